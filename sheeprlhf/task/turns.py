"""The loop of an online task around its algorithm: sample a rollout, let the task learn from it, log, validate, save.

A turn is one rollout and the optimizer steps on it. Checkpoints are made between turns alone, so that a resumed run
samples the same rollouts again. `state.step` counts the steps of full turns: one that was ended early, or had fewer
prompts, counts as many as the others, and `state.step` tells which turn comes next.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sheeprlhf.agent.rollout import Rollout
from sheeprlhf.data.prepare import TokenizedSplit
from sheeprlhf.data.sampler import StepPlan
from sheeprlhf.engine.checkpoint import TrainState
from sheeprlhf.engine.optim import lr_factor, scale_lr
from sheeprlhf.engine.run import Run
from sheeprlhf.engine.signals import STOP_SIGNALS
from sheeprlhf.engine.step import MicroBatch
from sheeprlhf.structure.online import OnlineTaskConfig
from sheeprlhf.task.batches import Batches
from sheeprlhf.task.collect import Collector
from sheeprlhf.task.finish import note_validation


class Turn:
    """One rollout, and what the task says about learning from it.

    Attributes:
        number: counted from 0.
        rollout: what was sampled.
        carried: small numbers that the task wants back after a resume.
    """

    def __init__(self, run: Run, optimizer: Optimizer, number: int, num_steps: int, carried: dict[str, Any]) -> None:
        self.number, self.carried = number, carried
        self.rollout: Rollout
        self._run, self._optimizer, self._num_steps = run, optimizer, num_steps
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def passes(self, rollout: Rollout, batches: Batches) -> Iterator[tuple[int, list[MicroBatch]]]:
        """The number of each optimizer step on the rollout and this rank's micro-batches, the learning rate set.

        Every pass over the rollout has an order of its own.
        """
        task, cfg = self._run.cfg.task, self._run.cfg
        assert isinstance(task, OnlineTaskConfig)
        plan = StepPlan(len(rollout), task.prompts_per_step(), task.ppo_epochs, cfg.seed + self.number)
        for index in range(plan.num_steps()):
            step = self.number * task.steps_per_rollout() + index
            how: dict[str, Any] = {"warmup": task.lr_warmup_steps, "min_ratio": cfg.optim.min_lr_ratio}
            scale_lr(self._optimizer, lr_factor(cfg.optim.schedule, step, total=self._num_steps, **how))
            yield step, batches.of(rollout, plan.rows_of_step(index))

    def note(self, metrics: dict[str, float], prefix: str = "") -> None:
        """Numbers of one optimizer step, or of the whole turn; their means are logged."""
        for name, value in metrics.items():
            name = f"{prefix}{name}"
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def figures(self) -> dict[str, float]:
        """The mean of everything that was noted."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}


def turns(
    run: Run,
    state: TrainState,
    rows: TokenizedSplit,
    collect: Collector,
    validate: Callable[[int], dict[str, float]] | None,
    learners: nn.Module,
    optimizer: Optimizer,
) -> Iterator[Turn]:
    """All ranks: every turn of the run from `state` on, which moves with them; after each what is due is done.

    Args:
        run: the run.
        state: as restored.
        rows: whose prompts are answered; an epoch is a pass over them.
        collect: samples and scores.
        validate: answers held-out prompts and shows it; None if there are none.
        learners: what trains.
        optimizer: of what trains.
    """
    task, cfg = run.cfg.task, run.cfg
    assert isinstance(task, OnlineTaskConfig)
    per_turn = task.steps_per_rollout()
    plan = StepPlan(len(rows), task.prompts_per_rollout(), task.epochs, cfg.seed)
    num_turns = min(plan.num_steps(), -(-(task.max_num_steps or per_turn * plan.num_steps()) // per_turn))
    collect.restore(state.extra)
    run.begin_progress(state, num_turns * per_turn)
    for number in range(state.step // per_turn, num_turns):
        turn = Turn(run, optimizer, number, num_turns * per_turn, state.extra)
        began = time.perf_counter()
        turn.rollout = collect(rows.examples(plan.rows_of_step(number).tolist()), number)
        turn.note(collect.figures | {"time/rollout": time.perf_counter() - began})
        began = time.perf_counter()
        yield turn
        turn.note({"time/update": time.perf_counter() - began, "lr": optimizer.param_groups[0]["lr"]})
        before, state.step, last = state.step, state.step + per_turn, number + 1 == num_turns
        num_tokens = sum(turn.rollout.response_lengths)
        state.items_seen += num_tokens
        state.extra = turn.carried | collect.state()
        figures = turn.figures()
        what = f"score {figures['objective/scores']:.3f}, KL {figures['objective/kl']:.2f}"
        run.show_progress(state, num_turns * per_turn, what, num_tokens, steps=per_turn)

        def due(interval: int, before: int = before, last: bool = last) -> bool:
            return last or state.step // interval > before // interval

        if due(task.log_interval):
            run.log(figures, state.step)
        if validate is not None and due(task.eval_interval):
            note_validation(run, state, validate(state.step), "objective", highest=True)
        signum = run.stop_signal()
        if due(task.save_interval) or signum or state.best_step == state.step:
            run.save(state, learners, optimizer)
        if signum in STOP_SIGNALS and not last:
            run.stop(signum)
