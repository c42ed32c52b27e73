"""Trainings and evaluations from Python: the commands `train` and `eval`, with results and exceptions. No torch."""

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sheeprlhf.config.compose import Source, check, compose_job, configs_directory
from sheeprlhf.config.registry import config_hash
from sheeprlhf.config.run_lookup import find_runs
from sheeprlhf.config.shell import option_word
from sheeprlhf.engine.rundir import is_finished
from sheeprlhf.launch import Job, launch, settled_words
from sheeprlhf.security.json_records import load_json
from sheeprlhf.security.record_schemas import RESULT
from sheeprlhf.structure.run import EvalConfig, RootConfig, TrainConfig
from sheeprlhf.utils.errors import ConfigError, SheepError

Overrides = Sequence[str] | Mapping[str, Any]


class TrainingRun(NamedTuple):
    """A finished training.

    Attributes:
        directory: the run directory.
        final: the folder that `from_pretrained` and `load_policy` load.
        metrics: for each logged name its (step, value) pairs, in the order of the steps.
    """

    directory: Path
    final: Path
    metrics: dict[str, list[tuple[int, float]]]


def train(overrides: Overrides = ()) -> TrainingRun:
    """Run the command `train` in this process; with several devices, in processes of their own.

    Ctrl-C, or a notebook's interrupt, saves a checkpoint after the current step and raises `Interrupted`; the same call
    with `resume=true` continues. `hydra.` options are not accepted: name the place of the run with `root_dir` and
    `run_name`.

    Args:
        overrides: options as on the command line, `["task=sft", "optim.lr=1e-4"]`, or `{"optim.lr": 1e-4}`.

    Raises:
        SheepError: `ConfigError`, `DataError` and so on: the same messages as on the command line.
    """
    config = _run("train", overrides)
    assert isinstance(config, TrainConfig)
    same = config_hash(config)
    runs = [run.dir for run in find_runs(config.root_dir) if run.info.get("config_hash") == same]
    named = None if config.resume_from is None else Path(config.resume_from)
    directory = named or next(run_dir for run_dir in runs if is_finished(run_dir))
    return TrainingRun(directory, directory / "final", _read_metrics(directory / "metrics.csv"))


def evaluate(overrides: Overrides = ()) -> dict[str, Any]:
    """Run the command `eval`; the result is also saved below the run's `eval/`, or below `output_dir` without a run.

    Args:
        overrides: options as on the command line, such as `["task=perplexity", f"experiment_dir={run.directory}"]`.

    Returns:
        The content of the result's JSON file.

    Raises:
        SheepError: the same messages as on the command line.
    """
    config = _run("eval", overrides)
    assert isinstance(config, EvalConfig)
    folder = Path(config.output_dir) if config.experiment_dir is None else Path(config.experiment_dir, "eval")
    results = [load_json(path, RESULT) for path in folder.glob("*.json")]
    of_task = [result for result in results if result.get("task") == config.task.config_name]
    return max(of_task, key=lambda result: str(result["time"]))


def as_words(overrides: Overrides) -> list[str]:
    """The options as words of the command line."""
    if isinstance(overrides, Mapping):
        return [option_word(key, value) for key, value in overrides.items()]
    return list(overrides)


def compose(verb: str, words: list[str]) -> RootConfig:
    """The typed, valid configuration of a command.

    Raises:
        ConfigError: with every problem.
    """
    hydra = [word for word in words if word.lstrip("+~").startswith(("hydra.", "hydra/"))]
    if hydra:
        raise ConfigError(f"{hydra[0]}: options of Hydra work on the command line only")
    source = Source(verb, configs_directory(), verb)
    problems = check(source, words)
    if problems:
        raise ConfigError(*problems)
    return compose_job(source, words)


def _run(verb: str, overrides: Overrides) -> RootConfig:
    words = as_words(overrides)
    config = compose(verb, words)
    with _restored_environment():
        code = launch(config, Job(verb, settled_words(config, words, {}), None, in_sweep=True))
    if code:
        raise SheepError(f"{verb} ended with exit code {code}; its message is above")
    return config


@contextmanager
def _restored_environment() -> Iterator[None]:
    """Undo a job's changes of environment variables, such as HF_HUB_OFFLINE, for the jobs that follow."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    metrics: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for step, name, value, _ in list(csv.reader(file))[1:]:
            metrics.setdefault(name, []).append((int(step), float(value)))
    return metrics
