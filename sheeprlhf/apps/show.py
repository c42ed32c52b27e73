"""`show` and `--help`: commands, choices and recipes with their options, read from the configuration itself."""

import re
import typing
from collections.abc import Callable, Iterable, Sequence
from itertools import dropwhile, groupby, repeat, takewhile
from typing import Any

import yaml
from rich.text import Text

from sheeprlhf.apps.arguments import FLAGS, PLAIN_VERBS, PLOT, VERBS, read_flags
from sheeprlhf.apps.terminal import Screen, clean, entry, flag_entries, heading, paragraph, print_help
from sheeprlhf.config.option_checks import nearest
from sheeprlhf.config.option_lookup import Entry, catalogue, choices_like
from sheeprlhf.config.registry import (
    BASES,
    ROOTS,
    Option,
    choices,
    configs_directory,
    groups,
    leaves,
    options,
    unwrap_optional,
)
from sheeprlhf.config.run_lookup import NEWEST, START, TASKS
from sheeprlhf.structure.option import MISSING, Config
from sheeprlhf.utils.errors import ConfigError

_FROM_FILE = "from a file"
_TYPE_NAMES = {int: "whole number", float: "number", bool: "true or false", str: "text"}


def meaning_of(cls: type) -> str:
    """The first line of a dataclass's documentation."""
    return (cls.__doc__ or "").strip().partition("\n")[0]


def choices_of(group: str, verb: str = "") -> dict[str, str]:
    """Every choice of a group with its meaning: the dataclasses, then the files of configs/; or the recipes."""
    if group == "experiment":
        return {name: recipe_meaning(name) for name in recipe_names(verb)}
    classes = choices(group, verb)
    files = sorted(path.stem for path in (configs_directory() / group).glob("*.yaml"))
    found = {name: meaning_of(cls) for name, cls in classes.items()}
    return found | {name: _FROM_FILE for name in files if name not in classes}


def print_choices(screen: Screen, meanings: dict[str, str]) -> None:
    """Print choices of one group with their meanings."""
    for name, meaning in meanings.items():
        screen.print(entry(name, meaning, width=max(18, *map(len, meanings))))


def default_choices(verb: str) -> dict[str, str | None]:
    """Default choices of a command by group; None where nothing is chosen."""
    content = yaml.safe_load((configs_directory() / f"{verb}.yaml").read_text(encoding="utf-8"))
    pairs = [pair for line in content["defaults"] if isinstance(line, dict) for pair in line.items()]
    return {group: None if name == "???" else name for group, name in pairs if " " not in group}


def recipe_names(verb: str = "train") -> list[str]:
    """The recipes of configs/experiment for `train` or for `pipeline`, whose recipes have stages; "": all."""
    paths = sorted((configs_directory() / "experiment").glob("*.yaml"))
    names = [path.stem for path in paths]
    return [name for name in names if not verb or bool(stages_of_recipe(name)) == (verb == "pipeline")]


def stages_of_recipe(name: str) -> dict[str, str]:
    """The command of each stage, if it is a recipe of `pipeline`, else nothing."""
    path = configs_directory() / "experiment" / f"{name}.yaml"
    if not path.is_file() or "\nstages:" not in (text := path.read_text(encoding="utf-8")):
        return {}
    return {str(stage): str(command) for stage, command in (yaml.safe_load(text)["stages"] or {}).items()}


def recipe_meaning(name: str) -> str:
    """The first sentence of the recipe's first comment, where it is one of ours."""
    path = configs_directory() / "experiment" / f"{name}.yaml"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    first = dropwhile(lambda line: not line.startswith("# ") or "@package" in line, lines)
    comment = " ".join(line[1:].strip() for line in takewhile(lambda line: line.startswith("# "), first))
    sentence = re.match(r".{20,}?\.(?= |$)|.+", comment)  # "Dr. GRPO" is no sentence
    return sentence[0] if sentence else "a recipe"


