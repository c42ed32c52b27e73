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


def test_eight_bytes_a_row_in_few_arrays() -> None:
    seen = SeenDigests()
    for start in range(0, 100_000, 1000):
        assert not seen.add(np.arange(start, start + 1000, dtype=np.uint64)).any()
    assert sum(len(run) for run in seen._runs) == 100_000
    assert len(seen._runs) < 10
    assert all(run.dtype == np.uint64 for run in seen._runs)
