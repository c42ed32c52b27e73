"""Kill -9 of one of two ranks while both write a sharded checkpoint: the newest complete one is kept and gone on with.

`KILLS=10 SEED=1 pytest -n 0 -m nightly -s tests/faults/test_shard_kills.py`; every second kill is in a save.
"""

import os
import random
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

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
from tests.unit.engine.toy import FORK, NEEDS_FSDP2, Net, _rank_main, micro_batch, seed_all, toy_loss

STEPS, LONGEST = 100, 600.0  # optimizer steps; seconds of a run on a busy machine


def work(_: Any, folder: Path, victim: int, step_of_kill: int, in_save: bool, delay: float, in_background: bool) -> int:
    """Train to the last step and save each; the victim dies at a moment of one step. Returns the step it began at."""
    fabric = make_fabric(FabricConfig(devices="2", strategy="fsdp2"))
    fabric.launch()
    seed_all(4)
    module, optimizer = set_up(fabric, AdamWConfig(weight_decay=0.1), Net(), 1e-2)
    state = restore_latest(fabric, folder, module, optimizer, config_hash="h", say=print) or TrainState()
    began = state.step
    background = BackgroundSaver(fabric) if in_background else None
    for number in range(began, STEPS):
        dies = fabric.global_rank == victim and number - began == step_of_kill
        if dies and not in_save:
            signal.setitimer(signal.ITIMER_REAL, delay)
        update(fabric, module, optimizer, [micro_batch(2 * number + fabric.global_rank)], toy_loss, max_grad_norm=0.5)
        if dies and in_save:
            signal.setitimer(signal.ITIMER_REAL, delay)
        state.step = number + 1
        options: dict[str, Any] = {"config_hash": "h", "keep": 2, "background": background}
        save_checkpoint(fabric, folder, state, module, optimizer, **options)
        complete = state.step if background is None else number
        (folder / f"saved-{fabric.global_rank}").write_text(str(complete))
    if background is not None:
        background.wait()
    return began


def killed(folder: Path, *plan: Any) -> bool:
    """Run both ranks to their end; True if one died, which the other has to notice."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    words = (2, port, FORK.Queue(), work, (folder, *plan))
    ranks = [FORK.Process(target=_rank_main, args=(rank, *words), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(LONGEST)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert None not in codes
    assert codes == [0, 0] or -signal.SIGALRM in codes
    return -signal.SIGALRM in codes


def last_saved(folder: Path) -> int:
    """The step that a rank knows to be saved."""
    return max((int(path.read_text() or 0) for path in folder.glob("saved-*")), default=0)


@NEEDS_FSDP2
@pytest.mark.nightly
@pytest.mark.parametrize("in_background", [False, True])
def test_campaign(in_background: bool, tmp_path: Path) -> None:
    kills, rng = int(os.environ.get("KILLS", "10")), random.Random(int(os.environ.get("SEED", "1")))
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    folder.mkdir()
    began = time.monotonic()
    assert not killed(whole, -1, 0, False, 0.0, False)
    seconds_of_step = (time.monotonic() - began) / (2 * STEPS)
    deaths = 0
    for number in range(kills):
        delay = rng.uniform(1e-4, seconds_of_step)
        deaths += killed(folder, number % 2, rng.randrange(1, 6), number // 2 % 2 == 0, delay, in_background)
        path = latest_checkpoint(folder, pytest.fail)
        assert (0 if path is None else int(path.name.removeprefix("step-"))) >= last_saved(folder)
        print(f"kill {number}: after {delay:.4f} s, newest {path}", flush=True)
    assert not killed(folder, -1, 0, False, 0.0, in_background)
    assert deaths == kills
    for name in ("model", "optimizer"):
        path = f"checkpoints/step-{STEPS}/{name}.safetensors"
        assert (folder / path).read_bytes() == (whole / path).read_bytes()
    assert not list(folder.rglob("*.tmp.*"))
