"""Models that a task starts from or evaluates; set-up of an RL task: prompts, critic, reward model, collector."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple, NotRequired, TypedDict, Unpack, cast

from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from sheeprlhf.agent.batches import longest_row
from sheeprlhf.agent.policy import Policy, load_policy
from sheeprlhf.agent.reward import (
    AdapterValueModel,
    RewardModel,
    load_reward_model,
    read_score_options,
    reward_model_of,
)
from sheeprlhf.config.model_lookup import (
    REWARD_MODEL,
    Trained,
    initial_run,
    is_on_base_of,
    reads_chat,
    reward_folder_errors,
    reward_model_source,
    whole_model,
    with_own_tokenizer,
)
from sheeprlhf.config.run_lookup import saved_group
from sheeprlhf.data.prepare import PreparedData, Stream, own_prompts, prepare_data
from sheeprlhf.data.report import available_columns
from sheeprlhf.data.store import TokenizedSplit
from sheeprlhf.data.tokenize import TextExchange, has_same_tokens
from sheeprlhf.engine.checkpoint import find_checkpoint, load_weights
from sheeprlhf.engine.run import Run
from sheeprlhf.engine.shard import to_device
from sheeprlhf.model.adapter import (
    CRITIC,
    POLICY,
    REWARD,
    add_second_adapter,
    copy_adapter,
    load_lora,
    load_score_adapter,
    lora_config,
    merge_lora,
    with_adapter,
)
from sheeprlhf.model.folder.account import HEAD
from sheeprlhf.model.folder.architecture import configured_router_loss
from sheeprlhf.model.folder.load import load_tokenizer, model_of_start, scalar_model
from sheeprlhf.model.folder.quantize import quantize
from sheeprlhf.model.memory import freeze_layers
from sheeprlhf.reward.score import check_columns, state_warnings, wanted_columns
from sheeprlhf.rollout.engines import StopStrings
from sheeprlhf.rollout.rollout import RolloutCollector, TermModel
from sheeprlhf.rollout.sources import EpisodeSource
from sheeprlhf.structure.data import KeptColumns
from sheeprlhf.structure.evaluation import ScoredConfig
from sheeprlhf.structure.model import AutoModelConfig, ModelConfig
from sheeprlhf.structure.reward import EPISODE_COLUMNS, MODEL, model_sources
from sheeprlhf.structure.rollout import (
    BestOfNConfig,
    DistillConfig,
    LocalRolloutConfig,
    OnlineTaskConfig,
    PPOConfig,
    VLLMRolloutConfig,
    environment_of,
)
from sheeprlhf.structure.run import EvalConfig, TrainConfig
from sheeprlhf.structure.task import TrainTaskConfig
from sheeprlhf.task.finish import prepare_run_data
from sheeprlhf.utils.errors import DataError, ModelError, Notify
from sheeprlhf.utils.lightning import Fabric
from sheeprlhf.utils.memory import phase

REFERENCE = "reference"  # the dataset's own response, as a column
_OWN_OPTIONS = (  # that a training does not take from the run that it starts from
    *("dtype", "save_dtype", "attn_implementation", "disable_dropout", "gradient_checkpointing", "library_cfg"),
)


class LoadOptions(TypedDict):
    """Options of loading a model."""

    longest: int  # tokens of the longest sequence that it will see
    batching: str  # `task.batching`
    say: Notify  # prints a line
    in_files: NotRequired[bool]  # its weights stay in their files until they are sharded; see `load_causal_lm`


def load_options(cfg: TrainConfig | EvalConfig, longest: int, say: Notify) -> LoadOptions:
    """Return the options of loading a model for sequences of up to `longest` tokens."""
    in_files = cfg.fabric.strategy == "fsdp2"
    return {"longest": longest, "batching": cfg.task.batching, "say": say, "in_files": in_files}


class RLModels(NamedTuple):
    """The models of an RL task besides the reference."""

    policy: Policy  # samples, and is trained
    # estimates the remaining reward, and is trained; None if the task has none
    critic: RewardModel | AdapterValueModel | None
    rewards: dict[str, TermModel]  # the reward models by their terms; empty if the reward has none
    teacher: Policy | None = None  # learned from, in place of a reference; None if the task has none


class OnlineSetup(NamedTuple):
    """Data and models of an RL task before Fabric wraps anything; the reward gets these columns of each row.

    `episodes` samples responses of several turns, in an environment.
    """

    tokenizer: PreTrainedTokenizerBase
    rows: TokenizedSplit
    held_out: TokenizedSplit | None
    models: RLModels
    columns: list[str]
    episodes: EpisodeSource | None
    stream: Stream | None


def load_online_setup(fabric: Fabric, run: Run) -> OnlineSetup:
    """All ranks: prepare and report the data, load the models onto the host.

    Raises SheepError if something cannot be loaded, or rows lack the response that the task or the reward reads.
    """
    cfg = run.cfg
    if cfg.generation.engine != "native":
        run.say(
            f"generation.engine={cfg.generation.engine} draws from torch's generator: a run that is resumed with as "
            "many processes and the same task.token_budget samples the same responses, any other run does not"
        )
    tokenizer, episodes = load_tokenizer(cfg.model), None
    if isinstance(cfg.rollout, LocalRolloutConfig) and cfg.rollout.environment is not None:
        episodes = resolve_name(cfg.rollout.source)(tokenizer, cfg.rollout, run.say)
    data, stream = prepare_run_data(fabric, run, tokenizer, kind="prompts", kept=_kept_columns(cfg))
    rows, held_out = rows_of_shard(cfg, (), data), data.splits.get("validation")
    used = {"": rows} if held_out is None else {"": rows, "validation": held_out}
    columns = check_reward_columns(cfg, data, {name or "train": not split.unanswered for name, split in used.items()})
    for line in state_warnings(cfg.reward, default=cfg.data.rule_reward):
        run.say(line)
    sampled = max(int(split.sizes[:, 0].max()) for split in used.values())
    longest = longest_row(used)
    if stream is not None:  # no later row is longer
        sampled, longest = min(cfg.data.max_prompt_length, cfg.data.max_length), cfg.data.max_length
    longest = max(longest, sampled + cfg.generation.max_new_tokens)
    models = load_rl_models(run, tokenizer, longest=longest, data=data)
    return OnlineSetup(tokenizer, rows, held_out, models, columns, episodes, stream)


def rows_of_shard(cfg: TrainConfig, columns: Sequence[str], data: PreparedData) -> TokenizedSplit:
    """The training rows of prepared data, which may be one shard of `data.streaming`.

    Raises:
        DataError: rows lack the response that the task reads, or the shard lacks one of the `columns` that the reward
            gets.
    """
    rows = data.splits["train"]
    if isinstance(cfg.task, PPOConfig) and cfg.task.ptx_coeff and rows.unanswered:
        raise DataError(
            f"task.ptx_coeff={cfg.task.ptx_coeff:g} learns from the dataset's own responses, and {rows.unanswered} of "
            f"{len(rows)} training rows have none: give each of them one, or task.ptx_coeff=0"
        )
    missing = set(columns) - set(rows.columns) - (set() if rows.unanswered else {REFERENCE})
    if missing:
        raise DataError(
            f"a shard of the training rows lacks columns that the reward gets from the first ({sorted(missing)}): give "
            "all rows the same columns"
        )
    return rows


def build_collector(fabric: Fabric, run: Run, setup: OnlineSetup, reference: nn.Module) -> RolloutCollector:
    """All ranks: move the reward models to the device and make the object that samples and scores.

    Raises SheepError if the reward's functions cannot be imported.
    """
    models, cfg, servers = setup.models, run.cfg, None
    if isinstance(cfg.rollout, VLLMRolloutConfig):
        stop = StopStrings(cfg.generation.stop_strings, setup.tokenizer)
        given = (fabric, cfg, models.policy, setup.tokenizer, stop, run.dir, run.say, run.has_stop_signal)
        servers = resolve_name(cfg.rollout.source)(*given)
    for term in models.rewards.values():
        to_device(fabric, term.model)
    return RolloutCollector(
        fabric, cfg, setup.tokenizer, models.policy, reference, models.rewards, setup.columns, servers, setup.episodes
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
    how: dict[str, Any] = {"kind": "prompts", "say": say, "progress": progress}
    return prepare_data(cfg.data, tokenizer, **how, kept=_kept_columns(cfg))


def _kept_columns(cfg: TrainConfig | EvalConfig) -> KeptColumns:
    """The columns that the reward and an environment read."""
    assert cfg.data is not None
    kept = wanted_columns(cfg.reward, default=cfg.data.rule_reward)
    return kept._replace(every=kept.every or environment_of(cfg) is not None)


def check_reward_columns(cfg: TrainConfig | EvalConfig, data: PreparedData, answered: Mapping[str, bool]) -> list[str]:
    """Return the names of the columns that the reward gets: those that the rows of all used splits have.

    `answered` names these splits, each with whether all of its rows have a response.
    Raises ConfigError if a function needs a column that a split lacks; names those that it has.
    """
    assert cfg.data is not None
    names: list[str] | None = None
    for split, has_reference in answered.items():
        own = [REFERENCE] if has_reference else []
        own += [] if environment_of(cfg) is None else EPISODE_COLUMNS
        available = dict.fromkeys([*available_columns(data.report, split), *own])
        check_columns(cfg.reward, available, default=cfg.data.rule_reward, rows=f"the {split} rows")
        kept = dict.fromkeys([*data.splits[split].columns, *own])
        names = [name for name in kept if names is None or name in names]
    return names or []


def load_rl_models(run: Run, tokenizer: PreTrainedTokenizerBase, *, longest: int, data: PreparedData) -> RLModels:
    """Load the models onto the host, not wrapped yet."""
    cfg, task = run.cfg, run.cfg.task
    assert isinstance(task, OnlineTaskConfig)
    how = load_options(cfg, longest, run.say)
    policy = load_initial_policy(cfg.model, *initial_run(task), tokenizer, **how)
    policy = with_adapters(policy, cfg.model)
    policy.exclude_undefined(tokenizer)
    if not isinstance(task, BestOfNConfig):  # it learns nothing
        configured_router_loss(policy.causal_lm(), task.config_name, run.say)
    rewards = _load_rewards(run, tokenizer, policy, longest=longest, data=data)
    teacher = _load_teacher(str(task.teacher), tokenizer, how) if isinstance(task, DistillConfig) else None
    critic = _make_critic(run, tokenizer, policy, rewards) if isinstance(task, PPOConfig) else None
    pack_alike([policy, teacher, critic, *(term.model for term in rewards.values() if term.exchange is None)])
    for term in rewards.values():
        if term.exchange is not None and isinstance(term.model, RewardModel):
            term.model.packed = False  # its rows may have any length, and every model can read padded ones
    return RLModels(policy, critic, rewards, teacher)


def pack_alike(models: Sequence[Policy | RewardModel | AdapterValueModel | None]) -> None:
    """Let models that read the same tokens have packed batches only if each of them can."""
    packed = all(model.packed for model in models if model is not None)
    for model in models:
        if isinstance(model, Policy | RewardModel):  # the others are on the policy's base
            model.packed = packed


def _load_rewards(
    run: Run, tokenizer: PreTrainedTokenizerBase, policy: Policy, *, longest: int, data: PreparedData
) -> dict[str, TermModel]:
    """Load the frozen reward models by their terms."""
    cfg, rewards = run.cfg, {}
    for term in model_sources(cfg.reward, cfg.data.rule_reward):
        own, exchange = load_reward_tokenizer(cfg, term), None
        reward: RewardModel | AdapterValueModel
        if reads_chat(cfg) or not has_same_tokens(own, tokenizer):
            prepare = partial(prepare_prompts, cfg, own, say=run.say, progress=False)
            prompts = own_prompts(data, prepare) if reads_chat(cfg) else None
            exchange = TextExchange(tokenizer, own, run.say, chat=reads_chat(cfg), own_prompts=prompts)
            reward = load_separate_reward_model(cfg, own, term, longest=longest, say=run.say)
            why = "is asked in its own chat template" if reads_chat(cfg) else "has another tokenizer"
            run.say(f"the reward model {why}: it reads prompts and responses as text")
        else:
            reward = _load_reward(run, tokenizer, policy, term, longest=longest)
        reward.requires_grad_(False) if isinstance(reward, RewardModel) else reward.head.requires_grad_(False)
        rewards[term] = TermModel(reward.eval(), exchange)
    return rewards


def _load_teacher(name: str, tokenizer: PreTrainedTokenizerBase, how: LoadOptions) -> Policy:
    """Load the frozen model that a distillation learns from.

    Raises ModelError if it cannot be loaded, or has another tokenizer.
    """
    try:
        cfg = teacher_config(name)
        if not has_same_tokens(load_tokenizer(cfg), tokenizer):
            raise ModelError(f"model.repo_name={name} has another tokenizer than the model: give one with the same")
        teacher = load_policy(cfg, tokenizer, **how)
    except ModelError as error:
        raise ModelError(str(error).replace("model.repo_name=", "task.teacher=")) from error
    teacher.exclude_undefined(tokenizer)
    return teacher.eval().requires_grad_(False)


def teacher_config(name: str) -> ModelConfig:
    """Return the configuration of the model that a distillation learns from."""
    return AutoModelConfig(repo_name=name, disable_dropout=True)


def _make_critic(
    run: Run, tokenizer: PreTrainedTokenizerBase, policy: Policy, rewards: Mapping[str, TermModel]
) -> RewardModel | AdapterValueModel:
    """Make the critic: the policy itself if asked, else of the reward model if asked and possible, else a new head.

    With adapters, it is one more adapter on the policy's base.
    """
    cfg, task = run.cfg, run.cfg.task
    assert isinstance(task, PPOConfig)
    if task.share_trunk:
        return _share_trunk(policy, tokenizer)
    reward = None
    if task.init_critic_with_reward and rewards:
        first, *others = rewards
        if others or not has_same_tokens(load_reward_tokenizer(cfg, first), tokenizer):
            why = "there are several reward models" if others else "the reward model has another tokenizer"
            run.say(f"the critic begins as the policy with a new head: {why}")
        else:
            reward = rewards[first].model
    if not isinstance(policy.model, PeftModel):
        if isinstance(reward, RewardModel):
            critic = copy.deepcopy(reward).train()
            critic.requires_grad_(True)
            return critic
        return reward_model_of(copy.deepcopy(policy), cfg.model, tokenizer)
    model, base = policy.model, policy.causal_lm()
    head = cast(nn.Linear, getattr(scalar_model(base, tokenizer), HEAD))
    if isinstance(reward, AdapterValueModel):
        add_second_adapter(model, CRITIC, cast(LoraConfig, model.peft_config[REWARD]), trains=True)
        copy_adapter(model, REWARD, CRITIC)
        head.load_state_dict(reward.head.state_dict())
        return AdapterValueModel(policy, CRITIC, head, reward.offset)
    assert cfg.model.lora_cfg is not None
    add_second_adapter(model, CRITIC, lora_config(base, cfg.model.lora_cfg, language_head=False), trains=True)
    return AdapterValueModel(policy, CRITIC, head)


def _share_trunk(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> AdapterValueModel:
    """Give the policy a value head; the critic is a view of the same weights."""
    policy.value_head = cast(nn.Linear, getattr(scalar_model(policy.causal_lm(), tokenizer), HEAD))
    return AdapterValueModel(policy, POLICY if isinstance(policy.model, PeftModel) else None, policy.value_head)


def _load_reward(
    run: Run, tokenizer: PreTrainedTokenizerBase, policy: Policy, term: str, *, longest: int
) -> RewardModel | AdapterValueModel:
    """Load the reward model of a term, on the policy's base if possible."""
    run_dir, folder, cfg = reward_model_source(run.cfg, term)
    if folder is None and isinstance(policy.model, PeftModel) and is_on_base_of(run.cfg, cfg, str(run_dir)):
        final = Path(str(run_dir)) / "final"
        run.say(f"reward model: the final weights of {run_dir}")
        head = nn.Linear(1, 1, bias=False)
        head.weight = nn.Parameter(load_score_adapter(policy.model, final, REWARD, run.say).float())
        run.say("reward, critic and reference share the policy's base")
        return AdapterValueModel(policy, REWARD, head, *read_score_options(final))
    return load_separate_reward_model(run.cfg, tokenizer, term, longest=longest, say=run.say)


