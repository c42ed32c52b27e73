"""The command line: verb -> compose -> typed config -> validate -> launch. Imports no torch until a run starts."""

import functools
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sheeprlhf.command.help import FLAGS, VERBS, print_overview, print_verb_help
from sheeprlhf.utils.errors import ConfigError, Interrupted, SheepError

HYDRA_VERBS = ("train", "eval")
_SECONDS_FOR_RANK_ZERO = 8.0
_REFUSED_FLAGS = {
    "--config-path": "give --config-dir=<folder>, which adds yours to those of sheeprlhf",
    "--experimental-rerun": "it would unpickle a file; repeat the command, or give resume_from=<run>",
}


class Words(NamedTuple):
    """A command line after the verb: Hydra's flags, their values by long name, and the overrides."""

    flags: list[str]
    values: dict[str, str]
    overrides: list[str]


def run(argv: list[str] | None = None) -> None:
    """Run one command (`sys.argv` by default); a problem ends in SystemExit with its message on stderr.

    Exit codes: 0 done, 1 a failure, 2 the command or configuration cannot work, 128 + n stopped by signal n.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "debug=true" in [argument.casefold() for argument in arguments]
    code = _guarded(lambda: _dispatch(arguments), debug)
    if code:
        raise SystemExit(code)


def _guarded(action: Callable[[], int], debug: bool) -> int:
    """Run `action`; an exception becomes a message and an exit code. With `debug`, its traceback is shown too."""
    other_rank = os.environ.get("LOCAL_RANK", "0") != "0"
    try:
        return action()
    except BrokenPipeError:  # who reads our output, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    except Interrupted as error:
        # All ranks stop together. A failing child would make Fabric kill rank zero, which may still be saving.
        if other_rank:
            return 0
        print(error, file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if other_rank:  # rank zero tells what it fails with too, and this process ends with it, before it fails alone
            time.sleep(_SECONDS_FOR_RANK_ZERO)
        if debug:
            traceback.print_exc()
        print(_message(error, debug), file=sys.stderr)
        return error.exit_code if isinstance(error, SheepError) else 1


def _message(error: Exception, debug: bool) -> str:
    from sheeprlhf.engine.redact import redact_text

    rank = os.environ.get("LOCAL_RANK", "0")
    who = "sheeprlhf" if rank == "0" else f"sheeprlhf (process {rank})"
    lines = str(error).splitlines() or [type(error).__name__]
    if isinstance(error, SheepError):
        return redact_text("\n".join([f"{who} cannot go on:", *(f"  - {line}" for line in lines)]))
    advice = getattr(error, "__notes__", []) or ([] if debug else ["debug=true shows where"])
    return redact_text("; ".join([f"{who} failed unexpectedly: {type(error).__name__}: {lines[0]}", *advice]))


def _dispatch(arguments: list[str]) -> int:
    verb, rest = _split_verb(arguments)
    if verb is None:
        print_overview()
        return 0
    words = split_words(rest)
    directory = words.values.get("--config-dir")
    if directory is not None and not Path(directory).is_dir():
        raise ConfigError(f"--config-dir={directory} is not a directory: give the folder that holds your groups")
    if "--help" in words.flags:
        print_verb_help(verb, words.overrides, directory)
        return 0
    return _with_hydra(verb, words)


def _split_verb(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The verb and what follows it; None to list the verbs.

    A shell asks for completions without the verb, which is then in `COMP_LINE`, where Hydra does not expect it.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return None, []
    if arguments[0] in ("-sc", "--shell-completion"):
        line = os.environ.get("COMP_LINE", "")
        verb = next((word for word in line.split() if word in HYDRA_VERBS), "train")
        os.environ["COMP_LINE"] = line.replace(f" {verb} ", " ", 1)
        return verb, arguments
    if arguments[0] == "--version":
        return "train", arguments
    if arguments[0] not in VERBS:
        from sheeprlhf.structure.limits import nearest

        near = nearest(arguments[0], VERBS) if "=" not in arguments[0] else "train"
        hint = f"did you mean `{near}`? " if near else ""
        raise ConfigError(f"{arguments[0]} is not a command: {hint}The commands are {', '.join(VERBS)}")
    return arguments[0], arguments[1:]


def split_words(words: list[str]) -> Words:
    """Separate flags, wherever they stand, from overrides.

    Raises:
        ConfigError: a flag is unknown, or lacks its value.
    """
    long_names = {short: flag.name for flag in FLAGS for short in (flag.name, flag.short)}
    takes_value = {flag.name for flag in FLAGS if flag.value}
    flags, values, overrides, problems = [], {}, [], []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("-"):
            overrides.append(word)
            continue
        given, equals, value = word.partition("=")
        name = long_names.get(given)
        if given in _REFUSED_FLAGS or given == "-cp":
            problems.append(f"{given} is not supported: {_REFUSED_FLAGS.get(given, _REFUSED_FLAGS['--config-path'])}")
        elif name is None:
            from sheeprlhf.structure.limits import nearest

            near = nearest(given, long_names)
            problems.append(f"there is no flag {given}" + (f": did you mean {near}?" if near else ""))
        elif name not in takes_value:
            flags.append(name)
        elif equals or waiting:
            values[name] = value if equals else waiting.pop(0)
            flags += [name, values[name]]
        else:
            problems.append(f"{given} needs a value: {next(flag.help for flag in FLAGS if flag.name == name)}")
    if problems:
        raise ConfigError(*problems)
    return Words(flags, values, overrides)


def _with_hydra(verb: str, words: Words) -> int:
    """Check the command line, then let Hydra run it: once, as a sweep, or showing the configuration."""
    from hydra import main as hydra_main

    from sheeprlhf.structure.compose import Source, check, configs_directory, saved_overrides
    from sheeprlhf.structure.registry import register_configs

    sweep = "--multirun" in words.flags
    shows = {"--cfg", "--info", "--shell-completion", "--hydra-help", "--version"} & set(words.flags)
    directory = configs_directory()
    source = Source(verb, directory, words.values.get("--config-name", verb), words.values.get("--config-dir"))
    if not shows or "--cfg" in shows:
        problems = check(source, words.overrides, multirun=sweep, complete=not shows)
        if problems:
            raise ConfigError(*problems)
    sweep_dir = tempfile.mkdtemp(prefix="sheeprlhf-") if sweep and "hydra.sweep.dir=" not in str(words) else ""
    codes: list[int] = []
    arguments, sys.argv = sys.argv, [sys.argv[0], *words.flags, *words.overrides]
    try:
        if sweep_dir:  # for the multirun.yaml that Hydra writes
            sys.argv.append(f"hydra.sweep.dir={sweep_dir}")
        register_configs()
        sys.argv += saved_overrides(verb, words.overrides)
        job = functools.partial(_job, verb, words, bool(sweep_dir), codes)
        hydra_main(config_path=str(directory), config_name=verb, version_base="1.3")(job)()
    finally:
        sys.argv = arguments
        shutil.rmtree(sweep_dir, ignore_errors=True)
    return next((code for code in codes if code), 0)


def _job(verb: str, words: Words, own_sweep_dir: bool, codes: list[int], composed: Any) -> None:
    """What Hydra calls for every job. Exit codes are collected; a signal ends the whole sweep."""
    from hydra.core.hydra_config import HydraConfig

    from sheeprlhf.launch import Job, launch
    from sheeprlhf.structure.compose import SAVED_CHOICE, finish

    hydra = HydraConfig.get()
    sweep = "--multirun" in words.flags
    overrides, given = words.overrides, hydra.run.dir
    if sweep:
        overrides = [word for word in hydra.overrides.task if not word.endswith(f"={SAVED_CHOICE}")]
        given = "." if own_sweep_dir else hydra.runtime.output_dir
        print(f"job {hydra.job.num}: {' '.join(overrides)}")
    if verb == "train":
        composed.experiment = hydra.runtime.choices.get("experiment")
        composed.run_name = f"{composed.run_name}_{hydra.job.num}" if sweep else composed.run_name
    flags = [flag for flag in words.flags if flag != "--multirun"]
    job = Job(verb, [*flags, *overrides], None if given == "." else str(given), sweep)
    code = _guarded(lambda: launch(finish(composed), job), bool(composed.debug))
    codes.append(code)
    if code > 128:
        raise SystemExit(code)
