"""The command line: verb -> compose -> typed config -> validate -> launch. Imports no torch until a run starts."""

import atexit
import codecs
import errno
import importlib
import io
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sheeprlhf.apps.arguments import PLAIN_VERBS, PLOT, VERBS, ParsedArgs, parse_args, verb_problem
from sheeprlhf.security.redaction import plain_text, redact_text
from sheeprlhf.utils.errors import ConfigError, Interrupted, MissingRanksError, SheepError
from sheeprlhf.utils.home import silence_libraries
from sheeprlhf.utils.launchers import (
    OWN_LAUNCHER,
    LauncherError,
    global_rank,
    is_rank_zero,
    leave_to_rank_zero,
    local_rank,
)
from sheeprlhf.utils.output import disk_full
from sheeprlhf.utils.processes import (
    SAVE_SIGNAL,
    Terminated,
    ignore_interrupts,
    ignored,
    just_interrupted,
    lasting,
    lost_output,
    open_closed_streams,
    outlives_reader,
    reliable_sigint,
)

if TYPE_CHECKING:
    from sheeprlhf.config.compose import Job
    from sheeprlhf.launch import Finished

HYDRA_VERBS = tuple(verb for verb in VERBS if verb not in PLAIN_VERBS)
_LASTING = (["train"], ["pipeline"])  # commands that continue after their output is closed
PARALLEL_VERBS = ("train", "eval", "pipeline")
_SHOWING = {"-h", "--help", "-c", "--cfg", "-i", "--info", "--hydra-help", "--version"}  # flags that only print
_SECONDS_FOR_RANK_ZERO = 8.0


