"""Check a whole configuration before anything heavy starts: every problem at once, as key, value and fix."""

import ast
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sheeprlhf.config.model_lookup import needs_base_model
from sheeprlhf.config.option_checks import near_path, nearest, option_problems
from sheeprlhf.config.path_checks import (
    data_file_problems,
    is_hub_id,
    is_weights_name,
    model_problem,
    new_folder_problems,
    template_problem,
    weights_problems,
)
from sheeprlhf.config.prompt_format import template_arg_problems
from sheeprlhf.config.registry import choices, config_to_dict, options
from sheeprlhf.config.run_lookup import (
    is_run_alias,
    read_run_config,
    saved_group,
    scores_by_run,
    start_problems,
    task_of_run,
)
from sheeprlhf.config.shell import shell_word
from sheeprlhf.security.model_folder import merge_advice
from sheeprlhf.security.user_code import find_module, hidden_by_installed, names_of, parse_path
from sheeprlhf.structure.data import DataConfig, LayoutDataConfig, LocalDataConfig
from sheeprlhf.structure.evaluation import REFERENCES, START, EvalTaskConfig, FrontierConfig, RewardConfig
from sheeprlhf.structure.fabric import FabricConfig
from sheeprlhf.structure.generation import GenConfig
from sheeprlhf.structure.model import LORAConfig, ModelConfig
from sheeprlhf.structure.optim import AdamWConfig, OptimizerConfig, SGDConfig
from sheeprlhf.structure.reward import (
    BUILTINS,
    JUDGE,
    MODEL,
    AutoRewardConfig,
    BuiltinOptionsConfig,
    CallOptionsConfig,
    FunctionRewardConfig,
    JudgeOptionsConfig,
    JudgeRewardConfig,
    ListRewardConfig,
    ModelRewardConfig,
    RewardSourceConfig,
    Term,
    is_users_own,
    judge_fields,
    parse_term,
)
from sheeprlhf.structure.rollout import BestOfNConfig, OnlineTaskConfig, PPOConfig
from sheeprlhf.structure.run import EvalConfig, FetchConfig, InspectConfig, RootConfig, TrainConfig
from sheeprlhf.structure.task import DPOConfig, SFTConfig, TrainTaskConfig
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.hardware import cuda_problem, missing_modules
from sheeprlhf.utils.home import cache_place, expand_home
from sheeprlhf.utils.output import link_problems

_COMMIT = re.compile(r"[0-9a-f]{40}")


def validate(config: RootConfig) -> list[str]:
    """Every problem of a typed configuration, one sentence each; empty if it can run."""
    return list(_problems(config))


def _problems(config: RootConfig) -> Iterator[str]:
    for option in options(config):
        yield from option_problems(option)
    for group in ("task", "data", "fabric", "optim", "reward"):
        yield from _name_problems(group, getattr(config, group, None))
    for group, problems in _OF_GROUP.items():
        if getattr(config, group, None) is not None:
            yield from problems(getattr(config, group))
    yield from _repo_problems(config)
    if isinstance(config, TrainConfig):
        yield from train_problems(config)
    elif isinstance(config, EvalConfig):
        yield from eval_problems(config)
    elif isinstance(config, InspectConfig):
        yield from new_folder_problems("output_dir", config.output_dir)
    elif isinstance(config, FetchConfig):
        yield from _cache_problems("cache_dir", config.cache_dir)
    if isinstance(config, TrainConfig | EvalConfig | InspectConfig) and config.data is not None:
        yield from _cache_problems("data.cache_dir", config.data.cache_dir)


def _cache_problems(key: str, cache_dir: str | None) -> Iterator[str]:
    place = cache_place(cache_dir, key)
    for problem in new_folder_problems(place.key, place.path):
        yield problem if place.key == key else f"{problem}, or {key}=<folder>"


def _repo_problems(config: RootConfig) -> Iterator[str]:
    model: ModelConfig | None = getattr(config, "model", None)
    if model is not None:
        if isinstance(config, EvalConfig) and not needs_base_model(config):
            return
        from_run = isinstance(config, EvalConfig) and config.experiment_dir is not None
        reads_weights = isinstance(config, TrainConfig | EvalConfig) and not from_run
        problem = model_problem(model.repo_name, weights=reads_weights and not model.random_init)
        if problem and isinstance(config, EvalConfig) and from_run:
            problem += f" (task={config.task.config_name} reads the model that the run was trained from)"
        if problem:
            yield problem
        if model.chat_template is not None:
            problem = template_problem(model.chat_template)
            if problem:
                yield problem


def _name_problems(group: str, config: Any) -> Iterator[str]:
    """A saved run is read back by this name, so only the class's own will do (a model has one schema: any name)."""
    if config is not None and choices(group).get(config.config_name) is not type(config):
        own = type(config).config_name
        yield f"{group}.config_name={config.config_name} cannot be changed: leave {group}.config_name={own}"


