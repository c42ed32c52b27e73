"""A row's columns: read texts, numbers and labels, report unusable rows, and keep columns for reward functions."""

import base64
import difflib
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, NamedTuple

from sheeprlhf.utils.errors import DataError

COLUMNS = ("prompt", "response", "chosen", "rejected", "responses", "margin", "messages", "label")  # all that are read
TEXT_COLUMNS = COLUMNS[:4]
STEPS = ("completions", "labels")  # columns of the steps of a response, and of their labels
CONVERSATION_COLUMNS = ("messages", "conversations")  # hold a conversation
CONVERSATION_EXTRAS = ("system", "tools")  # read next to messages or a prompt, and make a conversation of it
RANKINGS = ("ranks", "scores")  # of responses: 1 is the best rank, the highest score is the best
MEANING_COLUMNS = {  # change what a row means -> where they belong in a prompt, if text; "" where they do not
    "input": "after",
    **dict.fromkeys(("context", "contexts", "document", "documents", "passage", "background"), "before"),
    **dict.fromkeys(("system", "system_prompt", "system_message"), "before"),
    **dict.fromkeys(
        (
            *("history", "chat_history", "conversation_history", "conversations", "conversation", "dialogue"),
            *("tools", "functions", "tool_calls", "function_call", "tool_choice", "parallel_tool_calls"),
            *("reasoning_content", "reasoning", "thinking", "chat_template_kwargs", "template_args"),
            *("weight", "weights", "sample_weight", "loss_weight", "train", "loss_mask", "loss"),
            *("image", "images", "audio", "audios", "video", "videos"),
        ),
        "",
    ),
}
MAX_TEXT = 4 * 2**20  # characters; a tokenizer takes about 200 bytes for each
_MEANT = {column: column for column in COLUMNS} | {
    **dict.fromkeys(("instruction", "question", "query", "input", "document"), "prompt"),
    **dict.fromkeys(("completion", "answer", "output", "reply", "summary", "target"), "response"),
    **dict.fromkeys(("preferred", "accepted"), "chosen"),
    "dispreferred": "rejected",
    "ranking": "responses",
    **dict.fromkeys(("conversation", "dialogue", "chat"), "messages"),
}
_PLAIN_NAME = re.compile(r"[A-Za-z_]\w*")


class DropRowError(Exception):
    """Raised by a row format for a row that must not be trained on; the reason is counted in the data report."""


class MissingColumnError(DataError):
    """The row lacks a column; code that knows the file's other columns adds the probable one."""


class PreferenceExample(NamedTuple):
    """One row as text. `response` is what supervised fine-tuning learns; the pair is what preference tasks learn."""

    prompt: str  # what is answered
    response: str | None = None  # an answer to learn
    chosen: str | None = None  # the better answer of a pair
    rejected: str | None = None  # the worse one
    ranked: tuple[str, ...] | None = None  # instead of a pair, two or more answers, best first
    margin: float = 0.0  # how much better the chosen answer is, in units of a reward model's score
    label: Any = None  # whether `response` is desirable, by the row's column; for tasks of unpaired data only
    remarks: tuple[str, ...] = ()  # for the data report, which counts the rows of each
    untrained: int = 0  # answers of earlier turns, which are part of the prompt
    turns: tuple[str, ...] = ()  # of a conversation, behind `response`: text and an answer to learn, in turn
    steps: tuple[str, ...] = ()  # of a response; `label` has for each of them if it is right
    raw: "PreferenceExample | None" = None  # before reasoning was removed and before the chat template


class TemplatedExample(PreferenceExample):
    """An example that a chat template rendered: special tokens in its text are meant, and it may bring its own BOS."""


