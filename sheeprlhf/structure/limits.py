"""Checks of one option on its own, and the nearest valid name for a mistyped one."""

import difflib
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override

from sheeprlhf.structure.registry import Option
from sheeprlhf.utils.home import expand_home

_SAME = {"gpu": "cuda", "deepspeed": "fsdp2"}  # what nobody finds by the letters
_MOST_NAMES = 1000  # of a folder, that are compared with a mistyped one
_SECRET_NAME = re.compile(r"(token|secrets?|passwords?|passwd|api_?keys?|private_?key|secret_?key|credentials?)$", re.I)
# Formats of credentials: prefix, alphabet and length, as the services issue them. Those without a prefix (AWS secret
# keys, W&B keys of 40 hexadecimal digits) are known by the name of their option or environment variable alone.
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


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `word` in any letter case, or None if nothing is alike."""
    by_folded = {candidate.casefold(): candidate for candidate in candidates}
    folded = word.casefold()
    matches = [
        *difflib.get_close_matches(_SAME.get(folded, folded), by_folded, n=1, cutoff=0.5),
        *difflib.get_close_matches(folded, by_folded, n=1, cutoff=0.5),
    ]
    matches = matches or [candidate for candidate in by_folded if folded and candidate.startswith(folded)]
    return by_folded[matches[0]] if matches else None


def near_path(path: str) -> str | None:
    """The path of an existing neighbour whose name is most like that of `path`; None if nothing is alike."""
    wrong = Path(path)
    if os.path.exists(wrong):
        return None
    try:
        names = [child.name for child in itertools.islice(wrong.parent.iterdir(), _MOST_NAMES)]
    except OSError:
        return None
    near = nearest(wrong.name, names) if wrong.name else None
    return str(wrong.with_name(near)) if near else None


def is_secret_name(name: str) -> bool:
    """Whether an option of this name would carry a credential: `hf_token`, `api_key`; not `token_budget`."""
    return any(_SECRET_NAME.search(part) for part in name.split("."))


def is_secret_value(text: str) -> bool:
    """Return True if the text holds an access token, or an address with a password in it."""
    return bool(secret_spans(text))


def secret_spans(text: str) -> list[tuple[int, int]]:
    """Find credentials by their formats; a component of an existing path is none.

    Returns:
        First place and the one after the last, for each.
    """
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


def option_problems(option: Option) -> Iterator[str]:
    """What its own documentation forbids of one option: choices, range, credentials."""
    key, value, metadata = option.key, option.value, option.metadata
    if isinstance(value, str) and is_secret_value(value):
        yield f"{key}: the value looks like a credential; put it into the environment (HF_TOKEN) and remove it here"
    if isinstance(value, str) and metadata.get("choices") and not _is_choice(value, metadata["choices"]):
        near = nearest(value, metadata["choices"])
        did = f"did you mean {key}={near}? It" if near else "it"
        yield f"{key}={value} is not a choice: {did} may be {', '.join(metadata['choices'])}"
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, int | float) and not isinstance(number, bool):
            yield from _range_problems(key, number, metadata)


def _is_choice(value: str, choices: Iterable[str]) -> bool:
    return value.casefold() in {choice.casefold() for choice in choices}


def _range_problems(key: str, number: float, metadata: Any) -> Iterator[str]:
    low, high, above = metadata.get("minimum"), metadata.get("maximum"), metadata.get("above")
    unit = f" {metadata['unit']}" if metadata.get("unit") else ""
    if not math.isfinite(number):
        yield f"{key}={number} must be a finite number"
    elif low is not None and number < low:
        yield f"{key}={number} is too small: give {low:.12g}{unit} or more"
    elif above is not None and number <= above:
        yield f"{key}={number} is too small: give more than {above:.12g}{unit}"
    elif high is not None and number > high:
        yield f"{key}={number} is too large: give {high:.12g}{unit} or less"


def sweep_problems(parsed: list[Override]) -> list[str]:
    """Hydra composes a sweep once without what is swept, and an option of a task needs one that is chosen then."""
    swept = [override for override in parsed if override.is_sweep_override() and override.key_or_group == "task"]
    inner = [override.key_or_group for override in parsed if override.key_or_group.startswith("task.")]
    if not swept or not inner:
        return []
    return [f"{swept[0].input_line} in a sweep does not go with {inner[0]}: give each task a command of its own"]
