"""The optimizer steps of an iteration of RL: their number, order, learning rates and early end."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sheeprlhf.data.sampler import RolloutPlan, StepPlan
from sheeprlhf.rollout.rollout import Rollout
from sheeprlhf.structure.optim import AdamWConfig
from sheeprlhf.structure.rollout import GRPOConfig, OnlineDPOConfig, OnlineTaskConfig
from sheeprlhf.task.loop import Iteration
from sheeprlhf.utils.errors import NonFiniteError
from tests.support.batches import random_examples

ROLLOUT = Rollout(tuple(random_examples(4, 2)), np.zeros((4, 2)), np.ones((4, 2), dtype=bool), {})


def make_iteration(task: OnlineTaskConfig, number: int, metrics: list[dict[str, float]]) -> Iteration:
    """The `number`-th iteration of a run on 12 prompts, whose updates have these metrics."""
    answers = iter(metrics)

    def update(module: object, micro_batches: list[int], loss_fn: object) -> dict[str, float]:
        assert (module, len(micro_batches), loss_fn) == ("policy", 2, "loss")
        return dict(next(answers))

    cfg = SimpleNamespace(task=task, seed=3, optim=AdamWConfig(schedule="linear", min_lr_ratio=0.0))
    loop: Any = SimpleNamespace(
        run=SimpleNamespace(cfg=cfg),
        module="policy",
        optimizer=SimpleNamespace(param_groups=[{"peak_lr": 1.0, "lr": 0.0}]),
        collect=SimpleNamespace(metrics={}),
        state=SimpleNamespace(extra={}),
        update=update,
    )
    prompts = StepPlan(12, task.prompts_per_rollout(), 1, cfg.seed)
    plan = RolloutPlan(prompts, task.prompts_per_step(), task.num_iterations, task.max_num_steps)
    return Iteration(loop, number, plan, ROLLOUT)


def run(
    iteration: Iteration, rollout: Rollout = ROLLOUT, *, updates: bool = True
) -> tuple[list[int], list[list[int]], list[float]]:
    """Numbers, rows and learning rates of the steps that are taken."""
    batches: Any = SimpleNamespace(of=lambda _, rows: rows.tolist())
    numbers, rows, rates = [], [], []
    for step, micro_batches in iteration.steps(rollout, batches):
        if updates:
            iteration.update(micro_batches, "loss")  # type: ignore[arg-type]
        numbers.append(step)
        rows.append(micro_batches)
        rates.append(iteration._loop.optimizer.param_groups[0]["lr"])
    return numbers, rows, rates


def task_of(kind: type[OnlineTaskConfig] = GRPOConfig, **options: Any) -> OnlineTaskConfig:
    """Rollouts of four prompts, steps of two, three passes: six steps an iteration, eighteen a run."""
    sizes = {"num_generations": 2, "rollout_size": 8, "mini_batch_size": 4, "lr_warmup_steps": 0}
    return kind(**sizes | {"num_iterations": 3} | options)


def test_the_steps_of_an_iteration_cover_the_rollout_once_a_pass() -> None:
    numbers, rows, rates = run(make_iteration(task_of(), 1, [{"loss": 1.0}] * 6))
    assert numbers == [6, 7, 8, 9, 10, 11]
    assert [sorted(rows[i] + rows[i + 1]) for i in (0, 2, 4)] == [[0, 1, 2, 3]] * 3
    order = StepPlan(4, 2, 3, 3 + 1)  # another one in every iteration
    assert rows == [order.rows_of_step(step).tolist() for step in range(6)]
    assert rates == pytest.approx([1 - step / 18 for step in numbers], abs=1e-6)


def test_metrics_are_named_by_what_they_are_of() -> None:
    both = {"loss": 3.0, "policy": 1.0, "value": 2.0, "ratio": 0.9, "rewards/margins": 0.5}
    iteration = make_iteration(task_of(max_num_steps=2), 0, [both, {"loss": 2.0, "ratio": 1.1}])
    run(iteration)
    means = {"loss/policy": 1.5, "loss/value": 2.0, "policy/ratio": 1.0, "train/rewards/margins": 0.5}
    assert iteration.means() == pytest.approx(means, abs=1e-6)


def test_advantages_are_kept_and_other_rows_are_not() -> None:
    """Online DPO trains on pairs, which are not the rows that were sampled."""
    iteration = make_iteration(task_of(), 0, [{"loss": 0.0}] * 6)
    run(iteration)
    assert iteration.rollout is ROLLOUT
    rollout = ROLLOUT.with_advantages(torch.zeros(4, 2))
    iteration = make_iteration(task_of(), 0, [{"loss": 0.0}] * 6)
    run(iteration, rollout)
    assert iteration.rollout is rollout
    with pytest.raises(NonFiniteError):
        run(iteration, ROLLOUT.with_advantages(torch.full((4, 2), torch.nan)))


def test_importance_weights_multiply_the_advantages() -> None:
    num_tokens = sum(ROLLOUT.response_lengths)
    weights = torch.linspace(0.5, 2.0, num_tokens)
    rollout = ROLLOUT.with_advantages(torch.full((4, 2), 3.0)).with_tokens(importance=weights)
    iteration = make_iteration(task_of(), 0, [{"loss": 0.0}] * 6)
    run(iteration, rollout)
    torch.testing.assert_close(iteration.rollout.flat("advantages"), 3.0 * weights, rtol=0, atol=1e-6)
    iteration = make_iteration(task_of(), 0, [{"loss": 0.0}] * 6)
    run(iteration, ROLLOUT.with_tokens(importance=weights))  # of pairs, which have no advantages
    assert iteration.rollout is ROLLOUT


@pytest.mark.parametrize(
    ("kls", "limit", "num_steps"),
    [((0.05, 0.2, 0.0, 0.0, 0.0, 0.0), 0.1, 2), ((0.1,) * 6, 0.1, 6), ((0.3,) * 6, None, 6)],
)
def test_passes_end_after_an_update_beyond_the_limit(
    kls: tuple[float, ...], limit: float | None, num_steps: int
) -> None:
    metrics = [{"loss": 0.0, "approxkl": kl} for kl in kls]
    assert len(run(make_iteration(task_of(early_stop_kl=limit), 0, metrics))[0]) == num_steps


def test_skipped_and_absent_updates_and_tasks_without_the_limit_end_no_pass() -> None:
    skipped = [{"loss": 0.0, "approxkl": 0.05}, {}, {}, {}, {}, {}]
    assert len(run(make_iteration(task_of(early_stop_kl=0.1), 0, skipped))[0]) == 6
    assert len(run(make_iteration(task_of(early_stop_kl=0.1), 0, []), updates=False)[0]) == 6
    assert len(run(make_iteration(task_of(OnlineDPOConfig), 0, [{"loss": 0.0}] * 6))[0]) == 6


def test_the_last_iteration_ends_at_the_last_step() -> None:
    assert run(make_iteration(task_of(max_num_steps=8), 1, [{"loss": 0.0}] * 6))[0] == [6, 7]
