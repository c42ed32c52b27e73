"""Find options and choices by a name, a part of a name, or a mistyped one. Imports no Hydra."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sheeprlhf.config.option_checks import nearest
from sheeprlhf.config.registry import RENAMED, ROOTS, Option, choices, groups, options


class Entry(NamedTuple):
    """One option of one choice of a command."""

    verb: str  # the command
    group: str  # the group that the option belongs to; empty for the command's own
    choice: str  # the choice of that group which has it; empty for the command's own
    option: Option  # its key, type, default and documentation


def catalogue(verbs: Iterable[str] = ROOTS) -> Iterator[Entry]:
    """Every option of every choice of these commands."""
    for verb in verbs:
        yield from _own_entries(verb)
        for group in groups(verb):
            yield from _group_entries(verb, group)


def entries_of(key: str, verbs: Iterable[str] = ROOTS) -> Iterator[Entry]:
    """The option with this key, of every choice of these commands that has it."""
    group = key.partition(".")[0]
    for verb in verbs:
        found = _group_entries(verb, group) if group in groups(verb) else _own_entries(verb)
        yield from (entry for entry in found if entry.option.key == key)


def _own_entries(verb: str) -> Iterator[Entry]:
    yield from (Entry(verb, "", "", option) for option in options(ROOTS[verb]()) if option.key not in groups(verb))


def _group_entries(verb: str, group: str) -> Iterator[Entry]:
    for name, cls in choices(group, verb).items():
        for option in options(cls(), f"{group}."):
            if option.key != f"{group}.config_name":
                yield Entry(verb, group, name, option)


def keys_like(name: str) -> list[str]:
    """The keys that `name` is, or is the last part of: `lr` is `optim.lr`, `model.lr` and `model.lora_cfg.lr`."""
    keys = dict.fromkeys(entry.option.key for entry in catalogue())
    found = [name] if name in keys else [key for key in keys if key.endswith(f".{name}")]
    return found or [new for old, new in RENAMED.items() if new in keys and name in (old, old.partition(".")[2])]


def choices_like(word: str) -> list[str]:
    """The choices of that name in any letter case, as words of a command line: `opt` is `model=opt`."""
    all_groups = dict.fromkeys(group for verb in ROOTS for group in groups(verb))
    return [f"{group}={name}" for group in all_groups for name in choices(group) if name == word.casefold()]


def meant_by(word: str) -> list[str]:
    """Possible meanings of a word without `=`: a choice, an option's value, an option; else the nearest of them."""
    folded = word.casefold()
    entries = list(catalogue())
    values = {f"{e.option.key}={value}": value for e in entries for value in e.option.metadata.get("choices", ())}
    same = choices_like(word) or [text for text, value in values.items() if value.casefold() == folded]
    same = same or [f"{key}=<value>" for key in keys_like(folded)]
    if not same:
        named = {e.choice: f"{e.group}={e.choice}" for e in entries if e.choice}
        named |= {e.option.key.rpartition(".")[2]: f"{e.option.key}=<value>" for e in reversed(entries)}
        near = nearest(word, named)
        same = [named[near]] if near else []
    return same[:3]


def owners_of(key: str, but: str) -> str:
    """A sentence's end that names the other commands which have this option or group; empty if none has."""
    having = [verb for verb in ROOTS if key in groups(verb) or any(entries_of(key, [verb]))]
    owners = [f"`{verb}`" for verb in having if verb != but]
    return f" ({', '.join(owners)} {'has' if len(owners) == 1 else 'have'} {key})" if owners else ""
