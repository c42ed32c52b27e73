"""Reddit posts with two summaries, one preferred (CarperAI/openai_summarize_comparisons)."""

from collections.abc import Mapping
from typing import Any

from sheeprlhf.data.example import PreferenceExample
from sheeprlhf.data.rows import led_by_space, text

MARK = "TL;DR:"


def format_row(row: Mapping[str, Any], tokenizer: Any) -> PreferenceExample | None:
    """The post, a new line and "TL;DR:" without a space; the summary begins with that space (N+, detail 1)."""
    post = text(row, "prompt").rstrip().removesuffix(MARK).rstrip()
    return PreferenceExample(
        prompt=f"{post}\n{MARK}" if post else "",
        chosen=_summary(text(row, "chosen")),
        rejected=_summary(text(row, "rejected")),
    )


def _summary(column: str) -> str:
    """The summary without the mark that the dataset repeats before it."""
    return led_by_space(column.strip().removeprefix(MARK))
