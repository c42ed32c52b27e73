"""Repeated rows and prompts. Rows are told apart by 64 bits of a digest, where a Python set takes 100 bytes a row.

All rows of a prompt that has most of the rows, in one split, would leave the other splits empty.
"""

from typing import NamedTuple

import numpy as np

FEWEST_FREQUENT = 4  # rows; with fewer, a prompt that has most of them says nothing


class SeenDigests:
    """The digests met so far, in sorted runs, each more than twice as long as the next, so that there are few.

    Two different rows share 64 bits with a chance of about 3e-8 in a million rows, 3e-4 in a hundred million.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self._runs: list[np.ndarray] = []

    def add(self, digests_N: np.ndarray) -> np.ndarray:
        """Remember digests.

        Args:
            digests_N: (N,) uint64.

        Returns:
            (N,) bool, True where an equal digest came before, in an earlier call or earlier in this one.
        """
        seen_N = np.ones(len(digests_N), bool)
        seen_N[np.unique(digests_N, return_index=True)[1]] = False
        for run in self._runs:
            places_N = np.searchsorted(run, digests_N).clip(max=len(run) - 1)
            seen_N |= run[places_N] == digests_N
        if not seen_N.all():
            self._runs.append(np.sort(digests_N[~seen_N]))
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            shorter = self._runs.pop()
            self._runs[-1] = np.sort(np.concatenate([self._runs[-1], shorter]), kind="stable")
        return seen_N


class FrequentPrompts(NamedTuple):
    """The prompts that have half of the training rows or more, at most two.

    Attributes:
        shares: of each prompt, as `split_shares` makes them.
        rows: rows of each prompt.
        total: all training rows.
    """

    shares: frozenset[tuple[float, float]]
    rows: tuple[int, ...]
    total: int

    def notes(self, *, divided: bool) -> list[str]:
        """Notes for the user.

        Args:
            divided: the rows of such a prompt are divided among the splits.
        """
        if not self.shares:
            return []
        one, fix = len(self.rows) == 1, "give rows with other prompts"
        which = f"all {self.total:,}" if self.rows == (self.total,) else f"{sum(self.rows):,} of {self.total:,}"
        if divided:
            fix = (
                "each of these rows goes to a split by its whole content, so validation and test have prompts of "
                "training: give files of other prompts for them, or data.validation_split=0 data.test_split=0"
            )
        return [f"{which} rows have the same {'prompt' if one else 'two prompts'}; {fix}"]
