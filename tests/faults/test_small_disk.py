"""Disks that are too small, by 64 KB or by more, and a full TMPDIR: nothing half stays, what was saved stays whole.

Twenty more sizes, where no file may grow beyond one, are in tests/unit/engine/test_checkpoint.py.
"""

import tempfile
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
from tests.support.mounts import fill, small_disk

STEP = 64 << 10
TOO_SMALL = range(-20, 0)  # steps below what two checkpoints need
ENOUGH = range(1, 4)


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