def recipe_content(name: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Choices of a recipe by group, and its values by key, including those of a recipe that it extends."""
    content = yaml.safe_load((configs_directory() / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")) or {}
    chosen: dict[str, str] = {}
    values: dict[str, Any] = {}
    for line in content.pop("defaults", []):
        if isinstance(line, dict):
            chosen |= {key.removeprefix("override ").lstrip("/"): str(value) for key, value in line.items()}
        elif line != "_self_":
            extended = recipe_content(line)
            chosen |= extended[0]
            values |= extended[1]
    return chosen, values | dict(leaves(content))


def allowed(option: Option) -> str:
    """Allowed values: type and range, or the list of choices."""
    metadata = option.metadata
    if metadata.get("choices"):
        return f"one of {', '.join(metadata['choices'])}"
    plain, optional = unwrap_optional(option.type)
    if typing.get_origin(plain) in (tuple, list):
        kind = "numbers" if typing.get_args(plain)[0] in (int, float) else "texts"
    else:
        kind = "" if plain is Any else _TYPE_NAMES.get(plain, "group")
    if metadata.get("unit") and option.value is None:  # else the value shows it
        kind = f"{kind} of {metadata['unit']}"
    low, high, above = metadata.get("minimum"), metadata.get("maximum"), metadata.get("above")
    bounds = [f"above {above:g}"] if above is not None else []
    if low is not None:
        bounds.append(f"{low:g} to {high:g}" if high is not None else f"{low:g} or more")
    elif high is not None:
        bounds.append(f"at most {high:g}")
    return ", ".join(filter(None, (kind, " and ".join(bounds), "or null" if optional and plain is not Any else "")))


def shown(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(shown, value))}]"
    return str(value)


Show = Callable[[Screen], None]
_GROUP_NAMES = {"data": "dataset", "optim": "optimizer"}
_NO_BREAK = "\xa0"
_MAX_UNBROKEN = 60  # columns


def run(arguments: list[str]) -> int:
    """Print what each word names. Raises ConfigError if a word names nothing."""
    given = read_flags("show", (), arguments)
    if given is None or not given.words:
        kinds = {f"{group}=<name>": ", ".join(choices_of(group)) for group in _all_groups()}
        kinds |= {
            "<command>": ", ".join(VERBS),
            "<option>": "its full or last name: optim.lr, lr, mini_batch_size",
            "<part>": "options under one name: generation, model.lora_cfg",
        }
        meaning = "Options with their default, unit, allowed values and meaning."
        short = "Names alone will do: `show sft opt` is `show task=sft model=opt`."
        return print_help("show <what> ...", [meaning], "What can be shown", kinds, short)
    found, problems = [], []
    for word in given.words:
        shows = _find_shows(word)
        found += shows
        problems += [] if shows else [_unknown_problem(word)]
    if problems:
        raise ConfigError(*problems)
    screen = Screen()
    for number, show in enumerate(found):
        if number:
            screen.print()
        show(screen)
    return 0


def _all_groups() -> list[str]:
    return [*dict.fromkeys(group for verb in ROOTS for group in groups(verb)), "experiment"]


def _find_shows(word: str) -> list[Show]:
    """Resolve a name: a command, a group, a choice, a recipe, or options; empty if it is unknown."""
    key, equals, name = word.partition("=")
    if equals and key in _all_groups():
        return _choice(key, name)
    if word in VERBS:
        return [lambda screen: _print_verb(screen, word)]
    group = "experiment" if word == "experiments" else word
    if group in _all_groups():
        return [lambda screen: _print_group(screen, group)]
    of_choices = [show for same in choices_like(word) for show in _choice(*same.split("="))]
    of_choices += _choice("experiment", word)
    return of_choices or _options_named(key)


def _choice(group: str, name: str) -> list[Show]:
    if group == "experiment":
        if stages_of_recipe(name):
            return [lambda screen: _print_pipeline(screen, name)]
        return [lambda screen: _print_recipe(screen, name)] if name in recipe_names() else []
    if name in choices(group):
        return [lambda screen: _print_choice(screen, group, name)]
    tip = f"{group}={name} comes from a file: `train task=sft {group}={name} --help` shows its options."
    return [lambda screen: screen.print(paragraph(tip))] if name in choices_of(group) else []


def _options_named(key: str) -> list[Show]:
    """The options of that name, else those below it: `lr`, `optim.lr`, `generation`, `lora_cfg`."""
    entries = list(catalogue())
    same = [found for found in entries if f".{found.option.key}".endswith(f".{key}")]
    found = same or [found for found in entries if f".{key}." in f".{found.option.key}"]
    return [lambda screen: _print_entries(screen, found)] if found and key else []


def _unknown_problem(word: str) -> str:
    key, equals, name = word.partition("=")
    if equals and key in _all_groups():
        names = list(choices_of(key))
        near = nearest(name, names)
        listed = f"it may be {', '.join(names)}"
        return f"there is no {clean(word)}: " + (f"did you mean `show {key}={near}`? I{listed[1:]}" if near else listed)
    entries = list(catalogue())
    keys = [found.option.key for found in entries]
    candidates = {found.choice: f"{found.group}={found.choice}" for found in entries if found.choice}
    candidates |= {name: f"experiment={name}" for name in recipe_names("")}
    candidates |= {word: word for word in (*(key.rpartition(".")[2] for key in keys), *keys, *_all_groups(), *VERBS)}
    candidates |= {known: known for known in candidates.values()}
    near = nearest(key if equals else word, candidates)
    did = f"did you mean `show {candidates[near]}`? " if near else ""
    return f"there is nothing named {clean(word)}: {did}`show` alone lists what can be shown"


def _print_rows(screen: Screen, rows: Sequence[Option], notes: Iterable[str] = repeat("")) -> None:
    """Each option with its value, a note and, below it, its meaning: once, where several values of one option follow.

    A note says where an option is found, or what it is otherwise.
    """
    meanings, lines = [_meaning(option) for option in rows], list[Text]()
    for option, note, meaning, next_meaning in zip(rows, notes, meanings, [*meanings[1:], None], strict=False):
        must = option.value == "???"
        value = ("must be given", "odd") if must else (shown(option.value) or '""', "value")
        unit = option.metadata.get("unit", "") if isinstance(option.value, int | float) else ""
        parts = [(option.key, "name"), "  " if must else "=", value, f" {unit}" * bool(unit), (f"  {note}", "faint")]
        line = Text.assemble("  ", *parts)
        line.rstrip()
        lines += [line] if meaning == next_meaning else [line, meaning[1]]
    screen.print(*lines, sep="\n")


def _meaning(option: Option) -> tuple[str, Text]:
    """The key, and what the option means and takes; what it takes stays on one line where it is short."""
    facts = allowed(option)
    facts = facts if len(facts) > _MAX_UNBROKEN else facts.replace(" ", _NO_BREAK)
    text = paragraph(f"{option.metadata.get('help', '')} {f'({facts})' * bool(facts)}", indent=6)
    text = Text(text.plain.replace(_NO_BREAK, " ").rstrip())
    text.highlight_regex(r"\([^()]*\)$", "faint")
    return option.key, text


def _print_choice(screen: Screen, group: str, name: str) -> None:
    cls = choices(group)[name]
    screen.print(heading(f"{group}={name}"))
    screen.print(paragraph(meaning_of(cls)))
    verb = next(verb for verb in ROOTS if group in groups(verb) and name in choices(group, verb))
    rows = [option for option in options(cls(), f"{group}.") if option.key != f"{group}.config_name"]
    words = [verb if group == "task" else "train task=sft", f"{group}={name}"]
    words += ["experiment_dir=<run>"] if verb == "eval" else []
    words += [f"{START}={NEWEST}" for option in rows if option.key == START and name != TASKS[START]]
    words += [f"{option.key}=<value>" for option in rows if option.value == "???"]
    screen.print(paragraph(f"`{' '.join(words)}`"))
    parents = [parent for parent in cls.__mro__ if parent is cls or not issubclass(parent, BASES[group])]
    own = {option for parent in parents for option in vars(parent).get("__annotations__", ())}
    parts = [[option for option in rows if (option.key.split(".")[1] in own) == is_own] for is_own in (True, False)]
    every = f"Options of every {f'{verb} ' * (group == 'task')}{_GROUP_NAMES.get(group, group)}:"
    for title, part in zip(("Its own options:", every), parts, strict=True):
        if part:
            screen.print()
            screen.print(heading(title if all(parts) else "Options:"))
            _print_rows(screen, part)


def _print_group(screen: Screen, group: str) -> None:
    names = choices_of(group)
    screen.print(heading(f"{group}=", "one of"))
    print_choices(screen, names)
    screen.print(paragraph(f"`show {group}={next(iter(names), '<name>')}` tells all options of one."))


def _print_verb(screen: Screen, verb: str) -> None:
    screen.print(heading(verb))
    screen.print(paragraph(VERBS[verb]))
    if verb in PLAIN_VERBS:
        screen.print(paragraph(f"`{verb} --help` tells what words it takes."))
        return
    screen.print(heading("\nIts groups:"))
    defaults = default_choices(verb)
    for group in groups(verb):
        default = defaults.get(group)
        names = ", ".join(choices_of(group, verb))
        screen.print(entry(f"{group}={default or ''}", names if default else f"must be given: {names}", width=18))
    own = [found.option for found in catalogue([verb]) if not found.group]
    if any(option.key == "experiment" for option in own):
        screen.print(entry("experiment=", ", ".join(recipe_names(verb)), width=18))
    screen.print(heading("\nIts own options:"))
    own = [option for option in own if option.key != "experiment"]
    _print_rows(screen, sorted(own, key=lambda option: "." in option.key))
    screen.print(f"\n`{verb} --help` lists the options of its groups too.", style="faint")


def _print_recipe(screen: Screen, name: str) -> None:
    chosen, values = recipe_content(name)
    screen.print(heading(f"experiment={name}"))
    screen.print(paragraph(recipe_meaning(name)))
    words = " ".join(f"{group}={choice}" for group, choice in chosen.items())
    screen.print(paragraph(f"`train experiment={name}` is `train {words}` with these values:"))
    screen.print()
    composed = default_choices("train") | chosen
    of_choices = [found for found in catalogue(["train"]) if not found.group or found.choice == composed[found.group]]
    known = {found.option.key: found.option for found in of_choices}
    rows = [known.get(key, Option(key, Any, None, {})) for key in values]
    usual, given = [shown(option.value) for option in rows], list(values.values())
    notes = ["" if new in ("???", old) else f"(else {old})" for new, old in zip(map(shown, given), usual, strict=True)]
    _print_rows(screen, [option._replace(value=new) for option, new in zip(rows, given, strict=True)], notes)


def _print_pipeline(screen: Screen, name: str) -> None:
    screen.print(heading(f"experiment={name}"))
    screen.print(paragraph(f"{recipe_meaning(name)} `pipeline experiment={name}` has these stages:"))
    for stage, command in stages_of_recipe(name).items():
        screen.print(entry(stage, command, width=10))


def _print_entries(screen: Screen, entries: list[Entry]) -> None:
    """Options, once for all choices that agree about them."""
    where: dict[tuple[str, str, str, str], tuple[Option, dict[str, list[str]]]] = {}
    for verb, group, choice, option in entries:
        facts = (option.key, shown(option.value), option.metadata.get("help", ""), allowed(option))
        _, places = where.setdefault(facts, (option, {}))
        names = places.setdefault(group or "command", [])
        if (choice or verb) not in names:
            names.append(choice or verb)
    keys = list(dict.fromkeys(option.key for option, _ in where.values()))
    found = sorted(where.values(), key=lambda row: keys.index(row[0].key))
    notes = ["; ".join(_location(group, names) for group, names in places.items()) for _, places in found]
    _print_rows(screen, [option for option, _ in found], [f"({note})" for note in notes])


def _location(group: str, names: list[str]) -> str:
    if group == "command":
        return f"of {', '.join(names)}"
    everywhere = len(names) > 1 and set(names) == set(choices(group))
    return f"with every {_GROUP_NAMES.get(group, group)}" if everywhere else f"with {group}={', '.join(names)}"


def configuration_for_help(
    verb: str, overrides: list[str], config_dir: str | None
) -> tuple[Config, dict[str, list[str]]]:
    """The configuration of the groups chosen so far, and the choices of every group. Raises ConfigError.

    Choices that are all dataclasses are made without Hydra, whose import takes most of the time of a short command.
    """
    given = {key: value for key, _, value in (word.partition("=") for word in overrides)}
    defaults, known = default_choices(verb), {group: choices(group, verb) for group in groups(verb)}
    recipes = {"experiment": recipe_names(verb)} if "experiment" in defaults else {}
    if verb == "pipeline":
        del defaults["experiment"]  # the default recipe has stages, which help does not show, and nothing else
    chosen = {group: name for group, name in (defaults | given).items() if name is not None}
    has_files = config_dir is not None or any((configs_directory() / group).is_dir() for group in known)
    if has_files or len(given) < len(overrides) or any(chosen[group] not in known.get(group, ()) for group in chosen):
        from sheeprlhf.config.compose import Source, compose_for_help

        return compose_for_help(Source(verb, config_dir), overrides)
    config = ROOTS[verb]()
    for group, name in chosen.items():
        setattr(config, group, known[group][name]())
    return config, {group: list(classes) for group, classes in known.items()} | recipes


def print_verb_help(verb: str, overrides: list[str], config_dir: str | None) -> None:
    """Print the groups, every option of the chosen configuration, and the flags. Raises ConfigError."""
    config, available = configuration_for_help(verb, overrides, config_dir)
    screen = Screen()
    usage = heading(f"sheeprlhf {verb}", "[group=choice] [option=value] [--flag]")
    screen.print(usage, Text(), paragraph(VERBS[verb]), sep="\n")
    for group, names in available.items():
        needed = getattr(config, group) == MISSING
        chosen = getattr(getattr(config, group), "config_name", None)
        note = "(must be given)" if needed else f"(default {chosen})" if chosen else ""
        screen.print(heading(f"\n{group}=", note, "odd" if needed else "faint"))
        known = choices_of(group, "" if group == "experiment" else verb)
        known |= {name: _FROM_FILE for name in names if name not in known}
        print_choices(screen, {name: known[name] for name in sorted(names, key=list(known).index)})
    screen.print(heading("\nOptions, with the values of the choices above:"))
    _print_options(screen, verb, config)
    screen.print(heading("\nFlags:"))
    for name, meaning in flag_entries((*FLAGS, PLOT) if verb == "eval" else FLAGS).items():
        screen.print(entry(name, meaning, width=28))


def _print_options(screen: Screen, verb: str, config: Config) -> None:
    rows = [option for option in options(config) if _is_option(option) and option.key != "experiment"]
    if any(option.key == "task" for option in rows):  # it must be given
        for name, cls in choices("task", verb).items():
            screen.print(f"\n  with task={name}:", style="faint")
            _print_rows(screen, [inner for inner in options(cls(), "task.") if _is_option(inner)])
    before = ""
    for part, found in groupby((option for option in rows if option.key != "task"), _part_of):
        if part != before:
            screen.print()
        _print_rows(screen, list(found))
        before = part


def _part_of(option: Option) -> str:
    """The first part of a key with several: "model" of model.lora_cfg.rank, "" of seed."""
    first, dot, _ = option.key.partition(".")
    return first if dot else ""


def _is_option(option: Option) -> bool:
    """False for those that are set by choosing: names of choices, and the stages of a recipe."""
    return not option.key.endswith("config_name") and not isinstance(option.value, dict)
