"""Columns of the dataset in reward functions, as a user runs them: training, validation, evaluation, best of n."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sheeprlhf.cli import run
from tests.support.runs import train_words

ModelFolder = Callable[..., Path]


def rows_with_answers(path: Path, *columns: str) -> Path:
    rows = [{"prompt": f"what is {i}?", "answer": str(i), "meta": {"level": i, "tags": [None, "a"]}} for i in range(16)]
    path.write_text("".join(json.dumps({name: row[name] for name in ("prompt", *columns)}) + "\n" for row in rows))
    return path


def words(model: Path, data: Path, run_dir: Path, function: str, task: str, *extra: str) -> list[str]:
    path = f"reward.path=tests.support.rewards:{function}"
    return [*train_words(model, data, run_dir, "task.max_num_steps=2", path, *extra, task=task)]


@pytest.mark.slow
def test_prompts_alone_with_answers(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = model_folder(), rows_with_answers(tmp_path / "rows.jsonl", "answer", "meta")
    run(words(model, data, tmp_path / "run", "by_answer", "grpo"))
    capsys.readouterr()
    reward = ["reward=function", "reward.path=tests.support.rewards:by_answer", "generation.max_new_tokens=4"]
    for task in (["task=reward"], ["task=frontier", "task.best_of=2", "task.num_samples=4"]):
        run(["eval", *task, f"experiment_dir={tmp_path / 'run'}", *reward])
    found = {path.name.partition("-")[0] for path in (tmp_path / "run" / "eval").glob("*.json")}
    assert found == {"reward", "frontier"}
    run(words(model, data, tmp_path / "slow", "slow_answer", "rloo"))


def test_best_of_n_with_answers(tmp_path: Path, model_folder: ModelFolder) -> None:
    data = rows_with_answers(tmp_path / "rows.jsonl", "answer", "meta")
    options = [f"data.{split}_file={data}" for split in ("train", "validation", "test")]
    options += ["model=auto", f"model.repo_name={model_folder()}", "data=local", "generation.max_new_tokens=4"]
    reward = ["reward=function", "reward.path=tests.support.rewards:by_answer", "task.self_check=off"]
    run(["train", "task=best_of_n", *options, *reward, f"hydra.run.dir={tmp_path / 'best'}"])
    assert json.loads((tmp_path / "best" / "best_of_n.json").read_text())["train"]["prompts"] == 16


@pytest.mark.parametrize("lacks", ["train", "validation"])
def test_a_column_that_is_missing_is_refused_before_anything_is_loaded(
    lacks: str,
    tmp_path: Path,
    model_folder: ModelFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("nothing was to be loaded")

    monkeypatch.setattr("sheeprlhf.task.models.load_rl_models", load)
    whole = rows_with_answers(tmp_path / "whole.jsonl", "answer", "meta")
    part = rows_with_answers(tmp_path / "part.jsonl", "answer")
    data = [f"data.{split}_file={part if split == lacks else whole}" for split in ("train", "validation")]
    with pytest.raises(SystemExit) as ended:
        run(words(model_folder(), whole, tmp_path / "run", "by_answer", "grpo", *data))
    printed = capsys.readouterr().err
    assert (
        ended.value.code == 2 and "'meta'" in printed and f"the {lacks} rows" in printed and "prompt, answer" in printed
    )
