"""Where runs live, which one is gone on with, and that two processes never work in the same one."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sheeprlhf.engine import run as run_module
from sheeprlhf.engine import rundir
from sheeprlhf.engine.run import check_shared
from sheeprlhf.engine.rundir import (
    RunLock,
    choose_run_dir,
    discard_unused,
    find_runs,
    is_finished,
    mark_finished,
    read_run,
)
from sheeprlhf.structure.data import DocstringsConfig
from sheeprlhf.structure.model import TinyConfig
from sheeprlhf.structure.run import AdamWConfig, FabricConfig, TrainConfig
from sheeprlhf.structure.task import SFTConfig
from sheeprlhf.utils.errors import ConfigError, RecordError, RunInUseError
from tests.unit.engine.toy import FORK


@pytest.fixture
def cfg(tmp_path):
    return TrainConfig(
        task=SFTConfig(),
        model=TinyConfig(),
        data=DocstringsConfig(),
        fabric=FabricConfig(),
        optim=AdamWConfig(),
        root_dir=str(tmp_path / "runs"),
    )


def changed(cfg, **values):
    return dataclasses.replace(cfg, **values)


def test_a_new_directory(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sheeprlhf.py", "train", "task=sft", "model.hf_token=hf_abcdefghij"])
    place = choose_run_dir(cfg, "h")
    parts = place.dir.relative_to(tmp_path / "runs").parts
    assert parts[:3] == ("docstrings", "tiny", "sft")
    assert time.strptime(parts[3], "%Y-%m-%d_%H-%M-%S")
    assert parts[4] == "default"
    assert not place.resumed
    assert place.note == f"run directory: {place.dir}"
    assert place.dir.stat().st_mode & 0o777 == 0o700
    info = read_run(place.dir)
    assert (info["status"], info["config_hash"], info["task"], info["model"]) == ("running", "h", "sft", "tiny")
    assert info["command"] == ["train", "task=sft", "model.hf_token=<redacted>"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "x" * 201, "a\nb"])
def test_names_that_are_no_folder(cfg, name):
    with pytest.raises(ConfigError, match="run_name="):
        choose_run_dir(changed(cfg, run_name=name), "h")


@pytest.mark.parametrize("name", ["a b", "lr=1,2", "ünï", "x" * 200])
def test_odd_names_that_are(cfg, name):
    assert choose_run_dir(changed(cfg, run_name=name), "h").dir.name == name


def test_resume_takes_the_newest_unfinished_of_the_same_configuration(cfg):
    made = [choose_run_dir(changed(cfg, run_name=f"run{i}"), "other" if i == 4 else "h").dir for i in range(5)]
    for i, folder in enumerate(made):
        info = json.loads((folder / "run.json").read_text()) | {"started": 1000 + i}
        (folder / "run.json").write_text(json.dumps(info))
    mark_finished(made[3], perplexity=2.5)
    assert is_finished(made[3])
    assert read_run(made[3])["perplexity"] == 2.5
    place = choose_run_dir(changed(cfg, resume=True), "h")
    assert place.dir == made[2]
    assert place.resumed
    assert "newest of 3 unfinished" in place.note
    assert [run.dir for run in find_runs(cfg.root_dir)] == made[::-1]


def test_resume_without_anything_to_resume_is_a_fresh_start_that_says_so(cfg):
    choose_run_dir(cfg, "other")
    place = choose_run_dir(changed(cfg, resume=True), "h")
    assert not place.resumed
    assert "no unfinished run" in place.note
    assert "a fresh start" in place.note


def test_a_damaged_run_file_is_named_and_its_fix_works(cfg, capsys):
    folder = choose_run_dir(cfg, "h").dir
    usual = json.loads((folder / "run.json").read_text())
    lacking = json.dumps({key: value for key, value in usual.items() if key != "config_hash"})
    for number, content in enumerate(("", "[]", "{}", '{"started": "x"}', "[" * 100_000)):
        (folder / "run.json").write_text(content)
        assert not choose_run_dir(changed(cfg, resume=True, run_name="x"), f"h{number}").resumed
        assert f"{folder}/run.json is damaged" in capsys.readouterr().err
        with pytest.raises(RecordError, match=f"hydra.run.dir={folder}"):
            choose_run_dir(changed(cfg, resume_from=str(folder)), "h")
    (folder / "run.json").write_text(lacking)
    with pytest.raises(RecordError, match="config_hash"):
        choose_run_dir(changed(cfg, resume_from=str(folder)), "h")
    (folder / "run.json").unlink()
    assert choose_run_dir(cfg, "h", given=str(folder)).dir == folder
    assert read_run(folder)["config_hash"] == "h"


def test_the_newest_run_is_the_last_one_made_whatever_the_clock_says(cfg, monkeypatch):
    times = iter([3000.0, 2000.0, 1000.0, 3000.5])
    monkeypatch.setattr(rundir.time, "time", lambda: next(times))
    made = [choose_run_dir(changed(cfg, run_name=name), "h").dir for name in ("d", "c", "b", "a")]
    assert [run.dir for run in find_runs(cfg.root_dir)] == made[::-1]
    assert [run.info["started"] for run in find_runs(cfg.root_dir)] == [3000.5, 1000.0, 2000.0, 3000.0]
    assert choose_run_dir(changed(cfg, resume=True), "h").dir == made[-1]


def test_resume_from(cfg):
    folder = choose_run_dir(cfg, "h").dir
    again = changed(cfg, resume_from=str(folder))
    assert choose_run_dir(again, "h") == (folder, True, f"going on with {folder}")
    with pytest.raises(ConfigError, match="another configuration"):
        choose_run_dir(again, "h2")
    mark_finished(folder)
    assert choose_run_dir(again, "h").note.startswith(f"{folder} is finished")
    with pytest.raises(ConfigError, match="run directory"):
        choose_run_dir(changed(cfg, resume_from=cfg.root_dir), "h")


def test_the_user_s_own_directory(cfg, tmp_path):
    given = str(tmp_path / "mine")
    assert choose_run_dir(cfg, "h", given=given) == (tmp_path / "mine", False, f"run directory: {tmp_path / 'mine'}")
    with pytest.raises(ConfigError, match=r"hydra\.run\.dir"):
        choose_run_dir(cfg, "h", given=given)
    assert choose_run_dir(changed(cfg, resume=True), "h", given=given).resumed
    with pytest.raises(ConfigError, match="another configuration"):
        choose_run_dir(changed(cfg, resume=True), "h2", given=given)
    place = choose_run_dir(changed(cfg, resume=True), "h", given=str(tmp_path / "new"))
    assert not place.resumed
    assert "a fresh start" in place.note


def test_places_that_cannot_be_used(cfg, tmp_path):
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match="run directory"):
            choose_run_dir(changed(cfg, root_dir=str(root)), "h")
    with pytest.raises(ConfigError, match="run directory"):
        choose_run_dir(cfg, "h", given=str(tmp_path / "file"))


def hold_lock(folder, held, release):
    with RunLock(folder):
        held.set()
        release.wait(30)


def test_the_lock_names_its_holder_and_dies_with_it(tmp_path):
    held, release = FORK.Event(), FORK.Event()
    holder = FORK.Process(target=hold_lock, args=(tmp_path, held, release), daemon=True)
    holder.start()
    assert held.wait(30)
    with pytest.raises(RunInUseError, match=rf"in use by process {holder.pid} on .+; wait for it") as caught:
        RunLock(tmp_path).__enter__()
    assert caught.value.exit_code == 2
    holder.kill()
    holder.join()
    with RunLock(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
        with pytest.raises(RunInUseError):
            RunLock(tmp_path).__enter__()
    with RunLock(tmp_path):
        assert (tmp_path / ".lock").stat().st_mode & 0o777 == 0o600


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    with RunLock(tmp_path):
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(write_end, b"x")
            time.sleep(30)
            os._exit(0)
        os.read(read_end, 1)
    try:
        with RunLock(tmp_path):
            assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


STARTED = ("run.json", "config.yaml", ".lock", "data_report.json")


def test_only_what_a_start_wrote_goes_with_its_empty_folders(tmp_path):
    for folder in ("runs/data/a/default", "runs/data/b/default"):
        (tmp_path / folder).mkdir(parents=True)
        for name in STARTED:
            (tmp_path / folder / name).touch()
    assert discard_unused(tmp_path / "runs/data/a/default", tmp_path / "runs")
    assert sorted(path.name for path in (tmp_path / "runs/data").iterdir()) == ["b"]
    assert discard_unused(tmp_path / "runs/data/b/default", tmp_path / "runs")
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"] and not any((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("more", ["metrics.csv", "checkpoints/step-1/state.json", "notes.txt"])
def test_a_directory_with_anything_else_stays_as_it_is(more, tmp_path):
    for name in (*STARTED, more):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert not discard_unused(tmp_path, tmp_path.parent)
    assert all((tmp_path / name).is_file() for name in (*STARTED, more))


class Machines:
    """Two machines with a process each, whose code runs in turn here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folders: list[Path]) -> None:
        self._folders, self._views = folders, list[Any]()
        monkeypatch.setattr(run_module, "_SECONDS_TO_APPEAR", 0.0)
        monkeypatch.setattr(run_module, "gather_objects", self._gather)

    def _gather(self, fabric: Any, view: Any) -> list[Any]:
        if fabric.is_global_zero:
            other = self._folders[1]
            sign = next(path for path in self._folders[0].iterdir() if path.name.startswith(".seen-"))
            return [view, (1, run_module._appears(other / sign.name), run_module._checkpoints(other))]
        raise AssertionError

    def check(self) -> list[str]:
        """What rank zero says."""
        said: list[str] = []
        fabric: Any = SimpleNamespace(
            strategy=SimpleNamespace(num_nodes=2),
            is_global_zero=True,
            node_rank=0,
            broadcast=lambda item: item,
            barrier=lambda: None,
        )
        check_shared(fabric, self._folders[0], said.append)
        return said


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    made = [tmp_path / "a", tmp_path / "b"]
    for folder in made:
        folder.mkdir()
    return made


def checkpoint(folder: Path, text: str) -> None:
    (folder / "checkpoints" / "step-4").mkdir(parents=True)
    (folder / "checkpoints" / "step-4" / "MANIFEST.json").write_text(text)


def test_a_shared_directory_is_not_mentioned(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(folders[0], "a")
    assert Machines(monkeypatch, [folders[0], folders[0]]).check() == []
    assert [path.name for path in folders[0].iterdir()] == ["checkpoints"]


def test_a_new_run_says_what_another_machine_lacks(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (said,) = Machines(monkeypatch, folders).check()
    assert "node 1" in said and str(folders[0]) in said


def test_a_copy_can_be_gone_on_with(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in folders:
        checkpoint(folder, "a")
    assert len(Machines(monkeypatch, folders).check()) == 1


@pytest.mark.parametrize("content", [None, "another one"])
def test_without_the_checkpoint_it_is_refused(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    checkpoint(folders[0], "a")
    if content is not None:
        checkpoint(folders[1], content)
    with pytest.raises(ConfigError, match="node 1"):
        Machines(monkeypatch, folders).check()
    assert not list(folders[0].glob(".seen-*"))
