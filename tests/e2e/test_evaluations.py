"""`eval task=preference|reward|generate|frontier` from the command line, against loops that are slow and plain."""

import csv
import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from sheeprlhf.cli import run
from sheeprlhf.task.eval import reward
from sheeprlhf.task.eval.load import kl_of_responses
from sheeprlhf.task.eval.reward import expected_best
from tests.support.models import ModelFolder
from tests.support.rewards import letters
from tests.support.runs import figures, train, write_pairs

LETTERS = ["reward=function", "reward.path=tests.support.rewards:letters", "generation.max_new_tokens=6"]
NAME = "reward-tests.support.rewards.letters-test"
KEYS = {
    *("score", "score_interval", "win_rate", "win_rate_interval", "against", "rows", "kl", "kl_error"),
    *("response_tokens", "distinct_2", "rm_accuracy", "rm_pairs", "against_score"),
}
ALWAYS = {"task", "split", "data", "model", "weights", "experiment_dir", "time", "version"}  # in every result


class Made:
    """Runs on one model and one file of pairs, each made for the first test that needs it."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.base, self.data = base, write_pairs(folder / "rows.jsonl", 12)
        self._folder, self._cache = folder, f"data.cache_dir={folder / 'cache'}"

    def _train(self, name: str, *words: str, task: str) -> Path:
        return train(self.base, self.data, self._folder / name, self._cache, *words, task=task)

    @cached_property
    def sft(self) -> Path:
        return self._train("sft", "task.max_num_steps=2", task="sft")

    @cached_property
    def _start(self) -> list[str]:
        return [f"task.sft_experiment_dir={self.sft}", "task.self_check=off"]

    @cached_property
    def dpo(self) -> Path:
        """Adapters on the fine-tuned model."""
        adapters = ["model.finetune_mode=LORA", "model.lora_cfg.rank=4", "task.max_num_steps=6"]
        return self._train("dpo", *self._start, *adapters, "task.save_interval=3", "optim.lr=0.05", task="dpo")

    @cached_property
    def still(self) -> Path:
        """The same with all weights, but it learnt nothing."""
        return self._train("still", *self._start, "task.max_num_steps=1", "optim.lr=0", task="dpo")

    @cached_property
    def rm(self) -> Path:
        return self._train("rm", "task.max_num_steps=16", "optim.lr=5e-3", task="rm")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model_folder: ModelFolder) -> Made:
    return Made(tmp_path_factory.mktemp("made"), model_folder())


def evaluate(task: str, run_dir: Path, *words: str) -> None:
    run(["eval", f"task={task}", f"experiment_dir={run_dir}", *words])


def result_of(run_dir: Path, name: str) -> dict[str, Any]:
    return json.loads((run_dir / "eval" / f"{name}.json").read_text())


def rows_of(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "eval" / f"{name}.jsonl").read_text().splitlines()]


def models_of(made: Made) -> tuple[torch.nn.Module, torch.nn.Module]:
    """What `dpo` has become, and what it started from, by transformers and PEFT alone."""
    start, base = (AutoModelForCausalLM.from_pretrained(made.sft / "final", dtype=torch.float32) for _ in range(2))
    return PeftModel.from_pretrained(base, made.dpo / "final").eval(), start.eval()


def logprob(
    model: torch.nn.Module, prompt: list[int], response: list[int], defined: torch.Tensor | None = None
) -> float:
    """Of a response, nats, one row and no cache; with `defined`, of the distribution over these ids alone."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double()
    if defined is not None:
        logits = torch.full_like(logits, -torch.inf).index_copy(1, defined, logits[:, defined])
    logprobs = logits.log_softmax(-1)
    return sum(float(logprobs[len(prompt) + place - 1, token]) for place, token in enumerate(response))


