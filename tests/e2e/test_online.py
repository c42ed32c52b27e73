"""RL tasks as a user runs them: what a run leaves, from which runs it starts, what its first step says, engines."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sheeprlhf.cli import run
from sheeprlhf.task import loop
from tests.support.models import ModelFolder
from tests.support.runs import figures, train, train_words, write_pairs, write_rows

LORA = ["model.finetune_mode=LORA", "model.lora_cfg.rank=4"]


@pytest.mark.parametrize("task", ["ppo", pytest.param("online_dpo", marks=pytest.mark.nightly)])
def test_a_run_leaves_what_others_leave(task: str, tmp_path: Path, model_folder: ModelFolder) -> None:
    model, data = model_folder(), write_rows(tmp_path / "rows.jsonl")
    run_dir = train(model, data, tmp_path / "run", "task.max_num_steps=12", task=task)
    found = figures(run_dir)
    assert len(found["objective/scores"]) == 3
    assert len(found["val/scores"]) == 2
    ratios = () if task == "online_dpo" else ("policy/approxkl", "policy/clipfrac")
    for name in ("objective/kl", "objective/entropy", *ratios):
        assert len(found[name]) == 3, name
    assert len(found["loss/policy"]) >= 2  # without a pair there is nothing to learn
    assert abs(found["objective/kl"][0]) < 1e-4  # the policy begins as its reference
    assert found["objective/kl"][-1] != 0.0
    assert found["val/perplexity"][0] > 1
    own = {"ppo": "critic/explained_variance", "grpo": "frac_reward_zero_std", "online_dpo": "train/rewards/margins"}
    assert len(found["train/lr"]) == len(found[own.get(task, "objective/rlhf_reward")]) == 3
    if task == "ppo":
        assert max(found["loss/value"]) > 0
    table = (run_dir / "samples" / "step-12.txt").read_text()
    assert "[prompt]" in table
    assert "score" in table
    AutoModelForCausalLM.from_pretrained(run_dir / "final")
    assert json.loads((run_dir / "run.json").read_text())["status"] == "finished"
    for weights in ("final", "last"):
        run(["eval", "task=perplexity", f"experiment_dir={run_dir}", f"task.model_name={weights}"])
    kinds = [json.loads(path.read_text())["perplexity"] for path in sorted((run_dir / "eval").glob("perplexity*.json"))]
    assert len(kinds) == 2
    assert kinds[0] == pytest.approx(kinds[1], abs=1e-4)


def test_a_run_ends_after_exactly_so_many_steps(
    tmp_path: Path, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollouts of 4 steps, of which the second is left after one: the rates of five steps, and step 5 is saved."""
    rates: list[int] = []
    follow = loop.follow_schedule
    monkeypatch.setattr(loop, "follow_schedule", lambda *a, **k: (rates.append(a[2]), follow(*a, **k))[1])
    words = ["task.max_num_steps=5", "task.save_interval=99"]
    run_dir = train(model_folder(), write_rows(tmp_path / "r.jsonl"), tmp_path / "run", *words, task="grpo")
    assert rates == [0, 1, 2, 3, 4]
    assert json.loads((run_dir / "run.json").read_text())["step"] == 5
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-5"]
    assert len(figures(run_dir)["objective/scores"]) == 2 and (run_dir / "final").is_dir()


@pytest.mark.parametrize(
    ("task", "precision", "tolerance"),
    [
        ("ppo", "32-true", 1e-5),
        pytest.param("rloo", "32-true", 1e-5, marks=pytest.mark.slow),
        ("grpo", "bf16-mixed", 1e-2),
    ],
)
def test_the_first_update_begins_at_ratio_one(
    task: str, precision: str, tolerance: float, tmp_path: Path, model_folder: ModelFolder
) -> None:
    """One optimizer step a rollout: all of its ratios are those before the step, in half precision too."""
    words = ["task.mini_batch_size=24", "task.max_num_steps=2", "generation.temperature=0.7"]
    words.append(f"fabric.precision={precision}")
    found = figures(train(model_folder(), write_rows(tmp_path / "r.jsonl"), tmp_path / "run", *words, task=task))
    assert found["policy/ratio"] == pytest.approx([1.0, 1.0], abs=tolerance)
    assert found["policy/clipfrac"] == [0.0, 0.0]
    assert abs(found["objective/kl"][0]) < 1e-6  # policy and reference are read in the same batches


