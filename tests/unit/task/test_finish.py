"""Validations and the end of a run: which step is best, what a validation measures, and that `final/` is whole."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch.testing import assert_close

from sheeprlhf.engine.checkpoint import TrainState
from sheeprlhf.structure.task import TrainTaskConfig
from sheeprlhf.task import finish
from sheeprlhf.task.finish import finish_run, record_validation
from sheeprlhf.utils.errors import ModelError
from tests.support.runs import train, write_pairs, write_rows


def silent_run(folder: Path) -> Any:
    cfg = SimpleNamespace(task=TrainTaskConfig())
    return cast(Any, SimpleNamespace(dir=folder, cfg=cfg, say=lambda text: None, log=lambda metrics, step: None))


def test_the_lowest_validation_loss_is_the_best(tmp_path: Path) -> None:
    """And what is not finite never is, not even if it comes first."""
    for odd, sign in ((float("nan"), 1), (float("-inf"), 1), (float("inf"), -1)):
        state = TrainState()
        for step, loss in enumerate((odd, 3.0, 1.0, 2.0, odd, 1.0), start=1):
            state.step = step
            result = {"loss": loss if loss is odd else sign * loss}
            record_validation(silent_run(tmp_path), state, result, highest=sign < 0)
        assert (state.best_step, state.best_metric) == (3, sign * 1.0)


@pytest.mark.parametrize(
    ("options", "values", "best", "stops"),
    [
        ({"early_stopping_metric": "rewards/accuracies"}, [0.5, 0.7, 0.6, 0.8], (4, 0.8), False),
        ({"early_stopping_metric": "rewards/accuracies"}, [0.5, 0.7, 0.6, 0.7], (2, 0.7), True),
        ({"early_stopping_metric": "kl"}, [0.5, 0.7, float("nan")], (1, 0.5), True),
        ({"early_stopping_metric": "kl", "early_stopping_direction": "highest"}, [0.5, 0.7, 0.6], (2, 0.7), False),
        ({}, [0.5, 0.7, 0.6], (1, 3.0), False),
    ],
)
def test_the_metric_of_early_stopping_selects_the_best_step(
    options: dict[str, str], values: list[float], best: tuple[int, float], stops: bool, tmp_path: Path
) -> None:
    run, state = silent_run(tmp_path), TrainState()
    task = run.cfg.task = TrainTaskConfig(early_stopping_patience=2, **options)
    name = task.early_stopping_metric or "loss"
    for step, value in enumerate([values[0] + 9, *values]):  # step 0 does not count
        state.step = step
        assert not task.stops_early(state.stale_validations)
        record_validation(run, state, {"loss": 3.0, name: 3.0 if name == "loss" else value})
    assert (state.best_step, state.best_metric) == best
    assert task.stops_early(state.stale_validations) is stops


def test_final_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    class Dying:
        def save(self, folder: Path, tokenizer: object) -> None:
            (folder / "config.json").write_text("{}")
            raise Killed

    fabric = SimpleNamespace(is_global_zero=True, barrier=lambda: None, broadcast=lambda value: value)
    with pytest.raises(Killed):
        finish_run(cast(Any, fabric), silent_run(tmp_path), cast(Any, Dying()), cast(Any, None), TrainState())
    assert not (tmp_path / "final").exists()


@pytest.mark.parametrize("task", ["dpo"])
def test_memory_is_told_as_planned_and_as_it_was(
    task: str, tmp_path: Path, model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pairs(tmp_path / "rows.jsonl", 12)
    train(model_folder(), data, tmp_path / "run", "task.max_num_steps=1", task=task)
    told = capsys.readouterr().err
    planned = re.search(r"^memory plan: up to (\d+ MB) in a step of the longest rows", told, re.MULTILINE)
    assert planned is not None
    assert int(planned[1].split()[0]) > 520  # the libraries alone
    assert re.search(
        rf"^peak memory of this process: [\d.]+ [MG]B \(planned: up to {planned[1]}\)$", told, re.MULTILINE
    )
    assert told.splitlines()[-1].startswith("next: python sheeprlhf.py eval")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["peak_memory"] > 100e6


def test_a_model_that_cannot_be_measured_is_trained_all_the_same(
    tmp_path: Path,
    model_folder: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ModelError("it cannot be run on tensors without content")

    monkeypatch.setattr(finish, "step_plan", refuse)
    run_dir = train(model_folder(), write_rows(tmp_path / "rows.jsonl", 12), tmp_path / "run", "task.max_num_steps=1")
    told = capsys.readouterr().err
    assert "memory plan" not in told
    assert re.search(r"^peak memory of this process: [\d.]+ [MG]B$", told, re.MULTILINE)
    assert (run_dir / "final").is_dir()


def test_label_smoothing_is_of_training_alone(tmp_path: Path, model_folder: Callable[..., Path]) -> None:
    words = ["task.label_smoothing=0.5", "task.max_num_steps=2", "task.eval_interval=1", "task.num_sample_prompts=0"]
    run_dir = train(model_folder(), write_rows(tmp_path / "rows.jsonl", 12), tmp_path / "run", *words)
    with (run_dir / "metrics.csv").open() as file:
        values = {(row["tag"], int(row["step"])): float(row["value"]) for row in csv.DictReader(file)}
    for step in (1, 2):
        assert_close(values["val/loss", step], values["val/nll", step], rtol=1e-12, atol=0)
        assert abs(values["train/loss", step] - values["train/nll", step]) > 1e-4
