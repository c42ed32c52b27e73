"""The loop of an online task around its algorithm: sample a rollout, let the task learn from it, log, validate, save.

A turn is one rollout and the optimizer steps on it. Checkpoints are made between turns alone, so that a resumed run
samples the same rollouts again. `state.step` counts optimizer steps and tells which turn comes next; steps that a turn
leaves out (`task.max_kl`, prompts without a pair) count as if they had been taken. The last turn ends inside of its
rollout where `task.max_num_steps` says so.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sheeprlhf.agent.batches import Batches
from sheeprlhf.data.loader import load_ahead
from sheeprlhf.data.prepare import TokenizedSplit
from sheeprlhf.data.sampler import RolloutPlan, StepPlan
from sheeprlhf.engine.checkpoint import TrainState
from sheeprlhf.engine.optim import follow_schedule
from sheeprlhf.engine.run import Run
from sheeprlhf.engine.step import MicroBatch
from sheeprlhf.rollout.collect_steps import refuse_non_finite
from sheeprlhf.rollout.collector import Collector, check_sampler
from sheeprlhf.rollout.rollout import Rollout
from sheeprlhf.structure.rollout import OnlineTaskConfig
from sheeprlhf.task.finish import record_validation


class Turn:
    """One rollout, and what the task says about learning from it.

    Attributes:
        number: counted from 0.
        rollout: what was sampled.
        figures: numbers of it, for the log.
        carried: small numbers that the task wants back in the next turn, also after a resume.
    """

    def __init__(self, run: Run, optimizer: Optimizer, number: int, plan: RolloutPlan, carried: dict[str, Any]) -> None:
        self.number, self.carried = number, carried
        self.rollout: Rollout
        self.figures: dict[str, float] = {}
        self._run, self._optimizer, self._plan = run, optimizer, plan
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def passes(self, rollout: Rollout, batches: Batches) -> Iterator[tuple[int, list[MicroBatch]]]:
        """The number of each optimizer step on the rollout and this rank's micro-batches, the learning rate set.

        Every pass over the rollout has an order of its own.

        Raises:
            NonFiniteError: something in the rollout is not finite.
        """
        refuse_non_finite(rollout)
        task, cfg = self._run.cfg.task, self._run.cfg
        assert isinstance(task, OnlineTaskConfig)
        plan = StepPlan(len(rollout), task.prompts_per_step(), task.ppo_epochs, cfg.seed + self.number)
        num_steps, first = self._plan.num_steps(), self._plan.steps_before(self.number)
        how = {"warmup": task.lr_warmup_steps, "total": num_steps}
        steps = range(min(plan.num_steps(), num_steps - first))
        loaded = load_ahead(lambda index: batches.of(rollout, plan.rows_of_step(index)), steps, task.num_workers)
        for step, micro_batches in enumerate(loaded, first):
            follow_schedule(self._optimizer, cfg.optim, step, **how)
            yield step, micro_batches

    def note(self, metrics: dict[str, float], prefix: str = "") -> None:
        """Numbers of one optimizer step, or of the whole turn; their means are logged."""
        for name, value in metrics.items():
            name = f"{prefix}{name}"
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """The mean of everything that was noted."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}


class Loop:
    """Every turn of a run from `state` on, which moves with them; after each what is due is done.

    Args:
        run: the run.
        state: as restored.
        rows: whose prompts are answered; an epoch is a pass over them.
        collect: samples and scores, and reads what models say of a rollout.
        validate: answers held-out prompts and shows it; None if there are none.
        learners: what trains.
        optimizer: of what trains.
    """

    def __init__(
        self,
        run: Run,
        state: TrainState,
        rows: TokenizedSplit,
        collect: Collector,
        validate: Callable[[int], dict[str, float]] | None,
        learners: nn.Module,
        optimizer: Optimizer,
    ) -> None:
        self.state, self.collect = state, collect
        self._run, self._rows, self._validate = run, rows, validate
        self._learners, self._optimizer = learners, optimizer

    def __iter__(self) -> Iterator[Turn]:
        """All ranks: the turns, each with its rollout."""
        run, state, optimizer, task = self._run, self.state, self._optimizer, self._run.cfg.task
        assert isinstance(task, OnlineTaskConfig)
        prompts = StepPlan(len(self._rows), task.prompts_per_rollout(), task.epochs, run.cfg.seed)
        plan = RolloutPlan(prompts, task.prompts_per_step(), task.ppo_epochs, task.max_num_steps)
        num_steps = plan.num_steps()
        run.begin_progress(state, num_steps)
        for number in range(plan.rollout_after(state.step), plan.rollout_after(num_steps)):
            turn = Turn(run, optimizer, number, plan, dict(state.extra))
            began = time.perf_counter()
            turn.rollout = self.collect(self._rows.examples(prompts.rows_of_step(number).tolist()), number)
            turn.figures = self.collect.figures
            turn.note(turn.figures | {"time/rollout": time.perf_counter() - began})
            if number == 0 and task.self_check != "off":
                check_sampler(run, self.collect, turn.rollout)
            began = time.perf_counter()
            yield turn
            turn.note({"time/update": time.perf_counter() - began, "train/lr": optimizer.param_groups[0]["lr"]})
            self._end(turn, plan)

    def _end(self, turn: Turn, plan: RolloutPlan) -> None:
        """Log, validate and save where it is due."""
        run, state, task, num_steps = self._run, self.state, self._run.cfg.task, plan.num_steps()
        before, state.step = state.step, min(plan.steps_before(turn.number + 1), num_steps)
        last = state.step == num_steps
        num_tokens = sum(turn.rollout.response_lengths)
        state.items_seen += num_tokens
        state.extra = turn.carried | self.collect.state()
        means = turn.means()
        what = f"score {means['objective/scores']:.3f}, KL {means['objective/kl']:.2f}"
        run.show_progress(state, num_steps, what, num_tokens)

        def due(interval: int) -> bool:
            return last or state.step // interval > before // interval

        if due(task.log_interval):
            run.log(means, state.step)
        if self._validate is not None and due(task.eval_interval):
            record_validation(run, state, self._validate(state.step), "objective", highest=True)
        run.end_step(state, self._learners, self._optimizer, save=due(task.save_interval), last=last)
