"""The order of rows: a permutation an epoch, the same after a resume, split between ranks without overlap."""

import numpy as np
import pytest

from sheeprlhf.data.sampler import RolloutPlan, StepPlan, cut_micro_batches


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
    again = [tuple(StepPlan(50, 50, 3, seed).rows_of_step(epoch)) for seed in (0, 1) for epoch in range(3)]
    assert again == orders


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
@pytest.mark.parametrize("seed", range(5))
def test_ranks_share_the_rows_of_a_step(world_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 60, 100).astype(np.int32)
    rows = rng.permutation(100)[: int(rng.integers(1, 40))]
    shares = [
        cut_micro_batches(rows, lengths, max_rows=4, token_budget=80, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert sorted(row for share in shares for batch in share for row in batch) == sorted(rows.tolist())
    for share in shares:
        for batch in share:
            assert 1 <= len(batch) <= 4
            assert lengths[batch].sum() <= 80 or len(batch) == 1
        order = [length for batch in share for length in lengths[batch].tolist()]
        assert order == sorted(order, reverse=True)
    loads = [sum(int(lengths[batch].sum()) for batch in share) for share in shares]
    assert max(loads) - min(loads) <= lengths[rows].max()  # the greedy bound


def test_a_row_beyond_the_budget_goes_alone_and_spare_ranks_get_nothing() -> None:
    lengths = np.array([100, 5, 5, 5])
    assert cut_micro_batches([0, 1, 2, 3], lengths, max_rows=9, token_budget=10, rank=0, world_size=1) == [
        [0],
        [1, 2],
        [3],
    ]
    shares = [cut_micro_batches([3], lengths, max_rows=9, token_budget=10, rank=r, world_size=2) for r in (0, 1)]
    assert shares == [[[3]], []]


def test_the_rows_of_the_first_steps() -> None:
    plan = StepPlan(num_rows=10, rows_per_step=3, epochs=2, seed=1)
    for num_steps in range(1, 9):
        seen = {int(row) for step in range(num_steps) for row in plan.rows_of_step(step)}
        assert plan.rows_until(num_steps).tolist() == sorted(seen)
