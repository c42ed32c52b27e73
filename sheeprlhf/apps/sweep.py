"""Sweeps: the outcome of each job, for every launcher, and the number that a sweeper optimises."""

import functools
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hydra import main as hydra_main
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

import sheeprlhf
from sheeprlhf.apps.arguments import ParsedArgs
from sheeprlhf.config.compose import SAVED_CHOICE, Source, finish, register_configs, saved_overrides
from sheeprlhf.config.overrides import readable
from sheeprlhf.config.registry import choices, configs_directory, current_word
from sheeprlhf.config.run_lookup import read_run
from sheeprlhf.config.untrusted_config import check_sources
from sheeprlhf.security.redaction import redact_command
from sheeprlhf.structure.option import Config
from sheeprlhf.structure.rollout import OnlineTaskConfig
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.utils.errors import ConfigError, UnsafePathError
from sheeprlhf.utils.home import known_home
from sheeprlhf.utils.launchers import check_alone
from sheeprlhf.utils.output import link_problems
from sheeprlhf.utils.processes import noted_stop

_HERE = ("basic", "joblib")  # launchers whose jobs run on this machine and print here
_BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


class Outcome(float):
    """Result of a job for its sweeper: best validation metric of its run (NaN without one), exit code and message."""

    code: int = 0
    text: str = ""


def outcome(code: int, text: str, run_dir: Path | None) -> Outcome:
    """Make the outcome of a job that has ended; `run_dir` is None if it did not get that far, or is not a training."""
    metric = None if code or run_dir is None else read_run(run_dir).get("best_metric")
    made = Outcome(metric if isinstance(metric, int | float) else math.nan)
    made.code, made.text = code, text
    return made


@dataclass
class Sweep:
    """State of a sweep in the process that runs it."""

    outcomes: dict[int, tuple[str, Outcome]] = field(default_factory=dict)  # of ended jobs by number, with words
    problems: list[str] = field(default_factory=list)  # why its sweeper cannot work; it ends with SystemExit then
    optimises: bool = False  # its sweeper asks for results
    highest: bool = False  # the best result is the highest


class SweepLauncher(Launcher):
    """Runs jobs by a launcher of Hydra's and keeps outcomes; only an optimising sweeper hears of failed ones."""

    def __init__(self, inner: Launcher, sweep: Sweep) -> None:
        """Start without launched jobs."""
        self._inner, self._sweep = inner, sweep

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Do nothing: the inner launcher is set up already."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch of jobs to their end. Raises SystemExit if a signal has stopped a job, or one was lost."""
        words = {n: " ".join(redact_command(list(of))) for n, of in enumerate(job_overrides, initial_job_idx)}
        try:
            returns = self._inner.launch(job_overrides, initial_job_idx=initial_job_idx)
        except Exception as error:  # a job's process was killed, or could not be started
            lost = outcome(1, f"a job was lost: {type(error).__name__}: {str(error).strip().splitlines()[0]}", None)
            self._sweep.outcomes |= {number: (text, lost) for number, text in words.items()}
            raise SystemExit(1) from error
        for number, returned in enumerate(returns, initial_job_idx):
            try:
                of_job = returned.return_value
            except Exception as error:  # raised outside of our own code, for example by a callback
                of_job = outcome(1, f"{type(error).__name__}: {error}", None)
            if self._sweep.optimises and of_job.code == 0 and math.isnan(of_job):
                of_job.code, of_job.text = 1, "it has no validation result: lower task.eval_interval"
            self._sweep.outcomes[number] = (words[number], of_job)
            failed = of_job.code and self._sweep.optimises
            returned.status = JobStatus.FAILED if failed else JobStatus.COMPLETED
            returned._return_value = CompactHydraException(f"job {number} failed") if failed else of_job
        stopped = next((of_job.code for _, of_job in self._sweep.outcomes.values() if of_job.code > 128), 0)
        if stopped:
            raise SystemExit(stopped)
        return returns


