"""Paths of files and folders that are here become absolute; hub ids, names and words stay."""

from pathlib import Path

import pytest

from sheeprlhf.config.path_checks import absolute_value, absolute_words


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "owner" / "model").mkdir(parents=True)
    for name in ("rows.jsonl", "mine.jinja"):
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.repo_name", "owner/model"),
        ("model.repo_name", "./owner/../owner/model"),
        ("data.train_file", "rows.jsonl"),
        ("model.chat_template", "mine.jinja"),
        ("reward.folder", "owner/model"),
        ("task.sft_experiment_dir", "owner/model"),
        ("experiment_dir", "owner"),
        ("root_dir", "not/yet/there"),
    ],
)
def test_what_is_here_is_absolute(here: Path, key: str, value: str) -> None:
    found = Path(absolute_value(key, value))
    assert found.is_absolute()
    assert found.resolve() == (here / value).resolve()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.repo_name", "openai-community/gpt2"),
        ("model.repo_name", "embedded:tiny"),
        ("model.repo_name", "rows.jsonl"),
        ("model.chat_template", "chatml"),
        ("data.train_file", "missing.jsonl"),
        ("data.train_file", None),
        ("reward.folder", "owner/other"),
        ("task.sft_experiment_dir", "newest"),
        ("run_name", "owner"),
    ],
)
def test_everything_else_stays(here: Path, key: str, value: str | None) -> None:
    assert absolute_value(key, value) == value


def test_patterns_and_lists_of_data_files(here: Path) -> None:
    assert absolute_value("data.train_file", "*.jsonl") == str(here / "*.jsonl")
    assert absolute_value("data.train_file", "x*.jsonl") == "x*.jsonl"
    given = ["rows.jsonl", "owner", "missing.jsonl"]
    assert absolute_value("data.test_file", given) == [str(here / "rows.jsonl"), str(here / "owner"), "missing.jsonl"]
    mix = [{"train_file": "rows.jsonl", "columns": {"prompt": "rows.jsonl"}}, {"dataset_name": "you/name"}]
    expected = [{**mix[0], "train_file": str(here / "rows.jsonl")}, mix[1]]
    assert absolute_value("data.mix", mix) == expected


def test_a_folder_below_the_home_directory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    assert absolute_value("model.repo_name", "~/owner/model") == str(here / "owner" / "model")


def test_words_of_a_command(here: Path) -> None:
    words = ["train", "task=sft", "model.repo_name=owner/model", "data.train_file=rows.jsonl", "model=gpt2"]
    expected = ["train", "task=sft", f"model.repo_name={here}/owner/model", f"data.train_file={here}/rows.jsonl"]
    assert absolute_words(words) == [*expected, "model=gpt2"]