def _fabric_problems(fabric: FabricConfig) -> Iterator[str]:
    try:
        devices = parse_devices(fabric.devices)
    except ValueError:
        devices = None
        yield f"fabric.devices={fabric.devices} cannot be read: give a number, auto, or a list such as '0,1'"
    if fabric.accelerator == "cuda":
        problem = cuda_problem(devices)
        if problem:
            yield problem
    if fabric.accelerator == "cpu" or (fabric.accelerator == "auto" and cuda_problem(devices)):
        if fabric.precision == "16-true":
            yield "fabric.precision=16-true needs a CUDA device: give fabric.precision=bf16-mixed"
        if isinstance(devices, list):
            yield f"fabric.devices={fabric.devices} names devices, which a CPU has not: give a number of processes"
    if fabric.precision == "16-mixed":  # its loss scale begins too high on purpose: the first steps are not finite
        yield "fabric.precision=16-mixed is not supported: give fabric.precision=bf16-mixed or 32-true"


def parse_devices(value: str | None) -> int | str | list[int]:
    """`fabric.devices` as Fabric takes it: "2" -> 2, "auto" -> "auto", "0,1" or "[0,1]" -> [0, 1], None -> 1.

    Raises:
        ValueError: it is none of these.
    """
    if value is None:
        return 1
    text = value.strip().strip("[]")
    if text.casefold() in ("auto", "-1"):
        return "auto"
    if "," in text or value.strip().startswith("["):
        indices = [int(part) for part in text.split(",") if part.strip()]
        if not indices or min(indices) < 0 or len(set(indices)) < len(indices):
            raise ValueError(value)
        return indices
    if int(text) < 1:
        raise ValueError(value)
    return int(text)


def _generation_problems(generation: GenConfig) -> Iterator[str]:
    if generation.num_beams > 1 and generation.do_sample:
        yield (
            f"generation.num_beams={generation.num_beams} searches and generation.do_sample=true samples: "
            "give generation.num_beams=1 or generation.do_sample=false"
        )
    if "" in generation.stop_strings:
        yield "generation.stop_strings has an empty text, which ends every response at once: remove it"


def parse_targets(value: Any) -> str | list[str]:
    """`lora_cfg.targets`: "all-linear", or a list of module names and of regular expressions (`is_pattern`).

    A list may also be written as `a,b` or as Python's `"('a','b')"`.

    Raises:
        ValueError: it is none of these, or empty.
    """
    if isinstance(value, str) and is_pattern(value):
        value = [value]
    if isinstance(value, str):
        text = value.strip()
        if text.casefold() == "all-linear":
            return "all-linear"
        if text[:1] in ("(", "["):
            try:
                value = ast.literal_eval(text)
            except (SyntaxError, ValueError):
                value = text.strip("()[]")
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(value)
    if not all(isinstance(name, str) and (re.fullmatch(r"[\w.]+", name) or is_pattern(name)) for name in value):
        raise ValueError(value)
    return list(value)


def is_pattern(text: str) -> bool:
    """True for a regular expression of module names, which no name is; one that may take long to match is none."""
    if not re.search(r"[\\*+?|^$]", text) or len(text) > 200 or len(re.findall(r"[*+{]", text)) > 3:
        return False
    try:
        re.compile(text)
    except re.error:
        return False
    return re.search(r"\)[*+{]", text) is None  # a repeated group


_UNSAFE_INITS = {
    **dict.fromkeys(
        ("pissa", "olora"),
        "changes the weights of the base model, so that neither the reference nor a saved adapter fits the model",
    ),
    **dict.fromkeys(("eva", "corda", "lora_ga"), "needs data before training"),
    "loftq": "needs a quantised model",
    "mica": "freezes one of the two matrices",
}
_INITS = ("default", "gaussian", "orthogonal")


def _lora_problems(lora: LORAConfig) -> Iterator[str]:
    try:
        parse_targets(lora.targets)
    except ValueError:
        yield (
            f"model.lora_cfg.targets={lora.targets} cannot be read: give all-linear, "
            "names such as model.lora_cfg.targets=[q_proj,v_proj], or a regular expression of at most 200 characters "
            "with at most three repetitions and no repeated group"
        )
    reason = next((why for name, why in _UNSAFE_INITS.items() if lora.init.casefold().startswith(name)), None)
    if reason:
        yield f"model.lora_cfg.init={lora.init} {reason}: give {', '.join(_INITS)}"
    elif lora.init not in _INITS:
        yield f"model.lora_cfg.init={lora.init} is not a choice: it may be {', '.join(_INITS)}"
    if lora.init == "orthogonal" and lora.rank % 2:
        yield f"model.lora_cfg.init=orthogonal needs an even rank: give model.lora_cfg.rank={lora.rank + 1}"
    if any(layer < 0 for layer in lora.layers_to_transform):
        yield f"model.lora_cfg.layers_to_transform={lora.layers_to_transform}: layers are counted from 0"
    unnamed = [name for name in lora.modules_to_save if not re.fullmatch(r"[\w.]+", name)]
    if unnamed:
        yield f"model.lora_cfg.modules_to_save: {unnamed[0]!r} is no name of a module: give for example [lm_head]"


