"""Prompts that have most of the rows: all rows of one prompt in one split would leave the others empty, or full."""

from typing import NamedTuple

FEWEST_FREQUENT = 4  # rows; with fewer, a prompt that has most of them says nothing


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