@contextmanager
def watched_sweep(sweep: Sweep, verb: str) -> Iterator[None]:
    """Collect in `sweep` the outcomes of the jobs of command `verb`, which Hydra runs."""
    original = Plugins.instantiate_launcher

    def instantiate(self: Plugins, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> Any:
        sweep.optimises = OmegaConf.select(config, "hydra.sweeper._target_") != _BASIC_SWEEPER
        task = choices("task", "train").get(OmegaConf.select(config, "task.config_name", default=""))
        sweep.highest = task is not None and issubclass(task, OnlineTaskConfig)
        if sweep.optimises:
            sweep.problems.extend(_sweeper_problems(config, verb, task, sweep.highest))
        if sweep.problems:
            raise SystemExit(2)
        inner = original(self, hydra_context=hydra_context, task_function=task_function, config=config)
        return SweepLauncher(inner, sweep)

    package = str(Path(sheeprlhf.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    before = os.environ.get("PYTHONPATH")
    setattr(Plugins, "instantiate_launcher", instantiate)  # noqa: B010
    os.environ["PYTHONPATH"] = path  # for workers that start without this program
    try:
        yield
    finally:
        setattr(Plugins, "instantiate_launcher", original)  # noqa: B010
        os.environ.pop("PYTHONPATH")
        os.environ |= {} if before is None else {"PYTHONPATH": before}


def _sweeper_problems(config: DictConfig, verb: str, task: type[Config] | None, highest: bool) -> Iterator[str]:
    """Yield what keeps a sweeper from optimising the best validation metric of runs."""
    if verb != "train":
        yield f"hydra/sweeper: it optimises the validation metric of `train`; `{verb}` has none: use a plain sweep (-m)"
        return
    if task is not None and "eval_interval" in getattr(task, "unread", ()):
        yield f"hydra/sweeper: task={config.task.config_name} has no validation metric: use a plain sweep (-m)"
        return
    for key, value in (
        ("direction", "maximize" if highest else "minimize"),  # Optuna
        ("ax_config.experiment.minimize", not highest),  # Ax
        ("optim.maximize", highest),  # Nevergrad
    ):
        given = OmegaConf.select(config, f"hydra.sweeper.{key}", default=None)
        given = getattr(given, "name", given)
        if given is not None and given != value:
            metric = "objective is best when highest" if highest else "loss is best when lowest"
            key = f"hydra.sweeper.{key}"
            yield f"{key}={given}: the validation {metric}; give {key}={str(value).lower()}"


def sweep_parent(overrides: list[str]) -> str | None:
    """The folder for a sweep's own files; None for the system's, which other machines do not see."""
    given = {override.key_or_group: override.value() for override in readable(overrides)[0]}
    if given.get("hydra/launcher", "basic") in _HERE:
        return None
    folder = known_home("root_dir", str(given.get("root_dir", TrainConfig.root_dir))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def check_sweep_dir(overrides: list[str]) -> None:
    """Raises UnsafePathError if Hydra or a launcher would write through a link in the directory of a sweep."""
    given = {override.key_or_group: override.value() for override in readable(overrides)[0]}.get("hydra.sweep.dir")
    problems = [] if given is None else link_problems(Path(str(given)), ("multirun.yaml",), (".submitit",))
    if problems:
        raise UnsafePathError(*problems)


def sweep_code(sweep: Sweep) -> int:
    """The exit code of a sweep; prints the results of its jobs if they were asked for, and lists those that failed."""
    failed = {number: found for number, found in sorted(sweep.outcomes.items()) if found[1].code}
    done = [(of_job, f"job {n} ({words})") for n, (words, of_job) in sweep.outcomes.items() if not of_job.code]
    if sweep.optimises and done:
        for of_job, name in done:
            print(f"{name}: {float(of_job):.6g}")
        best, name = (max if sweep.highest else min)(done)
        print(f"best: {name}: {float(best):.6g}")
    if failed:
        print(f"{len(failed)} of {len(sweep.outcomes)} jobs failed:", file=sys.stderr)
    for number, (words, of_job) in failed.items():
        print(f"  job {number} ({words}): exit code {of_job.code}", file=sys.stderr)
        for line in of_job.text.splitlines():
            print(f"    {line}", file=sys.stderr)
    return next((of_job.code for _, of_job in failed.values()), 0)


class HydraJobs(NamedTuple):
    """Jobs that Hydra composes, of a sweep or of one of its flags; `launch` runs one and reports its errors."""

    source: Source
    args: ParsedArgs
    launch: Callable[..., tuple[int, Path | None]]

    def run(self, sweep_dir: str = "") -> int:
        """Call `hydra.main`, which writes into the empty `sweep_dir`; returns the exit code of the first failed job."""
        source, args, codes = self.source, self.args, list[int]()
        arguments, sys.argv = sys.argv, [sys.argv[0], *args.flags(), *map(current_word, args.words)]
        try:
            sys.argv += [f"hydra.sweep.dir={sweep_dir}"] if sweep_dir else []
            register_configs()
            check_sources()
            sys.argv += saved_overrides(source.verb, readable(args.words)[0])
            job = functools.partial(_run_composed, self, bool(sweep_dir), os.getpid(), codes)
            hydra_main(config_path=str(configs_directory()), config_name=source.verb, version_base="1.3")(job)()
        finally:
            sys.argv = arguments
        return next((code for code in codes if code), 0)


def _run_composed(jobs: HydraJobs, own_sweep_dir: bool, process: int, codes: list[int], composed: Any) -> Any:
    """Run a job for Hydra: in this process, or in another one, where `codes` is a copy; a signal ends the sweep."""
    verb, args, hydra = jobs.source.verb, jobs.args, HydraConfig.get()
    sweep, given = "multirun" in args.values, hydra.run.dir
    if sweep:
        overrides = [word for word in hydra.overrides.task if not word.endswith(f"={SAVED_CHOICE}")]
        args = ParsedArgs(overrides, {name: value for name, value in args.values.items() if name != "multirun"})
        given = "." if own_sweep_dir else hydra.runtime.output_dir
        print(f"job {hydra.job.num}: {' '.join(overrides)}")
    if verb in ("train", "pipeline"):
        composed.experiment = hydra.runtime.choices.get("experiment")
    if verb == "train":
        composed.run_name = f"{composed.run_name}_{hydra.job.num}" if sweep else composed.run_name
    given_dir = None if given == "." else str(given)
    messages: list[str] = []
    debug = bool(composed.debug)
    code, output = jobs.launch(verb, args, lambda: finish(composed, given_dir), debug, messages, in_sweep=sweep)
    if sweep and not code and noted_stop():
        code = 128 + noted_stop()
    codes.append(code)
    if code > 128 and os.getpid() == process:
        raise SystemExit(code)
    return outcome(code, "\n".join(messages), output if verb == "train" else None) if sweep else None


def run_sweep(jobs: HydraJobs) -> int:
    """Let Hydra run every job of a sweep; returns the exit code of the first that failed."""
    overrides = jobs.args.words
    check_alone("a sweep (-m)")
    check_sweep_dir(overrides)
    own_dir = "hydra.sweep.dir=" not in str(jobs.args)
    parent = sweep_parent(overrides) if own_dir else None
    sweep_dir = tempfile.mkdtemp(prefix=".sheeprlhf-" if parent else "sheeprlhf-", dir=parent) if own_dir else ""
    watched, code, failed = Sweep(), 0, 0
    try:
        with watched_sweep(watched, jobs.source.verb):
            code = jobs.run(sweep_dir)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        failed = sweep_code(watched)
        if failed and parent is not None:
            print(f"the launcher's logs: {sweep_dir}", file=sys.stderr)
        else:
            shutil.rmtree(sweep_dir, ignore_errors=True)
    if watched.problems:
        raise ConfigError(*watched.problems)
    return code if code > 128 else failed or code