def _model_problems(model: ModelConfig) -> Iterator[str]:
    lora = model.lora_cfg
    if lora is not None:
        yield from _lora_problems(lora)
    if model.finetune_mode == "LORA":
        if lora is None:
            yield "model.finetune_mode=LORA needs model.lora_cfg: remove model.lora_cfg=null or give finetune_mode=ALL"
        if model.freeze_transformer:
            yield "model.freeze_transformer=true leaves no layer for adapters: give model.finetune_mode=ALL"
        if model.random_init:
            yield "model.random_init=true has nothing for adapters to adapt: give model.finetune_mode=ALL"
    yield from _new_token_problems(model)
    library = model.library_cfg
    if library.trust_remote_code and not _COMMIT.fullmatch(library.revision or ""):
        yield (
            "model.library_cfg.trust_remote_code=true runs Python code of the model's authors on this machine: "
            "pin what you have read with model.library_cfg.revision=<40-digit commit>"
        )


def _new_token_problems(model: ModelConfig) -> Iterator[str]:
    wrong = [text for text in model.extra_vocabulary if not text.strip() or text != text.strip() or len(text) > 100]
    if wrong:
        yield (
            f"model.extra_vocabulary has {wrong[0][:40]!r}: give texts of at most 100 characters, without spaces at "
            "their ends"
        )
    if len(set(model.extra_vocabulary)) < len(model.extra_vocabulary):
        yield "model.extra_vocabulary has a text twice: give each once"
    if model.extra_vocabulary and not model.resize_embeddings:
        yield "model.extra_vocabulary needs rows in the model: give model.resize_embeddings=true"
    if model.resize_embeddings and model.freeze_transformer:
        yield (
            "model.freeze_transformer=true leaves the rows of new tokens untrained: give "
            "model.freeze_transformer=false, or model.resize_embeddings=false"
        )


def _data_problems(data: DataConfig) -> Iterator[str]:
    if data.max_prompt_length >= data.max_length:
        yield (
            f"data.max_prompt_length={data.max_prompt_length} leaves no room for a response in "
            f"data.max_length={data.max_length}: give data.max_prompt_length={max(1, data.max_length * 3 // 4)}"
        )
    if data.validation_split + data.test_split >= 1:
        yield (
            f"data.validation_split={data.validation_split} and data.test_split={data.test_split} leave no row to "
            "train on: their sum must be below 1"
        )
    yield from template_arg_problems(data.template_args)
    if isinstance(data, LocalDataConfig):
        for key in ("train_file", "validation_file", "test_file"):
            path = getattr(data, key)
            if path is not None:
                yield from data_file_problems(f"data.{key}", path)
    if isinstance(data, LayoutDataConfig):
        yield from column_problems(data)


def _optim_problems(optim: OptimizerConfig) -> Iterator[str]:
    if isinstance(optim, SGDConfig) and optim.nesterov and optim.momentum == 0:
        yield "optim.nesterov=true needs momentum: give optim.momentum=0.9 or optim.nesterov=false"
    if optim.decay_ratio != OptimizerConfig.decay_ratio and optim.schedule != "wsd":
        yield (
            f"optim.decay_ratio={optim.decay_ratio:g} is not read by optim.schedule={optim.schedule}: remove it, or "
            "give optim.schedule=wsd"
        )
    betas = getattr(optim, "betas", (0.0, 0.0))
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield f"optim.betas={list(betas)} must be two numbers in [0, 1): give for example optim.betas=[0.9,0.999]"


def task_problems(task: TrainTaskConfig | EvalTaskConfig) -> Iterator[str]:
    """Options that were set and that nothing would read, or that exclude each other."""
    if isinstance(task, TrainTaskConfig) and task.config_name != BestOfNConfig.config_name:
        yield from _training_problems(task)
    if isinstance(task, DPOConfig):
        smoothed = ("sigmoid", "robust")
        if task.label_smoothing > 0 and task.loss_type not in smoothed:
            yield (
                f"task.label_smoothing={task.label_smoothing} is not read by task.loss_type={task.loss_type}: "
                f"remove it, or give task.loss_type={' or '.join(smoothed)}"
            )
        if task.simpo_gamma != DPOConfig.simpo_gamma and task.loss_type != "simpo":
            yield (
                f"task.simpo_gamma={task.simpo_gamma} is not read by task.loss_type={task.loss_type}: "
                "remove it, or give task.loss_type=simpo"
            )


def _training_problems(task: TrainTaskConfig) -> Iterator[str]:
    if task.lr_warmup_steps and task.lr_warmup_ratio:
        yield (
            f"task.lr_warmup_steps={task.lr_warmup_steps} and task.lr_warmup_ratio={task.lr_warmup_ratio:g} both give "
            "the warm-up: remove one of them"
        )
    metric = task.early_stopping_metric
    if metric is None:
        for name in ("early_stopping_patience", "early_stopping_direction"):
            if getattr(task, name) != getattr(TrainTaskConfig, name):
                yield (
                    f"task.{name}={getattr(task, name)} is not read without task.early_stopping_metric: remove it, or "
                    f"give for example task.early_stopping_metric={task.val_metrics[0]}"
                )
    elif metric not in task.val_metrics and not (metric.startswith("scores/") and isinstance(task, OnlineTaskConfig)):
        near = nearest(metric.removeprefix("val/"), task.val_metrics)
        did = f"did you mean task.early_stopping_metric={near}? It" if near else "it"
        yield (
            f"task.early_stopping_metric={metric} is not measured by task={task.config_name}: {did} may be "
            f"{', '.join(task.val_metrics)}"
        )


