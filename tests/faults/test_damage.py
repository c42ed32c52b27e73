"""Damaged and mismatched checkpoints are noticed before anything is loaded, and one run directory has one owner.

A campaign: `TRIALS=600 SEED=2026 pytest -n 0 -m nightly -s tests/faults/test_damage.py`. A failure prints its trial,
which `SEED=... TRIAL=...` repeats alone.
"""

import dataclasses
import os
import random
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sheeprlhf.config.registry import config_hash
from sheeprlhf.engine.checkpoint import TrainState, restore_latest, save_checkpoint
from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.engine.manifest import MANIFEST
from sheeprlhf.engine.optim import set_up
from sheeprlhf.engine.run import open_run
from sheeprlhf.engine.rundir import RunLock, choose_run_dir
from sheeprlhf.engine.step import update
from sheeprlhf.structure.run import AdamWConfig, FabricConfig
from sheeprlhf.utils.errors import ConfigError, RunInUseError
from tests.unit.config.test_registry import typed
from tests.unit.engine.toy import Net, micro_batch, toy_loss

NAMES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", MANIFEST)
KINDS = ("bit", "bit", "bit", "bit", "bit", "cut", "gone")  # of 7 trials, so many of each


def toy(dropout: float = 0.0) -> tuple[Any, Any, Any]:
    fabric = make_fabric(FabricConfig())
    fabric.launch()
    torch.manual_seed(0)
    return fabric, *set_up(fabric, AdamWConfig(), Net(dropout), 1e-2)


def spoil(path: Path, kind: str, generator: random.Random) -> str:
    """Damage a file; what was done."""
    content = bytearray(path.read_bytes())
    place = generator.randrange(len(content))
    if kind == "bit":
        bit = generator.randrange(8)
        content[place] ^= 1 << bit
        path.write_bytes(content)
        return f"bit {bit} of byte {place} of {path.name}"
    if kind == "cut":
        path.write_bytes(content[:place])
        return f"{path.name} cut to {place} bytes"
    path.unlink()
    return f"{path.name} removed"


@pytest.mark.parametrize("trials", [70, pytest.param(None, marks=pytest.mark.nightly)])
def test_damage_is_named_and_the_checkpoint_before_is_loaded(trials: int | None, tmp_path: Path) -> None:
    seed = int(os.environ.get("SEED", "2026"))
    trials = trials or int(os.environ.get("TRIALS", "700"))
    chosen = range(trials) if "TRIAL" not in os.environ else [int(os.environ["TRIAL"])]
    fabric, module, optimizer = toy()
    good = tmp_path / "good"
    good.mkdir()
    for step in (1, 2):
        update(fabric, module, optimizer, [micro_batch(step)], toy_loss, max_grad_norm=1.0)
        save_checkpoint(fabric, good, TrainState(step), module, optimizer, config_hash="h", keep=9)
    before = load_file(good / "checkpoints/step-1/model.safetensors")
    done: Counter[str] = Counter()
    for trial in chosen:
        generator = random.Random(f"{seed}-{trial}")
        run_dir = tmp_path / "run"
        shutil.copytree(good, run_dir)
        name, kind = NAMES[trial % len(NAMES)], KINDS[trial % len(KINDS)]
        what = spoil(run_dir / "checkpoints/step-2" / name, kind, generator)
        said: list[str] = []
        state = restore_latest(fabric, run_dir, module, optimizer, config_hash="h", say=said.append)
        printed = f"SEED={seed} TRIAL={trial}: {what}: {said}"
        assert state is not None and state.step == 1, printed
        assert len(said) == 1 and name in said[0] and "step-2" in said[0], printed
        assert all(torch.equal(module.module.state_dict()[key], tensor) for key, tensor in before.items()), printed
        done[kind] += 1
        shutil.rmtree(run_dir)
    print(f"damaged {done.total()}: {dict(done)}, loaded 0, seed {seed}")


