"""Checks of one option on its own, and the nearest valid name for a mistyped one."""

import difflib
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sheeprlhf.config.registry import Option
from sheeprlhf.security.redaction import is_secret_value

_SAME = {"gpu": "cuda", "deepspeed": "fsdp2"}  # pairs without similar spelling
_MOST_NAMES = 1000  # of a folder, that are compared with a mistyped one


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


def did_you_mean(word: str, candidates: Iterable[str], otherwise: str, *, key: str = "", end: str = "") -> str:
    """Begin a sentence: "did you mean <key><candidate><end>?" if a candidate is like `word`, then `otherwise`."""
    near = nearest(word, candidates)
    return f"did you mean {key}{near}{end}? {otherwise.capitalize()}" if near else otherwise


def unread(given: str, where: str, instead: str = "") -> str:
    """The sentence for an option that has no effect, for example "by task=sft"; `instead` is a choice that reads it."""
    return f"{given} is not read {where}: remove it" + (f", or give {instead}" if instead else "")


def holds(condition: str, values: Mapping[str, Any]) -> bool:
    """True if all parts of a condition do: `key=a|b`, `key!=a|b`, or `key`: it is not null, 0, false or empty."""
    for part in condition.split():
        name, equals, wanted = part.partition("=")
        key = name.rstrip("!")
        is_one = shown(values.get(key)) in wanted.split("|") if equals else bool(values.get(key))
        if key not in values or is_one == name.endswith("!"):
            return False
    return True


def shown(value: Any) -> str:
    """A value in messages, and in conditions of `holds`."""
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(list(value) if isinstance(value, tuple) else value)


def unread_problems(found: Iterable[Option], rules: Mapping[str, str]) -> Iterator[str]:
    """Options that differ from their default and need a condition to be read that does not hold."""
    by_key = {option.key: option for option in found}
    values = {key: option.value for key, option in by_key.items()}
    for keys, conditions in rules.items():
        for option in (by_key[key] for key in keys.split() if key in by_key):
            value, usual = (tuple(one) if isinstance(one, list) else one for one in (option.value, option.default))
            for condition in conditions.split() if value != usual else ():
                name, _, wanted = condition.partition("=")
                other, named = by_key.get(name.rstrip("!")), [value for value in wanted.split("|") if value]
                if other is not None and not holds(condition, values):
                    if name.endswith("!"):
                        named = [choice for choice in other.metadata["choices"] if choice not in named]
                    instead = f"{other.key}={' or '.join(named) or '<value>'}"
                    yield unread(
                        f"{option.key}={shown(option.value)}", f"with {other.key}={shown(other.value)}", instead
                    )


def conflicts(found: Iterable[Option], rules: Iterable[tuple[str, str, str, str]]) -> Iterator[str]:
    """Problems of options that are set together, by (condition, other condition, reason, fix)."""
    values = {option.key: option.value for option in found}
    for first, second, reason, fix in rules:
        if holds(f"{first} {second}", values):
            keys = [part.partition("=")[0].rstrip("!") for part in f"{first} {second}".split()]
            given = " and ".join(f"{key.removesuffix('.config_name')}={shown(values[key])}" for key in keys)
            yield f"{given} do not go together{reason and f': {reason}'}: {fix}"


def not_installed(given: str, packages: Iterable[str], extra: str) -> str:
    """The sentence for an option that needs packages of an extra."""
    return f'{given} needs packages that are not installed ({", ".join(packages)}): pip install "sheeprlhf[{extra}]"'


def url_problem(key: str, url: str | None, example: str) -> str | None:
    """Return what is wrong with an address; a value that may be a secret is not repeated."""
    if not url:
        return f"{key} is missing: {example}"
    try:
        parts = urlsplit(url)
        ok = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        ok = False
    if not ok or not url.isprintable() or " " in url:
        return f"{key} is not an address of http or https: {example}"
    if "@" in parts.netloc:
        return f"{key} contains a user name or password: remove it"
    if parts.query or parts.fragment:
        return f"{key} has a part behind ? or #, which is not supported: {example}"
    return None


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


def option_problems(option: Option) -> Iterator[str]:
    """Violations of one option's declared choices or range, and credentials in its value."""
    key, value, metadata = option.key, option.value, option.metadata
    if isinstance(value, str) and is_secret_value(value):
        yield f"{key}: the value looks like a credential; put it into the environment (HF_TOKEN) and remove it here"
    known = [choice.casefold() for choice in metadata.get("choices", ())]
    if isinstance(value, str) and known and value.casefold() not in known:
        did = did_you_mean(value, metadata["choices"], "it", key=f"{key}=")
        yield f"{key}={value} is not a choice: {did} may be {', '.join(metadata['choices'])}"
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, int | float) and not isinstance(number, bool):
            low, high, above = (metadata.get(name) for name in ("minimum", "maximum", "above"))
            unit = f" {metadata['unit']}" if metadata.get("unit") else ""
            if not math.isfinite(number):
                yield f"{key}={number} must be a finite number"
            elif low is not None and number < low:
                yield f"{key}={number} is too small: give {low:.12g}{unit} or more"
            elif above is not None and number <= above:
                yield f"{key}={number} is too small: give more than {above:.12g}{unit}"
            elif high is not None and number > high:
                yield f"{key}={number} is too large: give {high:.12g}{unit} or less"