def load_reward_tokenizer(cfg: TrainConfig | EvalConfig, term: str = MODEL) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a term's reward model; of a run, the one in its folder."""
    run_dir, folder, model = reward_model_source(cfg, term)
    with reward_folder_errors(term) if folder is not None else nullcontext():
        return load_tokenizer(model if run_dir is None else with_own_tokenizer(model, Path(run_dir)))


def load_separate_reward_model(
    cfg: TrainConfig | EvalConfig, tokenizer: PreTrainedTokenizerBase, term: str = MODEL, *, longest: int, say: Notify
) -> RewardModel:
    """Load the reward model of a term on a base of its own."""
    task = cfg.task
    assert isinstance(task, OnlineTaskConfig | ScoredConfig)
    how = load_options(cfg, longest, say)
    run_dir, folder, model = reward_model_source(cfg, term)
    if folder is not None:
        say(f"reward model: {folder}")
        with reward_folder_errors(term):
            return load_reward_model(model, tokenizer, **how)
    say(f"reward model: the {task.rm_model_name} weights of {run_dir}")
    model = dataclasses.replace(model, disable_dropout=True, gradient_checkpointing=False)
    return load_trained_reward_model(model, Path(str(run_dir)), task.rm_model_name, tokenizer, **how)


@phase("loading the model")
def load_trained(
    trained: Trained, say: Notify, *, longest: int = 1, batching: str = "padded"
) -> tuple[Policy | RewardModel, PreTrainedTokenizerBase]:
    """Load the policy or reward model of a run, a folder or a configuration onto the host, and its tokenizer.

    The model has separate adapters if it has some.
    """
    tokenizer = load_tokenizer(trained.with_tokenizer())
    load: Any = load_trained_reward_model if trained.trains == REWARD_MODEL else load_policy_from_run
    of = (trained.model, trained.run_dir, trained.weights, tokenizer)
    return load(*of, longest=longest, batching=batching, say=say), tokenizer


