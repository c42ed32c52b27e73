"""What every online task begins with: prompts, the models it needs, a reward, and a check before the first step."""

import copy
import dataclasses
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from sheeprlhf.agent.policy import Policy
from sheeprlhf.agent.reference import reference_of
from sheeprlhf.agent.reward import RewardModel, load_reward_model, reward_model_of
from sheeprlhf.agent.rollout import Rollout
from sheeprlhf.data.prepare import TokenizedSplit, prepare_data
from sheeprlhf.engine.run import Run
from sheeprlhf.model.load import load_tokenizer
from sheeprlhf.model.lora import add_lora
from sheeprlhf.structure.model import AutoModelConfig, ModelConfig
from sheeprlhf.structure.online import OnlineTaskConfig, PPOConfig
from sheeprlhf.structure.reward import needs_model
from sheeprlhf.structure.saved import saved_group
from sheeprlhf.task.batches import longest_row
from sheeprlhf.task.finish import report_data
from sheeprlhf.task.rollouts import Collector
from sheeprlhf.task.start import load_start, load_trained_reward_model
from sheeprlhf.utils.errors import ConfigError, ModelError
from sheeprlhf.utils.lightning import Fabric


class Prompts(NamedTuple):
    """Whose prompts are answered.

    Attributes:
        rows: those of training.
        held_out: those of validation; None if there are none.
        longest: tokens of the longest sequence that a model will see.
    """

    rows: TokenizedSplit
    held_out: TokenizedSplit | None
    longest: int


class Agents(NamedTuple):
    """The models of an online task besides the reference.

    Attributes:
        policy: writes and learns.
        critic: says what a response is still going to earn, and learns; None if the task has none.
        reward: scores; None where the reward is a function.
        packed: batches are packed.
    """

    policy: Policy
    critic: RewardModel | None
    reward: RewardModel | None
    packed: bool


def load_prompts(fabric: Fabric, run: Run, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """All ranks: prepare and report the data."""
    cfg = run.cfg
    data = prepare_data(cfg.data, tokenizer, kind=cfg.task.data_kind, say=run.say, progress=fabric.is_global_zero)
    report_data(fabric, run, data)
    rows, held_out = data.splits["train"], data.splits.get("validation")
    used = {"": rows} if held_out is None else {"": rows, "validation": held_out}
    sampled = max(int(split.sizes[:, 0].max()) for split in used.values()) + cfg.generation.max_new_tokens
    return Prompts(rows, held_out, max(longest_row(used), sampled))


def load_agents(run: Run, tokenizer: PreTrainedTokenizerBase, *, longest: int) -> Agents:
    """The models, on the host and not wrapped yet.

    Raises:
        SheepError: one cannot be loaded, or the reward model has another tokenizer.
    """
    cfg, task = run.cfg, run.cfg.task
    assert isinstance(task, OnlineTaskConfig)
    start = (task.sft_experiment_dir, task.sft_model_name)
    policy, packed = load_start(cfg.model, *start, tokenizer, longest=longest, batching=task.batching, say=run.say)
    reward = None
    if needs_model(cfg.reward, cfg.data.rule_reward):
        reward, reward_packed = _load_reward(run, tokenizer, longest=longest)
        packed = packed and reward_packed
        reward.requires_grad_(False)
        reward.eval()
    critic = None
    if isinstance(task, PPOConfig):
        if reward is not None and task.init_critic_with_reward:
            critic = copy.deepcopy(reward).train()
            critic.requires_grad_(True)
        else:
            critic = reward_model_of(copy.deepcopy(policy), cfg.model, tokenizer)
    if cfg.model.finetune_mode == "LORA" and cfg.model.lora_cfg is not None:
        policy = Policy(add_lora(policy.causal_lm(), cfg.model.lora_cfg))
    return Agents(policy, critic, reward, packed)


def _load_reward(run: Run, tokenizer: PreTrainedTokenizerBase, *, longest: int) -> tuple[RewardModel, bool]:
    """The reward model of the configured folder or run."""
    task, folder = run.cfg.task, getattr(run.cfg.reward, "folder", None)
    assert isinstance(task, OnlineTaskConfig)
    of_run = task.rm_experiment_dir
    if folder is not None:
        cfg: ModelConfig = AutoModelConfig(repo_name=folder, disable_dropout=True)
    else:
        assert of_run is not None  # the command line asks for one
        saved = saved_group(of_run, "model")
        assert isinstance(saved, ModelConfig)
        cfg = saved
    if load_tokenizer(cfg).get_vocab() != tokenizer.get_vocab():
        where = f"reward.folder={folder}" if folder is not None else f"task.rm_experiment_dir={of_run}"
        raise ConfigError(
            f"{where}: its tokenizer is not that of {run.cfg.model.repo_name}: give a reward model that was made of "
            "the same model"
        )
    if folder is not None:
        run.say(f"reward model: {folder}")
        return load_reward_model(cfg, tokenizer, longest=longest, batching=task.batching)
    run.say(f"reward model: the {task.rm_model_name} weights of {of_run}")
    cfg = dataclasses.replace(cfg, disable_dropout=True, gradient_checkpointing=False)
    of = (cfg, Path(str(of_run)), task.rm_model_name, tokenizer)
    return load_trained_reward_model(*of, longest=longest, batching=task.batching, say=run.say)


def check_sampler(run: Run, collect: Collector, rollout: Rollout, policy: Policy) -> None:
    """All ranks, before the first step: sampler, training forward and reference must say the same of each token.

    The ratio of new to old probability is 1 then, and the KL to the reference 0.

    Raises:
        ModelError: they differ by more than rounding, and `task.self_check` is "error".
    """
    task, precision = run.cfg.task, run.cfg.fabric.precision
    assert isinstance(task, OnlineTaskConfig)
    tolerance = 1e-5 if precision == "32-true" else 2e-2
    sampled_N, reference_N = rollout.flat("logprobs"), rollout.flat("reference")
    trained_N = collect.logprobs(policy, rollout, "self-check")
    ratio, kl = (float((sampled_N - other_N).abs().mean()) for other_N in (trained_N, reference_N))
    problem = ""
    if not ratio <= tolerance:
        problem = (
            f"what was sampled has log-probabilities {ratio:.2g} nats a token from those that the training computes, "
            f"more than {tolerance:g}: the first ratio would not be 1; something besides weights and tokens changes "
            "them (random numbers in the model's code, positions, a cache)"
        )
    elif not kl <= tolerance:
        problem = (
            f"before the first step the policy's log-probabilities are {kl:.2g} nats a token from the reference's, "
            f"more than {tolerance:g}: the reference is not what training starts from"
        )
    elif not float(-sampled_N.mean()) > 0:
        problem = "the policy has no entropy: every token is certain, so nothing else is ever tried"
    if problem and task.self_check == "error":
        raise ModelError(f"{problem}; or give task.self_check=warn")
    if problem:
        run.say(f"warning: {problem}")


def make_collector(fabric: Fabric, run: Run, tokenizer: PreTrainedTokenizerBase, agents: Agents) -> Collector:
    """After the policy was set up, before a checkpoint is restored: the reference is the policy as it is now.

    Raises:
        SheepError: the reward's functions cannot be had.
    """
    reference = reference_of(agents.policy)
    reward = None if agents.reward is None else agents.reward.to(fabric.device)
    return Collector(fabric, run.cfg, tokenizer, agents.policy, reference, reward, packed=agents.packed)
