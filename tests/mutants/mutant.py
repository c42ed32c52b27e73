"""One wrong line of code that the tests must notice."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A change of one place.

    Attributes:
        trap: number of the mistake in the list of correctness traps.
        file: file to change, from the repository's root.
        old: exact source text, once in the file.
        new: what replaces it.
        tests: the test that must fail, as pytest names it.
    """

    trap: str
    file: str
    old: str
    new: str
    tests: str
