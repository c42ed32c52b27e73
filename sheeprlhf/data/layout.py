"""Column layouts: which columns of a row become prompt and response, and which are not read.

Rows of the user's own files may have the column names of other projects: instruction, input and output; prompt and
completion; question and answer; query and response; problem and solution. `data.columns` names any others. Each column
that is not read is counted for the data report; one that changes what a row means is an error.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from functools import lru_cache
from types import NoneType
from typing import Any, NamedTuple

from sheeprlhf.data.rows import (
    COLUMNS,
    CONVERSATION_COLUMNS,
    CONVERSATION_EXTRAS,
    MEANING_COLUMNS,
    RANKINGS,
    STEPS,
    TEXT_COLUMNS,
    has_value,
    mapping_text,
    printable,
)
from sheeprlhf.structure.data import DataConfig, KeptColumns, LayoutDataConfig
from sheeprlhf.utils.errors import DataError

PAIRS = {  # prompt column -> response column, of plain rows made for other projects
    "instruction": "output",
    "prompt": "completion",
    "question": "answer",
    "query": "response",
    "problem": "solution",
}
TEXT = "text"  # alone: a text without a prompt
INPUT = "input"  # next to an instruction: the second paragraph of its prompt
JOINT = "\n\n"  # between the columns of one text
_RESPONSES = ("response", "chosen", "rejected", "responses")
_LISTS = (*CONVERSATION_COLUMNS, "responses", *RANKINGS, *STEPS, "tools")  # csv and parquet may hold them as JSON text
SCORES = ("score_chosen", "score_rejected")  # their difference is the margin of a pair
MESSAGE_KEY = "messages."  # begins a name of data.ignore_columns that means a key of messages
_MESSAGE_EXTRAS = {"system_prompt": "system", "system_message": "system", "functions": "tools"}
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")  # counted in parquet files, never read

INSTRUCTION, HISTORY = "instruction", "history"  # the layout of Alpaca; its earlier questions, each with an answer
_NOTHING_KEPT = KeptColumns()

Sources = dict[str, tuple[str, ...]]
Shape = tuple[tuple[str, type], ...]  # names of a row's columns, with the types of their values


class _Reading(NamedTuple):
    """The columns that are read of rows of one shape."""

    sources: Sources  # columns that make texts of other names
    as_named: frozenset[str]  # columns that are read under their own names
    used: frozenset[str]  # all columns that are read


class RowLayout:
    """Takes the columns out of raw rows that the row formats read, and counts the others."""

    def __init__(self, cfg: DataConfig, kind: str, more: Sequence[str] = (), kept: KeptColumns = _NOTHING_KEPT) -> None:
        """Prepare for a dataset and a kind (see `prepare_data`); `more` columns are read besides the usual ones."""
        self._own_files, self._kind = isinstance(cfg, LayoutDataConfig), kind
        self._more = (*cfg.read_columns, *more, *(STEPS if kind == "stepwise" else ()))
        self._given: Sources = {}
        self._ignored: frozenset[str] = frozenset()
        self._ignored_keys: frozenset[str] = frozenset()
        names = [*COLUMNS, *CONVERSATION_COLUMNS, *CONVERSATION_EXTRAS, *self._more]
        if isinstance(cfg, LayoutDataConfig):
            given = (cfg.columns or {}).items()
            self._given = {str(name): (of,) if isinstance(of, str) else tuple(of) for name, of in given}
            self._ignored = frozenset(cfg.ignore_columns)
            keys = (name.partition(MESSAGE_KEY)[2] for name in cfg.ignore_columns if name.startswith(MESSAGE_KEY))
            self._ignored_keys = frozenset(keys)
            names += [*PAIRS, *PAIRS.values(), INPUT, TEXT, *(name for name in MEANING_COLUMNS if name not in _MEDIA)]
            names += [name for of in self._given.values() for name in of]
        # names of all columns that may be read
        self.columns = tuple(name for name in dict.fromkeys(names) if name not in self._ignored or name in kept.names)
        self.columns += tuple(name for name in kept.names if name not in self.columns)
        self.kept = kept  # columns that are stored with the tokens
        # names of all columns of the rows so far; clear it before reading to get those of one split
        self.available: dict[str, None] = {}
        # rows that have a value in a column that is not read, by the column's name
        self.unread: Counter[str] = Counter()
        self.undesirable = 0
        # rows of each layout, by what they hold and the columns that hold it
        self.layouts: Counter[tuple[str, tuple[str, ...]]] = Counter()
        # rows in which a text was made of columns of other names, by a description
        self.sources: Counter[str] = Counter()
        self.numbers: Counter[str] = Counter()  # rows in which a whole number was read as text, by column
        self._seen: set[str] = set()
        self._reading = lru_cache(maxsize=1000)(self._reading_of)

    def __call__(self, values: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """One row's columns under the names that formats read, and the unread ones. Raises DataError if ambiguous."""
        self._seen.update(values)
        self.available.update(dict.fromkeys(values))
        values = {name: value for name, value in values.items() if name not in self._ignored}
        sources, as_named, used = self._reading(_shape(values))
        row = {name: value for name, value in values.items() if name in as_named}
        for name, of in sources.items():
            if any(column in values for column in of):
                row[name] = _joined(values, of)
        if sources.get("response") == (TEXT,) and "prompt" not in sources and not self._given:
            row["prompt"] = ""
        if sources.get("prompt", ("",))[0] == INSTRUCTION and not self._given:
            used = used | _ask_as_conversation(row, values)
        others = [name for name in values if name not in used and name not in self.kept.names]
        unread = tuple(name for name in others if has_value(values[name]))
        if self._own_files:
            if any(row.get(name) is not None for name in ("prompt", *CONVERSATION_COLUMNS)):
                self._check_meaning(unread, row, sources)  # a row without either is an error of its own
            self._convert(row)
            read = tuple(name for name, value in values.items() if value is not None and name in used)
            self.layouts[_layout_of(row), read] += 1
        if self._ignored_keys:
            row = {name: _without_keys(value, self._ignored_keys) for name, value in row.items()}
        unread = () if self.kept.every else unread
        self._count(row, values, unread, sources)
        return row, unread

    def count_columns(self, counts: Mapping[str, int]) -> None:
        """Count columns, with their rows, that a reader left out. Raises DataError if one changes what a row means."""
        self._seen.update(counts)
        self.available.update(dict.fromkeys(counts))
        counted = {name: rows for name, rows in counts.items() if rows and name not in self._ignored}
        if self._own_files:
            self._check_meaning(tuple(counted), {}, {})
        self.unread.update(counted)

    def check_seen(self) -> None:
        """Check that some row has each column of `data.columns`. Raises DataError naming the columns that none has."""
        if unseen := [name for of in self._given.values() for name in of if name not in self._seen]:
            has = printable(sorted(self._seen)) or "no columns"
            raise DataError(f"data.columns names {printable(unseen)}, which no row has; the rows have {has}")

    def _reading_of(self, shape: Shape) -> _Reading:
        """The columns to read of rows of one shape. Raises DataError if columns could mean several things."""
        names = [name for name, _ in shape]
        has = {name for name, kind in shape if kind is not NoneType}
        sources = self._sources(names, has) if self._own_files else {}
        used = {name for of in sources.values() for name in of}
        extras = CONVERSATION_EXTRAS if self._can_be_conversation(shape, sources) else ()
        as_named = {*COLUMNS, *CONVERSATION_COLUMNS, *extras}
        as_named = (as_named - used - set(sources)) | set(self._more)
        return _Reading(sources, frozenset(as_named), frozenset(as_named | used))

    def _sources(self, names: Sequence[str], has: AbstractSet[str]) -> Sources:
        """The columns that make each text of a row, of `data.columns` or a known layout; `has`: those with a value."""
        if self._given:
            return self._given
        if has & set(CONVERSATION_COLUMNS):
            return {}
        answers = has & set(_RESPONSES)
        if "prompt" in has:
            return {} if answers or "completion" not in has else {"response": ("completion",)}
        pairs = {prompt: response for prompt, response in PAIRS.items() if prompt in has and response in has}
        if answers - {"response"} or (self._kind == "prompts" and not pairs):
            pairs = {prompt: "" for prompt in PAIRS if prompt in has}
        if len(pairs) > 1:
            raise DataError(
                f"columns {printable(pairs)} could each be the prompt; choose by data.columns, for example "
                + mapping_text(
                    {
                        name: [of]
                        for name, of in zip(("prompt", "response"), next(iter(pairs.items())), strict=True)
                        if of
                    }
                )
            )
        if not pairs and not answers and TEXT in has:
            self._check_texts()
            return {"response": (TEXT,)}
        sources: Sources = {}
        for prompt, response in pairs.items():
            sources["prompt"] = (prompt, INPUT) if prompt == "instruction" and INPUT in names else (prompt,)
            if response:
                sources["response"] = (response,)
        return sources

    def _can_be_conversation(self, shape: Shape, sources: Sources) -> bool:
        """True if a row has messages, in a column for them or in place of a text, or a prompt."""
        prompts = () if self._kind == "stepwise" else sources.get("prompt", ("prompt",))
        texts = {*TEXT_COLUMNS, *(column for of in sources.values() for column in of)}
        return any(
            (name in (*CONVERSATION_COLUMNS, *prompts) and kind is not NoneType)
            or (name in texts and issubclass(kind, (list, dict)))
            for name, kind in shape
        )

    def _check_texts(self) -> None:
        """Raise DataError if the task does not learn texts without a prompt."""
        if self._kind != "sft":
            given = mapping_text({"prompt": [TEXT]})
            as_prompt = f"; if they are prompts, give {given}" if self._kind == "prompts" else ""
            raise DataError(f"column '{TEXT}' alone is text without a prompt, which only task=sft learns{as_prompt}")

    def _check_meaning(self, unread: Sequence[str], row: Mapping[str, Any], sources: Sources) -> None:
        """Raise DataError if a column that is not read changes what the row means."""
        name = next((name for name in unread if name in MEANING_COLUMNS), None)
        if name is None:
            return
        fix = f"leave it out by 'data.ignore_columns=[{','.join([*sorted(self._ignored), name])}]'"
        place = MEANING_COLUMNS[name]
        if place and isinstance(row.get("prompt"), str):
            prompt = sources.get("prompt", ("prompt",) if row["prompt"] else ())
            joined = (name, *prompt) if place == "before" else (*prompt, name)
            fix = f"put it into the prompt by {mapping_text({**sources, 'prompt': joined})}, or {fix}"
        extra = _MESSAGE_EXTRAS.get(name)
        if extra and self._can_be_conversation(_shape(row), {}):
            fix = f"read it by {mapping_text({**sources, extra: (name,)})}, or {fix}"
        raise DataError(f"column '{name}' is not read here, and it changes what the row means; {fix}")

    def _convert(self, row: dict[str, Any]) -> None:
        """Read whole numbers as text where text is expected, and lists that a file can hold only as JSON text."""
        for name, value in row.items():
            if name in TEXT_COLUMNS:
                if type(value) is int:  # a bool is not a number here
                    row[name] = str(value)
                    self.numbers[name] += 1
                elif messages := _messages_in_text(value):
                    row[name] = messages
                    self.sources[f"{name} from JSON text of messages"] += 1
            elif name in _LISTS and isinstance(value, str) and value.lstrip()[:1] == "[":
                try:
                    row[name] = json.loads(value)
                except (ValueError, RecursionError) as error:
                    raise DataError(
                        f"column '{name}' holds a list as text that is not JSON ({str(error)[:80]}); write it with "
                        "json.dumps"
                    ) from None

    def _count(
        self, row: Mapping[str, Any], values: Mapping[str, Any], unread: Sequence[str], sources: Sources
    ) -> None:
        """Count what the data report tells of one row."""
        not_used = list(unread)
        if self._kind not in ("unpaired", "rewarded") and has_value(row.get("label")):
            not_used.append("label")
            self.undesirable += str(row["label"]).strip().casefold() in ("false", "0")
        if self._kind != "preference":
            not_used += [name for name in SCORES if has_value(row.get(name))]
        if row.get("responses") is None:
            not_used += [name for name in RANKINGS if has_value(row.get(name))]
        if not_used:
            self.unread.update(not_used)
        for name, of in sources.items():
            of = tuple(column for column in of if has_value(values.get(column)))
            if of and of != (name,):
                self.sources[f"{name} from {printable([' + '.join(of)])}"] += 1