def train_problems(config: TrainConfig) -> Iterator[str]:
    """Problems of a training: contradictory options, runs and folders."""
    name, starts_elsewhere = config.task.config_name, hasattr(config.task, "sft_experiment_dir")
    if isinstance(config.task, SFTConfig):  # without a run to start from, it trains the head alone
        starts_elsewhere = config.task.sft_experiment_dir is not None
    if config.model.freeze_transformer and starts_elsewhere and config.task.trains != "reward model":
        yield (
            f"model.freeze_transformer=true is not read by task={name}: remove it, or train less by "
            "model.finetune_mode=LORA"
        )
    if config.model.neftune_alpha is not None and not isinstance(config.task, SFTConfig):
        yield f"model.neftune_alpha={config.model.neftune_alpha:g} is not read by task={name}: remove it"
    optim, warmup = config.optim, config.task.lr_warmup_ratio
    if optim.schedule == "wsd" and warmup + optim.decay_ratio > 1:
        yield (
            f"task.lr_warmup_ratio={warmup:g} and optim.decay_ratio={optim.decay_ratio:g} are more than the whole run: "
            "their sum must be at most 1"
        )
    yield from sharding_problems(config, able=config.task.shards)
    yield from start_problems(config)
    yield from online_problems(config)
    if isinstance(config.task, BestOfNConfig):
        yield from _best_of_n_problems(config)
    if config.task.config_name == "sft" and config.data.reward_model_split == 1:
        yield "data.reward_model_split=1 leaves no row to fine-tune on: give for example data.reward_model_split=0.5"
    if config.resume and config.resume_from is not None:
        yield "resume=true and resume_from name two runs: give one of them"
    if config.resume_from is not None and not Path(config.resume_from).is_dir():
        near = near_path(config.resume_from)
        did = f"did you mean resume_from={near}?" if near else "give that of an earlier run;"
        yield f"resume_from={config.resume_from} is not a directory: {did} `list runs` shows them"
    if not re.fullmatch(r"[^/\\\0]+", config.run_name) or config.run_name in (".", ".."):
        yield f"run_name={config.run_name} cannot name a directory: give a name without slashes"
    yield from new_folder_problems("root_dir", config.root_dir)


def sharding_problems(config: TrainConfig | EvalConfig, *, able: bool) -> Iterator[str]:
    """Problems of options that exclude sharded weights."""
    if config.fabric.strategy != "fsdp2":
        return
    if not able:
        tasks = ", ".join(name for name, task in choices("task", "train").items() if getattr(task, "shards", False))
        yield (
            f"fabric.strategy=fsdp2 trains task={tasks} alone, not task={config.task.config_name}: "
            "give fabric.strategy=ddp"
        )
    if config.model is not None and config.model.finetune_mode == "LORA" and config.model.resize_embeddings:
        yield (
            "fabric.strategy=fsdp2 cannot train rows of model.resize_embeddings=true beside adapters: give "
            "model.finetune_mode=ALL, or fabric.strategy=ddp"
        )
    if config.fabric.precision == "64-true":
        yield "fabric.precision=64-true is not supported by fabric.strategy=fsdp2: give fabric.precision=32-true"


def online_problems(config: TrainConfig) -> Iterator[str]:
    """Problems of sampling and scoring; for other tasks, a reward that is not used."""
    task, model, how = config.task, config.model, config.generation
    if task.trains == "reward model":
        yield from unread_generation(how, task.config_name)
    if not isinstance(task, OnlineTaskConfig):
        yield from unread_engine(how, task.config_name)
        if config.reward != AutoRewardConfig():
            yield f"reward={config.reward.config_name} is not read by task={task.config_name}: remove it"
        return
    yield from unread_reward_model(config)
    group = task.num_generations
    for key in (key for key in ("rollout_size", "mini_batch_size") if key not in task.unread):
        size = getattr(task, key)
        if size % group:
            near = max(group, size - size % group)
            yield f"task.{key}={size} does not divide by task.num_generations={group}: give task.{key}={near}"
    if config.reward.overlong_buffer > how.max_new_tokens:
        yield (
            f"reward.overlong_buffer={config.reward.overlong_buffer} is more than generation.max_new_tokens="
            f"{how.max_new_tokens}: give at most that"
        )
    given = narrowed(how)
    if given:
        yield (
            f"{given}: a policy learns from what it samples with all its probabilities: remove it, or give "
            "generation.temperature"
        )
    if isinstance(task, PPOConfig):
        yield from _ppo_problems(task, model.dtype)
    if model.finetune_mode == "LORA" and model.lora_cfg is not None and model.lora_cfg.dropout > 0:
        yield (
            f"model.lora_cfg.dropout={model.lora_cfg.dropout}: task={task.config_name} compares probabilities of "
            "different passes: give model.lora_cfg.dropout=0"
        )
    if not model.disable_dropout:
        yield (
            f"model.disable_dropout=false: task={task.config_name} compares probabilities of different passes: "
            "give model.disable_dropout=true"
        )


