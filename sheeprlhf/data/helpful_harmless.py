"""Dialogues with two answers of an assistant, one preferred (Dahoas/full-hh-rlhf)."""

from collections.abc import Mapping
from typing import Any

from sheeprlhf.data.example import PreferenceExample
from sheeprlhf.data.rows import led_by_space, text

TURN = "\n\nAssistant:"


def format_row(row: Mapping[str, Any], tokenizer: Any) -> PreferenceExample | None:
    """The dialogue up to and with the last "Assistant:"; the answer begins with a space."""
    dialogue = text(row, "prompt").rstrip().removesuffix(TURN).rstrip()
    return PreferenceExample(
        prompt=f"{dialogue}{TURN}" if dialogue else "",
        chosen=led_by_space(text(row, "chosen")),
        rejected=led_by_space(text(row, "rejected")),
    )