def _ask_as_conversation(row: dict[str, Any], values: Mapping[str, Any]) -> set[str]:
    """Make messages of an Alpaca row with history; return the columns that it reads. Raises DataError."""
    history = values.get(HISTORY)
    if not has_value(history) or not isinstance(row.get("prompt"), str):
        return set()
    if isinstance(history, str):
        with suppress(ValueError, RecursionError):
            history = json.loads(history)
    if not isinstance(history, list) or not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in history):
        raise DataError(f"column '{HISTORY}' must be a list of pairs, [question, answer]; write it so")
    roles = ("user", "assistant")
    turns = [{"role": role, "content": text} for turn in history for role, text in zip(roles, turn, strict=True)]
    if turns:
        row["prompt"] = [*turns, {"role": "user", "content": row["prompt"]}]
    return {HISTORY}


def _shape(values: Mapping[str, Any]) -> Shape:
    """The shape of a row."""
    return tuple(zip(values, map(type, values.values()), strict=True))


def _layout_of(row: Mapping[str, Any]) -> str:
    """A row's kind of data, for the report."""
    has = {name for name, value in row.items() if value is not None}
    if has & {"chosen", "rejected", "rejected_response"}:
        return "preference" if has & {"prompt", *CONVERSATION_COLUMNS} else "preference, implicit prompt"
    if "responses" in has:
        return "ranked responses"
    if STEPS[0] in has:
        return "steps with labels"
    if "label" in has:
        return "response with a label"
    if has & set(CONVERSATION_COLUMNS):
        return "conversation"
    if "response" not in has:
        return "prompt"
    return "text" if row.get("prompt") == "" else "prompt and response"


