"""The words behind a command: flags and their values, overrides, and the sentence for what is neither."""

import math
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sheeprlhf.utils.errors import ConfigError

if TYPE_CHECKING:
    from rich.text import Text


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
    short: str = ""  # another name, with its dash


VERBS = {
    "train": "Train a model: `train task=sft` works offline on a CPU.",
    "eval": "Evaluate a run or model: `eval task=perplexity experiment_dir=<run>`.",
    "inspect": "Look at the data as training sees it: `inspect data=summarization`.",
    "pipeline": "All stages in one command: `pipeline experiment=quickstart`.",
    "list": "What there is to choose, and past runs: `list models`, `list runs`.",
    "show": "Every option of a choice, its default and meaning: `show model=opt`.",
    "report": "Runs as one page to look at: `report <run> <run>`, `report <folder of runs>`.",
    "doctor": "Check this machine, plan a run's memory: `doctor task=sft model=opt`.",
    "fetch": "Get a model of the hub into the local cache.",
    "chat": "Talk to a run or a model in the terminal: `chat <run>`.",
    "demo": "The same in the browser, several runs side by side: `demo <run> <run>`.",
    "export": "A run as a folder for plain transformers: `export <run> --to <folder>`.",
}
PLAIN_VERBS = ("list", "show", "report", "chat", "demo", "export")  # they take words; the others take options
_INFO = ("config", "defaults", "defaults-tree", "plugins", "searchpath", "all")
FLAGS = (
    Flag("help", "This text; `train task=sft model=opt --help` has the options of these.", kind=bool, short="-h"),
    Flag("cfg", "Print the composed configuration only.", values=("job", "hydra", "all"), short="-c"),
    Flag("resolve", "With --cfg: resolve interpolations.", kind=bool),
    Flag("package", "With --cfg: print this part only.", value="key", short="-p"),
    Flag("multirun", "A sweep: several values, as in seed=1,2,3, make one run each.", kind=bool, short="-m"),
    Flag("run", "One run; the default.", kind=bool, short="-r"),
    Flag("config-dir", "A folder of your own groups and recipes (model/, data/, ...).", value="folder", short="-cd"),
    Flag("config-name", "Compose this file of --config-dir instead of the command's own.", value="name", short="-cn"),
    Flag("info", f"Print what Hydra found: {', '.join(_INFO)}.", values=_INFO, value="what", short="-i"),
    Flag("shell-completion", 'Shell completion: eval "$(sheeprlhf -sc install=bash)".', kind=bool, short="-sc"),
    Flag("hydra-help", "Hydra's own help.", kind=bool),
    Flag("version", "Hydra's version.", kind=bool),
)
PLOT = Flag("plot", "Draw the result as a PNG too: another way to write plot=true.", kind=bool)  # of eval only
_REJECTED_FLAGS = {
    "--config-path": "give --config-dir=<folder>, which adds yours to those of sheeprlhf",
    "--experimental-rerun": "it would unpickle a file; repeat the command, or give resume_from=<run>",
}
CREDENTIAL = "credentials do not belong on the command line; remove it and set HF_TOKEN or run `hf auth login`"
_SHELLS = tuple(f"{verb}={shell}" for verb in ("install", "uninstall", "query") for shell in ("bash", "fish", "zsh"))


class ParsedArgs(NamedTuple):
    """A command line after the verb: Hydra's flags, their values by long name, and the overrides."""

    flags: list[str]
    values: dict[str, str]
    overrides: list[str]

    def config_dir(self) -> list[str]:
        """The flag for the user's folder of groups, for another command; empty if none was given."""
        folder = self.values.get("--config-dir")
        return [] if folder is None else [f"--config-dir={os.path.abspath(folder)}"]


def parse_args(words: list[str]) -> ParsedArgs:
    """Separate flags, wherever they are, from overrides. Raises ConfigError for wrong flags and values."""
    by_name = {name: flag for flag in FLAGS for name in (f"--{flag.name}", flag.short) if name}
    flags, values, overrides, problems = [], {}, [], []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("-"):
            overrides.append(word)
            continue
        given, equals, value = word.partition("=")
        flag = by_name.get(given)
        if given in _REJECTED_FLAGS or given == "-cp":
            problems.append(f"{given} is not supported: {_REJECTED_FLAGS.get(given, _REJECTED_FLAGS['--config-path'])}")
        elif flag is None:
            if not equals and waiting and not waiting[0].startswith("-") and "=" not in waiting[0]:
                value = waiting.pop(0)  # `--epochs 3`
            problems.append(flag_problem(given, value, by_name))
        elif flag.kind is bool:
            flags.append(f"--{flag.name}")
        elif equals or waiting:
            value = value if equals else waiting.pop(0)
            values[f"--{flag.name}"] = value
            flags += [f"--{flag.name}", value]
            problems += value_problems(given, value, flag.values)
        else:
            problems.append(f"{given} needs a value: {flag.help}")
    if "--shell-completion" in flags:
        asked = next((word for word in overrides if word.startswith(("install", "uninstall", "query"))), "")
        problems += value_problems("--shell-completion", asked, _SHELLS)
    problems += _space_problems(overrides)
    if problems:
        raise ConfigError(*problems)
    return ParsedArgs(flags, values, [_with_quoted_items(word) for word in overrides])


def _with_quoted_items(word: str) -> str:
    if "=[" not in word:
        return word
    from sheeprlhf.config.overrides import quote_list_items  # imports Hydra

    return quote_list_items(word)


