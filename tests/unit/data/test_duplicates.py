"""Digests met before, against a set; and what it costs to remember them."""

import numpy as np
import pytest

from sheeprlhf.data.duplicates import SeenDigests


@pytest.mark.parametrize("different", [1, 50, 5_000])
def test_like_a_set(different: int) -> None:
    rng = np.random.default_rng(different)
    seen, known = SeenDigests(), set()
    values = rng.integers(0, 2**64, different, np.uint64)
    for _ in range(200):
        digests = rng.choice(values, int(rng.integers(0, 40)))
        expected = []
        for digest in digests.tolist():
            expected.append(digest in known)
            known.add(digest)
        assert seen.add(digests).tolist() == expected
