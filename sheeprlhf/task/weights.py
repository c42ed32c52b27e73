"""The weights that a job is going to load, accounted for by the headers of their files before its data is prepared."""

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sheeprlhf.engine.checkpoint import Say
from sheeprlhf.model.load import check_vocabulary, check_weights
from sheeprlhf.structure.earlier import task_of_run
from sheeprlhf.structure.evaluation import ScoredConfig
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.structure.online import OnlineTaskConfig
from sheeprlhf.structure.reward import needs_model
from sheeprlhf.structure.run import EvalConfig, TrainConfig
from sheeprlhf.structure.saved import read_run_config, saved_group
from sheeprlhf.task.agents import of_reward_folder, reward_model_source

_MAX_STARTS = 8  # a run that starts from a run that ...


class Needed(NamedTuple):
    """A model that a job loads whole.

    Attributes:
        model: where it is.
        scores: it is a reward model.
        new_head: the task replaces its head.
        is_reward_folder: `reward.folder` names it.
    """

    model: ModelConfig
    scores: bool = False
    new_head: bool = False
    is_reward_folder: bool = False


def check_all_weights(config: TrainConfig | EvalConfig, say: Say) -> None:
    """One process: account for the weights of every model that the job loads before its first step.

    Raises:
        SheepError: a model cannot be found, or a parameter would not come from its files.
    """
    for needed in models_of(config):
        check_needed(needed, say)


def check_needed(needed: Needed, say: Say) -> str:
    """A line about tensors of this model that will not be read; empty if all are.

    Raises:
        SheepError: as `check_all_weights`.
    """
    auto: Any = AutoModelForSequenceClassification if needed.scores else AutoModelForCausalLM
    with of_reward_folder() if needed.is_reward_folder else nullcontext():
        note = check_weights(needed.model, auto=auto, new_head=needed.new_head, say=say)
        if needed.scores:
            check_vocabulary(needed.model)
        return note


def models_of(config: TrainConfig | EvalConfig) -> Iterator[Needed]:
    """The folders and hub ids that a job loads weights from, for its policy and for its reward."""
    task = config.task
    if isinstance(config, TrainConfig):
        new_head = config.task.trains == "reward model"
        start = getattr(task, "sft_experiment_dir", None), getattr(task, "sft_model_name", "final")
        yield from _of_start(config.model, *start, new_head=new_head, starts=_MAX_STARTS)
    elif config.experiment_dir is not None:
        yield from _of_run(config.experiment_dir, getattr(task, "model_name", "final"), starts=_MAX_STARTS)
    elif config.model is not None:
        yield Needed(config.model)
    rule = None if config.data is None else config.data.rule_reward
    if isinstance(task, OnlineTaskConfig | ScoredConfig) and needs_model(config.reward, rule):
        run_dir, folder, model = reward_model_source(config)
        if folder is not None:
            yield Needed(model, scores=True, is_reward_folder=True)
        elif run_dir is not None:
            yield from _of_run(run_dir, task.rm_model_name, starts=_MAX_STARTS)


def _of_start(
    model: ModelConfig, run_dir: str | None, weights: str, *, new_head: bool, starts: int
) -> Iterator[Needed]:
    """What `load_start` loads."""
    if run_dir is None:
        yield Needed(model, new_head=new_head)
    elif starts:
        yield from _of_run(run_dir, weights, starts=starts - 1)


def _of_run(run_dir: str, weights: str, *, starts: int) -> Iterator[Needed]:
    """The whole model of a run's `final/`; else that which its adapters or its checkpoints are put on."""
    model, task = saved_group(run_dir, "model"), task_of_run(read_run_config(run_dir))
    assert isinstance(model, ModelConfig)
    scores = task is not None and task.trains == "reward model"
    final = Path(run_dir) / "final"
    if weights == "final" and not (final / "adapter_config.json").is_file():
        if final.is_dir():
            whole = dataclasses.replace(model, repo_name=str(final), finetune_mode="ALL", random_init=False)
            yield Needed(whole, scores=scores)
        return
    saved = saved_group(run_dir, "task")
    start = getattr(saved, "sft_experiment_dir", None), getattr(saved, "sft_model_name", "final")
    yield from _of_start(model, *start, new_head=scores, starts=starts)
