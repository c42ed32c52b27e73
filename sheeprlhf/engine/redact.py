"""Redaction of text for disk and screen: removes secrets and control sequences. Imports no torch."""

import html
import os
import re
from typing import Any

from sheeprlhf.structure.limits import is_in_path, secret_spans

HIDDEN = "<redacted>"
_SHORTEST = 10  # characters; a shorter value may be a word of any text
_SECRET_KEY = re.compile(r"token|secret|password|passwd|credential|key$", re.IGNORECASE)
_ASSIGNMENT = re.compile(r"(?P<key>[\w.+~-]*)=(?P<value>.*)", re.DOTALL)
_ESCAPE_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)", re.DOTALL)
# control characters but newline and tab; the second range also holds the old one-byte forms of escape sequences
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def redact_text(text: str) -> str:
    """The text with all replaced that looks like a key or a URL's password, or is a secret of the environment.

    Components of existing paths stay: without them no command that is printed could be repeated.
    """
    secrets = _of_environment()
    spans = secret_spans(text)
    if secrets:
        found = re.finditer("|".join(map(re.escape, secrets)), text)
        spans += [match.span() for match in found if not is_in_path(text, *match.span())]
    for start, end in _joined(spans):
        text = f"{text[:start]}{HIDDEN}{text[end:]}"
    return text


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join spans that overlap; the last one first, so that they can be replaced one after the other."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined[::-1]


def _of_environment() -> list[str]:
    """The values of variables whose names say that they are secret, long ones first; paths and short words are none."""
    found = {value for name, value in os.environ.items() if _SECRET_KEY.search(name) and len(value) >= _SHORTEST}
    return sorted((value for value in found if not value.startswith(("/", "~", "."))), key=len, reverse=True)


def redact(value: Any, key: str = "") -> Any:
    """A configuration as plain dicts and lists, with secrets replaced: by the name of their key, or by their look.

    Only text is hidden by name: `token_budget: 2048` is a number and stays.
    """
    if isinstance(value, dict):
        return {k: redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(v, key) for v in value]
    if isinstance(value, str):
        return HIDDEN if _SECRET_KEY.search(key) else redact_text(value)
    return value


def redact_command(arguments: list[str]) -> list[str]:
    """Command-line arguments `key=value` with secrets replaced."""
    redacted = []
    for argument in arguments:
        match = _ASSIGNMENT.fullmatch(argument)
        if match:
            key = match["key"].rpartition(".")[2]
            is_number = match["value"].replace(".", "", 1).isdigit()
            value = match["value"] if is_number else redact(match["value"], key)
            redacted.append(f"{match['key']}={value}")
        else:
            redacted.append(redact_text(argument))
    return redacted


def plain_text(text: str) -> str:
    """Text that a terminal only prints and any file can hold: no escape sequences, control characters, half pairs."""
    text = text.encode("utf-8", "replace").decode()
    return _CONTROL.sub("", _ESCAPE_SEQUENCE.sub("", text))


def code_block(text: str) -> str:
    """Text as an HTML block that shows it as it is: no markup in it is obeyed."""
    return f"<pre>{html.escape(plain_text(text), quote=True)}</pre>"


def csv_cell(text: str) -> str:
    """Text that a table's program shows and does not compute: no formula begins with its first character."""
    text = plain_text(text)
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) or text.startswith(("\t", "\n")) else text
