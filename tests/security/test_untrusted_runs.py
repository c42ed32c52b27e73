"""A run from somebody else: going on with it, or evaluating it, changes no file outside of it and no file of the user.

Every link that the run could have stands in for one that an archive brought.
"""

import dataclasses
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sheeprlhf.apps.report import write_report
from sheeprlhf.cli import run
from sheeprlhf.engine.metrics import MetricWriter
from sheeprlhf.engine.rundir import check_existing_run
from sheeprlhf.structure.data import DocstringsConfig
from sheeprlhf.structure.model import TinyConfig
from sheeprlhf.structure.run import AdamWConfig, FabricConfig, TrainConfig
from sheeprlhf.structure.task import SFTConfig
from sheeprlhf.utils.errors import ConfigError, UnsafePathError
from sheeprlhf.utils.output import create_file, make_folder, open_append, open_lock_file, safe_path, write_file
from tests.support.models import ModelFolder
from tests.support.past_runs import make_past_run
from tests.support.pipelines import STAGES, Pretended, folders, pipeline, write_recipe
from tests.support.runs import exit_code, train_words, write_rows

PRECIOUS = "of the user"


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder: Path) -> set[str]:
    """Kinds and permissions of all that is below a folder."""
    return {f"{'d' if path.is_dir() else 'f'}{path.lstat().st_mode & 0o777:o}" for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def words_and_run(model_folder: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, Path]:
    """The words of a run of two steps without its directory, the run as if killed before its end, and its cache."""
    folder = tmp_path_factory.mktemp("untrusted")
    data, run_dir, cache = write_rows(folder / "rows.jsonl", 12), folder / "run", folder / "cache"
    extra = ["task.max_num_steps=2", "task.eval_interval=2", "task.save_interval=1", f"data.cache_dir={cache}"]
    words = train_words(model_folder(), data, run_dir, *extra)
    run_dir.mkdir(mode=0o755)
    (run_dir / "notes.txt").write_text(PRECIOUS)
    with umask(0):
        run(words)
    info = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps(info | {"status": "running"}))
    return [word for word in words if not word.startswith("hydra.run.dir")], run_dir, cache


def test_all_that_a_run_and_its_cache_hold_is_private(words_and_run: tuple[list[str], Path, Path]) -> None:
    _, run_dir, cache = words_and_run
    (run_dir / "notes.txt").chmod(0o600)
    assert modes(run_dir) == {"d700", "f600"}
    assert modes(cache) == {"d700", "f600"} and cache.stat().st_mode & 0o777 == 0o700
    assert any("tfevents" in path.name for path in run_dir.iterdir())


FILES = [
    *("run.json", "config.yaml", "data_report.json", "metrics.csv", "error.log", ".lock", "best_of_n.json"),
    *("samples/step-2.txt", "samples/step-99.txt", "parts/train-000000.jsonl"),
]
DIRECTORIES = [
    *("checkpoints", "samples", "parts", "final", "dataset"),
    *("checkpoints/step-1", "checkpoints/step-2", "checkpoints/step-9", "checkpoints/x.0badcafe.tmp.4194999"),
]


def add_link(run_dir: Path, place: str, elsewhere: Path) -> None:
    """Put a link in place of a part of a run, to what was there or to something of the user's."""
    link = run_dir / place
    link.parent.mkdir(exist_ok=True)
    if link.exists():
        link.rename(elsewhere)
    elif place in FILES:
        elsewhere.write_text(PRECIOUS)
    else:
        elsewhere.mkdir()
    if elsewhere.is_dir():
        for name in ("step-0", "step-1", "x.tmp.4194999", "x.0badcafe.tmp.4194999"):
            (elsewhere / name).mkdir(exist_ok=True)
            (elsewhere / name / "mine").write_text(PRECIOUS)
    link.symlink_to(elsewhere)


def times(*places: Path) -> dict[Path, int]:
    return {path: path.lstat().st_mtime_ns for place in places for path in [place, *place.rglob("*")]}


