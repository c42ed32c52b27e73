"""Random examples for tests."""

import numpy as np

from sheeprlhf.data.example import Example


def random_examples(num_rows: int, num_responses: int = 1, *, seed: int = 0, longest: int = 9) -> list[Example]:
    """Rows of random bytes; prompts and responses of 1 to `longest` tokens."""
    rng = np.random.default_rng(seed)

    def ids() -> np.ndarray:
        return rng.integers(0, 250, int(rng.integers(1, longest + 1))).astype(np.int32)

    return [Example(row, ids(), tuple(ids() for _ in range(num_responses))) for row in range(num_rows)]
