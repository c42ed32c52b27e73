"""Messages of chat data: the keys, roles and values of the usual layouts, read into one form.

A message is a dict with `role` and, as far as it has them, `content` (text), `tool_calls` (a list of objects),
`reasoning_content` and any other key of the row, which a chat template may read. `TRAINED` says whether the row marks
it as one to learn.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sheeprlhf.data.rows import printable, text
from sheeprlhf.utils.errors import DataError

Message = dict[str, Any]

TRAINED = "\0trained"  # key of a message that no file can have: True or False where the row says what is learned
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # names of one field
ROLES = {  # other names, in any letter case -> the role that chat templates know
    **{name: name for name in ("system", "developer", "user", "assistant", "tool")},
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bot", "ai", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "ipython"), "tool"),
}
_REASONING = re.compile(r"<think>.*?(?:</think>\s*|\Z)|\A(?:(?!<think>).)*?</think>\s*", re.DOTALL)
_ROLE = re.compile(r"[A-Za-z_]{1,32}")
_MARKS = ("weight", "train", "loss")  # whether a message is learned
_UNKNOWN_MARKS = ("train_detail", "mask", "masked", "loss_mask", "loss_weight", "trainable", "training")
_SPELLINGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def read_messages(value: Any, column: str, *, role: str | None = None) -> tuple[Message, ...]:
    """The messages in a column, checked.

    Args:
        value: a list of messages, one message, the JSON text of either, or a tuple that this function returned.
        column: its name, for messages.
        role: of a plain text; without it a text is JSON.

    Raises:
        DataError: it is something else; DropRowError: a text has a NUL character.
    """
    if isinstance(value, tuple) and all(isinstance(turn, dict) and "role" in turn for turn in value):
        return value
    if isinstance(value, str) and role is not None:
        return ({"role": role, "content": text({column: value}, column)},)
    if isinstance(value, str):
        value = _json(value, column)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple) or not all(isinstance(turn, Mapping) for turn in value):
        raise DataError(f"column '{column}' must be a list of {{role, content}}")
    found = []
    for index, turn in enumerate(value):
        try:
            found.append(_message(turn))
        except DataError as error:
            raise DataError(f"column '{column}', message {index}: {error}") from None
    return tuple(found)


def read_tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    """The functions of column 'tools': a list of JSON schemas, as objects or as JSON text; None if there is none.

    Raises:
        DataError: it is something else.
    """
    if isinstance(value, str):
        value = _json(value, "tools") if value.strip() else None
    if value is None or value == []:
        return None
    if isinstance(value, Mapping):
        value = [value]
    tools = [_json(tool, "tools") if isinstance(tool, str) else tool for tool in value] if _is_list(value) else [None]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError("column 'tools' must be a list of JSON schemas of functions")
    return tuple(dict(tool) for tool in tools if tool)


def is_answer(message: Message) -> bool:
    """True if the message is the assistant's."""
    return bool(message["role"] == "assistant")


def is_trained(message: Message) -> bool | None:
    """True if the row marks a message as one to learn, False if as one not to; None without a mark."""
    return message.get(TRAINED)


def plain_message(message: Message) -> Message:
    """The message as the chat template gets it."""
    return {key: value for key, value in message.items() if key != TRAINED}


def same_message(first: Message, second: Message) -> bool:
    """True if two messages have the same content."""
    return plain_message(first) == plain_message(second)


def reasoning_spans(text: str) -> list[tuple[int, int]]:
    """Start and end of each block of reasoning in a text, its tags and the white space behind it included.

    A block without its end goes on to the end of the text; one without its start begins with the text, as a chat
    template may have written `<think>` at the end of the prompt.
    """
    return [match.span() for match in _REASONING.finditer(text)]


def without_reasoning(text: str) -> str:
    """The text without its blocks of reasoning."""
    return _REASONING.sub("", text)


def without_reasoning_of(message: Message) -> Message:
    """A message of the assistant without its reasoning; any other as it is."""
    if not is_answer(message):
        return message
    kept = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    if "content" not in kept and "tool_calls" in kept:
        return kept
    return kept | {"content": without_reasoning(kept.get("content", ""))}


