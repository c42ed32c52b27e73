"""Prompts and what models wrote after them, from the sample texts of a training and the rows of an evaluation."""

import json
import re
from collections.abc import Iterable
from typing import NamedTuple

_MARK = re.compile(r"\[(prompt|model|best|worst|reference)\](.*)")
_TOKENS = r"(?:<\|[^<>|\s]{1,24}\|>|</?s>|<(?:bos|eos|pad|unk)>)+"
_CONTROL = re.compile(rf"^{_TOKENS}|{_TOKENS}$")
_MAX_EXCHANGES = 2_000
_MAX_TEXT = 3_000  # characters


class Answer(NamedTuple):
    """What was written: at a step, if it was during training; `note` tells its score or the like."""

    step: int | None
    note: str
    text: str


class Exchange(NamedTuple):
    """A prompt, the dataset's own responses, as often as they are told, and the answers, oldest first."""

    prompt: str
    references: list[str]
    answers: list[Answer]


def parse_samples(files: Iterable[tuple[int, str]]) -> dict[str, Exchange]:
    """Sample texts as exchanges, by their prompt without white space and control tokens.

    Args:
        files: step and content of each, oldest first.
    """
    found: dict[str, Exchange] = {}
    for step, content in files:
        exchange = None
        for mark, note, body in _blocks(content):
            if mark == "prompt":
                exchange = _exchange(found, body)
            elif exchange is not None and mark == "reference":
                exchange.references.append(_shown(body).strip())
            elif exchange is not None:
                name = "" if mark == "model" else f"{mark}: "
                exchange.answers.append(Answer(step, f"{name}{note}", _shown(body).strip()))
    return found


def _blocks(content: str) -> list[tuple[str, str, str]]:
    """Mark, what stands behind it, and the lines below it."""
    blocks: list[tuple[str, str, list[str]]] = []
    for line in content.split("\n"):
        match = _MARK.fullmatch(line)
        if match:
            blocks.append((match[1], match[2].strip(), []))
        elif blocks and not line.startswith("--- "):
            blocks[-1][2].append(line)
    return [(mark, note, "\n".join(lines)) for mark, note, lines in blocks]


def parse_rows(content: str) -> dict[str, Exchange]:
    """Rows of JSON with a prompt and a response as exchanges, likewise."""
    found: dict[str, Exchange] = {}
    for line in content.split("\n")[:_MAX_EXCHANGES]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
            exchange = _exchange(found, row["prompt"])
            if isinstance(row.get("reference"), str):
                exchange.references.append(_shown(row["reference"]).strip())
            scores = {key: value for key, value in row.items() if isinstance(value, float)}
            note = ", ".join(f"{key} {value:.4g}" for key, value in scores.items())
            exchange.answers.append(Answer(None, note, _shown(row["response"]).strip()))
    return found


def _exchange(found: dict[str, Exchange], prompt: str) -> Exchange:
    shown = _shown(prompt)
    return found.setdefault(" ".join(shown.split()), Exchange(shown, [], []))


def _shown(text: str) -> str:
    """Without control tokens at its ends, and of bounded length."""
    text = _CONTROL.sub("", text.strip("\n"))
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} … ({len(text) - _MAX_TEXT:,} more characters)"
