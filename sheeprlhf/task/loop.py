"""Training loops of tasks with a fixed dataset (`TrainLoop`) and of RL tasks (`RolloutLoop`), without the losses.

```python
loop = TrainLoop(fabric, run)  # data, order of the rows, number of steps
policy = loop.load_policy()  # model, or the run to start from
module = loop.set_up(policy)  # optimizer; wrapped by Fabric
loop.begin(lambda rows, read: partial(batches.of, rows))  # seed; the newest checkpoint if there is one
for step in loop:  # learning rate, log, checkpoints, signals
    step.update(loss_fn)
    if step.validates:
        loop.record(evaluate(fabric, module, loop.validation_batches(batches), loss_fn))
loop.finish(policy)  # final/
```
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from sheeprlhf.agent.batches import Batches, Rows, longest_row
from sheeprlhf.agent.policy import Policy, reference_of
from sheeprlhf.config.model_lookup import initial_run
from sheeprlhf.data.example import Batch, Example
from sheeprlhf.data.sampler import RolloutPlan, StepPlan
from sheeprlhf.data.store import TokenizedSplit, load_ahead
from sheeprlhf.engine.checkpoint import TrainState
from sheeprlhf.engine.optim import follow_schedule, set_up
from sheeprlhf.engine.run import Run
from sheeprlhf.engine.shard import data_rank, place
from sheeprlhf.engine.step import LossFn, MicroBatch, update
from sheeprlhf.model.folder.architecture import configured_router_loss
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.rollout.rollout import Rollout, RolloutCollector, check_finite, token_values
from sheeprlhf.structure.rollout import OnlineTaskConfig
from sheeprlhf.structure.task import SFTConfig
from sheeprlhf.task.finish import (
    RolloutValidator,
    Saved,
    check_sampler,
    finish_run,
    log_samples,
    prepare_run_data,
    record_validation,
    saved_rollouts,
    write_rollout,
)
from sheeprlhf.task.models import build_collector, load_initial_policy, load_online_setup, load_options, rows_of_shard
from sheeprlhf.utils.errors import ConfigError, DataError, RewardError, RolloutServerError
from sheeprlhf.utils.lightning import Fabric, _FabricModule


class TrainLoop:
    """The optimizer steps of one run. Every method is called on all ranks.

    Attributes:
        data: the prepared data. With `data.streaming`, `data`, `rows` and `plan` are those of the shard that is trained
            on.
        split: name of the split that the task trains on, `rows`: the first of `task.train_splits` that has rows.
        held_out: the validation split, None if it has no rows; every validation reads `held_out_rows` of it.
        longest: tokens of the longest sequence in any split.
        module: the trained model as wrapped by Fabric, set by `set_up` like its optimizer.
        load: returns this rank's batches of a step's rows; set by `begin` like `state`, the progress of the run.
    """

    module: _FabricModule
    optimizer: Optimizer
    load: Callable[[np.ndarray], Any]
    state: TrainState

    def __init__(self, fabric: Fabric, run: Run) -> None:
        """Prepare and report the data.

        Raises SheepError if the tokenizer cannot be loaded or the data cannot be used.
        """
        cfg, task = run.cfg, run.cfg.task
        self.fabric, self.run = fabric, run
        self.tokenizer = load_tokenizer(cfg.model)
        self.data, self.stream = prepare_run_data(fabric, run, self.tokenizer, kind=task.data_kind)
        self.split = next(name for name in task.train_splits if name in self.data.splits)
        self.rows, self.held_out = self.data.splits[self.split], self.data.splits.get("validation") or None
        num_held_out = None if task.max_eval_batches is None else task.max_eval_batches * task.mini_batch_size
        self.held_out_rows = np.arange(len(self.held_out or ()))[:num_held_out]
        self.longest = cfg.data.max_length if self.stream else longest_row(self.data.splits)
        self.plan = StepPlan(len(self.rows), task.mini_batch_size, task.epochs, cfg.seed, cfg.data.shuffle)
        self.num_steps = min(self.plan.num_steps(), task.max_num_steps or self.plan.num_steps())
        if self.stream is not None:
            self.num_steps = task.max_num_steps or 0

    def load_policy(self, *, new_head: bool = False) -> Policy:
        """Load the model that training starts from; see `load_initial_policy`."""
        cfg, options = self.run.cfg, load_options(self.run.cfg, self.longest, self.run.say)
        start = initial_run(cfg.task)
        policy = load_initial_policy(cfg.model, *start, self.tokenizer, new_head=new_head, **options)
        if not isinstance(cfg.task, SFTConfig):
            configured_router_loss(policy.causal_lm(), cfg.task.config_name, self.run.say)
        return policy

    def set_up(self, model: nn.Module) -> _FabricModule:
        """Make the optimizer of the model's trainable parameters, and wrap both with Fabric."""
        self.module, self.optimizer = set_up(self.fabric, self.run.cfg.optim, model, self.run.cfg.peak_lr())
        return self.module

    def begin(
        self,
        load_of: Callable[[TokenizedSplit, np.ndarray], Callable[[np.ndarray], Any]],
        learners: nn.Module | None = None,
    ) -> None:
        """Seed the random generators, restore the newest checkpoint if there is one.

        Args:
            load_of: called with `rows` and the indices of those that the steps read; returns `load` for them. With
                `data.streaming` it is called for each shard, else once, before the checkpoint is restored.
            learners: everything that is saved; None is the trained model only.
        """
        self._load_of = load_of
        if self.stream is None:
            self.load = load_of(self.rows, self.plan.rows_until(self.num_steps))
        torch.manual_seed(self.run.cfg.seed + data_rank(self.fabric).rank)  # equal weights on all ranks, other dropout
        self.state = self.run.restore(self.module if learners is None else learners, self.optimizer)
        if self.stream is not None:
            self._open_shard(int(self.state.extra.get("shard", 0)), int(self.state.extra.get("shard_step", 0)))

    def __iter__(self) -> Iterator["Step"]:
        """Yield the remaining steps. After each: log its metrics, save a checkpoint, act on signals."""
        run, state, task = self.run, self.state, self.run.cfg.task
        numbers = range(state.step, state.step if task.stops_early(state.stale_validations) else self.num_steps)
        run.begin_progress(state.step, self.num_steps)
        for number, batches in self._loaded(numbers):
            warmup = task.num_warmup_steps(self.num_steps)
            lr = follow_schedule(self.optimizer, run.cfg.optim, number, warmup=warmup, total=self.num_steps)
            step = Step(self, number, batches)
            yield step
            if self.due(task.log_interval):
                metrics = step.metrics | {
                    "lr": lr,
                    "epoch": self.plan.epochs_before(state.step) / (1 if self.stream is None else len(self.stream)),
                }
                run.log({f"train/{name}": value for name, value in metrics.items()} | run.usage(), state.step)
            run.end_step(save=self.due(task.save_interval), last=self.is_last)
            if self.is_last:
                return

    def _loaded(self, numbers: range) -> Iterator[tuple[int, Any]]:
        """Yield the numbers of steps with their batches; with `data.streaming`, open one shard after the other."""
        stream, num_workers = self.stream, self.run.cfg.task.num_workers
        with nullcontext() if stream is None else closing(stream):
            while True:
                end = self.plan.end()
                if stream is not None and end < numbers.stop:
                    stream.prepare_ahead(self.plan.first_epoch + 1)
                part = range(max(self.plan.first_step, numbers.start), min(end, numbers.stop))
                batches = load_ahead(lambda number: self.load(self.plan.rows_of_step(number)), part, num_workers)
                yield from zip(part, batches, strict=True)
                if end >= numbers.stop:
                    return
                with self.run.saved_at(DataError):
                    self._open_shard(self.plan.first_epoch + 1, end)

    def _open_shard(self, number: int, first_step: int) -> None:
        """Train on shard `number` of the stream from `first_step` on.

        Raises DataError if the shard cannot be used, or is not that of the checkpoint.
        """
        assert self.stream is not None
        cfg, self.data = self.run.cfg, self.stream.open_shard(number, self.state.extra, shard_step=first_step)
        if self.split not in self.data.splits:
            raise DataError(
                f"shard {number % len(self.stream) + 1} of the training rows has no rows of the {self.split} split: "
                "raise data.shard_size, or give larger files"
            )
        self.rows = self.data.splits[self.split]
        self.plan = StepPlan(
            len(self.rows), cfg.task.mini_batch_size, 1, cfg.seed, cfg.data.shuffle, first_step, first_epoch=number
        )
        self.load = self._load_of(self.rows, self.plan.rows_until(self.num_steps))

    @property
    def is_last(self) -> bool:
        """True after the last update: the planned one, or that whose validation ends the run."""
        state = self.state
        return state.step == self.num_steps or self.run.cfg.task.stops_early(state.stale_validations)

    def due(self, interval: int) -> bool:
        """Return whether something that happens every `interval` steps follows the newest update."""
        return self.is_last or self.state.step % interval == 0

    @property
    def validates_at_start(self) -> bool:
        """True before the first update if a validation precedes it."""
        return self.run.cfg.task.eval_at_start and self.state.step == 0

    def validation_batches(self, batches: Batches, rows: Rows | None = None) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of the held-out rows, or of the same rows of another split."""
        rows = self.held_out if rows is None else rows
        assert rows is not None
        return (micro for _, micro in batches.numbered(rows, self.held_out_rows, "validating"))

    def record(self, result: dict[str, float]) -> None:
        """Log a validation, and remember the step if it is the best so far."""
        record_validation(self.run, self.state, result)

    def log_samples(self, policy: Policy, rows: list[int] | None = None) -> None:
        """Log the policy's responses to a few held-out prompts, the first ones or the first of `rows`."""
        run, num_samples = self.run, getattr(self.run.cfg.task, "num_sample_prompts", 0)
        assert self.held_out is not None
        examples = self.held_out.examples((list(range(len(self.held_out))) if rows is None else rows)[:num_samples])
        log_samples(self.fabric, run, policy, self.tokenizer, examples, run.cfg.generation, self.state.step)

    def finish(self, model: Saved) -> None:
        """Write `final/` and mark the run finished."""
        finish_run(self.fabric, self.run, model, self.tokenizer, self.state)


