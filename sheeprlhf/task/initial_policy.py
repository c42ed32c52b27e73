"""The model that a task starts from or evaluates: the configured one, or what an earlier run made of it."""

import dataclasses
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from sheeprlhf.agent.policy import Policy, load_policy
from sheeprlhf.agent.reward import RewardModel, load_reward_model, reward_model_of
from sheeprlhf.config.model_lookup import POLICY, Trained, with_own_tokenizer
from sheeprlhf.config.run_lookup import saved_group
from sheeprlhf.config.shell import shell_word
from sheeprlhf.engine.checkpoint import find_checkpoint, load_weights
from sheeprlhf.model.load import load_tokenizer
from sheeprlhf.model.lora import add_lora, load_lora, merge_lora
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.structure.task import RMConfig, TrainTaskConfig
from sheeprlhf.utils.errors import ConfigError, Notify
from sheeprlhf.utils.memory import phase


@phase("loading the model")
def load_trained(
    trained: Trained, say: Notify, *, longest: int = 1, batching: str = "padded"
) -> tuple[Policy | RewardModel, PreTrainedTokenizerBase, bool]:
    """The policy or reward model of a run, a folder or a configuration, on the host.

    Args:
        trained: names it.
        say: prints a line for the user.
        longest: tokens of the longest sequence that it will see.
        batching: as in `load_policy`.

    Returns:
        The model, with separate adapters if it has some; its tokenizer; and whether its batches are packed.

    Raises:
        SheepError: it cannot be loaded.
    """
    tokenizer = load_tokenizer(trained.with_tokenizer())
    load: Any = load_policy_from_run if trained.trains == POLICY else load_trained_reward_model
    of = (trained.model, trained.run_dir, trained.weights, tokenizer)
    model, packed = load(*of, longest=longest, batching=batching, say=say)
    return model, tokenizer, packed


def load_policy_from_run(
    cfg: ModelConfig,
    run_dir: Path | None,
    weights: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest: int,
    batching: str,
    say: Notify,
) -> tuple[Policy, bool]:
    """The policy that a run trained, with its adapters beside it if it has some, and whether its batches are packed.

    Args:
        cfg: the run's model.
        run_dir: the run; None loads `cfg` as it is.
        weights: "final", "best", "last" or "step-<n>".
        tokenizer: the model's.
        longest: tokens of the longest sequence that it will see.
        batching: as in `load_policy`.
        say: prints a line for the user.

    Raises:
        ConfigError: the run has no `final/` yet.
        CheckpointError: it has no such checkpoint.
    """
    of: dict[str, Any] = {"longest": longest, "batching": batching, "say": say}
    whole = _whole_model(cfg, run_dir, weights)
    if whole is not None:
        return load_policy(whole, tokenizer, **of)
    assert run_dir is not None
    checkpoint = None if weights == "final" else find_checkpoint(run_dir, weights, say)
    task = saved_group(str(run_dir), "task")
    start = (getattr(task, "sft_experiment_dir", None), getattr(task, "sft_model_name", "final"))
    policy, packed = load_initial_policy(cfg, *start, tokenizer, **of)
    if checkpoint is None:
        return Policy(load_lora(policy.causal_lm(), run_dir / "final", say)), packed
    policy = with_adapters(policy, cfg)
    part = task.policy_part() if isinstance(task, TrainTaskConfig) else ""
    load_weights(checkpoint, policy.model, f"{part}model.")
    return policy, packed


