"""Stopped and continued is bit for bit the same as never stopped."""

import shutil

import pytest

from tests.unit.engine.toy import on_ranks, train_toy, train_toy_on

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


def test_two_ranks_resume_bit_for_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    on_ranks(2, train_toy_on, whole, 6)
    on_ranks(2, stop_at_3, parts, 6)
    on_ranks(2, train_toy_on, parts, 6)
    assert final_bytes(parts, 6) == final_bytes(whole, 6)
