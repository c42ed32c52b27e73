"""Stopped and continued is bit for bit the same as never stopped."""

import contextlib
import random
import shutil
import time

import pytest

from tests.unit.engine.toy import forkserver, on_ranks, train_toy, train_toy_on

STEPS = 12


def final_bytes(run_dir, step):
    folder = run_dir / f"checkpoints/step-{step}"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "MANIFEST.json"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    train_toy(run_dir, STEPS, keep=STEPS)
    return run_dir


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_resume_at_every_step(tmp_path, uninterrupted, step):
    for k in range(1, step + 1):
        shutil.copytree(uninterrupted / f"checkpoints/step-{k}", tmp_path / f"checkpoints/step-{k}")
    state = train_toy(tmp_path, STEPS)
    assert state.step == STEPS
    assert final_bytes(tmp_path, STEPS) == final_bytes(uninterrupted, STEPS)


def test_evaluating_saving_and_stopping_consume_no_randomness(tmp_path, uninterrupted):
    train_toy(tmp_path, STEPS, save_every=5, stop_at=5)
    train_toy(tmp_path, STEPS, save_every=5, stop_at=11)  # the step beyond the checkpoint is computed again
    train_toy(tmp_path, STEPS, save_every=STEPS, evaluate_every=1000)
    ours, expected = final_bytes(tmp_path, STEPS), final_bytes(uninterrupted, STEPS)
    del ours["state.json"], expected["state.json"]  # has the best validation result
    assert ours == expected


def stop_at_3(fabric, run_dir, steps):
    train_toy_on(fabric, run_dir, steps, stop_at=3)


@pytest.mark.slow
def test_two_ranks_resume_bit_for_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    on_ranks(2, train_toy_on, whole, 6)
    on_ranks(2, stop_at_3, parts, 6)
    on_ranks(2, train_toy_on, parts, 6)
    assert final_bytes(parts, 6) == final_bytes(whole, 6)


def kill_campaign(run_dir, steps, kills, seed):
    """Kill -9 a training process `kills` times, half of them inside a save; then let it end. Returns aimed hits."""
    generator = random.Random(seed)
    context = forkserver()
    hits = 0
    for number in range(kills):
        process = context.Process(target=train_toy, args=(run_dir, steps), kwargs={"pause": 0.005}, daemon=True)
        process.start()
        checkpoints = run_dir / "checkpoints"
        if number % 2:
            deadline = time.monotonic() + 20
            while process.is_alive() and time.monotonic() < deadline:
                with contextlib.suppress(OSError):
                    if any(".tmp." in path.name for path in checkpoints.iterdir()):
                        break
            time.sleep(generator.uniform(0, 0.006))
        else:
            time.sleep(generator.uniform(0.05, 0.6))
        process.kill()
        process.join()
        hits += any(path.name.endswith(f".tmp.{process.pid}") for path in run_dir.glob("checkpoints/*"))
    process = context.Process(target=train_toy, args=(run_dir, steps), daemon=True)
    process.start()
    process.join(600)  # on a busy machine early kills come before any progress, and all of it is left
    assert process.exitcode == 0
    return hits


@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.nightly)])
def test_killed_at_any_moment_nothing_is_lost(tmp_path, kills):
    steps = kills * 8
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    train_toy(whole, steps, save_every=steps)
    hits = kill_campaign(killed, steps, kills, seed=2026)
    print(f"kills {kills}, inside a save {hits}, lost 0, seed 2026")
    assert hits > 0
    assert final_bytes(killed, steps)["model.safetensors"] == final_bytes(whole, steps)["model.safetensors"]
    assert final_bytes(killed, steps) == final_bytes(whole, steps)
    assert not [path for path in (killed / "checkpoints").iterdir() if ".tmp." in path.name]
