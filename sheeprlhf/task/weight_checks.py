"""The models of a job, checked before data is prepared, by the headers of their files and without their content."""

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sheeprlhf.agent.batches import check_batching
from sheeprlhf.config.model_lookup import initial_run, reads_chat, reward_folder_errors, reward_model_source
from sheeprlhf.config.run_lookup import read_run_config, saved_group, task_of_run
from sheeprlhf.data.tokenize import turn_texts
from sheeprlhf.engine.shard import tensor_plan
from sheeprlhf.model.adapter import check_adapters, conflicting_options, read_adapter_config
from sheeprlhf.model.folder.architecture import packing_limit, switch_length
from sheeprlhf.model.folder.embedding_rows import check_vocabulary
from sheeprlhf.model.folder.load import load_tokenizer, model_of_start, scalar_model
from sheeprlhf.model.folder.weights import check_weights
from sheeprlhf.model.locate import locate_adapter
from sheeprlhf.model.memory import build_on_meta
from sheeprlhf.security.pickled_weights import adapter_folder
from sheeprlhf.structure.evaluation import ScoredConfig
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.structure.reward import model_sources
from sheeprlhf.structure.rollout import DistillConfig, OnlineTaskConfig, PPOConfig
from sheeprlhf.structure.run import EvalConfig, TrainConfig
from sheeprlhf.task.eval.load import load_evaluated_tokenizer
from sheeprlhf.task.models import load_reward_tokenizer, teacher_config
from sheeprlhf.utils.end_tokens import padding_token
from sheeprlhf.utils.errors import ConfigError, ModelError, Notify
from sheeprlhf.utils.modes import isolated_rng
from sheeprlhf.utils.rendering import check_template_args
from sheeprlhf.utils.vocabulary import num_rows_needed

_MAX_STARTS = 8  # a run that starts from a run that ...
_CODE_THAT_READS = (NotImplementedError, RuntimeError, TypeError)  # of a model whose code reads tensors


class Needed(NamedTuple):
    """A model that a job loads whole."""

    model: ModelConfig  # where it is
    scores: bool = False  # it is a reward model
    new_head: bool = False  # the task replaces its head
    reward_term: str | None = None  # the term of the reward of which it is the folder
    adapters: Path | None = None  # a PEFT folder of a run, whose tensors belong to this model


def check_all_weights(config: TrainConfig | EvalConfig, say: Notify) -> None:
    """One process: account for the weights of every model that the job loads. Raises SheepError for misfits."""
    for needed in models_of(config):
        check_needed(needed, say)
        if needed.reward_term is not None and reads_chat(config):
            turn_texts(load_reward_tokenizer(config, needed.reward_term))
    check_options(config)


def check_options(config: TrainConfig | EvalConfig) -> None:
    """One process: reject options that the architecture or the tokenizer of the job's model excludes."""
    tokenizer = load_tokenizer(config.model) if isinstance(config, TrainConfig) else load_evaluated_tokenizer(config)
    if config.data is not None:
        check_template_args(tokenizer, config.data.template_args)
    if config.fabric.tensor_parallel > 1:
        with isolated_rng():
            for needed in models_of(config):
                tensor_plan(build_on_meta(needed.model, scores=needed.scores)[1], config.fabric.tensor_parallel)
    if isinstance(config, TrainConfig):
        _check_training(config, tokenizer)
        return
    evaluated = next(models_of(config), None)
    if evaluated is not None and not evaluated.scores:
        whole = dataclasses.replace(evaluated.model, finetune_mode="ALL", freeze_transformer=False)
        with isolated_rng(), suppress(*_CODE_THAT_READS):
            causal_lm, _ = build_on_meta(whole, scores=False, vocabulary=num_rows_needed(tokenizer))
            check_batching(config.task.batching, packing_limit(causal_lm, 0))