def _ppo_problems(task: PPOConfig, dtype: str) -> Iterator[str]:
    if task.share_trunk and task.critic_warmup_steps:
        yield (
            f"task.critic_warmup_steps={task.critic_warmup_steps} needs a critic of its own: remove it, or give "
            "task.share_trunk=false"
        )
    if task.ptx_batch_size != PPOConfig.ptx_batch_size and not task.ptx_coeff:
        yield (
            f"task.ptx_batch_size={task.ptx_batch_size} is not read with task.ptx_coeff=0: remove it, or give for "
            "example task.ptx_coeff=1"
        )
    if task.ema_decay is not None and dtype != "float32":
        yield (
            f"task.ema_decay={task.ema_decay:g} is lost in the rounding of model.dtype={dtype}: give "
            "model.dtype=float32 fabric.precision=bf16-mixed"
        )


def _best_of_n_problems(config: TrainConfig) -> Iterator[str]:
    """Options that a task without training does not use."""
    for group, value, default in (("optim", config.optim, AdamWConfig()), ("task", config.task, BestOfNConfig())):
        names = config.task.unread if group == "task" else vars(default)
        if type(value) is not type(default):
            yield f"{group}={value.config_name} is not read by task=best_of_n, which learns nothing: remove it"
            continue
        for name in sorted(name for name in names if getattr(value, name) != getattr(default, name)):
            yield (
                f"{group}.{name}={getattr(value, name)} is not read by task=best_of_n, which learns nothing: remove it"
            )
    if config.reward.normalize:
        yield (
            "reward.normalize=true: by running moments the scores of different prompts could not be compared: give "
            "reward.normalize=false"
        )


def unread_engine(how: GenConfig, task: str) -> Iterator[str]:
    """Options that a task without rollouts does not use."""
    if how.engine != GenConfig.engine:
        yield f"generation.engine={how.engine} is not read by task={task}, which samples no rollouts: remove it"


def unread_generation(how: GenConfig, task: str) -> Iterator[str]:
    """Options that a task without generation does not use."""
    if how.stop_strings:
        yield f"generation.stop_strings={list(how.stop_strings)} is not read by task={task}: remove it"


def unread_reward_model(config: TrainConfig | EvalConfig) -> Iterator[str]:
    """A reward model that was given and that the reward does not ask."""
    of_reward = getattr(config.task, "rm_experiment_dir", None)
    if of_reward is not None and not is_run_alias(of_reward) and not scores_by_run(config):
        yield (
            f"task.rm_experiment_dir={of_reward} is not read by reward={config.reward.config_name}: remove it, or give "
            "reward=model"
        )


def narrowed(how: GenConfig) -> str:
    """The options that keep a sampler from using all probabilities, as they are typed; empty if there are none."""
    usual = (("top_k", 0), ("top_p", 1.0), ("num_beams", 1))
    return ", ".join(f"generation.{name}" for name, off in usual if getattr(how, name) != off)


def eval_problems(config: EvalConfig) -> Iterator[str]:
    """Problems of an evaluation: missing packages, model or run, weights, or reward."""
    yield from sharding_problems(config, able=False)
    yield from _unread_options_of_generation(config)
    yield from _reward_problems(config)
    if config.experiment_dir is None and isinstance(config.task, FrontierConfig):
        yield "task=frontier goes over the checkpoints of a run: give experiment_dir=<run directory>"
    elif config.experiment_dir is None:
        missing = [name for name in ("model", "data") if getattr(config, name) is None]
        if missing:
            give = " and ".join(f"{name}=<{', '.join(choices(name))}>" for name in missing)
            yield f"nothing to evaluate: give experiment_dir=<run directory>, or {give}"
        yield from new_folder_problems("output_dir", config.output_dir)
    if config.task.data_split == "reward" and config.data is not None and config.data.reward_model_split == 0:
        yield "task.data_split=reward is empty with data.reward_model_split=0: give another split"
    if isinstance(config.task, FrontierConfig) and config.task.model_name != EvalTaskConfig.model_name:
        yield f"task.model_name={config.task.model_name} is not read by task=frontier, which takes all: remove it"
    elif not is_weights_name(config.task.model_name):
        near = nearest(config.task.model_name, ("final", "best", "last"))
        did = f"did you mean task.model_name={near}? It may be" if near else "give"
        yield f"task.model_name={config.task.model_name} is unknown: {did} final, best, last or step-<n>"
    elif config.experiment_dir is not None:
        yield from _run_problems(config, config.experiment_dir)


def _unread_options_of_generation(config: EvalConfig) -> Iterator[str]:
    """Options of generation that this evaluation does not read."""
    how, name, writes = config.generation, config.task.config_name, config.task.writes
    yield from unread_engine(how, name)
    if not writes:
        yield from unread_generation(how, name)
    given = narrowed(how) if writes == "samples" else ""
    if given:
        yield (
            f"{given}: task={name} samples with all probabilities, as training does: remove it, or give "
            "generation.temperature"
        )


def _reward_problems(config: EvalConfig) -> Iterator[str]:
    """A reward that nothing reads, or that cannot score; a comparison with nothing."""
    reward, task = config.reward, config.task
    if task.writes != "samples":
        if reward != AutoRewardConfig():
            yield f"reward={reward.config_name} is not read by task={task.config_name}: remove it"
        return
    yield from start_problems(config)
    yield from unread_reward_model(config)
    if reward.normalize:
        yield (
            "reward.normalize=true: by running moments the scores of different responses could not be compared: give "
            "reward.normalize=false"
        )
    if reward.overlong_buffer > config.generation.max_new_tokens:
        yield (
            f"reward.overlong_buffer={reward.overlong_buffer} is more than generation.max_new_tokens="
            f"{config.generation.max_new_tokens}: give at most that"
        )
    if isinstance(task, RewardConfig):
        yield from _against_problems(config, task.against)


