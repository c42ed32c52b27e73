"""Flags of commands that compose no configuration: `--name value`, checked all at once, with their help."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sheeprlhf.apps.arguments import CREDENTIAL, value_problems
from sheeprlhf.apps.terminal import Screen, clean, entry, heading, paragraph
from sheeprlhf.config.option_checks import nearest
from sheeprlhf.security.redaction import is_secret_name, is_secret_value
from sheeprlhf.utils.errors import ConfigError

_HELP = ("--help", "-h")


class Flag(NamedTuple):
    """One flag."""

    name: str  # without dashes
    help: str  # its meaning
    default: Any = None  # the value when it is not given
    kind: type = str  # int, float or str; bool for a flag without a value
    minimum: float = -math.inf  # of a number
    maximum: float = math.inf
    values: tuple[str, ...] = ()  # all that it may be, if they are few
    value: str = ""  # what its value is called in the help


class Given(NamedTuple):
    """Parsed command line: words that are not flags, and the value of every flag by name."""

    words: list[str]
    values: dict[str, Any]


def number_problems(usage: str, words: Sequence[str], most: int = 1) -> list[str]:
    """The sentence for another number of runs or models than from one to `most`."""
    if 1 <= len(words) <= most:
        return []
    number = "one run or model" if most == 1 else f"one to {most} runs or models"
    what = f"{len(words)} were given" if words else "`list runs` shows the runs"
    return [f"`{usage.partition(' ')[0]}` takes {number}: `{usage}`; {what}"]


def print_flags_help(usage: str, meaning: str, flags: Sequence[Flag], *more: str) -> None:
    """The help of a command."""
    screen = Screen()
    verb, _, rest = usage.partition(" ")
    screen.print(heading(f"sheeprlhf {verb}", rest))
    screen.print()
    for text in (meaning, *more):
        screen.print(paragraph(text))
    screen.print(heading("\nFlags:"))
    for flag in flags:
        default = "" if flag.default in (None, False) else f" [default {flag.default}]"
        value = "" if flag.kind is bool else f" <{flag.value or '|'.join(flag.values) or flag.name}>"
        screen.print(entry(f"--{flag.name}{value}", f"{flag.help}{default}", width=26))


def read_flags(verb: str, flags: Sequence[Flag], arguments: Sequence[str]) -> Given | None:
    """Separate flags from other words; None if help is asked for. Raises ConfigError with all problems."""
    if any(word in _HELP for word in arguments):
        return None
    by_name = {f"--{flag.name}": flag for flag in flags}
    words: list[str] = []
    values = {flag.name: flag.default for flag in flags}
    problems: list[str] = []
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        given, equals, value = word.partition("=")
        flag = by_name.get(given if given.startswith("--") else f"--{given.replace('_', '-')}" if equals else "")
        if is_secret_name(given.lstrip("-").replace("-", "_")) or is_secret_value(word):
            problems.append(f"{clean(given)}: {CREDENTIAL}")
        elif flag is None and not word.startswith("-"):
            words.append(word)
        elif flag is None:
            near = nearest(given.replace("_", "-"), by_name)
            did = f"did you mean {near}?" if near else f"`{verb} --help` lists them"
            problems.append(f"`{verb}` has no flag {clean(given)}: {did}")
        elif not given.startswith("--"):
            problems.append(f"{clean(word)}: flags have dashes here; write --{flag.name} {clean(value)}")
        elif flag.kind is bool:
            problems += [f"{given} takes no value: write {given}"] if equals else []
            values[flag.name] = True
        elif not equals and (not waiting or waiting[0].startswith("--")):
            problems.append(f"{given} needs a value: {flag.help}")
        else:
            text = value if equals else waiting.pop(0)
            found = list(_value_problems(flag, text))
            problems += found
            values[flag.name] = flag.default if found else flag.kind(text)
    if problems:
        raise ConfigError(*problems)
    return Given(words, values)


def _value_problems(flag: Flag, text: str) -> Iterator[str]:
    shown = f"--{flag.name} {clean(text)}"
    if is_secret_value(text):
        yield f"--{flag.name}: {CREDENTIAL}"
    elif flag.values and text not in flag.values:
        yield from value_problems(f"--{flag.name}", clean(text), flag.values)
    elif flag.kind in (int, float):
        try:
            number = flag.kind(text)
        except ValueError:
            yield f"{shown} is not a {'whole ' if flag.kind is int else ''}number: {flag.help}"
            return
        if not math.isfinite(number) or number < flag.minimum:
            yield f"{shown} is too small or no number: give {flag.minimum:g} or more"
        elif number > flag.maximum:
            yield f"{shown} is too large: give {flag.maximum:.12g} or less"
