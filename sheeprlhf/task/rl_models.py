"""Set-up of an RL task: prompts with the columns of the reward, policy, critic and reward model, rollout collector."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple, cast

from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from sheeprlhf.agent.batches import longest_row
from sheeprlhf.agent.policy import Policy
from sheeprlhf.agent.reward import AdapterValueModel, RewardModel, load_reward_model, offset_of, reward_model_of
from sheeprlhf.config.model_lookup import with_own_tokenizer
from sheeprlhf.config.run_lookup import is_same_model, saved_group
from sheeprlhf.data.prepare import PreparedData, TokenizedSplit, available_columns, prepare_data
from sheeprlhf.engine.run import Run
from sheeprlhf.model.lm_head import HEAD, scalar_model
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
from sheeprlhf.model.router import say_router_loss_left_out
from sheeprlhf.reward.score import check_columns, state_warnings, wanted_columns
from sheeprlhf.rollout.rollout import RolloutCollector, TextExchange, has_same_tokens
from sheeprlhf.structure.evaluation import ScoredConfig
from sheeprlhf.structure.model import AutoModelConfig, ModelConfig
from sheeprlhf.structure.reward import needs_model
from sheeprlhf.structure.rollout import BestOfNConfig, OnlineTaskConfig, PPOConfig
from sheeprlhf.structure.run import EvalConfig, TrainConfig
from sheeprlhf.structure.task import RMConfig
from sheeprlhf.task.finish import report_data
from sheeprlhf.task.initial_policy import load_initial_policy, load_trained_reward_model, with_adapters
from sheeprlhf.utils.errors import DataError, ModelError, Notify
from sheeprlhf.utils.lightning import Fabric

REFERENCE = "reference"  # the dataset's own response, as a column


class RLModels(NamedTuple):
    """The models of an RL task besides the reference.

    Attributes:
        policy: samples, and is trained.
        critic: estimates the remaining reward, and is trained; None if the task has none.
        reward: scores; None if the reward is a function.
        packed: batches are packed.
        reward_tokenizer: the reward model's if it is not the policy's: the reward model then reads decoded texts.
    """

    policy: Policy
    critic: RewardModel | AdapterValueModel | None
    reward: RewardModel | AdapterValueModel | None
    packed: bool
    reward_tokenizer: PreTrainedTokenizerBase | None = None


class OnlineSetup(NamedTuple):
    """Data and models of an RL task before Fabric wraps anything.

    Attributes:
        tokenizer: the policy's.
        rows: rows whose prompts are answered.
        held_out: those of validation; None if there are none.
        models: the models.
        columns: names of the columns of each row that the reward gets.
    """

    tokenizer: PreTrainedTokenizerBase
    rows: TokenizedSplit
    held_out: TokenizedSplit | None
    models: RLModels
    columns: list[str]


def load_online_setup(fabric: Fabric, run: Run) -> OnlineSetup:
    """All ranks: prepare and report the data, load the models onto the host.

    Raises:
        SheepError: something cannot be loaded, or rows lack the response that the task or the reward reads; see its
            message.
    """
    cfg = run.cfg
    if cfg.generation.engine != "native":
        run.say(
            f"generation.engine={cfg.generation.engine} draws from torch's generator: a run that is resumed with as "
            "many processes and the same task.token_budget samples the same responses, any other run does not"
        )
    tokenizer = load_tokenizer(cfg.model)
    data = prepare_prompts(cfg, tokenizer, say=run.say, progress=fabric.is_global_zero)
    report_data(fabric, run, data)
    rows, held_out = data.splits["train"], data.splits.get("validation")
    used = {"": rows} if held_out is None else {"": rows, "validation": held_out}
    if isinstance(cfg.task, PPOConfig) and cfg.task.ptx_coeff and rows.unanswered:
        raise DataError(
            f"task.ptx_coeff={cfg.task.ptx_coeff:g} learns from the dataset's own responses, and {rows.unanswered} of "
            f"{len(rows)} training rows have none: give each of them one, or task.ptx_coeff=0"
        )
    columns = check_reward_columns(cfg, data, {name or "train": not split.unanswered for name, split in used.items()})
    for line in state_warnings(cfg.reward, default=cfg.data.rule_reward):
        run.say(line)
    sampled = max(int(split.sizes[:, 0].max()) for split in used.values()) + cfg.generation.max_new_tokens
    models = load_rl_models(run, tokenizer, longest=max(longest_row(used), sampled))
    return OnlineSetup(tokenizer, rows, held_out, models, columns)


def build_collector(fabric: Fabric, run: Run, setup: OnlineSetup, reference: nn.Module) -> RolloutCollector:
    """All ranks: move the reward model to the device and make the object that samples and scores.

    Args:
        fabric: where it runs.
        run: the run.
        setup: data and models, the policy set up.
        reference: the policy before training.

    Raises:
        SheepError: the reward's functions cannot be imported.
    """
    models, exchange = setup.models, None
    if models.reward_tokenizer is not None:
        exchange = TextExchange(setup.tokenizer, models.reward_tokenizer, run.say)
    return RolloutCollector(
        fabric,
        run.cfg,
        setup.tokenizer,
        models.policy,
        reference,
        None if models.reward is None else models.reward.to(fabric.device),
        packed=models.packed,
        columns=setup.columns,
        exchange=exchange,
    )


def prepare_prompts(
    cfg: TrainConfig | EvalConfig, tokenizer: PreTrainedTokenizerBase, *, say: Notify, progress: bool
) -> PreparedData:
    """Check the signatures of the reward functions, then prepare the prompts of a run or of an evaluation.

    Raises:
        ConfigError: a reward function cannot be imported or called.
        DataError: as `prepare_data` does.
    """
    assert cfg.data is not None
    kept = wanted_columns(cfg.reward, default=cfg.data.rule_reward)
    return prepare_data(cfg.data, tokenizer, kind="prompts", say=say, progress=progress, kept=kept)


def check_reward_columns(cfg: TrainConfig | EvalConfig, data: PreparedData, answered: Mapping[str, bool]) -> list[str]:
    """Return the names of the columns that the reward gets: those that the rows of all used splits have.

    Args:
        cfg: has the reward.
        data: of `prepare_prompts`.
        answered: the splits that are used, each with whether all of its rows have a response.

    Raises:
        ConfigError: a function needs a column that a split lacks; names those that it has.
    """
    assert cfg.data is not None
    names: list[str] | None = None
    for split, has_reference in answered.items():
        own = [REFERENCE] if has_reference else []
        available = dict.fromkeys([*available_columns(data.report, split), *own])
        check_columns(cfg.reward, available, default=cfg.data.rule_reward, rows=f"the {split} rows")
        kept = dict.fromkeys([*data.splits[split].columns, *own])
        names = [name for name in kept if names is None or name in names]
    return names or []


def load_rl_models(run: Run, tokenizer: PreTrainedTokenizerBase, *, longest: int) -> RLModels:
    """Load the models onto the host, not wrapped yet.

    Raises:
        SheepError: one cannot be loaded.
    """
    cfg, task = run.cfg, run.cfg.task
    assert isinstance(task, OnlineTaskConfig)
    start = (task.sft_experiment_dir, task.sft_model_name)
    policy, packed = load_initial_policy(
        cfg.model, *start, tokenizer, longest=longest, batching=task.batching, say=run.say
    )
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
    return RLModels(policy, critic, reward, packed, other)


def _make_critic(
    run: Run, tokenizer: PreTrainedTokenizerBase, policy: Policy, reward: RewardModel | AdapterValueModel | None
) -> RewardModel | AdapterValueModel:
    """Make the critic: the policy itself if asked, else of the reward model if asked and possible, else a new head.

    With adapters, it is one more adapter on the policy's base.
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
    if isinstance(reward, AdapterValueModel) and of_reward:
        add_second_adapter(model, CRITIC, cast(LoraConfig, model.peft_config[REWARD]), trains=True)
        copy_adapter(model, REWARD, CRITIC)
        head.load_state_dict(reward.head.state_dict())
        return AdapterValueModel(model, CRITIC, head, reward.offset)
    assert cfg.model.lora_cfg is not None
    add_second_adapter(model, CRITIC, lora_config(base, cfg.model.lora_cfg, language_head=False), trains=True)
    return AdapterValueModel(model, CRITIC, head)