def _against_problems(config: EvalConfig, against: str) -> Iterator[str]:
    """Problems of the responses to compare with."""
    if against.casefold() == REFERENCES:
        return
    if against.casefold() == START:
        if config.experiment_dir is None:
            yield "task.against=start: a model that no run has trained has no start: give references or a run directory"
        elif config.model is not None and config.model.random_init:
            yield (
                f"task.against=start: the start of {config.experiment_dir} was random weights: give references or "
                "another run directory"
            )
        return
    try:
        trained = task_of_run(read_run_config(against, key="task.against"))
        saved_group(against, "model", key="task.against")
    except ConfigError as error:
        yield from (f"{problem}; it may also be {REFERENCES} or {START}" for problem in error.problems)
        return
    if trained is not None and trained.trains != "policy":
        yield f"task.against={against}: this run of task={trained.config_name} trained a {trained.trains}: give another"
        return
    yield from weights_problems(against, "final", key="task.against", name_key="task.model_name")


def _frontier_problems(config: EvalConfig, run_dir: str) -> Iterator[str]:
    """A frontier begins at a start, and has points."""
    if config.model is not None and config.model.random_init:
        yield f"experiment_dir={run_dir}: task=frontier needs a start, and this run began with random weights"
    if not Path(run_dir, "final").is_dir() and not any(Path(run_dir).glob("checkpoints/step-*")):
        again = shell_word("resume_from", str(run_dir))
        yield f"experiment_dir={run_dir}: this run has no checkpoint; go on with it by {again}"


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
    if isinstance(config.task, FrontierConfig):
        yield from _frontier_problems(config, run_dir)
    else:
        yield from weights_problems(run_dir, config.task.model_name, key="experiment_dir", name_key="task.model_name")
    task = saved.get("task")
    start = task.get("sft_experiment_dir") if isinstance(task, dict) else None
    adapters = config.model is not None and config.model.finetune_mode == "LORA"
    if isinstance(start, str) and adapters and not Path(start).is_dir():
        yield (
            f"experiment_dir={run_dir} has adapters for the model that {start} left, and that is not there any more: "
            "put it back"
        )


MAPPED = ("prompt", "response", "chosen", "rejected", "responses", "margin", "messages", "label")  # data.rows.COLUMNS
EXTRAS = ("system", "tools")  # data.rows.CONVERSATION_EXTRAS


def column_problems(data: LayoutDataConfig) -> Iterator[str]:
    """Problems of `data.columns` and `data.ignore_columns`."""
    ignored = set(data.ignore_columns)
    users: dict[str, str] = {}
    if not isinstance(data.columns, dict | None):
        yield f"data.columns={data.columns} is no mapping: give for example 'data.columns={{prompt: question}}'"
    for name, value in data.columns.items() if isinstance(data.columns, dict) else ():
        columns = [value] if isinstance(value, str) else value
        if name not in (*MAPPED, *EXTRAS):
            names = ", ".join((*MAPPED, *EXTRAS))
            yield f"data.columns.{name} is no column that is read: give one or more of {names}"
            continue
        if not isinstance(columns, list) or not columns or not all(isinstance(c, str) and c for c in columns):
            yield f"data.columns.{name}={value} must be the name of a column, or a list of names to join"
            continue
        if len(columns) > 1 and name not in MAPPED[:4]:
            yield f"data.columns.{name}={value}: only texts are joined; give the name of one column"
        for column in columns:
            if column in ignored:
                yield f"data.columns.{name} names {column}, which data.ignore_columns leaves out: remove one of the two"
            if column in users:
                yield f"data.columns names {column} twice, in {users[column]} and {name}: give each column one use"
            users[column] = name
    if any(not name for name in data.ignore_columns):
        yield "data.ignore_columns has an empty name: remove it"


_READERS = {
    option: [name for name, builtin in BUILTINS.items() if option in builtin.reads]
    for option in dict.fromkeys(option for builtin in BUILTINS.values() for option in builtin.reads)
}
_EXAMPLES = {"target_length": "12", "pattern": r"'^Return\b'"}