class Step:
    """One optimizer step of a `TrainLoop` on `batches`; the loop logs `metrics`, which a task may replace."""

    def __init__(self, loop: TrainLoop, number: int, batches: Any) -> None:
        self.batches = batches
        self.metrics: dict[str, float] = {}
        self._loop, self._number = loop, number

    def update(self, loss_fn: LossFn, micro_batches: list[MicroBatch] | None = None) -> dict[str, float]:
        """All ranks: take the step, as `engine.step.update`; by default on `batches`."""
        loop, run, state = self._loop, self._loop.run, self._loop.state
        self.metrics = update(
            loop.fabric,
            loop.module,
            loop.optimizer,
            self.batches if micro_batches is None else micro_batches,
            loss_fn,
            max_grad_norm=run.cfg.task.max_grad_norm,
            skip=run.skip_step,
        )
        state.step = self._number + 1
        state.items_seen += int(self.metrics["items"])
        num_tokens = loop.rows.lengths[loop.plan.rows_of_step(self._number)].sum()
        run.show_progress(state.step, f"loss {self.metrics['loss']:.4f}", num_tokens)
        return self.metrics

    @property
    def validates(self) -> bool:
        """True if a validation follows the update."""
        return self._loop.held_out is not None and self._loop.due(self._loop.run.cfg.task.eval_interval)


