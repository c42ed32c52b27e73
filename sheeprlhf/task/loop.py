"""The training loop of tasks that learn from a dataset: everything around an optimizer step except its loss.

```python
loop = TrainLoop(fabric, run)  # data, order of the rows, number of steps
module = loop.set_up(policy)  # optimizer; wrapped by Fabric
loop.begin(partial(batches.of, loop.rows))  # seed; the newest checkpoint if there is one
for step in loop:  # learning rate, log, checkpoints, signals
    step.update(loss_fn)
    if step.validates:
        step.record(evaluate(fabric, module, loop.validation_batches(batches), loss_fn))
loop.finish(policy)  # final/
```
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from sheeprlhf.agent.batches import Batches, Rows, longest_row
from sheeprlhf.agent.policy import Policy
from sheeprlhf.data.loader import load_ahead
from sheeprlhf.data.prepare import prepare_data
from sheeprlhf.data.sampler import StepPlan
from sheeprlhf.engine.checkpoint import TrainState
from sheeprlhf.engine.optim import follow_schedule, set_up
from sheeprlhf.engine.run import Run
from sheeprlhf.engine.step import LossFn, MicroBatch, update
from sheeprlhf.model.load import load_tokenizer
from sheeprlhf.task.finish import Saved, finish_run, record_validation, report_data
from sheeprlhf.task.samples import log_samples
from sheeprlhf.utils.lightning import Fabric, _FabricModule


class TrainLoop:
    """The optimizer steps of one run. Every method is called on all ranks.

    Attributes:
        tokenizer: the model's.
        data: the prepared dataset.
        split: name of the split that the task trains on: the first of `task.train_splits` that has rows.
        rows: that split.
        held_out: the validation split; None if it has no rows.
        held_out_rows: the rows of it that every validation reads.
        longest: tokens of the longest sequence in any split.
        plan: the rows of each step.
        num_steps: optimizer steps of the whole run.
        module: the trained model as wrapped by Fabric; set by `set_up`.
        optimizer: its optimizer; set by `set_up`.
        load: called with the rows of a step, returns this rank's batches of them; set by `begin`.
        state: the progress of the run; set by `begin`.
    """

    module: _FabricModule
    optimizer: Optimizer
    load: Callable[[np.ndarray], Any]
    state: TrainState

    def __init__(self, fabric: Fabric, run: Run) -> None:
        """Prepare and report the data.

        Raises:
            SheepError: the tokenizer cannot be loaded or the data cannot be used.
        """
        cfg, task = run.cfg, run.cfg.task
        self.fabric, self.run = fabric, run
        self.tokenizer = load_tokenizer(cfg.model)
        self.data = prepare_data(
            cfg.data, self.tokenizer, kind=task.data_kind, say=run.say, progress=fabric.is_global_zero
        )
        report_data(fabric, run, self.data)
        self.split = next(name for name in task.train_splits if name in self.data.splits)
        self.rows, self.held_out = self.data.splits[self.split], self.data.splits.get("validation") or None
        num_held_out = None if task.eval_iters is None else task.eval_iters * task.mini_batch_size
        self.held_out_rows = np.arange(len(self.held_out or ()))[:num_held_out]
        self.longest = longest_row(self.data.splits)
        self.plan = StepPlan(len(self.rows), task.mini_batch_size, task.epochs, cfg.seed)
        self.num_steps = min(self.plan.num_steps(), task.max_num_steps or self.plan.num_steps())

    def set_up(self, model: nn.Module) -> _FabricModule:
        """Make the optimizer of the model's trainable parameters, and wrap both with Fabric.

        Raises:
            ConfigError: nothing is trainable.
        """
        self.module, self.optimizer = set_up(self.fabric, self.run.cfg.optim, model, self.run.cfg.peak_lr())
        return self.module

    def begin(self, load: Callable[[np.ndarray], Any]) -> None:
        """Seed the random generators and restore the newest checkpoint, if there is one.

        Args:
            load: called with the rows of a step, returns this rank's batches of them.
        """
        self.load = load
        torch.manual_seed(self.run.cfg.seed + self.fabric.global_rank)  # equal weights on all ranks, other dropout
        self.state = self.run.restore(self.module, self.optimizer)

    def __iter__(self) -> Iterator["Step"]:
        """Yield the remaining steps. After each: log its metrics, save a checkpoint, act on signals."""
        run, state, task = self.run, self.state, self.run.cfg.task
        numbers = range(state.step, self.num_steps)
        loaded = load_ahead(lambda number: self.load(self.plan.rows_of_step(number)), numbers, task.num_workers)
        run.begin_progress(state, self.num_steps)
        for number, batches in zip(numbers, loaded, strict=True):
            lr = follow_schedule(
                self.optimizer, run.cfg.optim, number, warmup=task.lr_warmup_steps, total=self.num_steps
            )
            step = Step(self, number, batches)
            yield step
            if self.due(task.log_interval):
                run.log({f"train/{name}": value for name, value in step.metrics.items()} | {"train/lr": lr}, state.step)
            last = state.step == self.num_steps
            run.end_step(state, self.module, self.optimizer, save=self.due(task.save_interval), last=last)

    def due(self, interval: int) -> bool:
        """Return whether something that happens every `interval` steps follows the newest update."""
        return self.state.step == self.num_steps or self.state.step % interval == 0

    def validation_batches(self, batches: Batches, rows: Rows | None = None) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of the held-out rows.

        Args:
            batches: cuts and collates them.
            rows: another split with the same number of rows; None is the validation split.
        """
        rows = self.held_out if rows is None else rows
        assert rows is not None
        return (micro for _, micro in batches.numbered(rows, self.held_out_rows, "validating"))

    def log_samples(self, policy: Policy, rows: list[int] | None = None) -> None:
        """Log responses of the policy to a few held-out prompts.

        Args:
            policy: the model that writes.
            rows: held-out rows in the order of preference; None is their own order.
        """
        run, num_samples = self.run, getattr(self.run.cfg.task, "num_sample_prompts", 0)
        assert self.held_out is not None
        examples = self.held_out.examples((list(range(len(self.held_out))) if rows is None else rows)[:num_samples])
        log_samples(self.fabric, run, policy, self.tokenizer, examples, run.cfg.generation, self.state.step)

    def finish(self, model: Saved) -> None:
        """Write `final/` and mark the run finished."""
        finish_run(self.fabric, self.run, model, self.tokenizer, self.state)


class Step:
    """One optimizer step of a `TrainLoop`, at its learning rate.

    Attributes:
        batches: the result of the loop's `load` for this step.
        metrics: numbers of the update, which the loop logs; a task may replace them.
    """

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
            max_grad_norm=run.cfg.task.gradient_clip_val,
            skip=run.skip_step,
        )
        state.step = self._number + 1
        state.items_seen += int(self.metrics["items"])
        num_tokens = loop.rows.lengths[loop.plan.rows_of_step(self._number)].sum()
        run.show_progress(state, loop.num_steps, f"loss {self.metrics['loss']:.4f}", num_tokens)
        return self.metrics

    @property
    def validates(self) -> bool:
        """Whether a validation follows the update."""
        return self._loop.held_out is not None and self._loop.due(self._loop.run.cfg.task.eval_interval)

    def record(self, result: dict[str, float]) -> None:
        """All ranks: log a validation, and remember the step if its loss is the lowest so far."""
        record_validation(self._loop.run, self._loop.state, result)