def strings_of(value: Any) -> Iterator[str]:
    """Every text in a nested value, keys of objects included."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            if one != TRAINED:
                yield one
        elif isinstance(one, Mapping):
            waiting += [*one.keys(), *one.values()]
        elif _is_list(one):
            waiting += one


def _message(turn: Mapping[Any, Any]) -> Message:
    """One message in the form that chat templates read."""
    given = {str(key): value for key, value in turn.items() if value is not None}
    for name, other in (("role", "from"), ("content", "value")):
        if name not in given and other in given:
            given[name] = given.pop(other)
    if "role" not in given:
        raise DataError(f"key 'role' (or 'from') is missing; {_has(given)}")
    role = text(given, "role")
    if not _ROLE.fullmatch(role):  # templates write roles between their markers
        raise DataError(f"role {role!r} is not a word")
    message: Message = {"role": ROLES.get(role.casefold(), role)}
    call = given.pop("function_call", None)
    if role.casefold() == "function_call":
        call = given.pop("content", None)
    if call is not None:
        given["tool_calls"] = _calls(call)
    calls = _tool_calls(given.pop("tool_calls", None))
    if "content" in given:
        message["content"] = _content(given["content"])
    elif not calls and not any(given.get(key) for key in REASONING_KEYS):
        raise DataError(f"key 'content' (or 'value') is missing or null; {_has(given)}")
    if calls:
        message["tool_calls"] = calls
    trained = _trained(given)
    if trained is not None:
        message[TRAINED] = trained
    for key in REASONING_KEYS:
        if key in given and not isinstance(given[key], str):
            raise DataError(f"key '{key}' holds {type(given[key]).__name__}, not text; write it as a string")
    others = {key: value for key, value in given.items() if key not in ("role", "content", *_MARKS)}
    return message | {key: value for key, value in others.items() if value not in ("", [], {})}


def _has(given: Mapping[str, Any]) -> str:
    return f"the message has {printable(given) or 'no key with a value'}; write its role and its text under these keys"


def _content(value: Any) -> str:
    """The text of a message, of one or more parts."""
    if not _is_list(value):
        return text({"content": value}, "content")
    parts = []
    for part in value:
        if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            part = part["text"]
        if not isinstance(part, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise DataError(f"a part of key 'content' is of type {str(kind)[:40]}; only text can be trained on")
        parts.append(text({"content": part}, "content"))
    return "".join(parts)


def _calls(value: Any) -> list[Any]:
    """Calls of functions as ShareGPT and older data have them: `{"name": ..., "arguments": ...}`, or its JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    calls = [value] if isinstance(value, Mapping) else value
    if not _is_list(calls) or not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise DataError('a function call must be JSON such as {"name": "f", "arguments": {}}; write it so')
    return [{"type": "function", "function": dict(call)} for call in calls]


def _tool_calls(value: Any) -> list[dict[str, Any]]:
    """Key 'tool_calls', checked."""
    if isinstance(value, str):
        value = _json(value, "tool_calls") if value.strip() else None
    if value is None:
        return []
    if not _is_list(value) or not all(isinstance(call, Mapping) for call in value):
        raise DataError("key 'tool_calls' must be a list of objects")
    for call in value:
        inner = call.get("function", call)
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise DataError("key 'tool_calls' has a call without the name of a function")
    return [dict(call) for call in value]


def _trained(given: Mapping[str, Any]) -> bool | None:
    """True if a message is learned, by its keys 'weight', 'train' and 'loss'.

    Raises:
        DataError: a key says it in a way that is not read.
    """
    unknown = next((key for key in _UNKNOWN_MARKS if key in given), None)
    if unknown is not None:
        raise DataError(
            f"key '{unknown}' is not read; write \"train\": true or false instead, or leave it out by "
            f"'data.ignore_columns=[messages.{unknown}]'"
        )
    said = []
    for key in _MARKS:
        if key in given:
            value = given[key]
            mark = _SPELLINGS.get(str(value).strip().casefold())
            if mark is None:
                raise DataError(f"key '{key}' is {str(value)[:40]!r}; only 0 and 1, or true and false, are read")
            said.append(mark)
    if len(set(said)) > 1:
        raise DataError(f"keys {' and '.join(key for key in _MARKS if key in given)} contradict each other; keep one")
    return said[0] if said else None


def _json(value: str, name: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"column '{name}' holds a text that is not JSON; write it with json.dumps") from None


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
