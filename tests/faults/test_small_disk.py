"""Disks that are too small, by 64 KB or by more, and a full TMPDIR: nothing half stays, what was saved stays whole.

Twenty more sizes, where no file may grow beyond one, are in tests/unit/engine/test_checkpoint.py.
"""

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.optim import Optimizer

from sheeprlhf.engine.checkpoint import TrainState, save_checkpoint
from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.engine.manifest import verify_manifest
from sheeprlhf.engine.optim import build_optimizer
from sheeprlhf.structure.fabric import FabricConfig
from sheeprlhf.structure.optim import AdamWConfig
from sheeprlhf.utils.errors import CheckpointError
from tests.support.jobs import JobServer
from tests.support.mounts import fill, resize, small_disk
from tests.support.runs import result_of, train, train_words, write_rows

ModelFolder = Callable[..., Path]
STEP = 64 << 10
TOO_SMALL = range(-20, 0)  # steps below what two checkpoints need
ENOUGH = range(1, 4)
FILLED = """
import sheeprlhf.task.loop as loop
from pathlib import Path
from tests.support.mounts import fill
update, steps = loop.update, iter(range(1000))
def filled(*words, **options):
    if next(steps) == 5:
        fill(Path({folder!r}))
    return update(*words, **options)
loop.update = filled
"""
NO_TEMPORARY_FILES = """
import tempfile
def refuse(*words, **options):
    raise OSError(28, "no temporary file in this test")
for name in ("mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryFile", "SpooledTemporaryFile", "TemporaryDirectory"):
    setattr(tempfile, name, refuse)
"""


@cache
def trained() -> tuple[Fabric, nn.Module, Optimizer]:
    """One step of a model whose checkpoint has about 1.6 MB."""
    fabric = make_fabric(FabricConfig())
    fabric.launch()
    net = nn.Linear(370, 370)
    module, optimizer = fabric.setup(net, build_optimizer(AdamWConfig(), net, 1e-3))
    fabric.backward(module(torch.ones(1, 370)).square().sum())
    optimizer.step()
    return fabric, module, optimizer


def save(run_dir: Path, step: int) -> Path:
    fabric, module, optimizer = trained()
    state = TrainState(step=step)
    return save_checkpoint(fabric, run_dir, state, module, optimizer, config_hash="h", keep=9)


def pages(folder: Path) -> int:
    """Bytes that a folder's files take on a file system of pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.iterdir())


@pytest.mark.parametrize("steps", [*TOO_SMALL, *ENOUGH])
def test_a_disk_that_is_too_small_or_just_enough(steps: int, tmp_path: Path) -> None:
    (tmp_path / "measured").mkdir()
    needed = pages(save(tmp_path / "measured", 1))
    assert needed > len(TOO_SMALL) * STEP  # the first one always fits
    with small_disk(tmp_path / "disk", 2 * needed + steps * STEP) as run_dir:
        first = save(run_dir, 1)
        if steps > 0:
            verify_manifest(save(run_dir, 2))
        else:
            expected = r"cannot write .*disk/checkpoints/step-2: .*: about [\d,]+ bytes are needed, [\d,]+ are free"
            with pytest.raises(CheckpointError, match=expected.replace(": about", "; about")) as raised:
                save(run_dir, 2)
            assert raised.value.exit_code == 1
            assert [path.name for path in first.parent.iterdir()] == ["step-1"]
        verify_manifest(first)


def test_a_checkpoint_needs_no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a temporary file")

    for name in ("mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory"):
        monkeypatch.setattr(tempfile, name, refuse)
    with small_disk(tmp_path / "full", 64 << 10) as full:
        fill(full)
        monkeypatch.setenv("TMPDIR", str(full))
        (tmp_path / "run").mkdir()
        assert "model.safetensors" in verify_manifest(save(tmp_path / "run", 1))["files"]


@pytest.mark.nightly
def test_a_run_with_a_full_temporary_folder(server: JobServer, tmp_path: Path, model_folder: ModelFolder) -> None:
    """From the data to the last checkpoint: without a temporary file anywhere."""
    model, data = model_folder(), write_rows(tmp_path / "rows.jsonl")
    with small_disk(tmp_path / "full", 64 << 10) as full:
        fill(full)
        words = train_words(model, data, tmp_path / "run")
        cache = str(tmp_path / "cache")
        job = server.start(words, tmp_path / "log", NO_TEMPORARY_FILES, TMPDIR=str(full), SHEEPRLHF_CACHE=cache)
        assert job.wait() == 0, job.text()
    assert result_of(tmp_path / "run") == result_of(train(model, data, tmp_path / "whole"))


@pytest.mark.parametrize(
    "save_interval", [pytest.param(8, marks=pytest.mark.slow), pytest.param(24, marks=pytest.mark.nightly)]
)
def test_a_run_whose_disk_is_full(
    save_interval: int, server: JobServer, tmp_path: Path, model_folder: ModelFolder
) -> None:
    """From the sixth step on, by another's file: a save, or before it the records of a step, find no room."""
    model, data = model_folder(), write_rows(tmp_path / "rows.jsonl")
    with small_disk(tmp_path / "disk", 16 << 20) as disk:
        run_dir = disk / "run"
        words = train_words(model, data, run_dir, "task.eval_interval=4", f"task.save_interval={save_interval}")
        job = server.start(words, tmp_path / "log", FILLED.format(folder=str(disk)))
        assert job.wait() == 1, job.text()
        text = job.text()
        assert f"cannot write {run_dir}" in text and "are free" in text and "Traceback" not in text
        assert f"resume_from={run_dir}" in text or "resume=true" in text
        assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-4"]
        assert not [path for path in run_dir.rglob("*") if ".tmp" in path.name]
        verify_manifest(run_dir / "checkpoints" / "step-4")
        resize(disk, 64 << 20)
        assert server.start([*words, "resume=true"], tmp_path / "log").wait() == 0
        assert result_of(run_dir) == result_of(train(model, data, tmp_path / "whole", "task.eval_interval=4"))
