"""The models of an online task: the policy, and the critic and the reward model where it has them."""

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple, cast

from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from sheeprlhf.agent.policy import Policy
from sheeprlhf.agent.reward import RewardModel, load_reward_model, offset_of, reward_model_of
from sheeprlhf.agent.shared import SharedScore
from sheeprlhf.config.model_lookup import with_own_tokenizer
from sheeprlhf.config.run_lookup import is_same_model
from sheeprlhf.config.saved_config import saved_group
from sheeprlhf.engine.checkpoint import Say
from sheeprlhf.engine.run import Run
from sheeprlhf.model.load import load_tokenizer
from sheeprlhf.model.lora import (
    CRITIC,
    POLICY,
    REWARD,
    add_second_adapter,
    copy_adapter,
    load_score_adapter,
    lora_config,
)
from sheeprlhf.model.scalar import HEAD, scalar_model
from sheeprlhf.rollout.text_exchange import has_same_tokens
from sheeprlhf.structure.evaluation import ScoredConfig
from sheeprlhf.structure.model import AutoModelConfig, ModelConfig
from sheeprlhf.structure.reward import needs_model
from sheeprlhf.structure.rollout import BestOfNConfig, OnlineTaskConfig, PPOConfig
from sheeprlhf.structure.run import EvalConfig, TrainConfig
from sheeprlhf.structure.task import RMConfig
from sheeprlhf.task.initial_policy import load_start, load_trained_reward_model, with_adapters
from sheeprlhf.task.router import say_router_loss_left_out
from sheeprlhf.utils.errors import ModelError


class Agents(NamedTuple):
    """The models of an online task besides the reference.

    Attributes:
        policy: writes and learns.
        critic: says what a response is still going to earn, and learns; None if the task has none.
        reward: scores; None where the reward is a function.
        packed: batches are packed.
        reward_tokenizer: the reward model's, where it is not the policy's; texts are exchanged then.
    """

    policy: Policy
    critic: RewardModel | SharedScore | None
    reward: RewardModel | SharedScore | None
    packed: bool
    reward_tokenizer: PreTrainedTokenizerBase | None = None


def load_agents(run: Run, tokenizer: PreTrainedTokenizerBase, *, longest: int) -> Agents:
    """The models, on the host and not wrapped yet.

    Raises:
        SheepError: one cannot be loaded.
    """
    cfg, task = run.cfg, run.cfg.task
    assert isinstance(task, OnlineTaskConfig)
    start = (task.sft_experiment_dir, task.sft_model_name)
    policy, packed = load_start(cfg.model, *start, tokenizer, longest=longest, batching=task.batching, say=run.say)
    policy = with_adapters(policy, cfg.model)
    policy.exclude_undefined(tokenizer)
    if not isinstance(task, BestOfNConfig):  # it learns nothing
        say_router_loss_left_out(policy.causal_lm(), task.config_name, run.say)
    reward, other = None, None
    if needs_model(cfg.reward, cfg.data.rule_reward):
        own = load_reward_tokenizer(cfg)
        if has_same_tokens(own, tokenizer):
            reward, reward_packed = _load_reward(run, tokenizer, policy, longest=longest)
            packed = packed and reward_packed
        else:
            other = own
            reward, _ = load_separate_reward_model(cfg, own, longest=longest, say=run.say)
            run.say("the reward model has another tokenizer: it reads prompts and responses as text")
        reward.requires_grad_(False) if isinstance(reward, RewardModel) else reward.head.requires_grad_(False)
        reward.eval()
    critic = None
    if isinstance(task, PPOConfig):
        if other is not None and task.init_critic_with_reward and not task.share_trunk:
            run.say("the critic begins as the policy with a new head: the reward model has another tokenizer")
        critic = _make_critic(run, tokenizer, policy, reward if other is None else None)
    return Agents(policy, critic, reward, packed, other)


def _make_critic(
    run: Run, tokenizer: PreTrainedTokenizerBase, policy: Policy, reward: RewardModel | SharedScore | None
) -> RewardModel | SharedScore:
    """The policy itself if asked, else of the reward model if asked and possible, else of the policy with a new head.

    With adapters, it is one more on the policy's base.
    """
    cfg, task = run.cfg, run.cfg.task
    assert isinstance(task, PPOConfig)
    if task.share_trunk:
        return _share_trunk(policy, tokenizer)
    of_reward = reward is not None and task.init_critic_with_reward
    if not isinstance(policy.model, PeftModel):
        if isinstance(reward, RewardModel) and of_reward:
            critic = copy.deepcopy(reward).train()
            critic.requires_grad_(True)
            return critic
        return reward_model_of(copy.deepcopy(policy), cfg.model, tokenizer)
    model, base = policy.model, policy.causal_lm()
    head = cast(nn.Linear, getattr(scalar_model(base, tokenizer), HEAD))
    if isinstance(reward, SharedScore) and of_reward:
        add_second_adapter(model, CRITIC, cast(LoraConfig, model.peft_config[REWARD]), trains=True)
        copy_adapter(model, REWARD, CRITIC)
        head.load_state_dict(reward.head.state_dict())
        return SharedScore(model, CRITIC, head, reward.offset)
    assert cfg.model.lora_cfg is not None
    add_second_adapter(model, CRITIC, lora_config(base, cfg.model.lora_cfg, language_head=False), trains=True)
    return SharedScore(model, CRITIC, head)


