"""Redaction of text for disk and screen: removes secrets and control sequences. Imports no torch."""

import html
import os
import re
from typing import Any

from sheeprlhf.utils.home import expand_home

HIDDEN = "<redacted>"
CREDENTIAL_ADVICE = "credentials do not belong on the command line; remove it and set HF_TOKEN or run `hf auth login`"
_LITERALS = ("true", "false", "null")
_SHORTEST = 10  # characters; a shorter value may be a word of any text
_SECRET_KEY = re.compile(r"token|secret|password|passwd|credential|key$", re.IGNORECASE)
_ASSIGNMENT = re.compile(r"(?P<key>[\w.+~-]*)=(?P<value>.*)", re.DOTALL)
_ESCAPE_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)", re.DOTALL)
# control characters but newline and tab; the second range also holds the old one-byte forms of escape sequences
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_SECRET_NAME = re.compile(r"(token|secrets?|passwords?|passwd|api_?keys?|private_?key|secret_?key|credentials?)$", re.I)
# Formats of credentials: prefix, alphabet and length, as the services issue them. Those without a prefix (AWS secret
# keys, W&B keys of 40 hexadecimal digits) are known by the name of their option or environment variable only.
_TOKENS = (
    r"hf_[A-Za-z0-9]{34,}|api_org_[A-Za-z0-9]{34,}|hf_(?:oauth|jwt)_[\w.-]{30,}",  # Hugging Face
    r"sk-[A-Za-z0-9]{32,}|sk-or-v1-[0-9a-f]{64}",  # OpenAI and OpenRouter
    r"sk-(?:proj|svcacct|admin|None)-(?=[\w-]{0,80}[A-Z\d])[\w-]{40,}",
    r"sk-ant-[a-z]+\d\d-[\w-]{80,}",  # Anthropic
    r"gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}",  # GitHub
    r"gl(?:pat|dt|rt|ptt|cbt|soat|oas|ft|imt|agent)-[\w.-]{20,}",  # GitLab
    r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}(?![A-Za-z0-9])",  # AWS
    r"AIza[\w-]{35}|ya29\.[\w-]{30,}|GOCSPX-[\w-]{28}",  # Google
    r"xox[a-z](?:\.xox[a-z])?-(?=[\w-]{0,40}\d)[\w-]{20,}|xapp-\d-[A-Z0-9]+-\d+-[a-z0-9]{20,}",  # Slack
    r"wandb_v1_\w{60,}",  # W&B
    r"pypi-AgE[\w-]{50,}|npm_[A-Za-z0-9]{36,}",  # package indexes
    r"eyJ[\w-]{10,400}\.eyJ[\w-]{10,}\.[\w-]{10,}",  # JSON web tokens
)
_TOKEN = re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(_TOKENS)})")
_USER_INFO = re.compile(  # of a URL: user:password@, and of HTTP also token@
    r"(?<=://)[^/\s@?#:]*:[^/\s@?#]+(?=@)|(?<=http://)[^/\s@?#]+(?=@)|(?<=https://)[^/\s@?#]+(?=@)"
)
_AROUND_PATH = re.compile(r"[\s'\"`=,:;<>|(){}\[\]]")  # a path begins after one of these and ends before one
_LONGEST_PATH = 4096
_MOST_STARTS = 32


def is_secret_name(name: str) -> bool:
    """True if an option of this name would carry a credential: `hf_token`, `api_key`; not `token_budget`."""
    return any(_SECRET_NAME.search(part) for part in name.split("."))


def is_secret_value(text: str) -> bool:
    """Return True if the text holds an access token, or an address with a password in it."""
    return bool(secret_spans(text))


def secret_spans(text: str) -> list[tuple[int, int]]:
    """First and end place of each credential, found by its format; a component of an existing path is none."""
    tokens = [match.span() for match in _TOKEN.finditer(text)]
    found = [span for span in tokens if not is_in_path(text, *span)]
    return found + [match.span() for match in _USER_INFO.finditer(text)]


def is_in_path(text: str, start: int, end: int) -> bool:
    """Return True if this part of the text belongs to a component of an existing path."""
    first = max(0, start - _LONGEST_PATH)
    begins = [first + match.end() for match in _AROUND_PATH.finditer(text[first:start])][-_MOST_STARTS:]
    rest = text[end : end + _LONGEST_PATH]
    component = re.split(r"[/\n]", rest, maxsplit=1)[0]  # which may have spaces in it
    ends = {end + len(_AROUND_PATH.split(component, maxsplit=1)[0]), end + len(component)}
    return any(_exists(text[begin:last].rstrip(".")) for begin in [first, *begins] for last in ends)


def _exists(path: str) -> bool:
    try:
        return bool(path) and os.path.lexists(expand_home(path))
    except (OSError, ValueError):  # a name with a zero byte
        return False


def redact_text(text: str) -> str:
    """The text without keys, URL passwords and secrets of the environment; existing paths stay."""
    # of the environment, by the names of the variables; paths and short words are none
    found = {value for name, value in os.environ.items() if _SECRET_KEY.search(name) and len(value) >= _SHORTEST}
    secrets = sorted((value for value in found if not value.startswith(("/", "~", "."))), key=len, reverse=True)
    spans = secret_spans(text)
    if secrets:
        matches = re.finditer("|".join(map(re.escape, secrets)), text)
        spans += [match.span() for match in matches if not is_in_path(text, *match.span())]
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


def redact(value: Any, key: str = "") -> Any:
    """A configuration as plain dicts and lists, with text replaced that is secret by its key or its look."""
    if isinstance(value, dict):
        return {k: redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(v, key) for v in value]
    if isinstance(value, str):
        return HIDDEN if _SECRET_KEY.search(key) else redact_text(value)
    return value


def redact_command(arguments: list[str]) -> list[str]:
    """Return command-line arguments `key=value` with secrets replaced; numbers, true, false and null are none."""
    redacted = []
    for argument in arguments:
        if match := _ASSIGNMENT.fullmatch(argument):
            key = match["key"].rpartition(".")[2]
            is_plain = match["value"].replace(".", "", 1).isdigit() or match["value"].casefold() in _LITERALS
            value = match["value"] if is_plain else redact(match["value"], key)
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