class RolloutLoop:
    """The iterations of an RL run. Every method is called on all ranks.

    An iteration is one rollout and the optimizer steps on it. Checkpoints are written between iterations only, so that
    a resumed run samples the same rollouts again. `state.step` counts optimizer steps, also those that an iteration
    skips (`task.early_stop_kl`, prompts without a pair). The last iteration ends within its rollout if
    `task.max_num_steps` says so.

    ```python
    loop = RolloutLoop(fabric, run)  # data, models
    loop.begin()  # optimizer, reference, seed, newest checkpoint
    batches = loop.batches("logprobs", "advantages")
    for iteration in loop:  # samples and scores a rollout; afterwards: log, validation, checkpoint, signals
        rollout = iteration.rollout.with_tokens(advantages=...)
        for _, micro_batches in iteration.steps(rollout, batches):  # learning rate
            iteration.update(micro_batches, loss_fn)
    loop.finish()  # final/
    ```

    Attributes:
        rows: rows whose prompts are answered; an epoch is a pass over them. With `data.streaming`, those of the shard
            that is trained on.
        models: policy, and critic and reward model if the task has them.
        module: the policy as wrapped by Fabric; set by `begin`, like those below.
        optimizer: of all trained parameters.
        collect: samples and scores.
        state: the progress of the run.
    """

    module: _FabricModule
    optimizer: Optimizer
    collect: RolloutCollector
    state: TrainState

    def __init__(self, fabric: Fabric, run: Run) -> None:
        """Prepare the data, load the models, take the policy as the reference, or the teacher if there is one.

        Raises SheepError if something cannot be loaded, or rows lack a response that the task or the reward reads.
        """
        assert isinstance(run.cfg.task, OnlineTaskConfig)
        self.fabric, self.run, self.task = fabric, run, run.cfg.task
        self._setup = load_online_setup(fabric, run)
        self.tokenizer, self.rows, self.models = self._setup.tokenizer, self._setup.rows, self._setup.models
        self._reference = self.models.teacher or reference_of(
            self.models.policy, new_adapter=run.cfg.model.adapter is None
        )

    def begin(
        self,
        trained: tuple[_FabricModule, Optimizer] | None = None,
        learners: nn.Module | None = None,
        eval_weights: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Place the models, seed the random generators, restore the newest checkpoint if there is one.

        Args:
            trained: the policy as wrapped by Fabric, and the optimizer of everything that trains; None makes both.
            learners: everything that trains and is saved; None is the policy only.
            eval_weights: within this block the policy has the weights that are validated and exported.

        Raises:
            SheepError: the reward's functions cannot be imported, or the checkpoint does not fit.
        """
        fabric, run = self.fabric, self.run
        self.module, self.optimizer = trained or set_up(fabric, run.cfg.optim, self.models.policy, run.cfg.peak_lr())
        self._eval_weights = eval_weights
        if isinstance(self._reference, Policy):  # else it is on the policy's base
            place(fabric, self._reference)
        self.collect = build_collector(fabric, run, self._setup, self._reference)
        torch.manual_seed(run.cfg.seed + data_rank(fabric).rank)  # equal weights on all ranks, other dropout
        self.state = run.restore(self.module if learners is None else learners, self.optimizer)
        self.collect.restore(self.state.extra)
        held_out = self._setup.held_out
        self._validate = None if held_out is None else RolloutValidator(run, self.collect, held_out)

    def batches(self, *names: str, num_items: Callable[[Batch], int] | None = None) -> Batches:
        """Cut rows into batches whose targets are the responses' tokens, with the values of these names next to them.

        A step's loss is divided by `num_items`, by default the number of targets.
        """
        return Batches(
            self.fabric,
            self.task,
            packed=self.models.policy.packed,
            targets="response",
            num_items=num_items,
            extras=partial(token_values, names=names) if names else None,
        )

    def update(self, module: _FabricModule, micro_batches: list[MicroBatch], loss_fn: LossFn) -> dict[str, float]:
        """Take an optimizer step as `engine.step.update`; return its metrics, none if the step was skipped."""
        max_grad_norm, skip = self.task.max_grad_norm, self.run.skip_step
        metrics = update(
            self.fabric, module, self.optimizer, micro_batches, loss_fn, max_grad_norm=max_grad_norm, skip=skip
        )
        return metrics if metrics["items"] else {}

    def __iter__(self) -> Iterator["Iteration"]:
        """Yield the remaining iterations. After each: log, validate, save a checkpoint, act on signals."""
        run, state, task = self.run, self.state, self.task
        stream, extra = self._setup.stream, state.extra
        if stream is not None:
            begins_at = {name: int(extra.get(name, 0)) for name in ("shard_step", "shard_rollout")}
            self._open_shard(int(extra.get("shard", 0)), **begins_at)
        whole = self._plan_of_shard()
        total, first = whole.num_steps(), whole.rollout_after(state.step)
        if task.eval_at_start and state.step == 0:
            self._record_validation()
        if state.step < total and whole.steps_before(first) != state.step:
            raise ConfigError(
                f"resume_from={run.cfg.resume_from} ended after step {state.step}, within a rollout, and cannot go on: "
                "extend a run whose task.max_num_steps is a whole number of rollouts"
            )
        run.begin_progress(state.step, total)
        num_rollouts = whole.rollout_after(total)
        if stream is not None:  # at least; the sizes of later shards are not known
            num_rollouts = -(-total // whole.steps_of_full_rollout())
        saved, servers = saved_rollouts(num_rollouts, task.save_rollouts), self.collect.servers
        if servers is not None:
            servers.restore(first)
        for number, plan, stop in self._rollouts(whole, total):
            if task.stops_early(state.stale_validations):
                return
            iteration = self._sample(number, plan, stop)
            if number == 0 and task.self_check != "off":
                check_sampler(run, self.collect, iteration.rollout)
            began = time.perf_counter()
            yield iteration
            lr = self.optimizer.param_groups[0]["lr"]
            iteration.log({"time/update": time.perf_counter() - began, "train/lr": lr})
            if number in saved and self.fabric.is_global_zero:
                write_rollout(run.dir, iteration.rollout, number, state.step)
            self._end(iteration, plan)

    def _rollouts(self, plan: RolloutPlan, total: int) -> Iterator[tuple[int, RolloutPlan, int]]:
        """Yield the number and the plan of each remaining rollout, and the number after the last one of its shard."""
        stream, state = self._setup.stream, self.state
        if stream is None:
            stop = plan.rollout_after(total)
            yield from ((number, plan, stop) for number in range(plan.rollout_after(state.step), stop))
            return
        with closing(stream):
            while state.step < total:
                end = plan.prompts.first_step + plan.prompts.steps_per_epoch()
                if plan.steps_before(end) < total:
                    stream.prepare_ahead(plan.prompts.first_epoch + 1)
                stop = min(end, plan.rollout_after(total))
                yield from ((number, plan, stop) for number in range(plan.rollout_after(state.step), stop))
                if state.step < total:
                    with self.run.saved_at(DataError):
                        self._open_shard(plan.prompts.first_epoch + 1, shard_step=state.step, shard_rollout=end)
                    plan = self._plan_of_shard()

    def _sample(self, number: int, plan: RolloutPlan, stop: int) -> "Iteration":
        """Make rollout `number`; servers go on with those after it, before `stop`, as `rollout.max_staleness` says."""
        began = time.perf_counter()

        def prompts_of(rollout: int) -> list[Example]:
            return self.rows.examples(plan.prompts.rows_of_step(rollout).tolist())

        with self.run.saved_at(RewardError, RolloutServerError):
            rollout = self.collect(prompts_of(number), number)
            last = min(number + getattr(self.run.cfg.rollout, "max_staleness", 0), stop - 1)
            self.collect.sample_ahead([(later, prompts_of(later)) for later in range(number + 1, last + 1)], number)
        iteration = Iteration(self, number, plan, rollout)
        iteration.log(iteration.metrics | {"time/rollout": time.perf_counter() - began})
        return iteration

    def _open_shard(self, number: int, **begins_at: int) -> None:
        """Answer the prompts of shard `number` of the stream from now on; raises DataError if it cannot be used."""
        assert self._setup.stream is not None
        data = self._setup.stream.open_shard(number, self.state.extra, **begins_at)
        self.rows = rows_of_shard(self.run.cfg, self._setup.columns, data)

    def _plan_of_shard(self) -> RolloutPlan:
        """The plan of the run; with `data.streaming` of the shard that is open, as if it came again and again."""
        cfg, task, extra = self.run.cfg, self.task, self.state.extra
        epochs = task.epochs if self._setup.stream is None else task.max_num_steps or 1
        shard, rollout, step = (int(extra.get(name, 0)) for name in ("shard", "shard_rollout", "shard_step"))
        prompts = StepPlan(
            len(self.rows), task.prompts_per_rollout(), epochs, cfg.seed, cfg.data.shuffle, rollout, first_epoch=shard
        )
        return RolloutPlan(prompts, task.prompts_per_step(), task.num_iterations, task.max_num_steps, step)

    def _end(self, iteration: "Iteration", plan: RolloutPlan) -> None:
        run, state, task, num_steps = self.run, self.state, self.task, plan.num_steps()
        before, state.step = state.step, min(plan.steps_before(iteration.number + 1), num_steps)
        last = state.step == num_steps
        num_tokens = sum(iteration.rollout.response_lengths)
        state.items_seen += num_tokens
        state.extra = iteration.extra_state | self.collect.state()
        means = iteration.means()
        scores, kl = means["objective/scores"], means["objective/kl"]
        run.show_progress(state.step, f"score {scores:.3f}, KL {kl:.2f}", num_tokens)

        def due(interval: int) -> bool:
            return last or state.step // interval > before // interval

        if due(task.log_interval):
            stream = self._setup.stream
            epoch = plan.prompts.epochs_before(iteration.number + 1) / (1 if stream is None else len(stream))
            run.log(means | {"train/epoch": epoch} | run.usage(), state.step)
        if self._validate is not None and due(task.eval_interval):
            self._record_validation()
        last = last or task.stops_early(state.stale_validations)
        save, servers = due(task.save_interval) or state.best_step == state.step, self.collect.servers
        with servers.saving(iteration.number + 1) if save and servers is not None else nullcontext():
            run.end_step(save=save, last=last)

    def _record_validation(self) -> None:
        assert self._validate is not None
        with self.run.saved_at(RewardError, RolloutServerError), self._eval_weights():
            result = self._validate(self.state.step)
        record_validation(self.run, self.state, result, "objective", highest=True)

    def finish(self) -> None:
        """Write `final/` and mark the run finished."""
        with self._eval_weights():
            finish_run(self.fabric, self.run, self.models.policy, self.tokenizer, self.state)
        if self.collect.servers is not None:
            self.collect.servers.finish()


class Iteration:
    """One rollout of a `RolloutLoop` and the optimizer steps on it.

    Attributes:
        number: counted from 0.
        rollout: the sampled and scored responses; from `steps` on with the advantages of their tokens.
        metrics: numbers of the rollout.
        extra_state: small numbers that the task gets back in the next iteration, also after a resume.
    """

    def __init__(self, loop: RolloutLoop, number: int, plan: RolloutPlan, rollout: Rollout) -> None:
        self.number, self.rollout, self.metrics = number, rollout, rollout.metrics
        self.extra_state: dict[str, Any] = dict(loop.state.extra)
        self._loop, self._plan = loop, plan
        self._values: dict[str, list[float]] = {}
        self._approxkl = 0.0  # of the newest update

    def steps(self, rollout: Rollout, batches: Batches) -> Iterator[tuple[int, list[MicroBatch]]]:
        """Yield the number of each optimizer step on the rollout and this rank's micro-batches; set the learning rate.

        Every pass over the rollout has an order of its own. No step follows an update whose approximate KL divergence
        exceeds `task.early_stop_kl`. Raises NonFiniteError if something in the rollout is not finite.
        """
        check_finite(rollout)
        if {"advantages", "importance"} <= rollout.tokens.keys():  # older samples: truncated weights, arXiv 2505.24298
            rollout = rollout.with_tokens(advantages=rollout.flat("advantages") * rollout.flat("importance"))
        if "advantages" in rollout.tokens:  # the same rows; not the pairs of online DPO
            self.rollout = rollout
        loop, cfg, task = self._loop, self._loop.run.cfg, self._loop.task
        plan = StepPlan(len(rollout), task.prompts_per_step(), task.num_iterations, cfg.seed + self.number)
        num_steps, first = self._plan.num_steps(), self._plan.steps_before(self.number)
        steps = range(min(plan.num_steps(), num_steps - first))
        loaded = load_ahead(lambda index: batches.of(rollout, plan.rows_of_step(index)), steps, task.num_workers)
        for step, micro_batches in enumerate(loaded, first):
            follow_schedule(loop.optimizer, cfg.optim, step, warmup=task.num_warmup_steps(num_steps), total=num_steps)
            yield step, micro_batches
            if self._approxkl > (getattr(task, "early_stop_kl", None) or math.inf):
                return

    def update(self, micro_batches: list[MicroBatch], loss_fn: LossFn) -> dict[str, float]:
        """All ranks: take an optimizer step of the policy and log it; return its metrics, none if it was skipped."""
        metrics = self._loop.update(self._loop.module, micro_batches, loss_fn)
        self._approxkl = metrics.get("approxkl", 0.0)
        if metrics:
            losses = {"policy": metrics.pop("loss")}  # the sum, where the loss function reports both parts
            losses |= {name: metrics.pop(name) for name in ("policy", "value") if name in metrics}
            self.log(losses, "loss/")
            for name, value in metrics.items():  # rewards/* are named as in tasks that learn from pairs
                self.log({name: value}, "train/" if "/" in name else "policy/")
        return metrics

    def log(self, metrics: dict[str, float], prefix: str = "") -> None:
        """Add numbers of an optimizer step, or of the whole iteration; their means are logged at its end."""
        for name, value in metrics.items():
            self._values.setdefault(f"{prefix}{name}", []).append(value)

    def means(self) -> dict[str, float]:
        """Return the mean of every number that was added."""
        return {name: sum(values) / len(values) for name, values in self._values.items()}
