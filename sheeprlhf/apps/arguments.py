"""The words behind a command: flags and their values, overrides, and the sentence for what is neither."""

import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

from sheeprlhf.security.redaction import CREDENTIAL_ADVICE, is_secret_name, is_secret_value
from sheeprlhf.utils.errors import ConfigError


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
# words that Hydra may not read without quotes, or whose value it may read as a number and write otherwise
_SPECIAL = re.compile(r"=.*[^\w./:-]|=-?(?:\d+[_.e]|\.\d|nan|inf)", re.ASCII | re.IGNORECASE)
_REJECTED_FLAGS = {
    **dict.fromkeys(("--config-path", "-cp"), "give --config-dir=<folder>, which adds yours to those of sheeprlhf"),
    "--experimental-rerun": "it would unpickle a file; repeat the command, or give resume_from=<run>",
}
_SHELLS = tuple(f"{verb}={shell}" for verb in ("install", "uninstall", "query") for shell in ("bash", "fish", "zsh"))


class ParsedArgs(NamedTuple):
    """A command line after the verb: what is no flag, such as overrides, and the values of flags by name."""

    words: list[str]
    values: dict[str, Any]

    def flags(self) -> list[str]:
        """The flags as words of a command line."""
        return [word for name, value in self.values.items() for word in (f"--{name}", value) if word is not True]

    def config_dir(self) -> list[str]:
        """The flag for the user's folder of groups, for another command; empty if none was given."""
        folder = self.values.get("config-dir")
        return [] if folder is None else [f"--config-dir={os.path.abspath(folder)}"]


def _split(
    flags: Sequence[Flag], arguments: Sequence[str], unknown: Callable[[str, str], str], problems: list[str]
) -> ParsedArgs:
    """Separate the flags that were given from other words; `unknown` gives the problem of a flag and its value."""
    by_name = {name: flag for flag in flags for name in (f"--{flag.name}", flag.short) if name}
    words: list[str] = []
    values: dict[str, Any] = {}
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        given, equals, value = word.partition("=")
        flag = by_name.get(given)
        if not word.startswith("-"):
            words.append(word)
        elif flag is None:
            if not equals and waiting and not waiting[0].startswith("-") and "=" not in waiting[0]:
                value = waiting.pop(0)  # `--epochs 3`
            problems.append(f"{given}: {CREDENTIAL_ADVICE}" if _is_secret(given, value) else unknown(given, value))
        elif flag.kind is bool:
            problems += [f"{given} takes no value: write {given}"] if equals else []
            values[flag.name] = True
        elif not equals and (not waiting or waiting[0].startswith("--")):
            problems.append(f"{given} needs a value: {flag.help}")
        else:
            text = value if equals else waiting.pop(0)
            found = list(_value_problems(flag, text))
            problems += found
            values |= {} if found else {flag.name: flag.kind(text)}
    return ParsedArgs(words, values)


def parse_args(words: list[str]) -> ParsedArgs:
    """Separate Hydra's flags, wherever they are, from overrides. Raises ConfigError for wrong flags and values."""
    problems: list[str] = []
    args = _split(FLAGS, words, flag_problem, problems)
    if "shell-completion" in args.values:
        asked = next((word for word in args.words if word.startswith(("install", "uninstall", "query"))), "")
        problems += choice_problems("--shell-completion", asked, _SHELLS)
    problems += _space_problems(args.words)
    if problems:
        raise ConfigError(*problems)
    if any(map(_SPECIAL.search, args.words)):
        from sheeprlhf.config.overrides import quote_texts  # imports Hydra

        args = args._replace(words=[quote_texts(word) for word in args.words])
    return args


