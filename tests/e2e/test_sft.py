"""Supervised fine-tuning from the command line to the files that other programs load."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from sheeprlhf.cli import run
from tests.support.models import ModelFolder
from tests.support.plain import response_logprobs
from tests.support.runs import digests, figures_at, killed, result_of, train, write_rows


def test_a_run_leaves_what_the_readme_says(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = train(model_folder(), write_rows(tmp_path / "rows.jsonl"), tmp_path / "run")
    captured = capsys.readouterr()
    assert f"eval task=perplexity experiment_dir={run_dir}" in captured.err.splitlines()[-1]
    for name in (
        "config.yaml",
        "data_report.json",
        "metrics.csv",
        "run.json",
        "final/model.safetensors",
        "final/tokenizer.json",
    ):
        assert (run_dir / name).is_file(), name
    assert list(run_dir.glob("events.out.tfevents.*"))
    assert sorted(path.name for path in (run_dir / "samples").iterdir()) == ["step-16.txt", "step-24.txt", "step-8.txt"]
    assert json.loads((run_dir / "run.json").read_text())["status"] == "finished"
    assert run_dir.stat().st_mode & 0o777 == 0o700
    values = figures_at(run_dir)
    losses = [values["train/loss", step] for step in range(1, 25)]
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    assert [values["train/epoch", step] for step in range(1, 25)] == pytest.approx([step / 8 for step in range(1, 25)])
    for name, least in (("time/tokens_per_second", 1.0), ("memory/peak_gb", 0.05)):
        assert min(values[name, step] for step in range(1, 25)) > least, name
    assert_close(values["val/perplexity", 24], float(torch.tensor(values["val/nll", 24]).exp()), rtol=1e-5, atol=0)
    model = AutoModelForCausalLM.from_pretrained(run_dir / "final", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "final")
    assert model(**tokenizer("hello", return_tensors="pt")).logits.shape[-1] == 260


def plain_loop_nll(model: torch.nn.Module, tokenizer: object, data: Path) -> tuple[float, int]:
    """Sum of negative log-likelihoods of the response tokens, one row at a time, from the file itself."""
    total, count = 0.0, 0
    for line in data.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]  # type: ignore[operator]
        response = tokenizer(row["response"], add_special_tokens=False)["input_ids"]  # type: ignore[operator]
        response.append(tokenizer.eos_token_id)  # type: ignore[attr-defined]
        with torch.no_grad():
            total -= float(response_logprobs(model, prompt, response).double().sum())
        count += len(response)
    return total, count


def test_perplexity_equals_a_plain_loop_for_any_batching(tmp_path: Path, model_folder: ModelFolder) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 20)
    run_dir = train(model_folder(), data, tmp_path / "run", "task.max_num_steps=2", "task.max_eval_batches=null")
    model = AutoModelForCausalLM.from_pretrained(run_dir / "final", dtype=torch.float32)
    total, count = plain_loop_nll(model, AutoTokenizer.from_pretrained(run_dir / "final"), data)
    validated = figures_at(run_dir)
    assert_close(validated["val/nll", 2], total / count, rtol=0, atol=1e-6)
    assert_close(validated["val/perplexity", 2], math.exp(total / count), rtol=1e-6, atol=0)
    for words in (["task.token_budget=40"], ["task.batching=padded", "task.mini_batch_size=7"]):
        run(["eval", "task=perplexity", f"experiment_dir={run_dir}", *words])
        result = json.loads((run_dir / "eval" / "perplexity-test-final.json").read_text())
        assert result["tokens"] == count
        assert_close(result["nll"], total / count, rtol=0, atol=1e-6)
        assert result["characters"] == sum(len(json.loads(line)["response"]) for line in data.read_text().splitlines())
        assert_close(result["bits_per_character"], total / math.log(2) / result["characters"], rtol=0, atol=1e-6)
    run(["eval", "task=perplexity", f"experiment_dir={run_dir}", "task.model_name=last", "task.data_split=train"])
    assert_close(
        json.loads((run_dir / "eval" / "perplexity-train-last.json").read_text())["nll"],
        total / count,
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.slow
def test_micro_batches_and_padding_do_not_change_the_losses(tmp_path: Path, model_folder: ModelFolder) -> None:
    """Traps 8 and 9: one forward per step, one row per forward, padded rows: the same losses and gradient norms."""
    data = write_rows(tmp_path / "rows.jsonl", 26)  # the last step of an epoch has 2 rows
    cuts = {
        "whole": ["task.micro_batch_size=6", "task.token_budget=100000"],
        "single": ["task.micro_batch_size=1"],
        "padded": ["task.batching=padded"],
    }
    curves = {}
    for name, words in cuts.items():
        values = figures_at(
            train(model_folder(), data, tmp_path / name, "task.epochs=2", "optim=sgd", "optim.lr=0.1", *words)
        )
        curves[name] = [
            values[tag, step] for step in range(1, 11) for tag in ("train/loss", "train/grad_norm", "train/items")
        ]
    for name in ("single", "padded"):
        assert_close(curves[name], curves["whole"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_intervals_and_workers_do_not_change_the_weights(tmp_path: Path, model_folder: ModelFolder) -> None:
    """Evaluation, logging, saving and loading ahead consume no training randomness (dropout is on)."""
    data = write_rows(tmp_path / "rows.jsonl")
    common = ["model.disable_dropout=false", "task.max_num_steps=6", "task.save_interval=6"]
    results = []
    for number, words in enumerate(
        (
            ["task.eval_interval=100", "task.log_interval=100"],
            ["task.eval_interval=1", "task.num_workers=2", "generation.do_sample=true"],
            ["task.save_interval=1", "task.num_sample_prompts=0"],
        )
    ):
        run_dir = train(model_folder("gpt2"), data, tmp_path / str(number), *common, *words)
        results.append(result_of(run_dir, 6))
    assert results[0] == results[1] == results[2]


def test_a_refused_start_leaves_nothing_and_a_refused_resume_everything(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistake that only the data shows: the same command goes through when it is mended, without resume=true."""
    rows = write_rows(tmp_path / "rows.jsonl")
    good = rows.read_text()
    words = (model_folder("llama"), rows, tmp_path / "run", "dry_run=true")
    rows.write_text(good + '{"prompt')
    with pytest.raises(SystemExit) as stop:
        train(*words)
    assert stop.value.code == 2 and not any((tmp_path / "run").iterdir())
    assert "nothing was begun" in capsys.readouterr().err
    rows.write_text(good)
    run_dir = train(*words)
    before = digests(killed(run_dir))
    rows.write_text(good + '{"prompt')
    with pytest.raises(SystemExit):
        train(*words, "resume=true")
    assert digests(run_dir) == before
    assert "nothing was begun" not in capsys.readouterr().err