def text(row: Mapping[str, Any], column: str) -> str:
    """The string in a column. Raises DataError if it holds none, DropRowError if the string contains a NUL."""
    if column not in row:
        raise MissingColumnError(f"column '{column}' is missing")
    value = row[column]
    if value is None:
        raise DataError(f"column '{column}' is null; give it text or remove the row")
    if not isinstance(value, str):
        raise DataError(f"column '{column}' holds {type(value).__name__}, not text; write it in quotes, as a string")
    if len(value) > MAX_TEXT:
        size = f"{len(value):,} characters, more than {MAX_TEXT:,}"
        raise DataError(f"column '{column}' holds {size}; make several rows of it or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"column '{column}' has half a surrogate pair at character {error.start}; remove it") from None
    if "\0" in value:
        raise DropRowError("nul_character")
    return value


def has_value(value: Any) -> bool:
    """True if a column has a value: null, an empty text, list or object, and white space do not count."""
    return not (value is None or value in ("", [], {}) or (isinstance(value, str) and not value.strip()))


def optional_text(row: Mapping[str, Any], column: str) -> str | None:
    """The string in a column, None where it is missing or null."""
    return None if row.get(column) is None else text(row, column)


def texts(row: Mapping[str, Any], column: str, fewest: int = 2) -> tuple[str, ...]:
    """The `fewest` or more strings in a column of lists. Raises DataError otherwise; DropRowError as `text` does."""
    value = row[column]
    if not isinstance(value, list | tuple):
        raise DataError(f"column '{column}' holds {type(value).__name__}, not a list; write a list of strings")
    if len(value) < fewest:
        count = "1 entry" if value else "no entry"
        raise DataError(f"column '{column}' has {count}; give {'two or more, best first' if fewest > 1 else 'one'}")
    found = []
    for number, entry in enumerate(value):
        try:
            found.append(text({column: entry}, column))
        except DataError as error:
            raise DataError(f"{error} (entry {number})") from None
    return tuple(found)


def number(row: Mapping[str, Any], column: str) -> float:
    """The finite number in a column, as text too (csv); 0 where missing. Raises DataError for other values."""
    value = row.get(column)
    if value is None or value == "":
        return 0.0
    with suppress(ValueError, OverflowError):
        if isinstance(value, int | float | str) and not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)
    raise DataError(f"column '{column}' holds {str(value)[:40]!r}, not a finite number; write one or remove the column")