def read_flags(verb: str, flags: Sequence[Flag], arguments: Sequence[str]) -> ParsedArgs | None:
    """Separate flags from other words; None if help is asked for. Raises ConfigError with all problems."""
    if {"--help", "-h"} & set(arguments):
        return None
    from sheeprlhf.config.option_checks import did_you_mean

    names = [f"--{flag.name}" for flag in flags]

    def unknown(given: str, value: str) -> str:
        advice = did_you_mean(given.replace("_", "-"), names, f"`{verb} --help` lists them")
        return f"`{verb}` has no flag {given}: {advice}"

    problems: list[str] = []
    args = _split(flags, arguments, unknown, problems)
    for word in args.words:
        key, equals, value = word.partition("=")
        if _is_secret(key, word):
            problems.append(f"{key if equals else 'a word'}: {CREDENTIAL_ADVICE}")
        elif equals and (name := f"--{key.replace('_', '-')}") in names:
            problems.append(f"{word}: flags have dashes here; write {name} {value}")
    if problems:
        raise ConfigError(*problems)
    return args._replace(values={flag.name: flag.default for flag in flags} | args.values)


def _space_problems(words: list[str]) -> Iterator[str]:
    """One sentence for each `key = value`, `key= value` and `key =value`, which the shell has cut into words."""
    for first, second, third in zip(words, [*words[1:], ""], [*words[2:], "", ""], strict=False):
        if "=" not in first and second.startswith("="):
            key, value = first, second[1:] or third
        elif len(first) > 1 and first.find("=") == len(first) - 1 and second and "=" not in second:
            key, value = first[:-1], second
        else:
            continue
        yield f"{key}: {CREDENTIAL_ADVICE}" if _is_secret(key, value) else f"no spaces around =: write {key}={value}"


def verb_problem(word: str, rest: list[str], verbs: Collection[str]) -> str:
    """The sentence for a first word that is not a command."""
    from sheeprlhf.config.option_checks import nearest
    from sheeprlhf.config.option_lookup import choices_like
    from sheeprlhf.config.registry import choices

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
    listed = f"the commands are {', '.join(verbs)}"
    did = f"did you mean {' or '.join(f'`{words}`' for words in likely)}? {listed.capitalize()}"
    return f"{shown} is not a command: {did if likely else listed}"


def flag_problem(given: str, value: str) -> str:
    """The sentence for a flag that Hydra's commands have not; options, which others write as flags, have no dashes."""
    from sheeprlhf.config.option_checks import nearest
    from sheeprlhf.config.option_lookup import keys_like
    from sheeprlhf.config.registry import ROOTS, groups

    if given in _REJECTED_FLAGS:
        return f"{given} is not supported: {_REJECTED_FLAGS[given]}"
    name = given.lstrip("-").replace("-", "_")
    is_group = any(name in groups(verb) for verb in ROOTS) or name == "experiment"
    if options := [name] if is_group else keys_like(name):
        written = " or ".join(f"{key}={value or '<value>'}" for key in options[:3])
        return f"there is no flag {given}: options have no dashes; write {written}"
    near = nearest(given, [f"--{flag.name}" for flag in FLAGS]) if given.startswith("--") else None
    return f"there is no flag {given}" + (f": did you mean {near}?" if near else "; `train --help` lists all")


def _is_secret(name: str, value: str) -> bool:
    return is_secret_name(name.lstrip("-").replace("-", "_")) or is_secret_value(value)


def choice_problems(given: str, value: str, values: Sequence[str]) -> Iterator[str]:
    """Yield the sentence for a value that is not one of `values`."""
    if value not in values:
        from sheeprlhf.config.option_checks import did_you_mean

        advice = did_you_mean(value, values, f"it may be {', '.join(values)}")
        yield f"{given} {value}".rstrip() + f" is not possible: {advice}"


def _value_problems(flag: Flag, text: str) -> Iterator[str]:
    if _is_secret("", text):
        yield f"--{flag.name}: {CREDENTIAL_ADVICE}"
    elif flag.values:
        yield from choice_problems(f"--{flag.name}", text, flag.values)
    elif flag.kind in (int, float):
        try:
            number = flag.kind(text)
        except ValueError:
            yield f"--{flag.name} {text} is not a {'whole ' if flag.kind is int else ''}number: {flag.help}"
            return
        if not math.isfinite(number) or number < flag.minimum:
            yield f"--{flag.name} {text} is too small or no number: give {flag.minimum:g} or more"
        elif number > flag.maximum:
            yield f"--{flag.name} {text} is too large: give {flag.maximum:.12g} or less"
