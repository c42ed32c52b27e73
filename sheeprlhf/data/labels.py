"""Unpaired data: single responses, each of them desirable or not (KTO, arXiv 2402.01306)."""

from typing import Any

from sheeprlhf.data.example import PreferenceExample
from sheeprlhf.data.rows import MissingColumnError
from sheeprlhf.utils.errors import DataError

_SPELLINGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}  # csv has text only


def labelled(example: PreferenceExample) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    """The responses of a row and which of them are desirable: one with its label, or both of a pair.

    Raises:
        MissingColumnError: the row has neither; DataError: its label is not a yes or no, or it ranks more than two.
    """
    if example.response is not None and example.label is not None:
        return (example.response,), (is_desirable(example.label),)
    if example.chosen is not None and example.rejected is not None:
        return (example.chosen, example.rejected), (True, False)
    if example.ranked is not None and len(example.ranked) == 2:
        return example.ranked, (True, False)
    if example.ranked is not None:
        raise DataError(
            f"column 'responses' ranks {len(example.ranked)}, and which of them are desirable it does not say; write "
            "a row of prompt, response and label for each"
        )
    raise MissingColumnError("column 'label' is missing: true where the response is desirable, false where not")


def is_desirable(label: Any) -> bool:
    """A row's label as a bool, from any type that a file may store: true or false, 1 or 0.

    Raises:
        DataError: it says something else.
    """
    if isinstance(label, bool | int | float) and label in (0, 1):
        return bool(label)
    if isinstance(label, str) and label.strip().casefold() in _SPELLINGS:
        return _SPELLINGS[label.strip().casefold()]
    raise DataError(
        f"column 'label' holds {str(label)[:40]!r}, neither true nor false; write true where the response is "
        "desirable, false where not"
    )
