"""Checks of a training as a whole and of each task; messages of `validate`."""

import re
from collections.abc import Iterator
from pathlib import Path

from sheeprlhf.config.option_checks import near_path
from sheeprlhf.config.path_checks import new_folder_problems
from sheeprlhf.config.registry import choices
from sheeprlhf.config.run_lookup import is_word, scores_by_run, start_problems
from sheeprlhf.structure.evaluation import EvalTaskConfig
from sheeprlhf.structure.generation import GenConfig
from sheeprlhf.structure.optim import AdamWConfig
from sheeprlhf.structure.reward import AutoRewardConfig
from sheeprlhf.structure.rollout import BestOfNConfig, OnlineTaskConfig, PPOConfig
from sheeprlhf.structure.run import EvalConfig, TrainConfig
from sheeprlhf.structure.task import DPOConfig, SFTConfig, TrainTaskConfig


def task_problems(task: TrainTaskConfig | EvalTaskConfig) -> Iterator[str]:
    """Options that were set and that nothing would read."""
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
    if of_reward is not None and not is_word(of_reward) and not scores_by_run(config):
        yield (
            f"task.rm_experiment_dir={of_reward} is not read by reward={config.reward.config_name}: remove it, or give "
            "reward=model"
        )


def narrowed(how: GenConfig) -> str:
    """The options that keep a sampler from using all probabilities, as they are typed; empty if there are none."""
    usual = (("top_k", 0), ("top_p", 1.0), ("num_beams", 1))
    return ", ".join(f"generation.{name}" for name, off in usual if getattr(how, name) != off)