@pytest.mark.parametrize("place", [*FILES, *DIRECTORIES])
def test_a_run_that_has_a_link_is_not_continued(
    words_and_run: tuple[list[str], Path, Path], place: str, tmp_path: Path
) -> None:
    run_dir, elsewhere = tmp_path / "a" / "b" / "c" / "d" / "run", tmp_path / "elsewhere"
    shutil.copytree(words_and_run[1], run_dir)
    config = TrainConfig(SFTConfig(), TinyConfig(), DocstringsConfig(), FabricConfig(), AdamWConfig())
    known = json.loads((run_dir / "run.json").read_text())["config_hash"]
    add_link(run_dir, place, elsewhere)
    before = times(tmp_path)
    for options, given in (
        ({"resume_from": str(run_dir)}, None),
        ({"resume": True}, str(run_dir)),
        ({"resume": True, "root_dir": str(tmp_path)}, None),
    ):
        with pytest.raises(UnsafePathError, match=str(run_dir / place)):
            check_existing_run(dataclasses.replace(config, **options), known, given)
    assert times(tmp_path) == before


def test_links_are_named_before_a_model_is_looked_for(
    words_and_run: tuple[list[str], Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(words_and_run[1], run_dir)
    places = ["checkpoints", "data_report.json", "samples"]
    for place in places:
        add_link(run_dir, place, tmp_path / f"to-{place}")
    before = times(tmp_path)
    assert exit_code([*words_and_run[0], f"resume_from={run_dir}"]) == 2
    message = capsys.readouterr().err
    assert all(f"{run_dir / place} is a symbolic link" in message for place in places) and "Traceback" not in message
    assert times(tmp_path) == before


def test_folders_of_the_user_in_a_run_survive_its_continuation(
    words_and_run: tuple[list[str], Path, Path], tmp_path: Path
) -> None:
    words, original, _ = words_and_run
    run_dir = tmp_path / "run"
    shutil.copytree(original, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-2")
    shutil.rmtree(run_dir / "final")
    mine = [
        *("checkpoints/step-0/a", "checkpoints/step-7/model.safetensors", "checkpoints/x.tmp.4194999/a"),
        *("checkpoints/step-1.0badcafe.tmp.4194999/a", "final.tmp.4194999/a", "notes.0badcafe.tmp.4194999/a"),
        *("parts/train-000000.jsonl", "samples/step-9.txt", "eval/a.json"),
    ]
    for name in mine:
        (run_dir / name).parent.mkdir(exist_ok=True)
        (run_dir / name).write_text(PRECIOUS)
    (run_dir / "samples" / "step-8.txt").write_text("--- samples\nof a killed process")
    assert exit_code([*words, f"resume_from={run_dir}"]) == 0
    assert {name: (run_dir / name).read_text() for name in mine} == dict.fromkeys(mine, PRECIOUS)
    assert (run_dir / "notes.txt").read_text() == PRECIOUS
    assert not (run_dir / "samples" / "step-8.txt").exists() and (run_dir / "final" / "model.safetensors").is_file()


def test_a_run_does_not_start_over_files_of_the_user(
    words_and_run: tuple[list[str], Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig(SFTConfig(), TinyConfig(), DocstringsConfig(), FabricConfig(), AdamWConfig())
    for name in ("config.yaml", "metrics.csv", "checkpoints/step-1/a", "samples/step-1.txt", "final/a"):
        file = tmp_path / name.replace("/", "_") / name
        file.parent.mkdir(parents=True)
        file.write_text(PRECIOUS)
        for resume in (False, True):
            with pytest.raises(ConfigError, match=f"has {name.partition('/')[0]}"):
                check_existing_run(dataclasses.replace(config, resume=resume), "h", str(file.parents[name.count("/")]))
    folder = tmp_path / "metrics.csv"
    assert exit_code([*words_and_run[0], f"hydra.run.dir={folder}"]) == 2
    assert f"hydra.run.dir={folder} has metrics.csv" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("metrics.csv", PRECIOUS)]


@pytest.mark.parametrize("place", ["eval", "eval/perplexity-final.json"])
def test_an_evaluation_writes_through_no_link(
    words_and_run: tuple[list[str], Path, Path], place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(words_and_run[1], run_dir)
    (run_dir / place).parent.mkdir(exist_ok=True)
    elsewhere.mkdir() if place == "eval" else elsewhere.write_text(PRECIOUS)
    (run_dir / place).symlink_to(elsewhere)
    assert exit_code(["eval", "task=perplexity", f"experiment_dir={run_dir}"]) == 2
    assert f"{run_dir / place} is a symbolic link" in capsys.readouterr().err
    assert (elsewhere.is_dir() and not list(elsewhere.iterdir())) or elsewhere.read_text() == PRECIOUS


def test_a_pipeline_writes_through_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sheeprlhf.apps.pipeline.check_stages", lambda *_: None)
    pretended = Pretended(monkeypatch)
    words = [write_recipe(tmp_path / "own", STAGES.replace(",<dpo>", "")), "experiment=small"]
    pretended.codes["task=rm"] = 3
    assert pipeline(*words) == 3
    [folder] = folders(tmp_path / "logs" / "pipelines")
    names = ["pipeline.json", "results.json", "report.html", ".lock", "sft"]
    for name in names:
        elsewhere = tmp_path / f"to-{name}"
        (folder / name).rename(elsewhere) if (folder / name).exists() else elsewhere.write_text(PRECIOUS)
        (folder / name).symlink_to(elsewhere)
    before = times(tmp_path)
    pretended.commands.clear()
    assert pipeline(*words, f"resume_from={folder}") == 2
    message = capsys.readouterr().err
    assert all(f"{folder / name} is a symbolic link" in message for name in names)
    assert times(tmp_path) == before and not pretended.commands


def test_a_sweep_writes_through_no_link(
    words_and_run: tuple[list[str], Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text(PRECIOUS)
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "multirun.yaml").symlink_to(tmp_path / "mine")
    verb, *words = words_and_run[0]
    assert exit_code([verb, "-m", *words, f"hydra.sweep.dir={tmp_path / 'sweep'}", "seed=1,2"]) == 2
    assert f"{tmp_path / 'sweep' / 'multirun.yaml'} is a symbolic link" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == PRECIOUS


def test_a_report_is_private(tmp_path: Path) -> None:
    past = make_past_run(tmp_path / "run")
    with umask(0):
        write_report([str(past)], to=str(tmp_path / "a" / "b"))
    assert modes(tmp_path / "a") == {"d700", "f600"} and (tmp_path / "a").stat().st_mode & 0o777 == 0o700


WRITES: list[Callable[[Path, str], object]] = [
    lambda folder, name: create_file(folder, name, b"new"),
    lambda folder, name: write_file(folder, name, b"new"),
    open_append,
    open_lock_file,
]


@pytest.mark.parametrize("write", WRITES)
def test_no_component_may_be_a_link(write: Callable[[Path, str], object], tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (folder / "a").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "file").write_text(PRECIOUS)
    (folder / "link").symlink_to(elsewhere)
    (folder / "a" / "link").symlink_to(elsewhere)
    (folder / "a" / "file").symlink_to(elsewhere / "file")
    (folder / "a" / "nowhere").symlink_to(tmp_path / "absent")
    names = ["link/new", "link/file", "a/link/new", "a/file", "a/nowhere", "../elsewhere/file", str(elsewhere / "file")]
    for name in names:
        with pytest.raises(UnsafePathError):
            write(folder, name)
    assert [path.name for path in elsewhere.iterdir()] == ["file"] and (elsewhere / "file").read_text() == PRECIOUS
    assert not (tmp_path / "absent").exists()
    (tmp_path / "by another name").symlink_to(folder)  # the folder itself is the user's choice
    write(tmp_path / "by another name", "new")
    assert (folder / "new").is_file()


def test_only_plain_files_are_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for write in (write_file, open_append, open_lock_file):
        with pytest.raises(UnsafePathError, match="not a plain file"):
            write(tmp_path, "pipe", *([b""] if write is write_file else []))
    with pytest.raises(FileExistsError):
        create_file(tmp_path, "pipe")
    assert safe_path(tmp_path, "pipe").is_fifo()


@pytest.mark.parametrize("mask", [0, 0o277])
def test_what_is_created_is_private_whatever_the_umask(mask: int, tmp_path: Path) -> None:
    with umask(mask):
        make_folder(tmp_path, "a/b")
        write_file(tmp_path, "a/c/file", b"")
        open_append(tmp_path, "a/log").close()
        os.close(open_lock_file(tmp_path, "a/lock"))
    assert modes(tmp_path) == {"d700", "f600"}


def test_records_go_through_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1_800_000_000.0)
    planned = tmp_path / f"events.out.tfevents.1800000000.{socket.gethostname()}.{os.getpid()}.0"
    MetricWriter(tmp_path).close()
    planned.unlink()  # the name that the next one would have
    planned.symlink_to(tmp_path / "elsewhere")
    writer = MetricWriter(tmp_path)
    writer.log({"loss": 1.0}, 1)
    writer.close()
    assert len(list(tmp_path.glob("events*"))) == 2 and not (tmp_path / "elsewhere").exists()
    (tmp_path / "samples").symlink_to(tmp_path)
    with pytest.raises(UnsafePathError):
        MetricWriter(tmp_path)
