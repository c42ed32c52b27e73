"""The process that writes a checkpoint dies at every call that changes the disk: before it, and in it if it writes.

The dying process is real (`os._exit`). Then the disk loses what was never forced to it, in three ways. Whatever is
left, the newest good checkpoint is the one before or the new one, loads, and nothing is said to be damaged.
"""

import json
import os
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sheeprlhf.engine import checkpoint, manifest
from sheeprlhf.engine.checkpoint import (
    BackgroundSaver,
    TrainState,
    latest_checkpoint,
    restore_latest,
    save_checkpoint,
)
from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.engine.optim import set_up
from sheeprlhf.engine.step import update
from sheeprlhf.structure.run import AdamWConfig, FabricConfig
from sheeprlhf.utils import output
from tests.unit.engine.toy import Net, micro_batch, toy_loss

LOSSES = ("nothing", "what was not forced", "half of it")
DIED, NO_WRITE = 137, 138  # exit codes; a call that writes no content is not died in


class Disk:
    """In a child process: counts the calls that change the disk, notes what is not forced to it, and dies at call k."""

    def __init__(self, die_at: int, moment: str, notes: Path) -> None:
        self.calls, self._die_at, self._moment, self._notes = 0, die_at, moment, notes
        self._contents: dict[str, None] = {}  # files whose content is not forced
        self._names: dict[str, None] = {}  # new names whose folder is not forced
        self._renames: list[tuple[str, str]] = []
        self._exit = os._exit

    def install(self) -> None:
        """Everything by which the writer touches the disk, save the removal of temporary folders after an error."""
        save_file, create_file = checkpoint.save_file, manifest.create_file
        fsync, rename, mkdir, unlink, rmdir = os.fsync, os.rename, os.mkdir, os.unlink, os.rmdir

        def write(function: Callable[..., Any], path: Path, *words: Any) -> Any:
            def half() -> None:
                function(*words)
                os.truncate(path, os.path.getsize(path) // 2)

            self._contents[str(path)] = self._names[str(path)] = None
            return self._call(lambda: function(*words), half)

        def forced(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            self._call(lambda: fsync(descriptor))
            self._contents.pop(path, None)
            for name in [name for name in self._names if os.path.dirname(name) == path]:
                del self._names[name]
            self._renames = [pair for pair in self._renames if os.path.dirname(pair[1]) != path]

        def renamed(source: Any, target: Any) -> None:
            self._call(lambda: rename(source, target))
            self._renames.append((str(source), str(target)))

        def made(path: Any, *words: Any) -> None:
            self._call(lambda: mkdir(path, *words))
            self._names[str(path)] = None

        checkpoint.save_file = lambda tensors, path: write(save_file, path, tensors, path)
        for module in (checkpoint, manifest, output):
            module.create_file = lambda folder, name, *content: write(  # type: ignore[attr-defined]
                create_file, folder / name, folder, name, *content
            )
        os.fsync, os.rename, os.mkdir = forced, renamed, made  # type: ignore[assignment]
        os.unlink = lambda path, **o: self._call(lambda: unlink(path, **o))
        os.rmdir = lambda path, **o: self._call(lambda: rmdir(path, **o))

    def _call(self, function: Callable[[], Any], half: Callable[[], None] | None = None) -> Any:
        self.calls += 1
        if self.calls != self._die_at:
            return function()
        if self._moment == "in":
            if half is None:
                self._exit(NO_WRITE)
            half()
        notes = {"contents": list(self._contents), "names": list(self._names), "renames": self._renames}
        descriptor = os.open(self._notes, os.O_WRONLY | os.O_CREAT)
        os.write(descriptor, json.dumps(notes).encode())
        self._exit(DIED)


def lose(notes: dict[str, Any], kind: str) -> None:
    """What a power cut may take: renames whose folder was not forced, then contents and names that were not."""
    if kind == "nothing":
        return
    for source, target in reversed(notes["renames"]):
        if os.path.exists(target) and not os.path.exists(source):
            os.rename(target, source)
            notes["contents"] = [path.replace(f"{target}/", f"{source}/") for path in notes["contents"]]
    for path in map(Path, notes["contents"]):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2 if kind == "half of it" else 0)
    for path in map(Path, notes["names"]) if kind == "what was not forced" else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("again", "in_background"),
    [
        pytest.param(False, False, id="a new step", marks=pytest.mark.nightly),
        pytest.param(False, True, id="a new step, in the background", marks=pytest.mark.nightly),
        pytest.param(True, False, id="over a damaged one", marks=pytest.mark.slow),
    ],
)
def test_dying_at_every_call_leaves_one_of_the_two(again: bool, in_background: bool, tmp_path: Path) -> None:
    fabric = make_fabric(FabricConfig())
    fabric.launch()
    torch.manual_seed(0)
    module, optimizer = set_up(fabric, AdamWConfig(), Net(), 1e-2)

    def save(run_dir: Path, step: int) -> None:
        background = BackgroundSaver(fabric) if in_background else None
        options: dict[str, Any] = {"config_hash": "h", "keep": 1, "background": background}
        save_checkpoint(fabric, run_dir, TrainState(step), module, optimizer, **options)
        if background is not None:
            background.wait()

    origin = tmp_path / "origin"
    origin.mkdir()
    for step in (1, 2) if again else (1,):
        update(fabric, module, optimizer, [micro_batch(step)], toy_loss, max_grad_norm=1.0)
        save_checkpoint(fabric, origin, TrainState(step), module, optimizer, config_hash="h", keep=9)
    if again:
        os.truncate(origin / "checkpoints/step-2/optimizer.safetensors", 10)
    weights = {1: module.module.first.weight.detach().clone()} if not again else {}
    update(fabric, module, optimizer, [micro_batch(5)], toy_loss, max_grad_norm=1.0)
    outcomes: set[str] = set()
    deaths, k, ended = 0, 0, False
    while not ended:
        k += 1
        for moment in ("before", "in"):  # after a call is before the next one
            run_dir, notes = tmp_path / "run", tmp_path / "notes"
            shutil.copytree(origin, run_dir)
            notes.unlink(missing_ok=True)
            if (pid := os.fork()) == 0:
                leave = os._exit
                try:
                    Disk(k, moment, notes).install()
                    save(run_dir, 2)
                    leave(0)
                finally:
                    traceback.print_exc()
                    leave(1)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if code in (0, NO_WRITE):
                ended |= code == 0
                shutil.rmtree(run_dir)
                continue
            assert code == DIED, (k, moment)
            deaths, kept = deaths + 1, ""
            for options in LOSSES:
                left = tmp_path / "left"
                shutil.copytree(run_dir, left)
                text = notes.read_text().replace(f"{run_dir}/", f"{left}/")
                lose(json.loads(text), options)
                said: list[str] = []
                found = latest_checkpoint(left, said.append)
                assert found is not None and found.name in ("step-1", "step-2"), (k, moment, options)
                assert not said or (again and all("step-2" in line for line in said)), (k, moment, options, said)
                outcomes.add(found.name)
                kept = found.name if options == "nothing" else kept
                shutil.rmtree(left)
            state = restore_latest(fabric, run_dir, module, optimizer, config_hash="h", say=lambda _: None)
            assert state is not None and kept == f"step-{state.step}"
            if weights and state.step == 1:
                assert torch.equal(module.module.first.weight, weights[1])
            assert not [path.name for path in run_dir.rglob("*") if f".tmp.{pid}" in path.name]  # swept
            shutil.rmtree(run_dir)
    print(f"{k - 1} calls, {deaths} deaths, {3 * deaths} disks")
    assert outcomes == {"step-1", "step-2"} and k > 15