def load_policy_from_run(
    cfg: ModelConfig,
    run_dir: Path | None,
    weights: str,
    tokenizer: PreTrainedTokenizerBase,
    **how: Unpack[LoadOptions],
) -> Policy:
    """Load the policy that a run trained, adapters kept separate.

    `cfg` is the run's model; without a run it is loaded as it is. `weights` is "final", "best", "last" or "step-<n>".
    Raises ConfigError if the run has no `final/` yet; CheckpointError if it has no such checkpoint.
    """
    whole = whole_model(cfg, run_dir, weights)
    if whole is not None:
        return load_policy(whole, tokenizer, **how)
    assert run_dir is not None
    checkpoint = None if weights == "final" else find_checkpoint(run_dir, weights, how["say"])
    if checkpoint is not None:  # its weights are copied over those of the files
        how["in_files"] = False
    task = saved_group(str(run_dir), "task")
    policy = load_initial_policy(cfg, *initial_run(task), tokenizer, **how)
    if checkpoint is None:
        policy.model = load_lora(policy.causal_lm(), run_dir / "final", how["say"])
        return policy
    policy = with_adapters(policy, cfg)
    part = task.policy_part() if isinstance(task, TrainTaskConfig) else ""
    load_weights(checkpoint, policy.model, f"{part}model.")
    return policy


