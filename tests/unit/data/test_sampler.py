"""The order of rows: a permutation an epoch, the same after a resume, split between ranks without overlap."""

import threading
import time

import numpy as np
import pytest

from sheeprlhf.data.sampler import RolloutPlan, StepPlan, cut_micro_batches
from sheeprlhf.data.store import load_ahead
from sheeprlhf.utils.errors import DataError


@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 9, 40])
@pytest.mark.parametrize("rows_per_step", [1, 3, 8, 50])
def test_each_epoch_is_a_permutation_in_ceil_steps(num_rows: int, rows_per_step: int) -> None:
    plan = StepPlan(num_rows, rows_per_step, epochs=3, seed=1)
    steps = -(-num_rows // rows_per_step)
    assert (plan.steps_per_epoch(), plan.num_steps()) == (steps, 3 * steps)
    for epoch in range(3):
        parts = [plan.rows_of_step(step) for step in range(epoch * steps, (epoch + 1) * steps)]
        assert all(plan.epoch_of(step) == epoch for step in range(epoch * steps, (epoch + 1) * steps))
        assert [len(part) for part in parts[:-1]] == [rows_per_step] * (steps - 1)
        assert 1 <= len(parts[-1]) <= rows_per_step
        assert sorted(np.concatenate(parts).tolist()) == list(range(num_rows))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    orders = [tuple(StepPlan(50, 50, 3, seed).rows_of_step(epoch)) for seed in (0, 1) for epoch in range(3)]
    assert len(set(orders)) == 6
    assert orders[5] == tuple(np.random.default_rng([1, 2]).permutation(50))  # in later versions too
    with pytest.raises(ValueError, match="read-only"):  # the order is kept
        StepPlan(50, 50, 3, 0).rows_of_step(0)[0] = 1


def test_without_shuffling_every_epoch_has_the_order_of_the_rows() -> None:
    plan = StepPlan(7, 3, epochs=2, seed=0, shuffle=False)
    assert [plan.rows_of_step(step).tolist() for step in range(6)] == [[0, 1, 2], [3, 4, 5], [6]] * 2
    assert plan.rows_until(2).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_plan_that_begins_later_counts_from_its_first_step_and_epoch() -> None:
    """Step 13 is the fourth of its plan: the first step of the epoch after epoch 4."""
    plan, start = StepPlan(8, 3, epochs=2, seed=1, first_step=10, first_epoch=4), StepPlan(8, 3, epochs=6, seed=1)
    assert plan.end() == 16
    assert [plan.epoch_of(step) for step in range(10, 16)] == [4, 4, 4, 5, 5, 5]
    assert [plan.epochs_before(step) for step in (10, 13, 16)] == [4.0, 5.0, 6.0]
    assert plan.epochs_before(14) == pytest.approx(5 + 1 / 3, abs=1e-12)
    for step in range(10, 16):
        assert plan.rows_of_step(step).tolist() == start.rows_of_step(step + 2).tolist()
    assert plan.rows_until(11).tolist() == sorted(plan.rows_of_step(10)) and plan.rows_until(13).tolist() == list(
        range(8)
    )


def test_a_plan_of_rollouts_that_begins_later_counts_from_there() -> None:
    """Rollouts of 4 prompts, 2 prompts a step, twice; the third of a pass over 10 prompts has 2."""
    first = RolloutPlan(StepPlan(10, 4, 3, seed=3), 2, 2, 40)
    later = RolloutPlan(StepPlan(10, 4, 3, seed=3, first_step=7, first_epoch=2), 2, 2, 40, first_step=23)
    for number in range(9):
        assert later.steps_before(7 + number) == 23 + first.steps_before(number)
        assert later.rollout_after(23 + first.steps_before(number)) == 7 + number
    assert first.num_steps() == 30 and later.num_steps() == 40


def test_no_rows_is_an_error() -> None:
    with pytest.raises(DataError):
        StepPlan(0, 1, 1, seed=0).num_steps()


def test_a_resume_needs_no_replay_and_no_global_rng() -> None:
    plan = StepPlan(20, 6, 4, seed=3)
    whole = [plan.rows_of_step(step).tolist() for step in range(plan.num_steps())]
    for start in reversed(range(plan.num_steps())):
        np.random.seed(start)  # other draws of the process do not matter
        resumed = StepPlan(20, 6, 4, seed=3)
        assert [resumed.rows_of_step(step).tolist() for step in range(start, plan.num_steps())] == whole[start:]


@pytest.mark.parametrize("num_rows", [1, 5, 12, 13, 40])
@pytest.mark.parametrize(("per_rollout", "per_step", "passes"), [(12, 3, 1), (12, 5, 2), (4, 4, 3), (50, 7, 1)])
def test_steps_of_rollouts_are_counted_exactly(num_rows: int, per_rollout: int, per_step: int, passes: int) -> None:
    """Against the steps laid end to end, with the short last rollout of each epoch."""
    prompts = StepPlan(num_rows, per_rollout, epochs=3, seed=1)
    rollout_of_step = []
    for number in range(prompts.num_steps()):
        steps = passes * len(range(0, len(prompts.rows_of_step(number)), per_step))
        rollout_of_step += [number] * steps
    plan = RolloutPlan(prompts, per_step, passes)
    assert plan.num_steps() == len(rollout_of_step)
    for number in range(prompts.num_steps()):
        assert plan.steps_before(number) == rollout_of_step.index(number)
        assert plan.rollout_after(plan.steps_before(number)) == number
    for step in range(1, len(rollout_of_step)):  # of a step inside of a rollout, the next one
        inside = rollout_of_step[step] == rollout_of_step[step - 1]
        assert plan.rollout_after(step) == rollout_of_step[step] + inside
    assert plan._replace(max_num_steps=2).num_steps() == min(2, len(rollout_of_step))
    assert plan._replace(max_num_steps=10**6).num_steps() == len(rollout_of_step)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(10))
