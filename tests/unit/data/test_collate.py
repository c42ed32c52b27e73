"""Batches against numbers worked out by hand, and against a brute-force reading of who sees what."""

import numpy as np
import pytest
import torch

from sheeprlhf.data.example import Example, collate_packed, collate_padded
from tests.support.batches import as_read, by_definition
from tests.unit.data.toy import example

EOS = 9


def test_packed_one_response() -> None:
    batch = collate_packed([example([1, 2, 3], [4, EOS], row_id=7), example([5], [6, 7, EOS], row_id=3)])
    assert batch.input_ids_BT.tolist() == [[1, 2, 3, 4, EOS, 5, 6, 7, EOS]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert batch.head_positions_R.tolist() == [2, 3, 5, 6, 7]
    assert batch.logit_index_N.tolist() == [0, 1, 2, 3, 4]
    assert batch.target_ids_N.tolist() == [4, EOS, 6, 7, EOS]
    assert batch.response_index_N.tolist() == [0, 0, 1, 1, 1]
    assert (len(batch.response_lengths), batch.row_ids, batch.attention_mask_BT) == (2, (7, 3), None)
    assert batch.layout is not None
    assert batch.layout.segments == ((3, (2,)), (1, (3,)))
    assert batch.layout.query_starts.tolist() == batch.layout.key_starts.tolist() == [0, 5, 9]
    assert batch.layout.query_starts.dtype == torch.int32
    assert (batch.layout.key_index, batch.layout.max_query, batch.layout.max_key) == (None, 5, 5)


def test_packed_two_responses_share_their_prompt() -> None:
    batch = collate_packed([example([1, 2], [3, 4, EOS], [5, EOS]), example([6], [7], [8, EOS])])
    assert batch.input_ids_BT.tolist() == [[1, 2, 3, 4, EOS, 5, EOS, 6, 7, 8, EOS]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 1, 1, 2]]
    assert batch.head_positions_R.tolist() == [1, 2, 3, 5, 7, 9]
    # the prompt's last place is computed once and predicts both first tokens
    assert batch.logit_index_N.tolist() == [0, 1, 2, 0, 3, 4, 4, 5]
    assert batch.target_ids_N.tolist() == [3, 4, EOS, 5, EOS, 7, 8, EOS]
    assert batch.response_index_N.tolist() == [0, 0, 0, 1, 1, 2, 3, 3]
    assert batch.layout is not None
    assert batch.layout.query_starts.tolist() == [0, 5, 7, 9, 11]
    assert batch.layout.key_starts.tolist() == [0, 5, 9, 11, 14]
    assert batch.layout.key_index is not None
    assert batch.layout.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 8, 7, 9, 10]
    assert (batch.layout.max_query, batch.layout.max_key) == (5, 5)


def test_scores_are_read_at_the_tokens_themselves() -> None:
    rows = [example([1, 2], [3, 4, EOS], [5, EOS]), example([6], [7], [8, EOS], [EOS])]
    batch = collate_packed(rows, targets="scores")
    assert batch.head_positions_R.tolist() == [2, 3, 4, 5, 6, 8, 9, 10, 11]
    assert batch.target_ids_N.tolist() == [3, 4, EOS, 5, EOS, 7, 8, EOS, EOS]
    assert batch.logit_index_N.tolist() == list(range(9))
    assert batch.response_index_N.tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 4]
    assert batch.response_lengths == (3, 2, 1, 2, 1)
    last = collate_padded(rows, pad_id=EOS, targets="last")
    assert last.head_positions_R.tolist() == [4, 8, 11, 17, 21]
    assert last.target_ids_N.tolist() == [EOS, EOS, 7, EOS, EOS]
    assert last.response_index_N.tolist() == [0, 1, 2, 3, 4]


def test_all_pairs_of_a_row_best_first() -> None:
    batch = collate_packed([example([1], [2], [3], [4]), example([1], [2]), example([1], [2], [3])])
    assert batch.pairs_P2.tolist() == [[0, 1], [0, 2], [1, 2], [4, 5]]
    assert batch.pair_weights_P.tolist() == pytest.approx([1 / 3] * 3 + [1.0])
    assert collate_packed([example([1], [2])]).pairs_P2.shape == (0, 2)


def test_padding_shifts_no_position() -> None:
    rows = [example([1, 2], [3, EOS]), example([5], [EOS])]
    batch = collate_padded(rows, pad_id=0)
    assert batch.input_ids_BT.tolist() == [[1, 2, 3, EOS], [5, EOS, 0, 0]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert batch.attention_mask_BT is not None
    assert batch.attention_mask_BT.int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.head_positions_R.tolist() == [1, 2, 4]
    assert batch.layout is None
    assert batch.logit_index_N.tolist() == [0, 1, 2]
    assert batch.target_ids_N.tolist() == [3, EOS, EOS]


def random_rows(seed: int, num_responses: int) -> list[Example]:
    rng = np.random.default_rng(seed)

    def ids() -> list[int]:
        return rng.integers(0, EOS + 1, int(rng.integers(1, 6))).tolist()

    return [example(ids(), *(ids() for _ in range(num_responses)), row_id=i) for i in range(5)]


@pytest.mark.parametrize("targets", ["response", "all"])
@pytest.mark.parametrize("num_responses", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_every_target_is_predicted_from_what_stands_before_it(seed: int, num_responses: int, targets: str) -> None:
    rows = random_rows(seed, num_responses)
    expected = by_definition(rows, targets)
    assert as_read(collate_packed(rows, targets=targets)) == expected
    assert as_read(collate_padded(rows, pad_id=EOS, targets=targets)) == expected


def test_pad_may_be_eos() -> None:
    rows = [example([1, EOS, 2], [3, EOS]), example([4], [5, 6, 7, EOS]), example([EOS], [EOS])]
    same, other = (collate_padded(rows, pad_id=pad) for pad in (EOS, 0))
    for field in ("attention_mask_BT", "position_ids_BT", "head_positions_R", "logit_index_N", "target_ids_N"):
        assert torch.equal(getattr(same, field), getattr(other, field)), field
    assert same.attention_mask_BT is not None
    assert same.attention_mask_BT.sum(dim=1).tolist() == [5, 5, 2]  # EOS inside a prompt and at an end is a token
    assert (same.target_ids_N == EOS).sum() == 3
    embedding = torch.nn.Embedding(EOS + 1, 4)  # what a head would do: the EOS targets carry gradient
    logits_NV = embedding(same.input_ids_BT).flatten(0, 1)[same.head_positions_R][same.logit_index_N] @ torch.randn(
        4, EOS + 1
    )
    torch.nn.functional.cross_entropy(logits_NV, same.target_ids_N).backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad[EOS].abs().sum() > 0  # "[EOS]" predicts its EOS
    assert embedding.weight.grad[0].abs().sum() == 0
