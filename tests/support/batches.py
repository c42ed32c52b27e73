"""Random examples for tests, and a brute-force reading of batches."""

import numpy as np
import torch

from sheeprlhf.data.example import Batch, Example


def random_examples(num_rows: int, num_responses: int = 1, *, seed: int = 0, longest: int = 9) -> list[Example]:
    """Rows of random bytes; prompts and responses of 1 to `longest` tokens."""
    rng = np.random.default_rng(seed)

    def ids() -> np.ndarray:
        return rng.integers(0, 250, int(rng.integers(1, longest + 1))).astype(np.int32)

    return [Example(row, ids(), tuple(ids() for _ in range(num_responses))) for row in range(num_rows)]


def by_definition(rows: list[Example], targets: str) -> list[tuple[tuple[int, ...], int, int]]:
    """Every target with all that it may see and its response: a double loop over the text."""
    found, number = [], 0
    for row in rows:
        prompt = row.prompt_ids.tolist()
        if targets == "all":
            found += [(tuple(prompt[:i]), prompt[i], number) for i in range(1, len(prompt))]
        for response in row.responses:
            for i, token in enumerate(response.tolist()):
                found.append((tuple(prompt + response.tolist()[:i]), token, number))
            number += 1
    return found


def as_read(batch: Batch) -> list[tuple[tuple[int, ...], int, int]]:
    """The same, read from a batch's tensors; checks that a token's position is its place in what it sees."""
    ids, positions = batch.input_ids_BT, batch.position_ids_BT
    seen: dict[tuple[int, int], tuple[int, ...]] = {}
    if batch.layout is None:
        assert batch.attention_mask_BT is not None
        for row, column in batch.attention_mask_BT.nonzero().tolist():
            mask = batch.attention_mask_BT[row, : column + 1]
            seen[row, column] = tuple(ids[row, : column + 1][mask].tolist())
    else:
        layout, keys = batch.layout, batch.layout.key_index
        keys = torch.arange(ids.shape[1]) if keys is None else keys
        queries, starts = layout.query_starts.tolist(), layout.key_starts.tolist()
        for i in range(len(queries) - 1):
            visible = keys[starts[i] : starts[i + 1]]
            for column in range(queries[i], queries[i + 1]):
                last = len(visible) - (queries[i + 1] - column) + 1  # bottom-right causal
                seen[0, column] = tuple(ids[0, visible[:last]].tolist())
                assert visible[last - 1] == column
    assert all(positions[place] == len(context) - 1 for place, context in seen.items())
    heads = [divmod(place, ids.shape[1]) for place in batch.head_positions_R.tolist()]
    return [
        (seen[heads[index]], target, owner)
        for index, target, owner in zip(
            batch.logit_index_N.tolist(), batch.target_ids_N.tolist(), batch.response_index_N.tolist(), strict=True
        )
    ]