def _check_training(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    task = config.task
    start = getattr(task, "sft_experiment_dir", None)
    if start is not None:
        model_of_start(config.model, start, tokenizer)
    scores = task.trains == "reward model"
    if config.model.adapter is not None and config.model.finetune_mode == "LORA" and not scores:
        _check_continued_adapter(config, config.model.adapter)
    with isolated_rng(), suppress(*_CODE_THAT_READS):
        causal_lm, _ = build_on_meta(config.model, scores=scores, vocabulary=num_rows_needed(tokenizer))
        check_batching(task.batching, packing_limit(causal_lm, 0))
        if isinstance(task, OnlineTaskConfig):
            longest = config.data.max_prompt_length + config.generation.max_new_tokens
            _check_frequencies(causal_lm, longest)
        if isinstance(task, PPOConfig):
            scalar_model(causal_lm, tokenizer)  # the critic
    if scores:
        padding_token(tokenizer)


def _check_frequencies(model: PreTrainedModel, longest: int) -> None:
    """Raise ModelError if prompts and responses of up to `longest` tokens get other frequencies while they grow."""
    switch = switch_length(model)
    if switch is not None and longest > switch:
        raise ModelError(
            f"{type(model).__name__} has other rotary embeddings beyond {switch} tokens, so a response that grows "
            "beyond them has other probabilities in sampling and in learning: data.max_prompt_length and "
            f"generation.max_new_tokens may be {switch} together, and are {longest}"
        )


def _check_continued_adapter(config: TrainConfig, adapter: str) -> None:
    """Raise ConfigError for options that the adapter, which continues training, has otherwise or excludes."""
    found = read_adapter_config(adapter_folder(locate_adapter(adapter), lambda _: None))
    problems = [f"{conflict}: leave the option out" for conflict in conflicting_options(config.model, found)]
    if isinstance(config.task, OnlineTaskConfig) and found.lora_dropout:
        problems.append(
            f"model.adapter={adapter} has lora_dropout={found.lora_dropout}: task={config.task.config_name} compares "
            "probabilities of different passes: set it to 0 in its adapter_config.json"
        )
    if problems:
        raise ConfigError(*problems)


def check_needed(needed: Needed, say: Notify) -> str:
    """A line about tensors of this model that will not be read; empty if all are. Raises SheepError."""
    if needed.adapters is not None:
        whole = dataclasses.replace(needed.model, finetune_mode="ALL", freeze_transformer=False)
        with isolated_rng(), suppress(*_CODE_THAT_READS), torch.device("meta"):
            _, model = build_on_meta(whole, scores=needed.scores)
            check_adapters(cast(PreTrainedModel, model), needed.adapters, say)
        return ""
    auto: Any = AutoModelForSequenceClassification if needed.scores else AutoModelForCausalLM
    with nullcontext() if needed.reward_term is None else reward_folder_errors(needed.reward_term):
        note = check_weights(needed.model, auto=auto, new_head=needed.new_head, say=say)
        if needed.scores:
            check_vocabulary(needed.model, num_rows_needed(load_tokenizer(needed.model)))
        return note


def models_of(config: TrainConfig | EvalConfig) -> Iterator[Needed]:
    """The folders and hub ids that a job loads weights from, for its policy and for its reward."""
    task = config.task
    if isinstance(config, TrainConfig):
        new_head = config.task.trains == "reward model"
        yield from _of_start(config.model, *initial_run(task), new_head=new_head, starts=_MAX_STARTS)
    elif config.experiment_dir is not None:
        yield from _of_run(config.experiment_dir, getattr(task, "model_name", "final"), starts=_MAX_STARTS)
    elif config.model is not None:
        yield from _of_start(config.model, None, "", new_head=False, starts=0)
    if isinstance(task, DistillConfig):
        yield Needed(teacher_config(str(task.teacher)))
    rule = None if config.data is None else config.data.rule_reward
    terms = model_sources(config.reward, rule) if isinstance(task, OnlineTaskConfig | ScoredConfig) else []
    for term in terms:
        run_dir, folder, model = reward_model_source(config, term)
        if folder is not None:
            yield Needed(model, scores=True, reward_term=term)
        elif run_dir is not None:
            yield from _of_run(run_dir, getattr(task, "rm_model_name", "final"), starts=_MAX_STARTS)


def _of_start(
    model: ModelConfig, run_dir: str | None, weights: str, *, new_head: bool, starts: int
) -> Iterator[Needed]:
    """Files that `load_initial_policy` loads."""
    if run_dir is None:
        yield Needed(model, new_head=new_head)
        if model.adapter is not None:
            yield Needed(model, adapters=locate_adapter(model.adapter))
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
    start = initial_run(saved_group(run_dir, "task"))
    if weights == "final" and not scores:  # it has the adapter that `model.adapter` has become
        model = dataclasses.replace(model, adapter=None)
    needed = list(_of_start(model, *start, new_head=scores, starts=starts))
    yield from needed
    if weights == "final" and needed:
        yield Needed(needed[0].model, scores=scores, adapters=final)
