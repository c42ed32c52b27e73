"""The run directory, seen from every machine: rank zero writes there, and all ranks read a checkpoint to go on."""

import hashlib
import secrets
import time
from contextlib import suppress
from pathlib import Path

from sheeprlhf.engine.checkpoint import saved_steps
from sheeprlhf.engine.manifest import MANIFEST
from sheeprlhf.utils.errors import ConfigError, Notify
from sheeprlhf.utils.lightning import Fabric, gather_objects
from sheeprlhf.utils.output import write_file

_SECONDS_TO_APPEAR = 3.0  # network file systems may be late


def check_shared(fabric: Fabric, run_dir: Path, say: Notify) -> None:
    """All ranks: find the machines that do not see rank zero's run directory, by a file that it makes for a moment.

    One without checkpoints works all the same; `say` tells then that going on will need them on every machine.

    Raises:
        ConfigError: on all ranks, if a machine lacks the run's checkpoints, or has others.
    """
    if getattr(fabric.strategy, "num_nodes", 1) == 1:
        return
    name = fabric.broadcast(f".seen-{secrets.token_hex(8)}")
    sign = run_dir / name
    try:
        if fabric.is_global_zero:
            write_file(run_dir, name, b"")
        fabric.barrier()
        views = gather_objects(fabric, (fabric.node_rank, _appears(sign), _checkpoints(run_dir)))
    finally:
        if fabric.is_global_zero:
            with suppress(OSError):
                sign.unlink()
    expected = views[0][2]
    blind = sorted({node for node, sees, _ in views if not sees})
    lacking = sorted({node for node, sees, checkpoints in views if not sees and checkpoints != expected})
    if expected and lacking:
        raise ConfigError(
            f"{_nodes(lacking)} not see the run directory {run_dir} of node 0. Every machine reads the checkpoint to "
            "go on, and there is none or another one: copy the directory to the same place on all machines, or move it "
            "to a file system that they share and give resume_from=<folder>"
        )
    if blind:
        say(
            f"{_nodes(blind)} not see the run directory {run_dir} of node 0: checkpoints are written on node 0 alone. "
            "To go on after a stop, first copy the directory to the same place on all machines; with root_dir=<folder "
            "of a shared file system> that is not needed"
        )


def _nodes(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers))
    return f"nodes {shown} do" if len(numbers) > 1 else f"node {shown} does"


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _checkpoints(run_dir: Path) -> str:
    """A digest of the manifests of all checkpoints; empty if there are none."""
    digest = hashlib.sha256()
    steps = saved_steps(run_dir / "checkpoints")
    for step in steps:
        with suppress(OSError):
            digest.update((run_dir / "checkpoints" / f"step-{step}" / MANIFEST).read_bytes())
    return digest.hexdigest() if steps else ""