def load_initial_policy(
    cfg: ModelConfig,
    run_dir: str | None,
    weights: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest: int,
    batching: str,
    say: Notify,
    new_head: bool = False,
) -> tuple[Policy, bool]:
    """The whole model that training starts from, a run's adapters merged into it, and whether its batches are packed.

    Args:
        cfg: the task's model; of a run with adapters, the model that they sit in.
        run_dir: the fine-tuning to start from; None starts from `cfg` as it is.
        weights: which of the run's.
        tokenizer: the model's.
        longest: tokens of the longest sequence that it will see.
        batching: as in `load_policy`.
        say: prints a line for the user.
        new_head: the task replaces the language head, which `cfg`'s files need not have.

    Raises:
        ConfigError: the run has another tokenizer.
        SheepError: the weights cannot be loaded.
    """
    whole = dataclasses.replace(cfg, finetune_mode="ALL", freeze_transformer=cfg.freeze_transformer and not new_head)
    if run_dir is None:
        return load_policy(whole, tokenizer, longest=longest, batching=batching, say=say, new_head=new_head)
    of_run = model_of_start(cfg, run_dir, tokenizer)
    say(f"starting from the {weights} weights of {run_dir}")
    kept = {name: getattr(cfg, name) for name in ("dtype", "disable_dropout", "gradient_checkpointing", "library_cfg")}
    of_run = dataclasses.replace(of_run, **kept, freeze_transformer=False, random_init=False)
    policy, packed = load_policy_from_run(
        of_run, Path(run_dir), weights, tokenizer, longest=longest, batching=batching, say=say
    )
    if isinstance(policy.model, PeftModel):
        policy = Policy(merge_lora(policy.model).model)
    return policy, packed


def model_of_start(cfg: ModelConfig, run_dir: str, tokenizer: PreTrainedTokenizerBase) -> ModelConfig:
    """The model of the run that a training starts from; arguments as of `load_initial_policy`.

    Raises:
        ConfigError: the run has another tokenizer.
    """
    of_run = saved_group(run_dir, "model")
    assert isinstance(of_run, ModelConfig)
    own = with_own_tokenizer(of_run, Path(run_dir))
    theirs = load_tokenizer(own if own.resize_embeddings else dataclasses.replace(own, chat_template=None))
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"task.sft_experiment_dir={run_dir} was trained with the tokenizer of {of_run.repo_name}, which is not "
            f"that of {cfg.repo_name}: give model={of_run.config_name} model.repo_name={of_run.repo_name}"
        )
    return of_run


def with_adapters(policy: Policy, cfg: ModelConfig) -> Policy:
    """The policy with new adapters on its model if the configuration asks for them."""
    if cfg.finetune_mode != "LORA" or cfg.lora_cfg is None:
        return policy
    return Policy(add_lora(policy.causal_lm(), cfg.lora_cfg))


def _whole_model(cfg: ModelConfig, run_dir: Path | None, weights: str) -> ModelConfig | None:
    """The model that `cfg` or a run's `final/` holds whole; None for adapters, or for weights of a checkpoint.

    Raises:
        ConfigError: the run has no `final/` yet.
    """
    if run_dir is None:
        return cfg
    final = run_dir / "final"
    if weights != "final" or (final / "adapter_config.json").is_file():
        return None
    if not final.is_dir():
        raise ConfigError(
            f"{run_dir}: this run has no final/ yet; finish it with {shell_word('resume_from', str(run_dir))}"
        )
    whole = dataclasses.replace(cfg, repo_name=str(final), finetune_mode="ALL", random_init=False)
    whole.chat_template = None  # the tokenizer in the folder has it
    return whole


def load_trained_reward_model(
    cfg: ModelConfig,
    run_dir: Path | None,
    weights: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest: int,
    batching: str,
    say: Notify,
) -> tuple[RewardModel, bool]:
    """The reward model that a run trained, its offset included, and whether its batches are packed.

    Args:
        cfg: the run's model.
        run_dir: the run; None loads the folder that `cfg` names.
        weights: "final", "best", "last" or "step-<n>".
        tokenizer: the model's.
        longest: tokens of the longest sequence that it will see.
        batching: as in `load_policy`.
        say: prints a line for the user.

    Raises:
        SheepError: it cannot be loaded.
    """
    whole = _whole_model(cfg, run_dir, weights)
    if whole is not None:
        return load_reward_model(whole, tokenizer, longest=longest, batching=batching, say=say)
    assert run_dir is not None
    task = saved_group(str(run_dir), "task")
    assert isinstance(task, RMConfig)
    start = (task.sft_experiment_dir, task.sft_model_name)
    how: dict[str, Any] = {"longest": longest, "batching": batching, "say": say}
    policy, packed = load_initial_policy(cfg, *start, tokenizer, **how, new_head=True)
    if weights == "final":
        return reward_model_of(policy, cfg, tokenizer, adapter=run_dir / "final", say=say), packed
    model = reward_model_of(policy, cfg, tokenizer)
    load_weights(find_checkpoint(run_dir, weights, say), model)
    return model, packed