def _share_trunk(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> RewardModel | SharedScore:
    """Give the policy a value head; the critic is a view of the same weights."""
    scalar = scalar_model(policy.causal_lm(), tokenizer)
    policy.value_head = cast(nn.Linear, getattr(scalar, HEAD))
    if isinstance(policy.model, PeftModel):
        return SharedScore(policy.model, POLICY, policy.value_head)
    return RewardModel(scalar)


def _load_reward(
    run: Run, tokenizer: PreTrainedTokenizerBase, policy: Policy, *, longest: int
) -> tuple[RewardModel | SharedScore, bool]:
    """The reward model of the configured folder or run, on the policy's base where that can be."""
    task = run.cfg.task
    assert isinstance(task, OnlineTaskConfig)
    of_run, folder, cfg = reward_model_source(run.cfg)
    if folder is None and isinstance(policy.model, PeftModel) and _same_base(run, cfg, str(of_run)):
        run.say(f"reward model: the {task.rm_model_name} weights of {of_run}")
        final = Path(str(of_run)) / "final"
        head = nn.Linear(1, 1, bias=False)
        head.weight = nn.Parameter(load_score_adapter(policy.model, final, REWARD, run.say).float())
        offset = offset_of(final)
        run.say("reward, critic and reference share the policy's base")
        return SharedScore(policy.model, REWARD, head, offset), True
    return load_separate_reward_model(run.cfg, tokenizer, longest=longest, say=run.say)


def reward_model_source(cfg: TrainConfig | EvalConfig) -> tuple[str | None, str | None, ModelConfig]:
    """The run or the folder that the reward model is in, and its model's configuration."""
    folder, of_run = getattr(cfg.reward, "folder", None), getattr(cfg.task, "rm_experiment_dir", None)
    if folder is not None:
        return None, folder, AutoModelConfig(repo_name=folder, disable_dropout=True)
    assert of_run is not None  # the command line asks for one
    saved = saved_group(of_run, "model")
    assert isinstance(saved, ModelConfig)
    return of_run, None, saved


@contextmanager
def of_reward_folder() -> Iterator[None]:
    """A block whose errors name `reward.folder` instead of `model.repo_name`."""
    try:
        yield
    except ModelError as error:
        raise ModelError(str(error).replace("model.repo_name=", "reward.folder=")) from error


def load_reward_tokenizer(cfg: TrainConfig | EvalConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the configured reward model; of a run, that which it has left.

    Raises:
        ModelError: it cannot be loaded.
    """
    of_run, folder, model = reward_model_source(cfg)
    with of_reward_folder() if folder is not None else nullcontext():
        return load_tokenizer(model if of_run is None else with_own_tokenizer(model, Path(of_run)))


def load_separate_reward_model(
    cfg: TrainConfig | EvalConfig, tokenizer: PreTrainedTokenizerBase, *, longest: int, say: Say
) -> tuple[RewardModel, bool]:
    """The configured reward model, on a base of its own, and whether its batches are packed.

    Raises:
        SheepError: it cannot be loaded.
    """
    task = cfg.task
    assert isinstance(task, OnlineTaskConfig | ScoredConfig)
    of_run, folder, model = reward_model_source(cfg)
    if folder is not None:
        say(f"reward model: {folder}")
        with of_reward_folder():
            return load_reward_model(model, tokenizer, longest=longest, batching=task.batching, say=say)
    say(f"reward model: the {task.rm_model_name} weights of {of_run}")
    model = dataclasses.replace(model, disable_dropout=True, gradient_checkpointing=False)
    of = (model, Path(str(of_run)), task.rm_model_name, tokenizer)
    return load_trained_reward_model(*of, longest=longest, batching=task.batching, say=say)


def _same_base(run: Run, cfg: ModelConfig, rm_dir: str) -> bool:
    """Whether a run's reward model is adapters on the very weights that the policy starts from."""
    task, theirs = run.cfg.task, saved_group(rm_dir, "task")
    assert isinstance(task, OnlineTaskConfig)
    return (
        cfg.finetune_mode == "LORA"
        and task.rm_model_name == "final"
        and (Path(rm_dir) / "final" / "adapter_config.json").is_file()
        and isinstance(theirs, RMConfig)
        and (theirs.sft_experiment_dir, theirs.sft_model_name) == (task.sft_experiment_dir, task.sft_model_name)
        and is_same_model(cfg.repo_name, run.cfg.model.repo_name)
    )
