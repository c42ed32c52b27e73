"""The rows of an optimizer step as a pure function of (seed, step); each rank takes its share of them."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from sheeprlhf.utils.errors import DataError


class StepPlan(NamedTuple):
    """The order of a run: the rows of an epoch, in a permutation of its own if `shuffle` is true, cut into steps."""

    num_rows: int  # rows of the split, N >= 1
    rows_per_step: int  # rows of one optimizer step over all ranks, G >= 1; the last step of an epoch may have fewer
    epochs: int  # passes over the rows
    seed: int  # the run's seed
    shuffle: bool = True  # false keeps the order of the rows in every epoch
    first_step: int = 0  # optimizer step with which the plan begins
    first_epoch: int = 0  # number of its first epoch, which chooses the permutation

    def steps_per_epoch(self) -> int:
        """ceil(N / G) optimizer steps. Raises DataError if there are no rows."""
        if self.num_rows < 1:
            raise DataError("there are no rows to train on: see the data report for what was dropped and why")
        return -(-self.num_rows // self.rows_per_step)

    def num_steps(self) -> int:
        """Optimizer steps of all epochs."""
        return self.epochs * self.steps_per_epoch()

    def end(self) -> int:
        """The first optimizer step after those of the plan."""
        return self.first_step + self.num_steps()

    def epoch_of(self, step: int) -> int:
        """The epoch, counted from 0, that optimizer step `step` (from 0) belongs to."""
        return self.first_epoch + (step - self.first_step) // self.steps_per_epoch()

    def epochs_before(self, step: int) -> float:
        """Passes over the rows before optimizer step `step`."""
        return self.first_epoch + (step - self.first_step) / self.steps_per_epoch()

    def rows_of_step(self, step: int) -> np.ndarray:
        """The (<= G,) row indices of optimizer step `step`, all ranks together; never empty."""
        epoch, number = self.epoch_of(step), (step - self.first_step) % self.steps_per_epoch()
        order = _permutation(self.num_rows, self.seed, epoch) if self.shuffle else np.arange(self.num_rows)
        return order[number * self.rows_per_step : (number + 1) * self.rows_per_step]

    def rows_until(self, num_steps: int) -> np.ndarray:
        """The rows that the steps before step `num_steps` read, ascending, each once."""
        if num_steps - self.first_step >= self.steps_per_epoch():
            return np.arange(self.num_rows)
        return np.unique(np.concatenate([self.rows_of_step(step) for step in range(self.first_step, num_steps)]))


class RolloutPlan(NamedTuple):
    """Optimizer steps of a run with `passes` over each rollout; the last one of an epoch may have fewer prompts."""

    prompts: StepPlan  # the order of the prompts; one of its "steps" is a rollout
    prompts_per_step: int  # prompts of one optimizer step, all ranks together
    passes: int  # passes over a rollout
    max_num_steps: int | None = None  # the run ends after this many, also inside of a rollout; None: at the end
    first_step: int = 0  # optimizer steps before the first rollout of `prompts`, whose number is `prompts.first_step`

    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        steps = self.steps_before(self.prompts.end())
        return steps if self.max_num_steps is None else min(steps, self.max_num_steps)

    def steps_before(self, number: int) -> int:
        """Optimizer steps of all rollouts before rollout `number`, counted from 0."""
        per_epoch = self.prompts.steps_per_epoch()
        epoch, within = divmod(number - self.prompts.first_step, per_epoch)
        return self.first_step + epoch * self._steps_per_epoch() + within * self.steps_of_full_rollout()

    def rollout_after(self, step: int) -> int:
        """The first rollout that begins at optimizer step `step` or later."""
        epoch, within = divmod(step - self.first_step, self._steps_per_epoch())
        before = self.prompts.first_step + epoch * self.prompts.steps_per_epoch()
        return before - (-within // self.steps_of_full_rollout())

    def steps_of_full_rollout(self) -> int:
        """Optimizer steps on a rollout that is not the last of an epoch."""
        return self._steps(self.prompts.rows_per_step)

    def _steps_per_epoch(self) -> int:
        full = self.prompts.steps_per_epoch() - 1
        last = self.prompts.num_rows - full * self.prompts.rows_per_step
        return full * self.steps_of_full_rollout() + self._steps(last)

    def _steps(self, num_prompts: int) -> int:
        """Optimizer steps on a rollout of so many prompts."""
        return self.passes * -(-num_prompts // self.prompts_per_step)


@lru_cache(maxsize=2)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch, kept because each of its steps asks for it."""
    order = np.random.default_rng([seed, epoch]).permutation(num_rows)
    order.setflags(write=False)
    return order


def cut_micro_batches(
    rows: ArrayLike, lengths: np.ndarray, *, max_rows: int, token_budget: int, rank: int, world_size: int
) -> list[list[int]]:
    """This rank's share of a step's rows, cut into micro-batches of rows of similar length.

    The longest row goes first, each to the rank with the fewest tokens so far. The cut changes speed and memory, never
    the result of a step.

    Args:
        rows: the step's row indices, the same on every rank.
        lengths: tokens of every row of the split (`TokenizedSplit.lengths`), indexed by row.
        max_rows: most rows of a micro-batch.
        token_budget: most tokens of a micro-batch; a longer row forms one by itself.
        rank: this process, of `world_size`.
        world_size: number of processes.

    Returns:
        Lists of row indices, longest rows first; none if there are fewer rows than ranks.
    """
    indices = np.asarray(rows, dtype=np.int64)
    tokens = np.asarray(lengths)[indices]
    by_length = np.argsort(-tokens.astype(np.int64), kind="stable")
    loads = [(0, r) for r in range(world_size)]
    batches: list[list[int]] = []
    room = 0  # tokens that the newest batch of this rank still takes
    for row, size in zip(indices[by_length].tolist(), tokens[by_length].tolist(), strict=True):
        load, owner = min(loads)
        loads[owner] = (load + size, owner)
        if owner != rank:
            continue
        if not batches or size > room or len(batches[-1]) == max_rows:
            batches.append([])
            room = token_budget
        batches[-1].append(row)
        room -= size
    return batches
