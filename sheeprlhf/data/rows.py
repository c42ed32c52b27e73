"""What the row formats share: reading a text column, and the two ways a row can be out of the ordinary."""

from collections.abc import Mapping
from typing import Any

from sheeprlhf.data.example import PreferenceExample
from sheeprlhf.utils.errors import DataError

COLUMNS = ("prompt", "response", "chosen", "rejected", "messages")  # all that any row format reads


class DropRowError(Exception):
    """Raised by a row format for a row that must not be trained on; the reason is counted in the data report."""


class TemplatedExample(PreferenceExample):
    """An example that a chat template rendered: special tokens in its text are meant, and it may bring its own BOS."""


def text(row: Mapping[str, Any], column: str) -> str:
    """The string in a column.

    Raises:
        DataError: if the column is missing or holds no string; the caller adds the file and the line.
    """
    if row.get(column) is None:
        found = ", ".join(name for name in row if row[name] is not None) or "nothing"
        raise DataError(f"column '{column}' is missing or null (found: {found}); add it or remove the row")
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"column '{column}' holds {type(value).__name__}, not text; write it as a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"column '{column}' holds half a surrogate pair at character {error.start}; remove it"
        ) from None
    return value


def optional_text(row: Mapping[str, Any], column: str) -> str | None:
    """The string in a column, None where it is missing or null."""
    return None if row.get(column) is None else text(row, column)


def led_by_space(response: str) -> str:
    """The response with exactly one space before it: a prompt that ends in a colon is continued by " word"."""
    stripped = response.strip()
    return f" {stripped}" if stripped else ""
