"""A training loop of milliseconds that uses all of the engine: dropout, python's and numpy's generators, evaluation."""

import multiprocessing
import os
import random
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.distributed.fsdp import FSDPModule

from sheeprlhf.engine.checkpoint import BackgroundSaver, TrainState, restore_latest, save_checkpoint
from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.engine.optim import build_optimizer, follow_schedule
from sheeprlhf.engine.step import LossOutput, MicroBatch, evaluate, update
from sheeprlhf.structure.run import AdamWConfig, FabricConfig

NEEDS_FSDP2 = pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="fsdp2 needs torch 2.13")
HASH = "toy"
LENGTHS = (1, 3, 17, 64)
FORK = multiprocessing.get_context("fork")  # its processes import nothing again; torch has one thread here


class Net(nn.Module):
    """Two layers, dropout, a tied weight, a frozen one and a buffer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.first = nn.Linear(4, 6)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(6, 1)
        self.tied = nn.Linear(4, 6, bias=False)
        self.tied.weight = self.first.weight
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(self.frozen(x)) + self.tied(x))
        return self.second(self.dropout(hidden)) * self.scale


def toy_loss(module: nn.Module, x: torch.Tensor) -> LossOutput:
    error = (module(x).squeeze(-1) - x.sum(-1)) ** 2
    return LossOutput(error.sum(), {"absolute": error.detach().sqrt().sum()})


def make_row(length: int, seed: int) -> torch.Tensor:
    return torch.randn(length, 4, generator=torch.Generator().manual_seed(seed))


def micro_batch(*rows: int) -> MicroBatch:
    """Rows by number; row i has LENGTHS[i % 4] items."""
    tensors = [make_row(LENGTHS[i % 4], i) for i in rows]
    return MicroBatch(torch.cat(tensors) if tensors else torch.zeros(0, 4), sum(map(len, tensors)), tuple(rows))


def noisy_loss(module: nn.Module, x: torch.Tensor) -> LossOutput:
    """Draws from every generator, so that one that is not restored shows."""
    output = toy_loss(module, x + random.gauss(0, 0.1) + float(np.random.standard_normal()) * 0.1)
    return output._replace(total=output.total * (1 + 0.1 * torch.rand(())))


def train_toy(run_dir: Path, steps: int, **options: Any) -> TrainState:
    """Train to `steps` in this process."""
    fabric = make_fabric(FabricConfig())
    fabric.launch()
    return train_toy_on(fabric, run_dir, steps, **options)


def train_toy_on(
    fabric: Fabric,
    run_dir: Path,
    steps: int,
    *,
    save_every: int = 1,
    evaluate_every: int = 3,
    keep: int = 3,
    pause: float = 0.0,
    stop_at: int | None = None,
    in_background: bool = False,
) -> TrainState:
    """Go on from the newest checkpoint; a new process begins with other random states each time."""
    torch.manual_seed(0)
    module = Net(dropout=0.3)
    cfg = AdamWConfig(weight_decay=0.1, schedule="cosine", min_lr_ratio=0.1)
    optimizer = build_optimizer(cfg, (module.parameters(), 1e-2))
    module, optimizer = fabric.setup(module, optimizer)
    seed_all(time.time_ns() % 2**31)
    background = BackgroundSaver(fabric) if in_background else None
    state = restore_latest(fabric, run_dir, module, optimizer, config_hash=HASH, say=print)
    if state is None:
        seed_all(1 + fabric.global_rank)
        state = TrainState()
    while state.step < (stop_at or steps):
        first = 4 * state.step
        follow_schedule(optimizer, cfg, state.step, warmup=2, total=steps)
        micros = [micro_batch(first, first + 1), micro_batch(first + 2), micro_batch(first + 3)]
        micros = micros[fabric.global_rank :: fabric.world_size]
        metrics = update(fabric, module, optimizer, micros, noisy_loss, max_grad_norm=1.0)
        state.step += 1
        state.items_seen += int(metrics["items"])
        if state.step % evaluate_every == 0:
            loss = evaluate(fabric, module, [micro_batch(1001, 1002)], noisy_loss)["loss"]
            if state.best_metric is None or loss < state.best_metric:
                state.best_metric, state.best_step = loss, state.step
        if state.step % save_every == 0:
            options: dict[str, Any] = {"config_hash": HASH, "keep": keep, "background": background}
            save_checkpoint(fabric, run_dir, state, module, optimizer, **options)
        time.sleep(pause)
    if background is not None:
        background.wait()
    return state


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _rank_main(rank: int, size: int, port: int, results: Any, function: Callable, args: tuple) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    os.environ["WORLD_SIZE"] = str(size)
    torch.set_num_threads(1)
    try:
        fabric = make_fabric(FabricConfig(devices=str(size), strategy="ddp"))
        fabric.launch()
        results.put((rank, function(fabric, *args)))
        fabric.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc()))
        raise


def on_ranks(size: int, function: Callable, *args: Any, timeout: float = 60) -> list[Any]:
    """`function(fabric, *args)` on `size` gloo processes; what each returned (plain data), in rank order."""
    with socket.socket() as sock:  # bound until the end, so that no other test is given this port; rank 0 may share it
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        results = FORK.Queue()
        processes = [
            FORK.Process(target=_rank_main, args=(rank, size, port, results, function, args), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            found = dict(results.get(timeout=timeout) for _ in range(size))
            for process in processes:
                process.join(30)
            assert [process.exitcode for process in processes] == [0] * size, found
        finally:
            for process in processes:
                process.kill()
    return [found[rank] for rank in range(size)]
