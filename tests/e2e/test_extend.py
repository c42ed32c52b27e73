"""More steps for a finished run: a run of its own that ends as one that was never interrupted."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from sheeprlhf.engine.optim import lr_factor
from tests.support.runs import digests, exit_code, result_of, train, train_words, write_pairs, write_rows

ModelFolder = Callable[..., Path]
CONSTANT = "optim.schedule=constant"


@pytest.mark.parametrize(
    ("task", "short", "long", "last_step"),
    [
        ("sft", ["task.max_num_steps=6"], ["task.max_num_steps=11"], 11),
        ("dpo", ["task.epochs=1"], ["task.epochs=2"], 16),
        pytest.param("grpo", ["task.max_num_steps=4"], ["task.max_num_steps=8"], 8, marks=pytest.mark.slow),
    ],
)
def test_an_extended_run_is_the_longer_run_bit_for_bit(
    task: str, short: list[str], long: list[str], last_step: int, tmp_path: Path, model_folder: ModelFolder
) -> None:
    data = (write_rows if task == "grpo" else write_pairs)(tmp_path / "rows.jsonl")
    base = model_folder()
    whole = train(base, data, tmp_path / "whole", CONSTANT, *long, task=task)
    finished = train(base, data, tmp_path / "finished", CONSTANT, *short, task=task)
    before = digests(finished)
    extended = train(base, data, tmp_path / "extended", CONSTANT, *long, f"resume_from={finished}", task=task)
    assert result_of(extended, last_step) == result_of(whole, last_step)
    assert digests(finished) == before
    again = train(base, data, extended, CONSTANT, *long, "resume=true", task=task)
    assert result_of(again, last_step) == result_of(whole, last_step)


def test_another_schedule_is_that_of_the_longer_run(tmp_path: Path, model_folder: ModelFolder) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    finished = train(model_folder(), data, tmp_path / "finished", "task.max_num_steps=6")
    words = ["task.max_num_steps=12", f"resume_from={finished}"]
    extended = train(model_folder(), data, tmp_path / "extended", *words)
    with open(extended / "metrics.csv") as file:
        rates = {int(row["step"]): float(row["value"]) for row in csv.DictReader(file) if row["tag"] == "train/lr"}
    totals = {step: 6 if step <= 6 else 12 for step in range(1, 13)}
    expected = {
        step: 1e-3 * lr_factor("cosine", step - 1, warmup=3, total=total, min_ratio=0.0)
        for step, total in totals.items()
    }
    assert rates == pytest.approx(expected, rel=1e-6)


def test_what_cannot_be_extended(tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    finished = train(model_folder(), data, tmp_path / "finished", "task.max_num_steps=6")
    for words in (["task.max_num_steps=3"], ["task.max_num_steps=12", "optim.lr=1e-4"], ["task.epochs=2"]):
        line = train_words(model_folder(), data, tmp_path / "new", *words, f"resume_from={finished}")
        assert exit_code(" ".join(line)) == 2
        assert words[-1].partition("=")[0] in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_run_that_ended_within_a_rollout_cannot_be_extended(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    finished = train(model_folder(), data, tmp_path / "finished", "task.max_num_steps=3", task="grpo")
    words = ["task.max_num_steps=8", f"resume_from={finished}"]
    assert exit_code(" ".join(train_words(model_folder(), data, tmp_path / "new", *words, task="grpo"))) == 2
    assert "task.max_num_steps" in capsys.readouterr().err
