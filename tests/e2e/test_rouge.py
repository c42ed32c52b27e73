"""`eval task=rouge` from the command line: the text of an argmax loop, the scores of rouge-score, for any batches."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer

from sheeprlhf.cli import run
from sheeprlhf.task.eval.rouge import ROUGE_TYPES
from tests.support.models import ModelFolder
from tests.support.runs import exit_code, train, write_rows

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model_folder: ModelFolder) -> Path:
    """A run that has half learnt its 20 rows: its greedy texts differ, share words with the references, and may end."""
    folder = tmp_path_factory.mktemp("trained")
    words = ["task.epochs=40", "task.mini_batch_size=20", "task.micro_batch_size=20", "optim.lr=0.02"]
    words += ["task.eval_interval=40", "task.save_interval=40", f"data.cache_dir={folder / 'cache'}"]
    return train(model_folder(), write_rows(folder / "rows.jsonl", 20), folder / "run", *words)


def evaluate(run_dir: Path, *extra: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    run(["eval", "task=rouge", f"experiment_dir={run_dir}", f"generation.max_new_tokens={NEW_TOKENS}", *extra])
    return result_of(run_dir / "eval")


def result_of(folder: Path, name: str = "rouge-test-final") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result but for its time, and the rows beside it."""
    result = json.loads((folder / f"{name}.json").read_text())
    result.pop("time")
    return result, [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def argmax_text(model: torch.nn.Module, tokenizer: Any, prompt: str) -> str:
    """One row, no cache, no padding."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + NEW_TOKENS and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.slow
def test_texts_and_scores_are_the_same_for_any_batches(trained: Path) -> None:
    result, rows = evaluate(trained)

    source = [json.loads(line) for line in (trained.parent / "rows.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in ("prompt", "reference")} for row in rows] == [
        {"prompt": row["prompt"], "reference": row["response"]}
        for row in source  # no BOS, no EOS
    ]
    model = AutoModelForCausalLM.from_pretrained(trained / "final", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "final")
    responses = [argmax_text(model, tokenizer, row["prompt"]) for row in source]
    assert len(set(responses)) > 10 and len(set(map(len, responses))) > 3  # by EOS
    assert [row["response"] for row in rows] == responses

    scorer = RougeScorer(ROUGE_TYPES)
    scores = [scorer.score(row["response"], text) for row, text in zip(source, responses, strict=True)]
    copies = [scorer.score(row["response"], row["prompt"]) for row in source]
    for name in ROUGE_TYPES:
        mean, low, high = result["mean_low_high"]["model"][name]
        assert mean == result[name] == pytest.approx(5 * sum(score[name].fmeasure for score in scores), abs=1e-9)
        assert mean > 0 and low <= mean <= high
        copied = result["mean_low_high"]["copy"][name][0]
        assert copied == pytest.approx(5 * sum(score[name].fmeasure for score in copies), abs=1e-9) and copied > 0
    assert result["rougeL_ahead_of"]["copy"][0] == pytest.approx(
        result["rougeL"] - result["mean_low_high"]["copy"]["rougeL"][0], abs=1e-9
    )
    assert [row["rougeL"] for row in rows] == pytest.approx([100 * score["rougeL"].fmeasure for score in scores])
    assert result["rows"] == 20 and set(result["words"]) == {"model", "lead", "copy"}

    for extra in (["task.mini_batch_size=1"], ["task.mini_batch_size=3"], ["task.token_budget=200"]):
        assert evaluate(trained, *extra) == (result, rows), extra


def test_what_cannot_be_generated_or_was_cut_is_reported(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    data, texts = tmp_path / "rows.jsonl", ["rrr", "r" * 40, "r" * 41, "?!"]
    data.write_text("".join(json.dumps({"prompt": "p" * 10, "response": text}) + "\n" for text in texts))
    words = ["eval", "task=rouge", "model=auto", f"model.repo_name={model_folder()}", f"output_dir={tmp_path}"]
    words += ["data=local", f"data.train_file={data}", f"data.test_file={data}"]
    assert exit_code([*words, "data.max_length=100", "data.max_prompt_length=50", "generation.max_new_tokens=118"]) == 2
    error = capsys.readouterr().err
    assert "generation.max_new_tokens=117" in error
    run([*words, "data.max_length=30", "data.max_prompt_length=20", "generation.max_new_tokens=4"])
    error = capsys.readouterr().err
    assert "data.max_length=30" in error and "a-z" in error
    references = [row["reference"] for row in result_of(tmp_path, "rouge-test-auto")[1]]
    assert references == ["rrr", "r" * 19, "r" * 19, "?!"]  # 30 less the prompt of 11, BOS included
