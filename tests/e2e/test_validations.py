"""Early stopping, validation before the first step and fixed order of the data, on short real runs."""

import json
import shutil
from pathlib import Path

import pytest
from torch.testing import assert_close

from sheeprlhf.config.registry import choices
from tests.support.models import ModelFolder
from tests.support.runs import WRITERS, exit_code, figures_at, killed, result_of, train, train_words, write_rows

STOP = ["task.early_stopping_metric=nll", "task.early_stopping_patience=2", "task.eval_interval=2"]
STILL = ["optim.lr=1e-30", "optim.weight_decay=0"]  # no weight changes


@pytest.mark.parametrize("task", ["sft", pytest.param("grpo", marks=pytest.mark.slow)])
def test_a_run_that_no_longer_improves_stops_and_is_finished(
    task: str, tmp_path: Path, model_folder: ModelFolder
) -> None:
    metric = ["task.early_stopping_metric=kl", "task.eval_interval=4"] if task == "grpo" else STOP[::2]
    words = [*metric, STOP[1], *STILL, "task.keep_checkpoints=9"]
    run_dir = train(model_folder(), write_rows(tmp_path / "rows.jsonl"), tmp_path / "run", *words, task=task)
    interval = 4 if task == "grpo" else 2
    info = json.loads((run_dir / "run.json").read_text())
    assert (info["status"], info["step"], info["best_step"]) == ("finished", 3 * interval, interval)
    assert info["stopped_early"] is True
    assert max(step for _, step in figures_at(run_dir)) == 3 * interval
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} >= {f"step-{3 * interval}", f"step-{interval}"}
    states = [json.loads((run_dir / "checkpoints" / f"step-{k * interval}" / "state.json").read_text()) for k in (1, 2)]
    assert [state["stale_validations"] for state in states] == [0, 1]
    before = result_of(run_dir, 3 * interval)
    for step in (2 * interval, 3 * interval):  # between two validations that count, and after the last one
        again = killed(shutil.copytree(run_dir, tmp_path / f"from-{step}"), step)
        train(model_folder(), tmp_path / "rows.jsonl", again, *words, "resume=true", task=task)
        assert json.loads((again / "run.json").read_text())["status"] == "finished"
        assert result_of(again, 3 * interval) == before


@pytest.mark.parametrize(
    "task",
    [
        "sft",
        "dpo",
        *(pytest.param(task, marks=pytest.mark.nightly) for task in ("rm", "kto", "ppo")),
    ],
)
def test_validation_before_the_first_step_changes_nothing_else(
    task: str, tmp_path: Path, model_folder: ModelFolder
) -> None:
    """The weights stay the same, the metrics are those that may be named, and training starts from the same model."""
    data = WRITERS[task](tmp_path / "rows.jsonl", 24)
    words = ["task.max_num_steps=4", "task.eval_interval=4"]
    plain = train(model_folder(), data, tmp_path / "plain", *words, task=task)
    first = train(model_folder(), data, tmp_path / "first", *words, "task.eval_at_start=true", task=task)
    assert result_of(first, 4) == result_of(plain, 4)
    assert json.loads((first / "run.json").read_text())["best_step"] == 4
    without, values = figures_at(plain), figures_at(first)
    apart = ("time/", "memory/")
    assert {key: value for key, value in values.items() if key[1] and not key[0].startswith(apart)} == {
        key: value for key, value in without.items() if not key[0].startswith(apart)
    }
    measured = {tag.removeprefix("val/") for tag, step in values if step == 0}
    assert measured == {tag.removeprefix("val/") for tag, step in values if step == 4 and tag.startswith("val/")}
    named = set(choices("task", "train")[task].val_metrics)
    assert named <= measured
    assert measured - named <= {"items", "tokens/chosen", "share/chosen"}
    if task in ("dpo", "kto"):
        assert_close(values["val/rewards/margins", 0], 0.0, rtol=0, atol=1e-5)


def test_without_validation_rows_both_are_refused(tmp_path: Path, model_folder: ModelFolder) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 12)
    for option in (STOP[0], "task.eval_at_start=true"):
        words = train_words(model_folder(), data, tmp_path / "run", option, "data.validation_split=0")
        assert exit_code(" ".join(word for word in words if not word.startswith("data.validation_file"))) == 2
        assert list((tmp_path / "run").iterdir()) == []


def test_rows_in_the_order_of_the_file(tmp_path: Path, model_folder: ModelFolder) -> None:
    """Twice the same two rows in turn: in a fixed order both steps of an epoch learn from the same rows."""
    lines = write_rows(tmp_path / "two.jsonl", 12).read_text().splitlines()
    order = [*lines[:6], *lines[6:]]
    losses = {}
    for name, rows in (("forth", order), ("back", order[::-1])):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("\n".join(rows) + "\n")
        words = ["task.epochs=2", "data.shuffle=false", *STILL]
        values = figures_at(train(model_folder(), data, tmp_path / name, *words))
        losses[name] = [values["train/loss", step] for step in range(1, 5)]
    first, second = losses["forth"][:2]
    assert abs(first - second) > 1e-3
    assert_close(losses["forth"], [first, second, first, second], rtol=1e-6, atol=0)
    assert_close(losses["back"], [second, first, second, first], rtol=1e-6, atol=0)
