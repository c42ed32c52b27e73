"""Places that a run cannot use are refused before a model loads; odd ones that it can use work.

The other names and places are in test_disk.py: odd names of runs, files where a folder should be.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sheeprlhf.cli import run
from sheeprlhf.task.loop import TrainLoop
from tests.support.mounts import read_only
from tests.support.runs import train_words, write_rows

ModelFolder = Callable[..., Path]
SHORT = ["task.max_num_steps=1", "task.num_sample_prompts=0", "task.epochs=1"]


def words_of(model: Path, folder: Path, *place: str) -> list[str]:
    words = train_words(model, write_rows(folder / "rows.jsonl", 12), folder, *SHORT)
    return [*(word for word in words if not word.startswith("hydra.run.dir=")), *place]


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: ModelFolder, tmp_path: Path
) -> Callable[..., str]:
    """A function (words about places) -> the message with which a run is refused before its model loads."""

    def no_model(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(TrainLoop, "load_policy", no_model)

    def message(*place: str) -> str:
        capsys.readouterr()  # what came before
        with pytest.raises(SystemExit) as stopped:
            run(words_of(model_folder(), tmp_path, *place))
        assert stopped.value.code == 2
        told = capsys.readouterr().err
        assert "Traceback" not in told and len(told.splitlines()) <= 5
        return told

    return message


@pytest.mark.parametrize("key", ["root_dir", "hydra.run.dir", "data.cache_dir"])
def test_a_read_only_place(key: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    place = tmp_path / "read-only"
    place.mkdir()
    more = [f"hydra.run.dir={tmp_path / 'run'}"] if key == "data.cache_dir" else []
    with read_only(place):
        assert f"{key}={place}" in refused(f"{key}={place}", *more)


def test_a_cache_of_the_environment_that_cannot_be_written(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("SHEEPRLHF_CACHE", str(tmp_path / "cache"))
    with read_only(tmp_path / "cache"):
        message = refused(f"hydra.run.dir={tmp_path / 'run'}")
        assert f"{tmp_path / 'cache'}" in message and "data.cache_dir" in message
    monkeypatch.setenv("SHEEPRLHF_CACHE", str(tmp_path / "rows.jsonl"))
    assert "data.cache_dir" in refused(f"hydra.run.dir={tmp_path / 'other'}")


def test_a_run_on_a_disk_that_became_read_only(
    tmp_path: Path, refused: Callable[..., str], model_folder: ModelFolder
) -> None:
    place = tmp_path / "run"
    with pytest.raises(SystemExit):  # by the model that does not load in this test
        run(words_of(model_folder(), tmp_path, f"hydra.run.dir={place}"))
    with read_only(place):
        for words in ([f"hydra.run.dir={place}", "resume=true"], [f"resume_from={place}"]):
            assert f"{place}" in refused(*words)


def test_a_working_directory_that_is_gone(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "working directory" in refused(f"hydra.run.dir={tmp_path / 'run'}")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["hydra.run.dir={}/not/there/yet", "root_dir={}/a/b/c", "hydra.run.dir={}/link"])
def test_places_that_work(place: str, tmp_path: Path, model_folder: ModelFolder) -> None:
    """Parents that are missing, and a link to a folder elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    run(words_of(model_folder(), tmp_path, place.format(tmp_path)))
    [final] = [path for path in tmp_path.rglob("final") if "link" not in path.parts]
    assert (final / "model.safetensors").is_file()
    assert os.path.islink(tmp_path / "link")
