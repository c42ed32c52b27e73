"""From rows to micro-batches: every row once over all ranks, within the budget, whatever the cut."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from torch.utils._pytree import tree_leaves

from sheeprlhf.agent.batches import Batches, longest_row
from sheeprlhf.data.example import Example
from sheeprlhf.data.store import TokenizedSplit
from tests.support.batches import random_examples


class Rows:
    """A split in memory; counts what is read."""

    def __init__(self, examples: list[Example]) -> None:
        self._examples = examples
        self.lengths = np.array([example.num_tokens() for example in examples], np.int32)
        most = max((len(example.responses) for example in examples), default=1)
        self.sizes = np.full((len(examples), 1 + most), -1, np.int32)
        for number, (_, prompt, responses, *_) in enumerate(examples):
            self.sizes[number, : 1 + len(responses)] = [len(prompt), *map(len, responses)]
        self.num_read = 0

    def __len__(self) -> int:
        return len(self._examples)

    def examples(self, indices: Any) -> list[Example]:
        self.num_read += len(indices)
        return [self._examples[index] for index in indices]


def rows(num_rows: int = 23) -> tuple[TokenizedSplit, Rows]:
    split = Rows(random_examples(num_rows))
    return cast(TokenizedSplit, split), split


def batches(rank: int = 0, world_size: int = 1, *, packed: bool = True, targets: str = "response", **options: Any):
    fabric = cast(Fabric, SimpleNamespace(global_rank=rank, world_size=world_size, strategy=None))
    defaults = {"mini_batch_size": 8, "token_budget": 1000}
    return Batches(fabric, SimpleNamespace(**defaults | options), packed=packed, targets=targets)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 3}, {"token_budget": 25}, {"token_budget": 1}])
def test_every_row_once_within_the_budget(packed: bool, world_size: int, options: dict[str, int]) -> None:
    split, held = rows()
    asked = np.array([3, 1, 4, 15, 9, 2, 6, 5, 22, 0, 11])
    seen: list[int] = []
    num_targets = 0
    for rank in range(world_size):
        for micro in batches(rank, world_size, packed=packed, **options).of(split, asked):
            lengths = held.lengths[list(micro.row_ids)]
            assert len(micro.row_ids) <= options.get("micro_batch_size", 8)
            assert len(micro.row_ids) == 1 or lengths.sum() <= options.get("token_budget", 1000)
            assert micro.num_items == len(micro.batch.target_ids_N)
            assert (micro.batch.layout is None) != packed
            assert micro.batch.row_ids == micro.row_ids
            seen += micro.row_ids
            num_targets += micro.num_items
    assert sorted(seen) == sorted(asked)
    assert num_targets == sum(len(held.examples([row])[0].responses[0]) for row in asked)


@pytest.mark.parametrize(("pins", "device"), [(True, "cuda"), (False, "cuda"), (True, "cpu")])
def test_all_tensors_of_a_micro_batch_are_pinned_if_asked(
    pins: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, _ = rows(6)
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    fabric = cast(Fabric, SimpleNamespace(global_rank=0, world_size=1, strategy=None, device=torch.device(device)))
    options = SimpleNamespace(mini_batch_size=4, token_budget=1000, pin_memory=pins)
    cut = Batches(fabric, options, packed=True, targets="response", extras=lambda _, part: torch.ones(len(part)))
    moved = [x for micro in cut.of(split, np.arange(6)) for x in tree_leaves(micro.batch) if torch.is_tensor(x)]
    expected = [id(tensor) for tensor in pinned]
    assert len(moved) > 20 and (expected == [id(x) for x in moved] if pins and device == "cuda" else not expected)


@pytest.mark.parametrize("packed", [True, False])
def test_all_targets_are_the_prompts_too(packed: bool) -> None:
    split, held = rows(6)
    micros = batches(packed=packed, targets="all").of(split, np.arange(6))
    assert sum(micro.num_items for micro in micros) == int(held.lengths.sum()) - 6  # no first token is predicted


def test_items_may_be_counted_differently() -> None:
    split, _ = rows(6)
    fabric = cast(Fabric, SimpleNamespace(global_rank=0, world_size=1, strategy=None))
    options = SimpleNamespace(mini_batch_size=4, token_budget=1000)
    cut = Batches(fabric, options, packed=True, targets="response", num_items=lambda batch: len(batch.response_lengths))
    assert sorted(micro.num_items for micro in cut.of(split, np.arange(6))) == [2, 4]


def test_an_evaluation_reads_the_first_rows_one_batch_at_a_time() -> None:
    for num_rows, expected in ((None, 23), (10, 10), (100, 23)):
        split, held = rows()
        found = batches(mini_batch_size=4).first(split, num_rows, "validation")
        assert held.num_read == 0
        first = next(found)
        assert held.num_read == len(first.row_ids) == 4
        ids = [*first.row_ids, *(row for micro in found for row in micro.row_ids)]
        assert sorted(ids) == list(range(expected))


def test_of_ranked_responses_the_longest_sequence_counts_not_their_sum() -> None:
    """The model's positions are for a prompt and one response: the next response goes on from the prompt again."""
    ids = np.arange(100, dtype=np.int32)
    pair = Example(0, ids[:4], (ids[:9], ids[:30]))
    ranked = Example(1, ids[:20], (ids[:5], ids[:6], ids[:7]))
    assert longest_row({"train": cast(TokenizedSplit, Rows([ranked, pair]))}) == 34
    alone = Example(2, ids[:40], ())
    assert longest_row({"train": cast(TokenizedSplit, Rows([ranked, pair, alone]))}) == 40
    assert longest_row({"train": cast(TokenizedSplit, Rows([alone]))}) == 40


def test_the_longest_row_of_any_split() -> None:
    splits = {"train": rows(5)[0], "test": rows(23)[0], "validation": cast(TokenizedSplit, Rows([]))}
    assert longest_row(splits) == max(example.num_tokens() for example in random_examples(23))