def run(argv: list[str] | None = None) -> None:
    """Run a command; ends in SystemExit: 0 done, 1 failed, 2 cannot work, 128 + n stopped by signal n."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        _prepare_streams(needs_reader=arguments[:1] not in _LASTING or bool(_SHOWING & set(arguments)))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # paths and texts may hold what its encoding has not
    debug = "debug=true" in [argument.casefold() for argument in arguments]
    if argv is None:  # this is the program itself; else who called has more to do
        atexit.register(ignore_interrupts)  # called after those of the libraries, which are yet to be imported
    with ignored(SAVE_SIGNAL), reliable_sigint() as interrupts:  # until there is something to save
        code = _guarded(lambda: _flushed(_dispatch(arguments)), debug)
        if argv is None and code == 0:
            code = _report_lost_output()
        interrupts.leaving = argv is None
    if code:
        raise SystemExit(code)


def _prepare_streams(*, needs_reader: bool) -> None:
    """Standard streams that exist, that no full disk makes fail in the middle of the work, and that take any text."""
    open_closed_streams(needs_output=needs_reader)
    sys.stderr, sys.stdout = lasting(sys.stderr), lasting(sys.stdout, needs_reader=needs_reader)
    if isinstance(sys.stdin, io.TextIOWrapper):
        is_ascii = codecs.lookup(sys.stdin.encoding).name == "ascii"
        sys.stdin.reconfigure(encoding="utf-8" if is_ascii else None, errors="strict")


def _flushed(code: int) -> int:
    """The exit code, after all that was printed is written."""
    sys.stdout.flush()
    return code


def _report_lost_output() -> int:
    """Rank zero reports output that could not be written; returns the exit code."""
    for stream, other, name in (
        (sys.stdout, sys.stderr, "standard output"),
        (sys.stderr, sys.stdout, "standard error"),
    ):
        error = lost_output(stream)
        if error is not None and is_rank_zero():
            why = "it is closed" if error.errno == errno.EBADF else error.strerror
            print(
                f"sheeprlhf: {name} cannot be written ({why}), and a part of it is lost: redirect it to a file on a "
                "disk with room, or to /dev/null",
                file=other,
                flush=True,
            )
            return 1
    return 0


def _guarded(action: Callable[[], int], debug: bool, messages: list[str] | None = None) -> int:
    """Run `action`; an exception becomes an exit code and a message (also in `messages`; with `debug`, a traceback)."""
    other_rank = not is_rank_zero()
    try:
        return action()
    except (KeyboardInterrupt, Terminated) as stopped:
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # of objects half made, such as a progress bar
        traceback.clear_frames(stopped.__traceback__)
        sys.unraisablehook = hook
        return _stopped(stopped.signum if isinstance(stopped, Terminated) else signal.SIGINT, other_rank)
    except Interrupted as error:
        # All ranks stop together. A failing child would make Fabric kill rank zero, which may still be saving.
        if other_rank:
            return 0
        print(error, file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not outlives_reader(sys.stdout):  # `head`, for one, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if just_interrupted():
            return _stopped(just_interrupted(), other_rank)
        # Rank zero reports the same error, and this process ends with it.
        if other_rank and not isinstance(error, MissingRanksError):
            time.sleep(_SECONDS_FOR_RANK_ZERO)
            begun = "torch" in sys.modules or OWN_LAUNCHER in os.environ
            of_all = isinstance(error, ConfigError) and not begun and local_rank() > 0  # the first of a machine tells
            if of_all or isinstance(error, LauncherError):
                return error.exit_code if isinstance(error, SheepError) else 1
        if debug:
            print(plain_text(redact_text(traceback.format_exc())), file=sys.stderr)
        full = disk_full(error) if isinstance(error, OSError) else None
        message = _message(full or error, debug)
        if sys.stderr.isatty() or "FORCE_COLOR" in os.environ:
            from sheeprlhf.apps.terminal import print_error  # imports rich, for colours

            print_error(message)
        else:
            print(plain_text(message), file=sys.stderr)
        if messages is not None:
            messages.append(message)
        return error.exit_code if isinstance(error, SheepError) else 1


def _stopped(signum: int, other_rank: bool) -> int:
    """The exit code of a command that a signal has ended where nothing was to be saved; rank zero reports it."""
    if other_rank:
        time.sleep(_SECONDS_FOR_RANK_ZERO)  # a failing child would make Fabric kill rank zero, which is ending too
    else:
        print("stopped by Ctrl-C" if signum == signal.SIGINT else f"stopped by signal {signum}", file=sys.stderr)
    return 128 + signum


def _message(error: Exception, debug: bool) -> str:
    rank = global_rank()
    who = "sheeprlhf" if rank == 0 else f"sheeprlhf (process {rank})"
    lines = str(error).splitlines() or [type(error).__name__]
    notes = list(getattr(error, "__notes__", []))
    if rank > 0 and local_rank() == 0 and isinstance(error, ConfigError):
        notes.append(f"this is {socket.gethostname()}: every machine needs the same files at the same places")
    if isinstance(error, SheepError):
        return redact_text("\n".join([f"{who} cannot continue:", *(f"  - {line}" for line in lines), *notes]))
    if isinstance(error, UnicodeEncodeError) and sys.getfilesystemencoding() != "utf-8":
        notes = ["the locale has only ASCII, and a path has other characters: set PYTHONUTF8=1"]
    if isinstance(error, ModuleNotFoundError):
        notes = [f"{sys.executable} is without it: use the Python of the environment where sheeprlhf is installed"]
    advice = notes or ([] if debug else ["debug=true shows where"])
    return redact_text("; ".join([f"{who} failed unexpectedly: {type(error).__name__}: {lines[0]}", *advice]))


def _dispatch(arguments: list[str]) -> int:
    verb, rest = _split_verb(arguments)
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError("the working directory has been removed: change to another one (cd <folder>)") from None
    if verb is None:
        from sheeprlhf.apps.terminal import print_overview

        return print_overview()
    silence_libraries()
    if verb not in PARALLEL_VERBS and leave_to_rank_zero():
        return 0
    if verb not in HYDRA_VERBS:
        plain = [word for word in rest if word.casefold() != "debug=true"]
        return importlib.import_module(f"sheeprlhf.apps.{verb}").run(plain)
    args = parse_args(["plot=true" if verb == "eval" and word == f"--{PLOT.name}" else word for word in rest])
    if verb == "pipeline":
        from sheeprlhf.config.pipeline import collected

        args = args._replace(words=collected(args.words))
    directory = args.values.get("config-dir")
    if directory is not None and not Path(directory).is_dir():
        raise ConfigError(f"--config-dir={directory} is not a directory: give the folder that holds your groups")
    if (name := args.values.get("config-name")) is not None:
        _check_config_name(name, directory)
    if "help" in args.values:
        from sheeprlhf.apps.show import print_verb_help

        print_verb_help(verb, args.words, directory)
        return 0
    return _compose_and_launch(verb, args)


def _split_verb(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The verb and what follows; None to list the verbs. A shell asks for completions with it in `COMP_LINE`."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return (arguments[1], ["--help"]) if arguments[1:] and arguments[1] in VERBS else (None, [])
    if arguments[0] in ("-sc", "--shell-completion"):
        line = os.environ.get("COMP_LINE", "")
        verb = next((word for word in line.split() if word in HYDRA_VERBS), "train")
        os.environ["COMP_LINE"] = line.replace(f" {verb} ", " ", 1)
        return verb, arguments
    if arguments[0] == "--version":
        return "train", arguments
    if arguments[0] not in VERBS:
        raise ConfigError(verb_problem(arguments[0], arguments[1:], VERBS))
    return arguments[0], arguments[1:]


def _check_config_name(name: str, directory: str | None) -> None:
    """Raises ConfigError if no folder has that file."""
    from sheeprlhf.config.option_checks import did_you_mean
    from sheeprlhf.config.registry import configs_directory

    folders = [Path(directory)] if directory else []
    folders.append(configs_directory())
    if not any((folder / f"{name.removesuffix('.yaml')}.yaml").is_file() for folder in folders):
        there = [path.stem for folder in folders for path in folder.glob("*.yaml") if path.is_file()]
        did = did_you_mean(name, there, "give the name of a file of --config-dir, without its ending")
        raise ConfigError(f"--config-name={name} does not exist: {did}")


def _compose_and_launch(verb: str, args: ParsedArgs) -> int:
    """Compose, check and run one job; leave sweeps and what only Hydra can do to Hydra, after the same checks."""
    from sheeprlhf.config.compose import Source, check, compose_job

    source = Source(verb, args.values.get("config-dir"), args.values.get("config-name"))
    shows = {"cfg", "info", "shell-completion", "hydra-help", "version"} & set(args.values)
    sweep = "multirun" in args.values
    options_of_hydra = [word for word in args.words if re.match(r"[+~]*hydra\b", word)]
    if not sweep and not shows and all(word.startswith("hydra.run.dir=") for word in options_of_hydra):
        job = compose_job(source, args.words)
        return _run_job(verb, args, lambda: job, bool(getattr(job.config, "debug", False))).code
    checks = not shows or "cfg" in shows
    if checks and (problems := check(source, args.words, multirun=sweep, complete=not shows)):
        raise ConfigError(*problems)
    from sheeprlhf.apps.sweep import HydraJobs, run_sweep

    jobs = HydraJobs(source, args, _run_job)
    return run_sweep(jobs) if sweep and not shows else jobs.run()


def _run_job(
    verb: str,
    args: ParsedArgs,
    finish: Callable[[], "Job"],
    debug: bool,
    messages: list[str] | None = None,
    *,
    in_sweep: bool = False,
) -> "Finished":
    """Launch a job; an error, also of `finish`, which gives its configuration, becomes a message and an exit code."""
    from sheeprlhf.launch import Finished, launch

    output = None

    def start() -> int:
        nonlocal output
        code, output = launch(verb, args, finish(), in_sweep=in_sweep)
        return code

    return Finished(_guarded(start, debug, messages), output)
