"""Any number of rows in micro-batches of any size on two ranks, by DDP and FSDP2: as on one, each row once, no waiting.

Then checkpoints: one made by either way is gone on with by the other, and by a single process.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import sheeprlhf.engine.shard as engine_shard
from sheeprlhf.data.sampler import cut_micro_batches
from sheeprlhf.engine.checkpoint import NOT_THE_SAME, TrainState, restore_latest, save_checkpoint
from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.engine.optim import set_up
from sheeprlhf.engine.shard import gathered
from sheeprlhf.engine.step import MicroBatch, evaluate, update
from sheeprlhf.structure.run import AdamWConfig, FabricConfig
from sheeprlhf.utils.errors import ConfigError
from tests.unit.engine.toy import LENGTHS, Net, micro_batch, on_ranks, seed_all, toy_loss

COMBINATIONS = [(rows, most) for rows in range(1, 10) for most in range(1, 5)]  # 36, each trained on and evaluated: 72
STRATEGIES = ("ddp", "fsdp2")
STEPS, STOP = 6, 3


def micro_batches(fabric: Any, num_rows: int, most: int) -> list[MicroBatch]:
    """This rank's share, cut as the tasks do it."""
    lengths = np.array([LENGTHS[i % 4] for i in range(num_rows)])
    place = {"rank": fabric.global_rank, "world_size": fabric.world_size}
    parts = cut_micro_batches(np.arange(num_rows), lengths, max_rows=most, token_budget=10_000, **place)
    return [micro_batch(*part) for part in parts]


def fabric_of(size: int, strategy: str) -> Any:
    fabric = make_fabric(FabricConfig(devices=str(size), strategy=strategy))
    fabric.launch()
    return fabric


def all_combinations(_: Any, size: int, strategy: str) -> list[dict[str, float]]:
    """Metrics of one step and of one evaluation after it, for every combination."""
    fabric = fabric_of(size, strategy)
    seed_all(3)
    module, optimizer = set_up(fabric, AdamWConfig(), Net(), 1e-3)
    found = []
    for rows, most in COMBINATIONS:
        micros = micro_batches(fabric, rows, most)
        found.append(update(fabric, module, optimizer, micros, toy_loss, max_grad_norm=0.5))
        found.append(evaluate(fabric, module, iter(micros), toy_loss))
    return found


def train(_: Any, size: int, strategy: str, run_dir: Path, until: int) -> tuple[int, list[str]]:
    """Go on to step `until`, saving there; returns the step it began at, and what it said then."""
    fabric = fabric_of(size, strategy)
    seed_all(4)
    module, optimizer = set_up(fabric, AdamWConfig(weight_decay=0.1), Net(), 1e-2)
    run_dir.mkdir(exist_ok=True)
    said: list[str] = []
    state = restore_latest(fabric, run_dir, module, optimizer, config_hash="h", say=said.append) or TrainState()
    began = state.step
    for step in range(began, until):
        update(fabric, module, optimizer, micro_batches(fabric, 3 + step, 2), toy_loss, max_grad_norm=0.5)
    evaluate(fabric, module, micro_batches(fabric, 3, 1), toy_loss)  # leaves nothing gathered behind
    save_checkpoint(fabric, run_dir, TrainState(until), module, optimizer, config_hash="h", keep=9)
    return began, said


def without_room(_: Any, size: int, strategy: str) -> str:
    """What is said where the whole weights do not fit."""
    fabric = fabric_of(size, strategy)
    module = fabric.setup_module(Net())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_shard, "available_memory", lambda: 2 * 110)  # half of it for each rank
        with pytest.raises(ConfigError) as caught, gathered(fabric, module):
            pass
    return str(caught.value)


def work(fabric: Any, jobs: list[tuple[Any, ...]]) -> list[Any]:
    return [function(fabric, *arguments) for function, *arguments in jobs]