@pytest.mark.slow
def test_the_self_check_can_be_off(tmp_path: Path, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is computed for it."""
    asked: list[int] = []
    monkeypatch.setattr("sheeprlhf.task.loop.check_sampler", lambda *_: asked.append(1))
    model, data = model_folder(), write_rows(tmp_path / "rows.jsonl")
    for mode, calls in (("off", 0), ("error", 1)):
        words = [f"task.self_check={mode}", "task.max_num_steps=4"]
        train(model, data, tmp_path / mode, *words, task="rloo")
        assert len(asked) == calls


def chain(tmp_path: Path, model: Path, *extra: str) -> tuple[Path, Path]:
    """A fine-tuned run and a reward model that started from it."""
    short = ["task.max_num_steps=4", "task.save_interval=99"]
    sft = train(model, write_rows(tmp_path / "rows.jsonl"), tmp_path / "sft", *short)
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    rm = train(model, pairs, tmp_path / "rm", *short, *extra, f"task.sft_experiment_dir={sft}", task="rm")
    return sft, rm


@pytest.mark.slow
def test_ppo_with_a_reward_model(tmp_path: Path, model_folder: ModelFolder) -> None:
    """With adapters, policy, critic and reward share one base; the frozen ones do not move."""
    words = LORA
    sft, rm = chain(tmp_path, model_folder(), *words)
    starts = [f"task.sft_experiment_dir={sft}", f"task.rm_experiment_dir={rm}", "reward=model"]
    base = without_function(model_folder(), tmp_path / "rows.jsonl", tmp_path / "run")
    run([*base, *words, *starts, "task.max_num_steps=4"])
    found = figures(tmp_path / "run")
    assert len(found["objective/scores"]) == 1
    weights = load_file(tmp_path / "run" / "checkpoints" / "step-4" / "model.safetensors")
    assert any(name.startswith("actor.") for name in weights)
    assert not any(".reward." in name for name in weights)
    assert any(".critic." in name for name in weights)
    assert not (tmp_path / "run" / "final" / "critic").exists()
    found = []
    for name in ("final", "last"):
        run(["eval", "task=perplexity", f"experiment_dir={tmp_path / 'run'}", f"task.model_name={name}"])
        [result] = (tmp_path / "run" / "eval").glob(f"perplexity*{name}*.json")
        found.append(json.loads(result.read_text())["perplexity"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.slow
def test_the_average_is_what_a_run_leaves(tmp_path: Path, model_folder: ModelFolder) -> None:
    """Of a trunk that policy and critic share, with the dataset's texts beside: every name of its weights means it."""
    model, data = model_folder(), write_rows(tmp_path / "rows.jsonl")
    words = ["task.share_trunk=true", "task.ptx_coeff=0.5", "task.max_num_steps=4", *LORA]
    run_dir = train(model, data, tmp_path / "run", *words, "task.ema_decay=0.9", task="ppo")
    found = figures(run_dir)
    assert len(found["loss/ptx"]) == len(found["loss/value"]) == len(found["loss/policy"]) > 0
    assert "critic/grad_norm" not in found
    weights = load_file(run_dir / "checkpoints" / "step-4" / "model.safetensors")
    names = {name.partition(".")[2] for name in weights if name.startswith("average.")}
    assert names == {name.partition(".")[2] for name in weights if name.startswith("actor.model.")}
    rest = {name for name in weights if not name.startswith(("average.", "actor.model."))}
    assert rest == {"actor.value_head.weight"}
    assert any(not weights[f"average.{name}"].equal(weights[f"actor.{name}"]) for name in names)
    results = []
    for name in ("final", "last"):
        run(["eval", "task=perplexity", f"experiment_dir={run_dir}", f"task.model_name={name}"])
        [result] = (run_dir / "eval").glob(f"perplexity*{name}*.json")
        results.append(json.loads(result.read_text())["perplexity"])
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    plain = train(model, data, tmp_path / "plain", *words, task="ppo")
    assert figures(plain)["val/perplexity"] != found["val/perplexity"]


def without_function(model: Path, data: Path, run_dir: Path) -> list[str]:
    """The words of a run, without its reward."""
    return [word for word in train_words(model, data, run_dir, task="ppo") if not word.startswith("reward")]


@pytest.mark.slow
def test_a_run_with_transformers_engine(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generation.engine=hf", "task.max_num_steps=3", "task.mini_batch_size=24", "task.eval_interval=99"]
    data = write_rows(tmp_path / "rows.jsonl")
    run_dir = train(model_folder(), data, tmp_path / "run", *words, task="ppo")
    assert capsys.readouterr().err.count("generation.engine=hf draws from torch's generator") == 1
    found = figures(run_dir)
    assert found["policy/ratio"] == pytest.approx([1.0, 1.0, 1.0], abs=1e-5)
    assert abs(found["objective/kl"][0]) < 1e-4 < abs(found["objective/kl"][-1])
    assert (run_dir / "final").is_dir()
    again = train(model_folder(), data, tmp_path / "again", *words, task="ppo")
    assert figures(again)["objective/scores"] == found["objective/scores"]
