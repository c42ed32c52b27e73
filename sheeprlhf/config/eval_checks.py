"""Checks of an evaluation: its run or model, the weights, and options that it does not read."""

from collections.abc import Iterator
from pathlib import Path

from sheeprlhf.config.option_checks import unread
from sheeprlhf.config.path_checks import is_weights_name, new_folder_problems, weights_problems
from sheeprlhf.config.registry import choices
from sheeprlhf.config.reward_checks import (
    NORMALIZED,
    environment_problems,
    model_score_problems,
    narrowing_options,
    overlong_problems,
)
from sheeprlhf.config.run_lookup import read_run_config, saved_group, start_problems, task_of_run
from sheeprlhf.config.shell import shell_word
from sheeprlhf.config.validate import sharding_problems, unread_options
from sheeprlhf.structure.evaluation import NOTHING, REFERENCES, START, EvalTaskConfig, FrontierConfig, RewardConfig
from sheeprlhf.structure.run import EvalConfig
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.output import link_problems


def eval_problems(config: EvalConfig) -> Iterator[str]:
    """Problems of an evaluation: missing packages, model or run, weights, or reward."""
    yield from sharding_problems(config)
    name, writes = config.task.config_name, config.task.writes
    yield from unread_options(config, "generation.engine", *(() if writes else ("generation.stop_strings",)))
    if given := narrowing_options(config.generation) if writes == "samples" else "":
        yield f"{given}: task={name} samples with all probabilities: remove it, or give generation.temperature"
    yield from _reward_problems(config)
    yield from environment_problems(config)
    if config.experiment_dir is None and isinstance(config.task, FrontierConfig):
        yield "task=frontier goes over the checkpoints of a run: give experiment_dir=<run directory>"
    elif config.experiment_dir is None:
        if missing := [name for name in ("model", "data") if getattr(config, name) is None]:
            give = " and ".join(f"{name}=<{', '.join(choices(name))}>" for name in missing)
            yield f"nothing to evaluate: give experiment_dir=<run directory>, or {give}"
        yield from new_folder_problems("output_dir", config.output_dir)
    if config.task.data_split == "reward" and config.data is not None and config.data.reward_model_split == 0:
        yield "task.data_split=reward is empty with data.reward_model_split=0: give another split"
    if isinstance(config.task, FrontierConfig) and config.task.model_name != EvalTaskConfig.model_name:
        yield unread(f"task.model_name={config.task.model_name}", "by task=frontier, which takes all")
    elif not is_weights_name(config.task.model_name):
        yield from weights_problems("", config.task.model_name, key="", name_key="task.model_name")
    elif config.experiment_dir is not None:
        yield from _run_problems(config, config.experiment_dir)


def _reward_problems(config: EvalConfig) -> Iterator[str]:
    """A reward that nothing reads, or that cannot score; a comparison with nothing."""
    reward, task = config.reward, config.task
    if task.writes != "samples":
        yield from unread_options(config, "reward")
        return
    yield from start_problems(config)
    yield from model_score_problems(config)
    if reward.normalize:
        yield NORMALIZED
    yield from overlong_problems(config)
    if isinstance(task, RewardConfig):
        yield from _against_problems(config, task.against)


def _against_problems(config: EvalConfig, against: str) -> Iterator[str]:
    """Problems of the responses to compare with."""
    if against.casefold() in (REFERENCES, NOTHING):
        return
    if against.casefold() == START:
        if config.experiment_dir is None:
            yield "task.against=start: a model that no run has trained has no start: give references or a run directory"
        elif config.model is not None and config.model.random_init:
            yield f"task.against=start: {config.experiment_dir} began with random weights: give references or a run"
        return
    try:
        trained = task_of_run(read_run_config(against, key="task.against"))
        saved_group(against, "model", key="task.against")
    except ConfigError as error:
        yield from (f"{problem}; it may also be {REFERENCES}, {START} or {NOTHING}" for problem in error.problems)
        return
    if trained is not None and trained.trains != "policy":
        yield f"task.against={against}: this run of task={trained.config_name} trained a {trained.trains}: give another"
        return
    yield from weights_problems(against, "final", key="task.against", name_key="task.model_name")


def _run_problems(config: EvalConfig, run_dir: str) -> Iterator[str]:
    """Problems of the run that is evaluated: missing weights, or a folder that is not writable."""
    yield from new_folder_problems("experiment_dir", str(Path(run_dir) / "eval"))
    yield from link_problems(Path(run_dir), (), ("eval",))
    saved = read_run_config(run_dir)
    trained = task_of_run(saved)
    what, wanted = "policy" if trained is None else trained.trains, config.task.evaluates
    if what not in wanted:
        able = [name for name, cls in choices("task", "eval").items() if what in getattr(cls, "evaluates", ())]
        give = f"task={' or '.join(able)}, or another run" if able else "another run"
        of = "" if trained is None else f" of task={trained.config_name}"
        yield (
            f"experiment_dir={run_dir}: task={config.task.config_name} evaluates a {' or a '.join(wanted)}, and this "
            f"run{of} trained a {what}: give {give}"
        )
        return
    if isinstance(config.task, FrontierConfig):  # it begins at a start, and has points
        if config.model is not None and config.model.random_init:
            yield f"experiment_dir={run_dir}: task=frontier needs a start, and this run began with random weights"
        if not Path(run_dir, "final").is_dir() and not any(Path(run_dir).glob("checkpoints/step-*")):
            again = shell_word("resume_from", str(run_dir))
            yield f"experiment_dir={run_dir}: this run has no checkpoint; continue it by {again}"
    else:
        yield from weights_problems(run_dir, config.task.model_name, key="experiment_dir", name_key="task.model_name")
    task = saved.get("task")
    start = task.get("sft_experiment_dir") if isinstance(task, dict) else None
    adapters = config.model is not None and config.model.finetune_mode == "LORA"
    if isinstance(start, str) and adapters and not Path(start).is_dir():
        yield f"experiment_dir={run_dir} has adapters for the model that {start} left, which is gone: put it back"
