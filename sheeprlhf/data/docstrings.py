"""The embedded dataset: Python signatures and their one-line summaries (see assets/docstrings)."""

from collections.abc import Mapping
from typing import Any

from sheeprlhf.data.example import PreferenceExample
from sheeprlhf.data.rows import optional_text, text


def format_row(row: Mapping[str, Any], tokenizer: Any) -> PreferenceExample | None:
    """The row as it is: what the author wrote, and its imperative (chosen) and third-person (rejected) forms."""
    return PreferenceExample(
        prompt=text(row, "prompt"),
        response=text(row, "response"),
        chosen=optional_text(row, "chosen"),
        rejected=optional_text(row, "rejected"),
    )
