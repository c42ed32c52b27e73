"""Columns of the source files that are stored with the tokens, for reward functions: any value, as JSON text."""

import base64
import json
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

from sheeprlhf.utils.errors import DataError

_TAG = "__sheeprlhf__"  # the key of a value that JSON lacks: [kind, text]
_KINDS: dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]] = {  # datetime is a date, so it comes first
    "datetime": (datetime, datetime.isoformat, datetime.fromisoformat),
    "date": (date, date.isoformat, date.fromisoformat),
    "time": (time, time.isoformat, time.fromisoformat),
    "timedelta": (timedelta, lambda of: repr(of.total_seconds()), lambda text: timedelta(seconds=float(text))),
    "decimal": (Decimal, str, Decimal),
    "bytes": (bytes, lambda of: base64.b64encode(of).decode(), base64.b64decode),
}


def encode_columns(values: Mapping[str, Any]) -> str:
    """Return the columns of one row as JSON text.

    Raises:
        DataError: naming a column whose value cannot be stored.
    """
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
