"""Micro-batches of this rank from the rows of a split, and the choice between packed and padded batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data._utils.pin_memory import pin_memory
from tqdm import tqdm
from transformers import PreTrainedModel

from sheeprlhf.data.example import Batch, Example, collate_packed, collate_padded
from sheeprlhf.data.sampler import cut_micro_batches
from sheeprlhf.data.store import TokenizedSplit
from sheeprlhf.engine.shard import data_rank
from sheeprlhf.engine.step import MicroBatch
from sheeprlhf.model.attention import tolerance
from sheeprlhf.model.folder.architecture import packing_limit
from sheeprlhf.model.lm_head import TokenLogprobs
from sheeprlhf.utils.errors import ModelError, Notify
from sheeprlhf.utils.lightning import Fabric, move_data_to_device
from sheeprlhf.utils.modes import eval_mode


class BatchOptions(Protocol):
    """The options that cut rows into forward passes; training and evaluation tasks have them."""

    mini_batch_size: int
    token_budget: int


class Rows(Protocol):
    """Rows that can be cut into batches: a split of a dataset, or a rollout."""

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) tokens of each row."""

    def __len__(self) -> int:
        """Number of rows."""

    def examples(self, indices: Sequence[int]) -> list[Example]:
        """Some of them."""


@dataclass(frozen=True)
class MappedRows:
    """Rows whose examples are changed when they are read; none gets longer."""

    rows: Rows
    change: Callable[[Example], Example]

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) tokens of each row at most."""
        return self.rows.lengths

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def examples(self, indices: Sequence[int]) -> list[Example]:
        """Some of them, changed."""
        return list(map(self.change, self.rows.examples(indices)))


class Batches:
    """Cuts rows into micro-batches, the same way for every loss.

    Args:
        fabric: tells this rank from the others.
        options: `mini_batch_size`, `token_budget`, and `micro_batch_size` and `pin_memory` where the task has them.
        packed: lay rows end to end; else pad them.
        targets: "response" or "all", the tokens to predict.
        num_items: what a step's loss is divided by, counted in one batch; None counts its targets.
        extras: called with the split and the rows of a micro-batch; returns further inputs of its loss.
    """

    def __init__(
        self,
        fabric: Fabric,
        options: BatchOptions,
        *,
        packed: bool,
        targets: str,
        num_items: Callable[[Batch], int] | None = None,
        extras: Callable[[Any, list[int]], Any] | None = None,
    ) -> None:
        most, data = getattr(options, "micro_batch_size", options.mini_batch_size), data_rank(fabric)
        self._cut: dict[str, Any] = {
            "max_rows": max(1, most // getattr(options, "num_generations", 1)),
            "token_budget": options.token_budget,
            "rank": data.rank,
            "world_size": data.size,
        }
        self._collate: Callable[[Sequence[Example]], Batch] = (
            partial(collate_packed, targets=targets) if packed else partial(collate_padded, pad_id=0, targets=targets)
        )
        self._num_items = num_items
        self._extras = extras
        self._pins = getattr(options, "pin_memory", False) and fabric.device.type == "cuda"

    def of(self, split: Rows, rows: np.ndarray) -> list[MicroBatch]:
        """This rank's micro-batches of some rows of a split; may be none."""
        return [self._collated(split, part) for part in cut_micro_batches(rows, split.lengths, **self._cut)]

    def first(self, split: Rows, num_rows: int | None, label: str) -> Iterator[MicroBatch]:
        """This rank's micro-batches of a split's first rows, or of all, each made when it is asked for, under a bar."""
        rows = np.arange(min(len(split), num_rows or len(split)))
        return (micro for _, micro in self.numbered(split, rows, label))

    def numbered(self, split: Rows, rows: np.ndarray, label: str) -> Iterator[tuple[list[int], MicroBatch]]:
        """The same of some rows, each with the rows that it is made of."""
        parts = cut_micro_batches(rows, split.lengths, **self._cut)
        hidden = None if self._cut["rank"] == 0 else True  # None: shown in a terminal only
        with tqdm(total=sum(map(len, parts)), desc=label, unit=" rows", leave=False, disable=hidden) as bar:
            for part in parts:
                yield part, self._collated(split, part)
                bar.update(len(part))

    def _collated(self, split: Rows, part: list[int]) -> MicroBatch:
        batch = self._collate(split.examples(part))
        content = batch if self._extras is None else (batch, self._extras(split, part))
        if self._pins:  # Fabric copies without waiting; from other memory the driver would wait all the same
            content = pin_memory(content)
        num_items = len(batch.target_ids_N) if self._num_items is None else self._num_items(batch)
        return MicroBatch(content, num_items, batch.row_ids)


def longest_row(splits: Mapping[str, TokenizedSplit]) -> int:
    """Tokens of the longest sequence that a model sees in any split: a prompt with the longest of its responses."""
    longest = [rows.sizes[:, 0] + rows.sizes[:, 1:].max(axis=1, initial=0) for rows in splits.values() if len(rows)]
    return max(int(of_split.max()) for of_split in longest)


def choose_packed(
    scored: nn.Module,
    model: PreTrainedModel,
    *,
    longest: int,
    batching: str,
    say: Notify = lambda _: None,
) -> bool:
    """Decide whether batches of a `Policy` or `RewardModel` are packed: packed and padded numbers have to be equal.

    `scored` contains the Hugging Face model, which will see rows of up to `longest` tokens. `batching` "auto" packs
    them if `packing_problem` finds none; "packed" raises ModelError if there is one.
    """
    if batching == "padded":
        return False
    problem = packing_problem(scored, model, longest)
    check_batching(batching, problem)
    if problem:
        say(f"batches are padded, not packed: {problem}")
    return not problem


def check_batching(batching: str, problem: str) -> None:
    """Raises ModelError if packed batches are asked for and there is a problem with them."""
    if problem and batching == "packed":
        raise ModelError(f"task.batching=packed: {problem}; set task.batching=padded")


def packing_problem(scored: nn.Module, model: PreTrainedModel, longest: int) -> str:
    """The reason that this model cannot compute packed batches of up to `longest` tokens; empty if it can."""
    problem = packing_limit(model, longest)
    if problem:
        return problem
    try:
        difference = packing_difference(scored)
    except (TypeError, ValueError, LookupError) as error:  # the model refuses an argument that packed batches need
        return str(error)
    if difference <= packing_tolerance(scored):
        return ""
    return f"packed and padded results of {type(model).__name__} differ by {difference:.2g}"


def packing_tolerance(scored: nn.Module) -> float:
    """Tolerance between packed and padded results, nats or units of the score, in the weights' number format."""
    return tolerance(next(scored.parameters()))


def packing_difference(scored: nn.Module) -> float:
    """Difference between packed and padded results of two short examples, nats or units of the score.

    Raises TypeError, ValueError, LookupError if the model's code refuses what packed batches need.
    """
    ids = np.arange(12, dtype=np.int32) % 5 + 3
    examples = [Example(0, ids[:4], (ids[4:9],)), Example(1, ids[1:3], (ids[2:12],))]
    device = next(scored.parameters()).device

    def result(batch: Batch) -> Tensor:
        output: TokenLogprobs | Tensor = scored(cast(Batch, move_data_to_device(batch, device)))
        return output if isinstance(output, Tensor) else output.target_N

    with eval_mode(scored), torch.no_grad():
        packed = result(collate_packed(examples))
        padded = result(collate_padded(examples, pad_id=0))
    return float((packed - padded).abs().max())
