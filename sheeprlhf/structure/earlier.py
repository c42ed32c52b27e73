"""Runs that were made before: how they are found, and whether a task can start from one. Imports no torch."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.structure.places import is_weights_name, weights_problems
from sheeprlhf.structure.registry import choices, config_hash
from sheeprlhf.structure.run import RootConfig, TrainConfig
from sheeprlhf.structure.saved import read_run_config, saved_group
from sheeprlhf.structure.smaller import changed
from sheeprlhf.structure.task import TrainTaskConfig
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.files import read_small

RUN_FILE = "run.json"
NEWEST = "newest"  # instead of a directory: the newest finished fine-tuning of the same model
START = "task.sft_experiment_dir"
_MAX_RUN_BYTES = 1 << 20


class FoundRun(NamedTuple):
    """A run directory and the content of its run.json."""

    dir: Path
    info: dict[str, Any]


def find_runs(root_dir: str | Path) -> list[FoundRun]:
    """All runs under `root_dir`, newest first."""
    runs = [FoundRun(path.parent, read_run(path.parent)) for path in Path(root_dir).glob(f"*/*/*/*/*/{RUN_FILE}")]
    return sorted((run for run in runs if run.info), key=lambda run: (run.info["started"], run.dir.name), reverse=True)


def read_run(run_dir: Path) -> dict[str, Any]:
    """The content of run.json; empty if it is missing or not ours."""
    with suppress(OSError, ValueError, RecursionError):
        info = json.loads(read_small(run_dir / RUN_FILE, _MAX_RUN_BYTES))
        if isinstance(info, dict) and isinstance(info.get("started"), int | float):
            return info
    return {}


def task_of_run(saved: dict[str, Any]) -> type[TrainTaskConfig] | None:
    """What a run trained for, by its saved configuration; None if it does not tell."""
    task = saved.get("task")
    cls = choices("task", "train").get(str(task.get("config_name"))) if isinstance(task, dict) else None
    return cls if cls is not None and issubclass(cls, TrainTaskConfig) else None


def start_of(config: RootConfig) -> str | None:
    """The directory of the run that training starts from, as it is configured."""
    return getattr(config.task, "sft_experiment_dir", None) if isinstance(config, TrainConfig) else None


def with_start(config: RootConfig, given_dir: str | None) -> RootConfig:
    """The configuration with the whole path of the run that training starts from, also where it said "newest".

    A run that is resumed goes on with the one that it started from, whatever has been trained since.

    Args:
        config: typed; returned as it is if there is nothing to find.
        given_dir: the directory of `hydra.run.dir=...`, if the user gave one.
    """
    start = start_of(config)
    if start is None:
        return config
    assert isinstance(config, TrainConfig)
    if not is_newest(start):
        return _starting_from(config, str(Path(start).expanduser().absolute()))
    for run in _resumable(config, given_dir):
        with suppress(ConfigError):
            before = read_run_config(str(run.dir)).get("task")
            if isinstance(before, dict) and isinstance(before.get("sft_experiment_dir"), str):
                same = _starting_from(config, before["sft_experiment_dir"])
                if config_hash(same) == run.info.get("config_hash"):
                    return same
    found = _newest(config)
    return config if found is None else _starting_from(config, str(found.absolute()))


def is_newest(start: str) -> bool:
    """Whether it is the word instead of a directory."""
    return start.casefold() == NEWEST


def _starting_from(config: TrainConfig, start: str) -> TrainConfig:
    new = changed(config, {START: start})
    new.lock()
    return new


def _resumable(config: TrainConfig, given_dir: str | None) -> list[FoundRun]:
    """The runs that this one may go on with."""
    folder = config.resume_from or (given_dir if config.resume else None)
    if folder is not None:
        return [FoundRun(Path(folder), read_run(Path(folder)))]
    return find_runs(config.root_dir) if config.resume else []


def _newest(config: TrainConfig) -> Path | None:
    """The newest finished fine-tuning of the configured model; a dry run is one for dry runs alone."""
    for run in find_runs(config.root_dir):
        if run.info.get("task") != "sft" or run.info.get("status") != "finished" or not (run.dir / "final").is_dir():
            continue
        with suppress(ConfigError):
            saved = read_run_config(str(run.dir))
            model = saved.get("model")
            name = model.get("repo_name") if isinstance(model, dict) else None
            if is_same_model(name, config.model.repo_name) and (config.dry_run or not saved.get("dry_run")):
                return run.dir
    return None


def is_same_model(first: Any, second: Any) -> bool:
    """Whether two values of `model.repo_name` are one hub id or one folder."""
    if first == second:
        return True
    if not isinstance(first, str) or not isinstance(second, str):
        return False
    one, other = Path(first).expanduser(), Path(second).expanduser()
    return one.is_dir() and other.is_dir() and one.resolve() == other.resolve()


def start_problems(config: TrainConfig) -> Iterator[str]:
    """Why training cannot start from the run that it is told to start from."""
    start = start_of(config)
    if start is None:
        return
    if is_newest(start):
        yield (
            f"{START}={start}: {config.root_dir} has no finished run of task=sft with model.repo_name="
            f"{config.model.repo_name}: first `python sheeprlhf.py train task=sft {_model_words(config.model)} "
            f"data={config.data.config_name}`, or give a run directory"
        )
        return
    try:
        saved = read_run_config(start, key=START)
        theirs = saved_group(start, "model", key=START)
    except ConfigError as error:
        yield from error.problems
        return
    task = task_of_run(saved)
    if task is None or task.trains != "policy":
        what = f"a run of task={task.config_name}, which trains a {task.trains}" if task else "a run of no known task"
        yield f"{START}={start} is {what}: give a run of task=sft; `list runs` shows them"
        return
    assert isinstance(theirs, ModelConfig)
    if not is_same_model(theirs.repo_name, config.model.repo_name):
        yield (
            f"{START}={start} was trained from model.repo_name={theirs.repo_name}, and this run has "
            f"{config.model.repo_name}: give {_model_words(theirs)}, or another run"
        )
    name = str(getattr(config.task, "sft_model_name", "final"))
    if is_weights_name(name):
        yield from weights_problems(start, name, key=START, name_key="task.sft_model_name")
    else:
        yield f"task.sft_model_name={name} is unknown: give final, best, last or step-<n>"
    if config.model.random_init:
        yield f"model.random_init=true and {START}={start} are two beginnings: give one of them"


def _model_words(model: ModelConfig) -> str:
    """The words that choose a model."""
    usual = getattr(choices("model").get(model.config_name), "repo_name", None)
    named = "" if model.repo_name == usual else f" model.repo_name={model.repo_name}"
    return f"model={model.config_name}{named}"