def load_initial_policy(
    cfg: ModelConfig,
    run_dir: str | None,
    weights: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    new_head: bool = False,
    **how: Unpack[LoadOptions],
) -> Policy:
    """Load the model that training starts from, with a run's adapters merged.

    Training starts from `cfg` as it is, or from these weights of a run. Quantisation comes after the merge. With
    `new_head`, the task replaces the language head, which the files need not have.
    Raises ConfigError if the run has another tokenizer; SheepError if the weights cannot be loaded.
    """
    whole = dataclasses.replace(cfg, finetune_mode="ALL", freeze_transformer=cfg.freeze_transformer and not new_head)
    if cfg.finetune_mode == "LORA" and not new_head:
        whole.adapter = None  # it trains, next to the weights
    if run_dir is None:
        policy = load_policy(whole, tokenizer, **how, new_head=new_head)
    else:
        of_run = model_of_start(cfg, run_dir, tokenizer)
        how["say"](f"starting from the {weights} weights of {run_dir}")
        kept = {name: getattr(cfg, name) for name in _OWN_OPTIONS}
        of_run = dataclasses.replace(of_run, **kept, freeze_transformer=False, random_init=False)
        if whole_model(of_run, Path(run_dir), weights) is None:  # weights change before they are sharded
            how["in_files"] = False
        policy = load_policy_from_run(of_run, Path(run_dir), weights, tokenizer, **how)
    if isinstance(policy.model, PeftModel):
        policy.model = merge_lora(policy.model).model
    quantize(policy.causal_lm(), cfg.quantization)
    return policy