@pytest.mark.slow
def test_the_implicit_reward_is_that_of_a_plain_loop(made: Made) -> None:
    evaluate("preference", made.dpo)
    result = result_of(made.dpo, "preference-test-final")
    policy, start = models_of(made)
    tokenizer = AutoTokenizer.from_pretrained(made.dpo / "final")
    rewards = []
    for line in made.data.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        for side in ("chosen", "rejected"):
            ids = [*tokenizer(row[side], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            rewards.append(0.1 * (logprob(policy, prompt, ids) - logprob(start, prompt, ids)))
    chosen, rejected = np.array(rewards).reshape(-1, 2).T
    assert result["accuracy"] == np.mean(chosen > rejected)
    assert_allclose([result["margin"], result["score_chosen"]], [np.mean(chosen - rejected), chosen.mean()], atol=1e-5)
    assert abs(result["margin"]) > 1e-3 and result["pairs"] == 12
    assert (result["beta"], result["reference"]) == (0.1, f"the final weights of {made.sft}")
    low, high = result["accuracy_interval"]
    assert 0 <= low <= result["accuracy"] <= high <= 1
    assert (made.dpo / "eval" / "preference-test-final.png").read_bytes().startswith(b"\x89PNG")

    evaluate("preference", made.dpo, "task.beta=2", "task.batching=padded", "task.mini_batch_size=1")
    scaled = result_of(made.dpo, "preference-test-final")
    assert scaled["accuracy"] == result["accuracy"]
    assert_allclose(scaled["margin"], 20 * result["margin"], rtol=1e-4)
    evaluate("preference", made.still)
    assert result_of(made.still, "preference-test-final")["accuracy"] == 0.5  # all ties


def test_reasoning_that_is_not_learned_is_left_out_of_the_implicit_reward(made: Made, tmp_path: Path) -> None:
    """The evaluation says of the rows that a run validates on what its validation has said."""
    rows = [json.loads(line) for line in made.data.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["chosen"] = f"<think>{'x' * (number % 3 + 1)}</think>{row['chosen']}"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data.reasoning=mask", f"data.cache_dir={tmp_path / 'cache'}", "task.max_num_steps=2", "optim.lr=0.01"]
    run_dir = train(made.base, tmp_path / "rows.jsonl", tmp_path / "run", *words, "task.max_eval_batches=2", task="dpo")
    evaluate("preference", run_dir)
    result, metrics = result_of(run_dir, "preference-test-final"), figures(run_dir)
    assert abs(result["margin"]) > 1e-3
    assert_allclose(result["margin"], metrics["val/rewards/margins"][-1], atol=1e-5)
    assert_allclose(result["score_chosen"], metrics["val/rewards/chosen"][-1], atol=1e-5)


def test_scores_win_rate_and_kl_are_those_of_plain_loops(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    caught: list[Any] = []

    def catching(answers: Any, *logprobs: torch.Tensor) -> np.ndarray:
        caught.append((answers, kl_of_responses(answers, *logprobs)))
        return caught[0][1]

    monkeypatch.setattr(reward, "kl_of_responses", catching)
    evaluate("reward", made.dpo, *LETTERS, "--plot")
    result, rows = result_of(made.dpo, f"{NAME}-final"), rows_of(made.dpo, f"{NAME}-final")
    assert set(result) == KEYS | ALWAYS
    source = [json.loads(line) for line in made.data.read_text().splitlines()]
    assert [(row["prompt"], row["against"]) for row in rows] == [(row["prompt"], row["chosen"]) for row in source]
    scores = letters([], [row["response"] for row in rows])
    others = letters([], [row["chosen"] for row in source])
    assert [(row["score"], row["against_score"]) for row in rows] == list(zip(scores, others, strict=True))
    assert_allclose(result["score"], np.mean(scores), atol=1e-12)
    won = [(one > other) + 0.5 * (one == other) for one, other in zip(scores, others, strict=True)]
    assert result["win_rate"] == np.mean(won) < 0.5
    assert (result["against"], result["rows"], result["rm_accuracy"], result["rm_pairs"]) == (
        "references",
        12,
        None,
        None,
    )

    [(answers, kl_N)] = caught
    policy, start = models_of(made)
    ids = [(row.prompt_ids.tolist(), row.responses[0].tolist()) for row in answers.rollout.rows]
    defined = torch.tensor(sorted(AutoTokenizer.from_pretrained(made.dpo / "final").get_vocab().values()))
    expected = [logprob(policy, *row, defined) - logprob(start, *row, defined) for row in ids]
    assert_allclose(kl_N, expected, atol=1e-4)
    assert np.ptp(expected) > 0.1
    assert_allclose(result["kl"], np.mean(expected), atol=1e-5)
    assert_allclose(result["kl_error"], np.std(expected, ddof=1) / 12**0.5, atol=1e-5)
    assert result["response_tokens"] == np.mean([len(one) - (one[-1] == 258) for _, one in ids])
    assert (made.dpo / "eval" / f"{NAME}-final.png").read_bytes().startswith(b"\x89PNG")


def test_prompts_alone_are_scored_without_a_comparison(made: Made, tmp_path: Path) -> None:
    rows = [json.loads(line)["prompt"] for line in made.data.read_text().splitlines()]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in rows))
    words = ["data=local", *(f"data.{split}_file={prompts}" for split in ("train", "test"))]
    model = ["model=auto", f"model.repo_name={made.base}", f"output_dir={tmp_path}", f"data.cache_dir={tmp_path / 'c'}"]
    run(["eval", "task=reward", *model, *words, *LETTERS])
    result = json.loads((tmp_path / f"{NAME}-auto.json").read_text())
    scored = [json.loads(line) for line in (tmp_path / f"{NAME}-auto.jsonl").read_text().splitlines()]
    assert [set(row) for row in scored] == [{"row", "prompt", "response", "score"}] * len(rows)
    assert_allclose(result["score"], np.mean(letters([], [row["response"] for row in scored])), atol=1e-12)
    assert (result["against"], result["win_rate"], result["against_score"], result["kl"]) == ("none", None, None, None)


@pytest.mark.slow
def test_a_policy_that_learnt_nothing_ties_with_its_start(made: Made) -> None:
    evaluate("reward", made.still, *LETTERS, "task.against=start")
    result = result_of(made.still, f"{NAME}-final")
    assert (result["win_rate"], result["win_rate_interval"], result["kl"]) == (0.5, [0.5, 0.5], 0.0)
    evaluate("reward", made.still, *LETTERS, f"task.against={made.sft}")
    assert result_of(made.still, f"{NAME}-final")["win_rate"] == 0.5  # by its directory, which is that start
    before, cut = rows_of(made.still, f"{NAME}-final"), ["task.token_budget=40", "task.batching=padded"]
    evaluate("reward", made.still, *LETTERS, "task.mini_batch_size=1", *cut)
    kept = ("row", "prompt", "response", "score")
    assert [[row[key] for key in kept] for row in rows_of(made.still, f"{NAME}-final")] == [
        [row[key] for key in kept] for row in before
    ]


@pytest.mark.slow
def test_a_reward_model_judges_and_says_how_far_it_may_be_believed(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reward=model", f"task.rm_experiment_dir={made.rm}", "generation.max_new_tokens=6"]
    evaluate("reward", made.sft, *words)
    result = result_of(made.sft, "reward-model-test-final")
    evaluate("preference", made.rm, "task.subset_column=prompt")
    alone = result_of(made.rm, "preference-test-final")
    subsets = alone["accuracy_by_subset"].values()
    assert sum(part["pairs"] * part["accuracy"] for part in subsets) == pytest.approx(12 * alone["accuracy"])
    assert (result["rm_accuracy"], result["rm_pairs"]) == (alone["accuracy"], 12) and alone["accuracy"] > 0.9
    rows = rows_of(made.sft, "reward-model-test-final")
    assert_allclose(np.mean([row["against_score"] for row in rows]), alone["score_chosen"], atol=1e-5)
    assert "chance" not in capsys.readouterr().err
    # one that prefers either response equally often
    swapped = [json.loads(line) for line in made.data.read_text().splitlines()]
    for row in swapped[::2]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    other = tmp_path / "swapped.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in swapped))
    evaluate("reward", made.sft, *words, f"data.test_file={other}")
    assert result_of(made.sft, "reward-model-test-final")["rm_accuracy"] == pytest.approx(0.5, abs=0.2)
    assert "warning: " in capsys.readouterr().err


@pytest.mark.slow
def test_models_of_other_tokenizers_are_compared_and_judge_by_text(made: Made, tmp_path: Path) -> None:
    """Its ids are ours but for one more word; scores are those of the same model with our tokenizer."""
    base = shutil.copytree(made.base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["neverwritten"])
    tokenizer.save_pretrained(base)
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    other = train(base, made.data, tmp_path / "other", "task.max_num_steps=2", cache)
    evaluate("reward", made.sft, *LETTERS, f"task.against={other}")
    against = [row["against"] for row in rows_of(made.sft, f"{NAME}-final")]
    evaluate("reward", other, *LETTERS)
    assert against == [row["response"] for row in rows_of(other, f"{NAME}-final")]  # by its own tokenizer
    words = ["reward=model", "generation.max_new_tokens=6", f"task.rm_experiment_dir={made.rm}"]
    evaluate("reward", other, *words)
    theirs, ours = result_of(other, "reward-model-test-final"), made.sft / "eval" / "reward-model-test-final.json"
    evaluate("reward", made.sft, *words)
    pairs = zip(rows_of(other, "reward-model-test-final"), rows_of(made.sft, "reward-model-test-final"), strict=True)
    assert_allclose(*np.array([(a["against_score"], b["against_score"]) for a, b in pairs]).T, atol=1e-5)
    assert theirs["rm_accuracy"] == json.loads(ours.read_text())["rm_accuracy"]


@pytest.mark.slow
def test_generated_rows_follow_the_options(made: Made) -> None:
    sampled = ["generation.do_sample=true", "generation.top_k=4", "generation.top_p=0.9"]
    found = {}
    for options, words in {"greedy": [], "sampled": sampled, "beams": ["generation.num_beams=2"]}.items():
        for cut in ([], ["task.mini_batch_size=1", "task.token_budget=50"])[: 1 if options == "beams" else 2]:
            evaluate("generate", made.dpo, "generation.max_new_tokens=6", *words, *cut)
            rows = rows_of(made.dpo, "generate-test-final")
            assert found.setdefault(options, rows) == rows, (options, cut)
        assert set(rows[0]) == {"row", "prompt", "response", "reference", "tokens", "finished"}
    assert len({json.dumps(rows) for rows in found.values()}) == 3
    result = result_of(made.dpo, "generate-test-final")
    assert result["generation"]["num_beams"] == 2 and result["rows"] == 12


@pytest.mark.slow
def test_a_plain_folder_and_a_checkpoint_are_evaluated(made: Made, tmp_path: Path) -> None:
    data = ["data=local", f"data.train_file={made.data}", f"data.test_file={made.data}", "data.max_length=120"]
    folder = ["model=auto", f"model.repo_name={made.sft / 'final'}", *data, "data.max_prompt_length=70"]
    run(["eval", "task=reward", *folder, *LETTERS, f"output_dir={tmp_path}"])
    result = json.loads((tmp_path / f"{NAME}-auto.json").read_text())
    assert result["kl"] is None and result["rows"] == 12
    evaluate("reward", made.sft, *LETTERS)
    assert result["score"] == result_of(made.sft, f"{NAME}-final")["score"]
    run(["eval", "task=preference", *folder, f"output_dir={tmp_path}"])
    assert json.loads((tmp_path / "preference-test-auto.json").read_text())["reference"] is None
    evaluate("reward", made.dpo, *LETTERS, "task.model_name=step-3")
    assert result_of(made.dpo, f"{NAME}-step-3")["weights"] == "step-3"


@pytest.mark.slow
def test_the_frontier_has_the_start_every_checkpoint_and_the_best_of_n(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[np.ndarray] = []

    def catching(scores_PK: np.ndarray, n: int) -> np.ndarray:
        pools.append(scores_PK)
        return expected_best(scores_PK, n)

    monkeypatch.setattr(reward, "expected_best", catching)
    evaluate("frontier", made.dpo, *LETTERS, "task.best_of=6")
    name = NAME.replace("reward-", "frontier-", 1)
    points = {point["what"]: point for point in result_of(made.dpo, f"{name}-all")["points"]}
    assert list(points) == ["best of 1", "best of 2", "best of 4", "best of 6", "step-3", "final"]
    assert pools[0].shape == (12, 6)
    assert_allclose(
        [points["best of 1"]["score"], points["best of 6"]["score"]], [pools[0].mean(), pools[0].max(1).mean()]
    )
    assert_allclose(points["best of 4"]["kl"], np.log(4) - 3 / 4)
    for weights in ("step-3", "final"):
        evaluate("reward", made.dpo, *LETTERS, f"task.model_name={weights}")
        alone = result_of(made.dpo, f"{NAME}-{weights}")
        assert_allclose([points[weights][key] for key in ("score", "kl")], [alone[key] for key in ("score", "kl")])
    folder = made.dpo / "eval"
    rows = list(csv.DictReader((folder / f"{name}-all.csv").open()))
    assert [float(row["score"]) for row in rows] == [point["score"] for point in points.values()]
    assert (folder / f"{name}-all.png").read_bytes().startswith(b"\x89PNG")