def launch(size: int, *jobs: tuple[Any, ...]) -> list[Any]:
    """What every job returned on rank zero; the ranks agree."""
    ranks = on_ranks(size, work, [(function, size, *arguments) for function, *arguments in jobs], timeout=200)
    assert all(found == ranks[0] for found in ranks)
    return ranks[0]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything in three launches; "<a> to <b>" is a run directory that a worked in first, then b."""
    folder = tmp_path_factory.mktemp("moved")
    names = {
        f"{a} to {b}": folder / f"{a} to {b}" for a in (*STRATEGIES, "one") for b in (*STRATEGIES, "one") if a != b
    }
    first = [(train, a, names[key], STOP) for key in names if (a := key.split(" to ")[0]) != "one"]
    second = [(train, b, names[key], STEPS) for key in names if (b := key.split(" to ")[1]) != "one"]
    ones = [(train, "auto", names[key], STOP) for key in names if key.startswith("one")]
    of_one, *_ = launch(1, (all_combinations, "auto"), (train, "auto", folder / "whole", STEPS), *ones)
    both = [(all_combinations, strategy) for strategy in STRATEGIES]
    ddp, fsdp2, refusal, *began = launch(2, *both, (without_room, "fsdp2"), *first, *second)
    last = launch(1, *((train, "auto", names[key], STEPS) for key in names if key.endswith("one")))
    assert began[: len(first)] == [(0, [])] * len(first)
    resumed = [key for key in names if not key.endswith("one")] + [key for key in names if key.endswith("one")]
    said = {}
    for key, (step, lines) in zip(resumed, [*began[len(first) :], *last], strict=True):
        assert step == STOP
        said[key] = lines
    return {
        "one": of_one,
        "ddp": ddp,
        "fsdp2": fsdp2,
        "whole": folder / "whole",
        "said": said,
        "refusal": refusal,
    } | names


@pytest.mark.slow
def test_weights_that_do_not_fit_one_device_are_not_gathered(found: dict[str, Any]) -> None:
    """Net has 57 float32 parameters, 228 bytes, and each rank has 110."""
    assert all(text in found["refusal"] for text in ("fabric.strategy=fsdp2", "rollout=vllm", "rank 0"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_uneven_numbers_of_rows(strategy: str, found: dict[str, Any]) -> None:
    assert len(found["one"]) == len(found[strategy]) == 72
    for ours, expected in zip(found[strategy], found["one"], strict=True):
        assert ours == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert ours["items"] == expected["items"]  # each row once


@pytest.mark.slow
@pytest.mark.parametrize("moved", ["ddp to fsdp2", "fsdp2 to ddp", "one to fsdp2", "fsdp2 to one"])
def test_a_checkpoint_fits_every_strategy(moved: str, found: dict[str, Any]) -> None:
    for step, name in ((STOP, "model"), (STEPS, "model"), (STEPS, "optimizer")):
        ours = load_file(found[moved] / f"checkpoints/step-{step}/{name}.safetensors")
        if step == STEPS:
            assert_close(
                ours, load_file(found["whole"] / f"checkpoints/step-{step}/{name}.safetensors"), rtol=0, atol=1e-5
            )
        assert all(type(tensor) is torch.Tensor for tensor in ours.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moved", "facts"),
    [
        ("ddp to fsdp2", ["sharded was False and is True"]),
        ("fsdp2 to ddp", ["sharded was True and is False"]),
        ("one to fsdp2", ["world_size was 1 and is 2", "sharded was False and is True"]),
        ("fsdp2 to one", ["world_size was 2 and is 1", "sharded was True and is False"]),
        ("one to ddp", ["world_size was 1 and is 2"]),
        ("ddp to one", ["world_size was 2 and is 1"]),
    ],
)
def test_what_is_not_bit_for_bit_is_reported(moved: str, facts: list[str], found: dict[str, Any]) -> None:
    assert found["said"][moved] == [f"{fact} now: the run continues, {NOT_THE_SAME}" for fact in facts]
