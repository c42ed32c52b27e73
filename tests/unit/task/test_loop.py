"""The optimizer steps of an iteration of RL: their number, order, learning rates and early end."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sheeprlhf.data.sampler import RolloutPlan, StepPlan
from sheeprlhf.rollout.rollout import Rollout
from sheeprlhf.structure.optim import AdamWConfig
from sheeprlhf.structure.rollout import GRPOConfig, OnlineDPOConfig, OnlineTaskConfig
from sheeprlhf.task.loop import Iteration
from tests.support.batches import random_examples

ROLLOUT = Rollout(tuple(random_examples(4, 2)), np.zeros((4, 2)), np.ones((4, 2), dtype=bool), {})


def make_iteration(task: OnlineTaskConfig, number: int, metrics: list[dict[str, float]]) -> Iteration:
    """The `number`-th iteration of a run on 12 prompts, whose updates have these metrics."""
    answers = iter(metrics)
    cfg = SimpleNamespace(task=task, seed=3, optim=AdamWConfig(schedule="linear", min_lr_ratio=0.0))
    loop: Any = SimpleNamespace(
        run=SimpleNamespace(cfg=cfg),
        module=None,
        optimizer=SimpleNamespace(param_groups=[{"peak_lr": 1.0, "lr": 0.0}]),
        collect=SimpleNamespace(metrics={}),
        state=SimpleNamespace(extra={}),
        update=lambda *_: dict(next(answers)),
    )
    prompts = StepPlan(12, task.prompts_per_rollout(), 1, cfg.seed)
    plan = RolloutPlan(prompts, task.prompts_per_step(), task.num_iterations, task.max_num_steps)
    return Iteration(loop, number, plan, ROLLOUT)


def run(iteration: Iteration) -> tuple[list[int], list[list[int]], list[float]]:
    """Numbers, rows and learning rates of the steps that are taken."""
    batches: Any = SimpleNamespace(of=lambda _, rows: rows.tolist())
    numbers, rows, rates = [], [], []
    for step, micro_batches in iteration.steps(ROLLOUT, batches):
        iteration.update(micro_batches, None)  # type: ignore[arg-type]
        numbers.append(step)
        rows.append(micro_batches)
        rates.append(iteration._loop.optimizer.param_groups[0]["lr"])
    return numbers, rows, rates


def task_of(kind: type[OnlineTaskConfig] = GRPOConfig, **options: Any) -> OnlineTaskConfig:
    """Rollouts of four prompts, steps of two, two passes: four steps an iteration, twelve a run."""
    sizes = {"num_generations": 2, "rollout_size": 8, "mini_batch_size": 4, "lr_warmup_steps": 0}
    return kind(**sizes | {"num_iterations": 2} | options)


def test_the_steps_of_an_iteration_cover_the_rollout_once_a_pass() -> None:
    iteration = make_iteration(task_of(), 1, [{"loss": 1.0, "items": 4.0}] * 4)
    numbers, rows, rates = run(iteration)
    assert numbers == [4, 5, 6, 7]
    assert sorted(rows[0] + rows[1]) == sorted(rows[2] + rows[3]) == [0, 1, 2, 3]
    assert rates == pytest.approx([1 - step / 12 for step in numbers], abs=1e-6)
    assert iteration.means() == {"loss/policy": 1.0, "policy/items": 4.0}


@pytest.mark.parametrize(
    ("kls", "limit", "num_steps"),
    [((0.05, 0.2, 0.0, 0.0), 0.1, 2), ((0.1, 0.1, 0.1, 0.1), 0.1, 4), ((0.3, 0.3, 0.3, 0.3), None, 4)],
)
def test_passes_end_after_an_update_beyond_the_limit(
    kls: tuple[float, ...], limit: float | None, num_steps: int
) -> None:
    metrics = [{"loss": 0.0, "approxkl": kl} for kl in kls]
    assert len(run(make_iteration(task_of(early_stop_kl=limit), 0, metrics))[0]) == num_steps


def test_a_skipped_update_and_a_task_without_the_limit_end_no_pass() -> None:
    skipped = [{"loss": 0.0, "approxkl": 0.05}, {}, {}, {}]
    assert len(run(make_iteration(task_of(early_stop_kl=0.1), 0, skipped))[0]) == 4
    assert len(run(make_iteration(task_of(OnlineDPOConfig), 0, [{"loss": 0.0}] * 4))[0]) == 4


def test_the_last_iteration_ends_at_the_last_step() -> None:
    iteration = make_iteration(task_of(max_num_steps=6), 1, [{"loss": 0.0}] * 4)
    assert run(iteration)[0] == [4, 5]
