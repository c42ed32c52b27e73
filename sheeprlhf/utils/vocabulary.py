"""Token ids that a tokenizer defines. A model may have more rows than that: padding, and holes that no token has."""

from typing import Any

import numpy as np


def defined_ids(tokenizer: Any) -> np.ndarray:
    """(D,) int64, ascending: the ids that stand for a token."""
    ids = {*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder}
    return np.array(sorted(map(int, ids)), dtype=np.int64)


def num_rows_needed(tokenizer: Any) -> int:
    """Rows of an embedding that has all ids: the largest one, plus one."""
    ids = defined_ids(tokenizer)
    return int(ids[-1]) + 1 if len(ids) else 0


def undefined_ids(tokenizer: Any, num_rows: int) -> np.ndarray | None:
    """(U,) int64, ascending: ids below `num_rows` that stand for no token; None if there are none.

    Args:
        tokenizer: of transformers.
        num_rows: of the model's language head.
    """
    missing = np.setdiff1d(np.arange(num_rows, dtype=np.int64), defined_ids(tokenizer), assume_unique=True)
    return missing if len(missing) else None
