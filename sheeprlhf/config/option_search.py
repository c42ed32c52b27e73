"""Search options by a name, a part of it or a mistyped one; the command line does it after an error, `show` always."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from omegaconf import DictConfig

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
        grouped = groups(verb)
        for option in options(ROOTS[verb]()):
            if option.key not in grouped:
                yield Entry(verb, "", "", option)
        for group in grouped:
            for name, cls in choices(group, verb).items():
                for option in options(cls(), f"{group}."):
                    if option.key != f"{group}.config_name":
                        yield Entry(verb, group, name, option)


def keys_like(name: str, verbs: Iterable[str] = ROOTS) -> list[str]:
    """The keys that `name` is, or is the last part of: `lr` is `optim.lr`, `model.lr` and `model.lora_cfg.lr`."""
    keys = dict.fromkeys(entry.option.key for entry in catalogue(verbs))
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
    having = [verb for verb in ROOTS if key in groups(verb) or any(e.option.key == key for e in catalogue([verb]))]
    owners = [f"`{verb}`" for verb in having if verb != but]
    return f" ({', '.join(owners)} {'has' if len(owners) == 1 else 'have'} {key})" if owners else ""


_HYDRA_KEYS = [
    f"hydra{key}"
    for key in (".run.dir", ".sweep.dir", ".sweep.subdir", ".job.name", ".verbose", "/launcher", "/sweeper")
]


def unknown_key(verb: str, key: str, config: DictConfig, names: Iterable[str]) -> str:
    """The sentence for a key that no option of a configuration has; `names` are those of its groups."""
    group, _, rest = key.partition(".")
    if group in groups(verb):
        having = [n for n, cls in choices(group, verb).items() if rest in {o.key for o in options(cls())}]
        if rest and having:
            return f"{key} is an option of {group}={' and '.join(having)}: choose that, or remove {key}"
    keys = [option.key for option in options(config)]
    last = key.split(".")[-1]
    same = [k for k in keys if k.split(".")[-1] == last]
    if not same:
        near_last = nearest(last, [k.split(".")[-1] for k in keys]) if "." not in key else None
        near = nearest(key, [*keys, *names])
        same = [k for k in keys if k.split(".")[-1] == near_last] if near is None and near_last else []
        same = same or ([near] if near else [])
    owners = owners_of(key, verb)  # then the key is probably not mistyped
    did = f"did you mean {' or '.join(same[:3])}?" if same and not owners else f"`{verb} --help` lists all"
    return f"there is no option {key[:80]}: {did}{owners}"


def condensed(lines: list[str], verb: str) -> str:
    """Hydra's own message on one line, with the nearest key if it names one that does not exist."""
    text = " ".join(lines[:2])
    if unknown := re.match(r"Could not override '([\w./]+)'", text):
        near = nearest(unknown[1], _HYDRA_KEYS)
        return f"there is no option {unknown[1]}: " + (f"did you mean {near}?" if near else "`--hydra-help` tells more")
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), None)
    names = [field for group in groups(verb) for cls in choices(group, verb).values() for field in vars(cls())]
    near = nearest(key.split(".")[-1], names) if key else None
    return f"{text} ({key}: did you mean {near}?)" if near else text
