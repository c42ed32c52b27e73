"""Detection of duplicate rows by 64 bits of a digest: eight bytes per row, where a Python set takes about 100."""

import numpy as np


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
