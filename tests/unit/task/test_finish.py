"""Validations and the end of a run: which step is best, what a validation measures, and that `final/` is whole."""

import csv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch.testing import assert_close

from sheeprlhf.engine.checkpoint import TrainState
from sheeprlhf.task.finish import finish_run, note_validation
from tests.support.runs import train, write_rows


def silent_run(folder: Path) -> Any:
    return cast(Any, SimpleNamespace(dir=folder, say=lambda text: None, log=lambda metrics, step: None))


def test_the_lowest_validation_loss_is_the_best(tmp_path: Path) -> None:
    state = TrainState()
    for step, loss in enumerate((3.0, 1.0, 2.0, 1.0), start=1):
        state.step = step
        note_validation(silent_run(tmp_path), state, {"loss": loss, "nll": -loss})
    assert (state.best_step, state.best_metric) == (2, 1.0)


def test_final_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    class Dying:
        def save(self, folder: Path, tokenizer: object) -> None:
            (folder / "config.json").write_text("{}")
            raise Killed

    fabric = SimpleNamespace(is_global_zero=True, barrier=lambda: None)
    with pytest.raises(Killed):
        finish_run(
            cast(Any, fabric), silent_run(tmp_path), cast(Any, Dying()), cast(Any, None), TrainState(), "python ..."
        )
    assert not (tmp_path / "final").exists()


def test_label_smoothing_is_of_training_alone(tmp_path: Path, model_folder: Callable[..., Path]) -> None:
    words = ["task.label_smoothing=0.5", "task.max_num_steps=2", "task.eval_interval=1", "task.num_sample_prompts=0"]
    run_dir = train(model_folder(), write_rows(tmp_path / "rows.jsonl", 12), tmp_path / "run", *words)
    with (run_dir / "metrics.csv").open() as file:
        values = {(row["tag"], int(row["step"])): float(row["value"]) for row in csv.DictReader(file)}
    for step in (1, 2):
        assert_close(values["val/loss", step], values["val/nll", step], rtol=1e-12, atol=0)
        assert abs(values["train/loss", step] - values["train/nll", step]) > 1e-4