def best_first(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with its responses in the order of 'ranks' or 'scores'. Raises DataError, DropRowError for ties."""
    column = next((name for name in RANKINGS if row.get(name) is not None), None)
    responses = row.get("responses")
    if column is None or not isinstance(responses, list | tuple):
        return row
    values = row[column]
    if not isinstance(values, list | tuple) or len(values) != len(responses):
        raise DataError(f"column '{column}' must be a list of as many numbers as column 'responses' has entries")
    numbers = [number({column: value}, column) if value is not None else math.nan for value in values]
    if any(map(math.isnan, numbers)):
        raise DataError(f"column '{column}' has null for a response; give each a number")
    if len(set(numbers)) < len(numbers):
        raise DropRowError("equal_ranks")
    order = sorted(range(len(numbers)), key=numbers.__getitem__, reverse=column == "scores")
    return {**row, "responses": [responses[index] for index in order]}


def led_by_space(response: str) -> str:
    """The response with exactly one space before it: a prompt that ends in a colon is continued by " word"."""
    stripped = response.strip()
    return f" {stripped}" if stripped else ""


def column_advice(present: Iterable[str], others: Iterable[str], unread: Collection[str] = ()) -> str:
    """The columns of a row that lacks an expected one, `others` than `COLUMNS` last, and the probable replacement.

    `unread` are columns that the task does not read, so that no other column can stand for them.
    """
    has, others = list(present), list(others)
    sources: dict[str, list[str]] = {}
    for name in others:
        near = difflib.get_close_matches(name.strip().casefold(), _MEANT, n=1, cutoff=0.75)
        if near and _MEANT[near[0]] not in {*has, *sources, *unread}:
            sources[_MEANT[near[0]]] = [name]
    if "prompt" in sources:  # what belongs to the prompt must not be lost by the advice
        for name in others:
            if place := MEANING_COLUMNS.get(name) if [name] != sources["prompt"] else None:
                sources["prompt"].insert(0 if place == "before" else len(sources["prompt"]), name)
    it_has = printable([*has, *others]) or "no column with a value"
    advice = f"give {mapping_text(sources)}" if sources else "add what is missing, or remove the row"
    return f"it has {it_has}; {advice}"


def mapping_text(sources: Mapping[str, Iterable[str]]) -> str:
    """`data.columns` as it is written on a command line; a description where a name cannot be written like that."""
    parts = []
    for name, columns in sources.items():
        columns = list(columns)
        if not all(column.isprintable() and not set(column) & set("'\"\\$") for column in columns):
            return f"simpler names to the columns ({printable(columns)} for {name})"
        quoted = [column if _PLAIN_NAME.fullmatch(column) else f'"{column}"' for column in columns]
        parts.append(f"{name}: {quoted[0] if len(quoted) == 1 else '[' + ', '.join(quoted) + ']'}")
    return f"'data.columns={{{', '.join(parts)}}}'"


def printable(names: Iterable[str]) -> str:
    """Names from an untrusted file for a message: at most a dozen, cut to 40 characters, control characters escaped."""
    shown = []
    for name in names:
        short = name[:40]
        plain = short.isprintable() and short == short.strip() != ""
        shown.append((short if plain else ascii(short)) + ("..." if len(name) > 40 else ""))
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


SPELLINGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}  # csv has text only


def labelled(example: PreferenceExample, *, rewarded: bool = False) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    """Responses of unpaired data, desirable or not: one with a label (or reward), or a pair. Raises DataError."""
    if example.response is not None and example.label is not None:
        return (example.response,), (rewarded or is_desirable(example.label),)
    if example.chosen is not None and example.rejected is not None:
        return (example.chosen, example.rejected), (True, False)
    if example.ranked is not None and len(example.ranked) == 2:
        return example.ranked, (True, False)
    if example.ranked is not None:
        raise DataError(
            f"column 'responses' ranks {len(example.ranked)}, and which of them are desirable it does not say; write "
            "a row of prompt, response and label for each"
        )
    meaning = "the reward of the response" if rewarded else "true where the response is desirable, false where not"
    raise MissingColumnError(f"column 'label' is missing: {meaning}")


def reward_of(example: PreferenceExample) -> float:
    """The reward of the desirable responses of a row: its label, or 1. Raises DataError for other labels."""
    if example.response is None or example.label is None:
        return 1.0
    try:
        reward = float(SPELLINGS.get(str(example.label).strip().casefold(), example.label))
    except (TypeError, ValueError, OverflowError):
        reward = math.nan
    if not math.isfinite(reward):
        raise DataError(f"column 'label' holds {str(example.label)[:40]!r}: write the reward as a finite number")
    return reward


def is_desirable(label: Any) -> bool:
    """A row's label as a bool: true or false, 1 or 0, of any type. Raises DataError for any other."""
    if isinstance(label, bool | int | float) and label in (0, 1):
        return bool(label)
    if isinstance(label, str) and label.strip().casefold() in SPELLINGS:
        return SPELLINGS[label.strip().casefold()]
    advice = "write true where the response is desirable, false where not"
    raise DataError(f"column 'label' holds {str(label)[:40]!r}, neither true nor false; {advice}")


_TAG = "__sheeprlhf__"  # the key of a value that JSON lacks, in a column for reward functions: [kind, text]
_KINDS: dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]] = {  # datetime is a date, so it comes first
    "datetime": (datetime, datetime.isoformat, datetime.fromisoformat),
    "date": (date, date.isoformat, date.fromisoformat),
    "time": (time, time.isoformat, time.fromisoformat),
    "timedelta": (timedelta, lambda of: repr(of.total_seconds()), lambda text: timedelta(seconds=float(text))),
    "decimal": (Decimal, str, Decimal),
    "bytes": (bytes, lambda of: base64.b64encode(of).decode(), base64.b64decode),
}


def encode_columns(values: Mapping[str, Any]) -> str:
    """Return the columns of one row as JSON text. Raises DataError naming a column whose value cannot be stored."""
    try:
        return json.dumps(values, default=_tagged)
    except (TypeError, ValueError, RecursionError):
        for name, value in values.items():
            try:
                json.dumps(value, default=_tagged)
            except (TypeError, ValueError, RecursionError):
                raise DataError(
                    f"column '{name}' holds {type(value).__name__}, which a reward function cannot be given; write it "
                    "as text, a number, a list or an object"
                ) from None
        raise


def decode_columns(text: str) -> dict[str, Any]:
    """Return what `encode_columns` was given, as new objects."""
    values = json.loads(text, object_hook=_untagged) if text else {}
    assert isinstance(values, dict)
    return values


def _tagged(value: Any) -> dict[str, list[str]]:
    for kind, (cls, write, _) in _KINDS.items():
        if isinstance(value, cls):
            return {_TAG: [kind, write(value)]}
    raise TypeError(type(value).__name__)


def _untagged(value: dict[str, Any]) -> Any:
    if len(value) == 1 and _TAG in value:
        kind, text = value[_TAG]
        return _KINDS[kind][2](text)
    return value
