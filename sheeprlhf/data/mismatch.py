"""Every prompt with the response of another row: what KTO estimates its KL divergence from."""

from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import numpy as np

from sheeprlhf.data.example import Example
from sheeprlhf.data.store import TokenizedSplit


class MismatchedSplit(TokenizedSplit):
    """The rows of a split of unpaired data, each with the response of another row, cut to the room behind its prompt.

    Who goes with whom depends on the rows and their order only, never on a step or a rank, so that the reference's
    log-probabilities of these pairs are computed once.

    Attributes:
        partners: (rows,) int64, the row that lends its response.
        has_one_prompt: there is no other prompt, and the responses are not mismatched.
    """

    def __init__(self, file: Path, longest: int) -> None:
        """Open the split's file.

        Args:
            file: as for `TokenizedSplit`.
            longest: most tokens of a row, at least those of the longest row of the split.

        Raises:
            DataError: if the file is damaged.
        """
        super().__init__(file)
        prompts = (super(MismatchedSplit, self).example(row).prompt_ids for row in range(len(self)))
        prompts_N = _digests(prompts)
        self.has_one_prompt = bool((prompts_N == prompts_N[0]).all())
        self.partners = mismatched_rows(prompts_N)
        num_prompt, num_response = self.sizes[:, 0], self.sizes[self.partners, 1]
        self.sizes = np.stack([num_prompt, np.minimum(num_response, longest - num_prompt)], axis=1)
        self.lengths = self.sizes.sum(axis=1, dtype=np.int32)

    def example(self, index: int) -> Example:
        """Row `index` with the response of its partner; its label stays its own."""
        own = super().example(index)
        partner, length = super().example(int(self.partners[index])), self.sizes[index, 1]
        trained = None if partner.trained is None else partner.trained[:length]
        return own._replace(responses=(partner.responses[0][:length],), trained=trained)


def mismatched_rows(prompts_N: np.ndarray) -> np.ndarray:
    """For each row another row, with another prompt.

    That is the row as many places ahead, counted around the end, as the longest run of one prompt has rows: the two
    responses of a pair, which stand side by side, go to two different rows, and every response is lent once. Where
    that row has the same prompt again, the first of the next run is taken. A split of one prompt has no such rows;
    each gets the next.

    Args:
        prompts_N: (N,) equal numbers where prompts are equal.

    Returns:
        (N,) int64 rows.
    """
    rows_N = np.arange(len(prompts_N))
    starts = np.flatnonzero(prompts_N != np.roll(prompts_N, 1))  # rows that begin a run
    if not len(starts):
        return np.roll(rows_N, -1)
    longest_run = int(np.diff([*starts, starts[0] + len(rows_N)]).max())
    partners_N = (rows_N + longest_run) % len(rows_N)
    next_start_N = starts[np.searchsorted(starts, rows_N, side="right") % len(starts)]
    same_N = prompts_N[partners_N] == prompts_N
    partners_N[same_N] = next_start_N[partners_N[same_N]]
    return partners_N


def _digests(prompts: Iterable[np.ndarray]) -> np.ndarray:
    """64 bits of each prompt."""
    digests = (blake2b(ids.tobytes(), digest_size=8).digest() for ids in prompts)
    return np.frombuffer(b"".join(digests), np.uint64)
