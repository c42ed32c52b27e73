"""Which row lends its response to which prompt, and what is left of it."""

from pathlib import Path

import numpy as np
import pytest

from sheeprlhf.data.store import MismatchedSplit, mismatched_rows
from tests.unit.data.toy import byte_tokenizer, local, prepare


@pytest.mark.parametrize(
    ("prompts", "partners"),
    [
        ([7, 8, 9], [1, 2, 0]),  # the next row
        ([7, 7, 8, 8, 9, 9], [2, 3, 4, 5, 0, 1]),  # pairs: good for good, bad for bad
        ([7, 8, 8, 7], [2, 3, 0, 1]),  # a run goes on around the end
        ([7, 8, 7, 8, 8], [3, 0, 4, 0, 2]),  # two ahead; rows 0, 1 and 4 meet their prompt there: the run after it
        ([7, 7, 7, 8], [3, 3, 3, 2]),  # one prompt rules: its rows share the only other one
        ([7, 7], [1, 0]),
        ([7], [0]),
    ],
)
def test_by_hand(prompts: list[int], partners: list[int]) -> None:
    assert mismatched_rows(np.array(prompts)).tolist() == partners


def test_another_prompt_always() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        prompts = rng.integers(0, rng.integers(2, 9), rng.integers(2, 40)).repeat(rng.integers(1, 4))
        if len(set(prompts.tolist())) > 1:
            assert (prompts[mismatched_rows(prompts)] != prompts).all(), prompts


def test_every_response_is_lent_once_where_prompts_stand_together() -> None:
    for repeats in (1, 2, 3):
        partners = mismatched_rows(np.arange(12).repeat(repeats))
        assert sorted(partners.tolist()) == list(range(12 * repeats))
        assert ((partners - np.arange(len(partners))) % len(partners) == repeats).all()


def test_responses_are_cut_to_the_room_that_there_is(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p" * 9, "response": "a", "label": True},
        {"prompt": "q", "response": "b" * 7, "label": False},
        {"prompt": "s", "response": "ccc", "label": True},
    ]
    data = prepare(local(tmp_path, rows), byte_tokenizer(), "unpaired")
    own = data.splits["train"]
    split = MismatchedSplit(data.folder / "train.arrow", int(own.lengths.max()))  # 11, of the first row
    found = split.examples(range(3))
    assert [(e.row_id, e.prompt_ids.tolist(), e.desirable) for e in found] == [
        (e.row_id, e.prompt_ids.tolist(), e.desirable) for e in own.examples(range(3))
    ]
    responses = [e.responses[0].tolist() for e in own.examples(range(3))]
    assert [e.responses[0].tolist() for e in found] == [responses[1][:2], responses[2], responses[0]]
    assert split.sizes.tolist() == [[9, 2], [1, 4], [1, 2]]
    assert split.lengths.tolist() == [11, 5, 3]
    assert own.sizes.tolist() == [[9, 2], [1, 8], [1, 4]]