def test_ranks_share_the_rows_of_a_step(world_size: int, seed: int) -> None:
    """By a slow loop: the longest row goes first to the rank with the fewest tokens; of equal ones the first."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 60, 100)
    rows = rng.permutation(100)[: int(rng.integers(1, 40))].tolist()
    most, budget = int(rng.integers(1, 6)), int(rng.integers(30, 90))
    expected: list[list[list[int]]] = [[] for _ in range(world_size)]
    for row in sorted(rows, key=lambda row: -lengths[row]):
        loads = [sum(lengths[row] for batch in share for row in batch) for share in expected]
        share = expected[loads.index(min(loads))]
        if not share or len(share[-1]) == most or lengths[[*share[-1], row]].sum() > budget:
            share.append([])
        share[-1].append(row)
    for rank in range(world_size):
        found = cut_micro_batches(rows, lengths, max_rows=most, token_budget=budget, rank=rank, world_size=world_size)
        assert found == expected[rank]


def test_the_rows_of_the_first_steps() -> None:
    plan = StepPlan(num_rows=10, rows_per_step=3, epochs=2, seed=1)
    for num_steps in range(1, 9):
        seen = {int(row) for step in range(num_steps) for row in plan.rows_of_step(step)}
        assert plan.rows_until(num_steps).tolist() == sorted(seen)


WORKERS = pytest.mark.parametrize("workers", [0, 1, 2, 5])


@WORKERS
def test_results_keep_their_order(workers: int) -> None:
    def load(item: int) -> int:
        time.sleep(0.002 * (7 - item % 8))  # later items are ready first
        return item * item

    assert list(load_ahead(load, range(30), workers)) == [item * item for item in range(30)]
    assert list(load_ahead(load, [], workers)) == []


@WORKERS
def test_an_exception_comes_where_its_result_would_have(workers: int) -> None:
    def load(item: int) -> int:
        if item == 3:
            raise ValueError("row 3")
        return item

    found = load_ahead(load, range(9), workers)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="row 3"):
        next(found)
    assert list(found) == []


@WORKERS
def test_only_a_few_items_are_loaded_ahead_in_the_right_thread(workers: int) -> None:
    loaded: list[int] = []
    threads: set[str] = set()

    def load(item: int) -> int:
        threads.add(threading.current_thread().name)
        loaded.append(item)
        return item

    found = load_ahead(load, range(1000), workers)
    assert loaded == []  # nothing before the first result is asked for
    assert next(found) == 0
    time.sleep(0.05)
    assert len(loaded) <= 2 * workers + 1
    assert ("MainThread" in threads) == (workers == 0)
    found.close()  # type: ignore[attr-defined]
    count = len(loaded)
    time.sleep(0.05)
    assert len(loaded) <= count + workers  # what was waiting is cancelled