def with_adapters(policy: Policy, cfg: ModelConfig) -> Policy:
    """The policy with adapters that train if the configuration asks for them: new ones or those of `model.adapter`.

    Without adapters, the layers of `model.frozen_layers` do not train.
    """
    if cfg.finetune_mode != "LORA" or cfg.lora_cfg is None:
        freeze_layers(policy.causal_lm(), cfg.frozen_layers)
    else:
        policy.model = with_adapter(policy.causal_lm(), cfg)
    return policy


def load_trained_reward_model(
    cfg: ModelConfig,
    run_dir: Path | None,
    weights: str,
    tokenizer: PreTrainedTokenizerBase,
    **how: Unpack[LoadOptions],
) -> RewardModel:
    """Load the reward model that a run trained, with its offset; results and arguments as of `load_policy_from_run`."""
    whole = whole_model(cfg, run_dir, weights)
    if whole is not None:
        return load_reward_model(whole, tokenizer, **how)
    assert run_dir is not None
    if weights != "final":
        how["in_files"] = False
    task = saved_group(str(run_dir), "task")
    policy = load_initial_policy(cfg, *initial_run(task), tokenizer, **how, new_head=True)
    adapter = run_dir / "final" if weights == "final" else None
    model = reward_model_of(policy, cfg, tokenizer, adapter=adapter, say=how["say"])
    if adapter is None:
        load_weights(find_checkpoint(run_dir, weights, how["say"]), model)
    return model