def _messages_in_text(value: Any) -> list[Any] | None:
    """The messages that a text spells as JSON, which csv files need; None if it spells something else."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    try:
        messages = json.loads(value)
    except (ValueError, RecursionError):
        return None
    keys = ({"role", "content"}, {"from", "value"})
    is_list = isinstance(messages, list) and all(
        isinstance(one, dict) and any(k <= set(one) for k in keys) for one in messages
    )
    return messages if is_list and messages else None


def _without_keys(value: Any, keys: frozenset[str]) -> Any:
    """A value with all messages in it without some of their keys."""
    if isinstance(value, list):
        return [_without_keys(one, keys) for one in value]
    if isinstance(value, dict) and ("role" in value or "from" in value):
        return {key: one for key, one in value.items() if key not in keys}
    return value


def _joined(values: Mapping[str, Any], columns: Sequence[str]) -> Any:
    """The value of a column, or the texts of several with a blank line between them; empty ones are left out."""
    if len(columns) == 1:
        return values.get(columns[0])
    parts = []
    for name in columns:
        value = values.get(name)
        if has_value(value):
            if type(value) is int:
                value = str(value)
            if not isinstance(value, str):
                raise DataError(f"column '{name}' holds {type(value).__name__}; only text is joined with other columns")
            parts.append(value)
    empty = "" if any(values.get(name) is not None for name in columns) else None
    return JOINT.join(parts) if parts else empty