def reward_problems(cfg: RewardSourceConfig) -> Iterator[str]:
    """Every problem of a source of rewards: its functions, their options, penalties without effect."""
    yield from _penalty_problems(cfg)
    sources: list[str] = []
    if isinstance(cfg, FunctionRewardConfig):
        sources = [cfg.path]
        if cfg.path in (MODEL, JUDGE):
            yield f"reward.path={cfg.path} names no function: give reward={cfg.path}"
        else:
            yield from source_problems("reward.path=", cfg.path)
    elif isinstance(cfg, ListRewardConfig):
        terms = list(_readable_terms(cfg.terms))
        sources = [term.source for term in terms if isinstance(term, Term)]
        yield from (problem for problem in terms if isinstance(problem, str))
        yield from _terms_problems(sources)
    elif isinstance(cfg, JudgeRewardConfig):
        sources = [JUDGE]
    if isinstance(cfg, CallOptionsConfig) and not any(source == JUDGE or is_users_own(source) for source in sources):
        for name in ("num_workers", "timeout"):
            if getattr(cfg, name) != getattr(CallOptionsConfig, name):
                yield f"reward.{name}={getattr(cfg, name)} is read by functions of yours and the judge alone: remove it"
    if isinstance(cfg, JudgeOptionsConfig):
        yield from _judge_problems(cfg) if JUDGE in sources else _unread_judge_problems(cfg)
    if isinstance(cfg, BuiltinOptionsConfig):
        yield from _option_problems(cfg, sources)
    if isinstance(cfg, ModelRewardConfig | ListRewardConfig) and cfg.folder is not None:
        if isinstance(cfg, ListRewardConfig) and MODEL not in sources:
            yield f"reward.folder={cfg.folder} is read by no term: remove it, or add the term model"
        else:
            yield from _folder_problems(cfg.folder)


def _penalty_problems(cfg: RewardSourceConfig) -> Iterator[str]:
    if cfg.short_penalty != RewardSourceConfig.short_penalty and cfg.min_response_length == 0:
        yield (
            f"reward.short_penalty={cfg.short_penalty:g} is not read with reward.min_response_length=0: "
            "remove it, or give for example reward.min_response_length=4"
        )
    elif cfg.short_penalty == 0:
        yield (
            f"reward.min_response_length={cfg.min_response_length} does nothing with reward.short_penalty=0: "
            "remove both, or give for example reward.short_penalty=1"
        )


def _readable_terms(texts: list[str]) -> Iterator[Term | str]:
    """Each term, or what is wrong with it."""
    if not texts:
        yield "reward.terms=[] has nothing to add up: give for example reward.terms=[model,0.5*length]"
    for text in texts:
        try:
            yield parse_term(text)
        except ValueError:
            yield (
                f"reward.terms: {text or 'an empty text'} is not a term: give a source, or weight*source with a finite "
                "weight other than 0, for example 0.5*length"
            )


def _terms_problems(sources: list[str]) -> Iterator[str]:
    for source in dict.fromkeys(sources):
        if source not in (MODEL, JUDGE):
            yield from source_problems("reward.terms: ", source)
        if sources.count(source) > 1:
            yield f"reward.terms: {source} is there more than once: give it once, with the sum of the weights"


def source_problems(given: str, source: str) -> Iterator[str]:
    """Problems of one reward function.

    Args:
        given: the beginning of the sentence: the option that names it.
        source: a built-in's name or a dotted path.
    """
    if source in BUILTINS:
        builtin = BUILTINS[source]
        missing = missing_modules(builtin.requires)
        if missing:
            install = f'pip install "sheeprlhf[{builtin.extra}]"'
            yield f"{given}{source} needs packages that are not installed ({', '.join(missing)}): {install}"
    elif source.endswith(".py") or "/" in source or ".py:" in source:
        module, _, function = source.partition(":")
        dotted = module.removeprefix("./").removesuffix(".py").replace("/", ".")
        yield f"{given}{source} is a file: give its dotted path, {given}{dotted}:{function or '<function>'}"
    elif not is_users_own(source):
        known = list(BUILTINS) if given.endswith("=") else [MODEL, JUDGE, *BUILTINS]
        near = nearest(source, known)
        did = f"did you mean {given if given.endswith('=') else ''}{near}? It" if near else "it"
        yield (
            f"{given}{source} is unknown: {did} may be {', '.join(known)}, or a function of yours as "
            "package.module:function"
        )
    else:
        yield from _users_own_problems(given, source)


def _users_own_problems(given: str, source: str) -> Iterator[str]:
    try:
        module, function = parse_path(source)
    except ValueError:
        yield f"{given}{source} cannot be read: give package.module:function, for example {given}my_rewards:brevity"
        return
    spec = find_module(module)
    if spec is None:
        files = [path.stem for path in Path.cwd().glob("*.py")]
        near = nearest(module, files) if "." not in module else None
        did = f"did you mean {given}{near}:{function}? It" if near else "it"
        yield (
            f"{given}{source}: there is no module {module}: {did} has to be installed, on PYTHONPATH or in the current "
            f"directory ({Path.cwd()})"
        )
        return
    if spec.origin is None or not spec.origin.endswith(".py"):
        return  # compiled, or built in: importing it will tell
    try:
        names = names_of(spec.origin)
    except SyntaxError as error:
        yield f"{given}{source}: {spec.origin}, line {error.lineno}, is not Python: {error.msg}"
        return
    except OSError as error:
        yield f"{given}{source}: {spec.origin} cannot be read: {error.strerror}"
        return
    if names is not None and function not in names:
        near, hidden = nearest(function, names), hidden_by_installed(module)
        did = f"did you mean {given}{module}:{near}?" if near else "give the name of one that it has"
        if hidden is not None:
            did = f"it comes before your {hidden}: rename that"
        yield f"{given}{source}: {spec.origin} has no {function}: {did}"


def _unread_judge_problems(cfg: JudgeOptionsConfig) -> Iterator[str]:
    given, shared = config_to_dict(cfg), config_to_dict(CallOptionsConfig())
    for name, value in config_to_dict(JudgeOptionsConfig()).items():
        if name not in shared and given[name] != value:
            yield f"reward.{name} is read by no term: remove it, or add the term judge"