MISMATCHES = {  # an override, and how the message tells it
    "model.lora_cfg.targets=[q_proj]": "model.lora_cfg.targets",
    "model=gpt2": "model.config_name",
    "fabric.precision=bf16-mixed": "fabric.precision was 32-true and is bf16-mixed",
    "optim.lr=3e-4": "optim.lr was null and is 0.0003",
    "task.max_grad_norm=null": "task.max_grad_norm was 1.0 and is null",
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has begun."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    cfg = typed("model=tiny", "model.finetune_mode=LORA", "model.lora_cfg.rank=4")
    choose_run_dir(cfg, config_hash(cfg), given=str(folder))
    with open_run(make_fabric(FabricConfig()), cfg, folder):
        pass
    return folder


@pytest.mark.parametrize("override", MISMATCHES)
def test_another_configuration_is_refused_and_the_difference_reported(override: str, begun: Path) -> None:
    words = ["model=tiny", "model.finetune_mode=LORA", "model.lora_cfg.rank=4"]
    words = [word for word in words if word.split("=")[0] != override.split("=")[0]]
    cfg = dataclasses.replace(typed(*words, override), resume_from=str(begun))
    with pytest.raises(ConfigError) as refused:
        choose_run_dir(cfg, config_hash(cfg))
    assert MISMATCHES[override] in str(refused.value)
    assert str(begun / "config.yaml") in str(refused.value)


@pytest.mark.parametrize(
    "rounds", [1, pytest.param(3, marks=pytest.mark.slow), pytest.param(25, marks=pytest.mark.nightly)]
)
def test_eight_starters_one_winner(rounds: int, tmp_path: Path) -> None:
    """Eight processes want the directory at once; its holder is killed, and the next round finds it free."""
    losers = 0
    for number in range(rounds):
        gate, printed = os.pipe(), os.pipe()
        pids = []
        for _ in range(8):
            if (pid := os.fork()) == 0:
                os.read(gate[0], 1)
                try:
                    with RunLock(tmp_path):
                        os.write(printed[1], f"won {os.getpid()}\n".encode())
                        signal.pause()
                except RunInUseError as error:
                    os.write(printed[1], f"lost {error}\n".encode())
                    signal.pause()
                finally:
                    os._exit(1)
            pids.append(pid)
        try:
            os.write(gate[1], b"go" * 4)
            lines: list[str] = []
            while len(lines) < 8:
                lines += os.read(printed[0], 1 << 16).decode().splitlines()
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            for descriptor in (*gate, *printed):
                os.close(descriptor)
        [winner] = [line.split()[1] for line in lines if line.startswith("won")]
        lost = [line for line in lines if line.startswith("lost")]
        assert len(lost) == 7, (number, lines)
        assert all(f"is in use by process {winner} " in line for line in lost), (number, lines)
        losers += len(lost)
    print(f"{rounds} rounds, {rounds} winners, {losers} losers that name the winner")


@pytest.mark.nightly
def test_soak(tmp_path: Path) -> None:
    """2,000 steps, saved every 10: memory, open files and disk stay as they are."""
    fabric, module, optimizer = toy(0.1)
    page = os.sysconf("SC_PAGE_SIZE")
    seen: list[tuple[int, int, int]] = []
    for step in range(1, 2001):
        update(fabric, module, optimizer, [micro_batch(step % 40)], toy_loss, max_grad_norm=1.0)
        if step % 10 == 0:
            save_checkpoint(fabric, tmp_path, TrainState(step), module, optimizer, config_hash="h", keep=2)
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
            seen.append((resident, len(os.listdir("/proc/self/fd")), len(list((tmp_path / "checkpoints").iterdir()))))
    memory, files, folders = zip(*seen, strict=True)
    print(f"2,000 steps, {len(seen)} saves: memory {memory[20]:,} to {memory[-1]:,} bytes, {max(files)} open files")
    assert memory[-1] < 1.02 * memory[20]
    assert len(set(files)) == 1
    assert max(folders) <= 2