def _share_trunk(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> RewardModel | AdapterValueModel:
    """Give the policy a value head; the critic is a view of the same weights."""
    scalar = scalar_model(policy.causal_lm(), tokenizer)
    policy.value_head = cast(nn.Linear, getattr(scalar, HEAD))
    if isinstance(policy.model, PeftModel):
        return AdapterValueModel(policy.model, POLICY, policy.value_head)
    return RewardModel(scalar)


def _load_reward(
    run: Run, tokenizer: PreTrainedTokenizerBase, policy: Policy, *, longest: int
) -> tuple[RewardModel | AdapterValueModel, bool]:
    """Load the reward model of the configured folder or run, on the policy's base if possible."""
    task = run.cfg.task
    assert isinstance(task, OnlineTaskConfig)
    run_dir, folder, cfg = reward_model_source(run.cfg)
    if folder is None and isinstance(policy.model, PeftModel) and _same_base(run, cfg, str(run_dir)):
        run.say(f"reward model: the {task.rm_model_name} weights of {run_dir}")
        final = Path(str(run_dir)) / "final"
        head = nn.Linear(1, 1, bias=False)
        head.weight = nn.Parameter(load_score_adapter(policy.model, final, REWARD, run.say).float())
        offset = offset_of(final)
        run.say("reward, critic and reference share the policy's base")
        return AdapterValueModel(policy.model, REWARD, head, offset), True
    return load_separate_reward_model(run.cfg, tokenizer, longest=longest, say=run.say)


def reward_model_source(cfg: TrainConfig | EvalConfig) -> tuple[str | None, str | None, ModelConfig]:
    """Return the run or the folder that the reward model is in, and its model's configuration."""
    folder, run_dir = getattr(cfg.reward, "folder", None), getattr(cfg.task, "rm_experiment_dir", None)
    if folder is not None:
        return None, folder, AutoModelConfig(repo_name=folder, disable_dropout=True)
    assert run_dir is not None  # the command line asks for one
    saved = saved_group(run_dir, "model")
    assert isinstance(saved, ModelConfig)
    return run_dir, None, saved


@contextmanager
def reward_folder_errors() -> Iterator[None]:
    """Let the errors of a block name `reward.folder` instead of `model.repo_name`."""
    try:
        yield
    except ModelError as error:
        raise ModelError(str(error).replace("model.repo_name=", "reward.folder=")) from error


def load_reward_tokenizer(cfg: TrainConfig | EvalConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the configured reward model; of a run, the one in its folder.

    Raises:
        ModelError: it cannot be loaded.
    """
    run_dir, folder, model = reward_model_source(cfg)
    with reward_folder_errors() if folder is not None else nullcontext():
        return load_tokenizer(model if run_dir is None else with_own_tokenizer(model, Path(run_dir)))


def load_separate_reward_model(
    cfg: TrainConfig | EvalConfig, tokenizer: PreTrainedTokenizerBase, *, longest: int, say: Notify
) -> tuple[RewardModel, bool]:
    """Load the configured reward model on a base of its own; return it and whether its batches are packed.

    Raises:
        SheepError: it cannot be loaded.
    """
    task = cfg.task
    assert isinstance(task, OnlineTaskConfig | ScoredConfig)
    run_dir, folder, model = reward_model_source(cfg)
    if folder is not None:
        say(f"reward model: {folder}")
        with reward_folder_errors():
            return load_reward_model(model, tokenizer, longest=longest, batching=task.batching, say=say)
    say(f"reward model: the {task.rm_model_name} weights of {run_dir}")
    model = dataclasses.replace(model, disable_dropout=True, gradient_checkpointing=False)
    of = (model, Path(str(run_dir)), task.rm_model_name, tokenizer)
    return load_trained_reward_model(*of, longest=longest, batching=task.batching, say=say)


def _same_base(run: Run, cfg: ModelConfig, rm_dir: str) -> bool:
    """Return whether a run's reward model is adapters on the very weights that the policy starts from."""
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