def _judge_problems(cfg: JudgeOptionsConfig) -> Iterator[str]:
    """Options of a judge that are missing or cannot be read; no value that may be a secret is repeated."""
    yield from _url_problems(cfg.url)
    if not cfg.judge_model:
        yield "reward.judge_model is missing: give the name of the server's model"
    try:
        if "response" not in judge_fields(cfg.judge_prompt):
            yield "reward.judge_prompt does not contain {response}: add it"
    except ValueError as error:
        yield f"reward.judge_prompt cannot be read ({error}): write {{name}} for a field and {{{{ }}}} for braces"
    try:
        re.compile(cfg.judge_pattern)
    except (re.error, OverflowError, RecursionError) as error:
        yield f"reward.judge_pattern={cfg.judge_pattern} is not a regular expression: {error}; quote and escape it"
    limits = cfg.judge_range
    if len(limits) != 2 or not (math.isfinite(sum(limits)) and limits[0] < limits[1]):
        yield f"reward.judge_range={list(limits)} must be the lowest and the highest score: give for example [0,10]"
    if cfg.judge_failure_score is not None and not math.isfinite(cfg.judge_failure_score):
        yield f"reward.judge_failure_score={cfg.judge_failure_score} must be a finite number"
    variable = cfg.api_key_variable
    if variable is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", variable):
        yield "reward.api_key_variable is no name of an environment variable: give the name, never the key itself"
    elif variable is not None and not re.fullmatch(r"[\x21-\x7e]+", os.environ.get(variable, "").strip()):
        yield f"reward.api_key_variable={variable}: the environment variable is empty or no key: export it"


def _url_problems(url: str | None) -> Iterator[str]:
    example = "give for example reward.url=http://127.0.0.1:8000/v1"
    if not url:
        yield f"reward.url is missing: {example}"
        return
    try:
        parts = urlsplit(url)
        ok = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        ok = False
    if not ok or not url.isprintable() or " " in url:
        yield f"reward.url is not an address of http or https: {example}"
    elif "@" in parts.netloc:
        yield "reward.url contains a user name or password: remove it, and give reward.api_key_variable=<variable>"
    elif parts.query or parts.fragment:
        yield f"reward.url has a part behind ? or #, which is not supported: {example}"
    elif parts.path.rstrip("/").endswith("/chat/completions"):
        yield f"reward.url={url}: /chat/completions is appended: give the address up to /v1"


def _option_problems(cfg: BuiltinOptionsConfig, sources: list[str]) -> Iterator[str]:
    """Options of built-ins: what is set and not read, what is needed and missing, what cannot be read."""
    values = {"target_length": cfg.target_length, "length_unit": cfg.length_unit, "pattern": cfg.pattern}
    for name, value in values.items():
        readers = _READERS[name]
        reading = [source for source in sources if source in readers]
        if value != getattr(BuiltinOptionsConfig, name) and not reading:
            yield f"reward.{name}={value} is read by {' and '.join(readers)} alone: remove it, or choose that function"
        elif value is None and any(name in BUILTINS[source].needs for source in reading):
            yield f"reward.{name} is missing: {reading[0]} needs it, for example reward.{name}={_EXAMPLES[name]}"
    if cfg.pattern is not None:
        try:
            re.compile(cfg.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            yield f"reward.pattern={cfg.pattern} is not a regular expression: {error}; quote and escape it"


def _folder_problems(folder: str) -> Iterator[str]:
    """Reasons that a reward model cannot be loaded from a folder or hub id, from local files only."""
    given, place = f"reward.folder={folder}", expand_home(folder)
    if place.is_dir():
        if (place / "adapter_config.json").is_file():
            run = place.resolve().parent
            if (run / "config.yaml").is_file():
                yield (
                    f"{given}: these are adapters of a run, which knows their base model: give "
                    f"task.rm_experiment_dir={run} and leave reward.folder out"
                )
            else:
                yield f"{given}: {merge_advice(place)}"
            return
        if (place / "config.json").is_file():
            problem = model_problem(folder, weights=True)
            if problem:
                yield problem.replace("model.repo_name=", "reward.folder=", 1)
            return
        inside = place / "final"
        did = "give a folder that from_pretrained loads"
        if (inside / "adapter_config.json").is_file():
            did = f"did you mean {shell_word('task.rm_experiment_dir', str(place.resolve()))}?"
        elif (inside / "config.json").is_file():
            did = f"did you mean reward.folder={inside}?"
        yield f"{given}: this folder has no config.json: {did}"
    elif os.path.exists(place):
        yield f"{given} is a file: give the folder that has config.json, or a hub id (owner/name)"
    elif not is_hub_id(folder):
        near = near_path(folder)
        did = f"did you mean reward.folder={near}? Else " if near else ""
        yield f"{given} is neither a folder nor a hub id (owner/name): {did}give one of them"


_OF_GROUP: dict[str, Callable[[Any], Iterator[str]]] = {
    "task": task_problems,
    "fabric": _fabric_problems,
    "generation": _generation_problems,
    "model": _model_problems,
    "data": _data_problems,
    "optim": _optim_problems,
    "reward": reward_problems,
}