def _space_problems(words: list[str]) -> Iterator[str]:
    """One sentence for each `key = value`, `key= value` and `key =value`, which the shell has cut into words."""
    for first, second, third in zip(words, [*words[1:], ""], [*words[2:], "", ""], strict=False):
        if "=" not in first and second.startswith("="):
            key, value = first, second[1:] or third
        elif len(first) > 1 and first.find("=") == len(first) - 1 and second and "=" not in second:
            key, value = first[:-1], second
        else:
            continue
        yield f"{key}: {CREDENTIAL}" if _is_secret(key, value) else f"no spaces around =: write {key}={value}"


def verb_problem(word: str, rest: list[str], verbs: Collection[str]) -> str:
    """The sentence for a first word that is not a command."""
    from sheeprlhf.config.option_checks import nearest
    from sheeprlhf.config.overrides import choices_like
    from sheeprlhf.config.registry import choices
    from sheeprlhf.security.redaction import is_secret_name

    key, equals, _ = word.partition("=")
    shown = key if is_secret_name(key) else word
    evaluates = any(choice == f"task={name}" for choice in choices_like(word) for name in choices("task", "eval"))
    start = "eval" if evaluates else "train"
    meant = [f"{start} {'' if choice.startswith('task=') else 'task=sft '}{choice}" for choice in choices_like(word)]
    if word.startswith("-"):
        if word.lstrip("-") in verbs:
            return f"{word} is a command, and commands have no dashes: write `{word.lstrip('-')} ...`"
        verb = next((other for other in rest if other in verbs), "train")
        return f"{shown} comes before the command: write `{verb} {key} ...`"
    near = None if equals or meant else nearest(word, verbs)
    likely = ["train"] if equals else meant or ([near] if near else [])
    hint = f"did you mean {' or '.join(f'`{words}`' for words in likely)}? " if likely else ""
    return f"{shown} is not a command: {hint}The commands are {', '.join(verbs)}"


def flag_problem(given: str, value: str, flags: Iterable[str]) -> str:
    """The sentence for a flag that does not exist; options, which others write as flags, have no dashes here."""
    from sheeprlhf.config.option_checks import nearest
    from sheeprlhf.config.overrides import keys_like
    from sheeprlhf.config.registry import ROOTS, groups

    name = given.lstrip("-").replace("-", "_")
    if _is_secret(name, value):
        return f"{given}: {CREDENTIAL}"
    is_group = any(name in groups(verb) for verb in ROOTS) or name == "experiment"
    options = [name] if is_group else keys_like(name)
    near = nearest(given, [flag for flag in flags if flag.startswith("--")]) if given.startswith("--") else None
    if options:
        written = " or ".join(f"{key}={value or '<value>'}" for key in options[:3])
        return f"there is no flag {given}: options have no dashes; write {written}"
    return f"there is no flag {given}" + (f": did you mean {near}?" if near else "; `train --help` lists all")


def _is_secret(name: str, value: str) -> bool:
    from sheeprlhf.security.redaction import is_secret_name, is_secret_value

    return is_secret_name(name) or is_secret_value(value)


def value_problems(given: str, value: str, values: tuple[str, ...]) -> list[str]:
    """The sentence for a value that a flag cannot have; none where any value will do."""
    from sheeprlhf.config.option_checks import nearest

    if not values or value in values:
        return []
    near = nearest(value, values)
    did = f"did you mean {near}? It" if near else "it"
    return [f"{given} {value}".rstrip() + f" is not possible: {did} may be {', '.join(values)}"]


def usage(verb: str) -> "Text":
    """The first line of a command's help."""
    from sheeprlhf.apps.terminal import heading

    return heading(f"sheeprlhf {verb}", "[group=choice] [option=value] [--flag]")


def print_overview() -> None:
    """Print all commands; called without a command, so it imports nothing that composes configurations."""
    from sheeprlhf.apps.terminal import Screen, entry, heading, paragraph

    screen = Screen()
    screen.print(usage("<command>"), "\nFine-tune and align language models.\n", heading("Commands:"), sep="\n")
    for verb, meaning in VERBS.items():
        screen.print(entry(verb, meaning, width=9))
    screen.print()
    screen.print(paragraph("Start with `train task=sft`; `list` and `<command> --help` tell what there is."))


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
    from sheeprlhf.apps.terminal import Screen, entry, heading, paragraph

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
    if {"--help", "-h"} & set(arguments):
        return None
    from sheeprlhf.apps.terminal import clean
    from sheeprlhf.config.option_checks import nearest

    by_name = {f"--{flag.name}": flag for flag in flags}
    words: list[str] = []
    values = {flag.name: flag.default for flag in flags}
    problems: list[str] = []
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        given, equals, value = word.partition("=")
        flag = by_name.get(given if given.startswith("--") else f"--{given.replace('_', '-')}" if equals else "")
        if _is_secret(given.lstrip("-").replace("-", "_"), word):
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
            found = list(_value_problems(flag, text, clean(text)))
            problems += found
            values[flag.name] = flag.default if found else flag.kind(text)
    if problems:
        raise ConfigError(*problems)
    return Given(words, values)


def _value_problems(flag: Flag, text: str, shown: str) -> Iterator[str]:
    if _is_secret("", text):
        yield f"--{flag.name}: {CREDENTIAL}"
    elif flag.values and text not in flag.values:
        yield from value_problems(f"--{flag.name}", shown, flag.values)
    elif flag.kind in (int, float):
        try:
            number = flag.kind(text)
        except ValueError:
            yield f"--{flag.name} {shown} is not a {'whole ' if flag.kind is int else ''}number: {flag.help}"
            return
        if not math.isfinite(number) or number < flag.minimum:
            yield f"--{flag.name} {shown} is too small or no number: give {flag.minimum:g} or more"
        elif number > flag.maximum:
            yield f"--{flag.name} {shown} is too large: give {flag.maximum:.12g} or less"
