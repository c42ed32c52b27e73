"""Parts of custom training loops: models, tokenizers, data, batches and samples. See `examples/`.

A model is named like the choices of `model=` ("tiny", "opt"), by a hub id or a folder, or by a run directory ("newest":
that of the newest finished run).
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from sheeprlhf.agent.policy import Policy
from sheeprlhf.agent.reward import RewardModel
from sheeprlhf.api.jobs import as_words, compose
from sheeprlhf.config.model_lookup import POLICY, REWARD_MODEL, Trained, find_trained
from sheeprlhf.config.option_checks import did_you_mean
from sheeprlhf.config.registry import choices
from sheeprlhf.config.run_lookup import is_newest
from sheeprlhf.data import prepare
from sheeprlhf.data.example import Batch, Example, collate_packed, collate_padded
from sheeprlhf.data.prepare import PreparedData
from sheeprlhf.data.tokenize import SpecialIds, encode
from sheeprlhf.model.folder import load, weights
from sheeprlhf.rollout.sampler import sample_responses
from sheeprlhf.security.redaction import plain_text, redact_text
from sheeprlhf.structure.run import InspectConfig
from sheeprlhf.task.models import load_trained
from sheeprlhf.utils.end_tokens import end_token_ids
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.home import expand_home
from sheeprlhf.utils.lightning import move_data_to_device
from sheeprlhf.utils.vocabulary import ResponseDecoder

_TASKS = {  # a task that reads each kind of rows
    "sft": "sft",
    "preference": "dpo",
    "unpaired": "kto",
    "rewarded": "ilql",
    "stepwise": "prm",
    "prompts": "grpo",
}


class Samples(NamedTuple):
    """Responses sampled after some prompts."""

    examples: list[Example]  # the prompts with their K sampled responses, for `collate`
    texts: list[list[str]]  # K texts for each prompt, without special tokens
    logprobs_N: Tensor  # (N,) log-probabilities of all responses' tokens, nats, in the order of a batch of all examples


def load_tokenizer(model: str = "tiny", **options: Any) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; `options` are of the group `model`. Raises SheepError if it cannot be loaded."""
    return load.load_tokenizer(_trained(None, model, options).with_tokenizer())


def load_policy(model: str = "tiny", *, max_length: int | None = None, **options: Any) -> Policy:
    """Load a language model whose forward pass gives the log-probabilities of a batch's targets.

    Ids that the tokenizer does not define have probability 0, in forward passes as in `sample`.

    Args:
        model: see the module; of a run, its final weights.
        max_length: tokens of the longest sequence that it will see; by default 512, or the model's positions if fewer.
        options: of the group `model`, such as finetune_mode="LORA" or **{"lora_cfg.rank": 8}; a run has its own.

    Raises:
        SheepError: it cannot be loaded.
    """
    policy, tokenizer = _load(POLICY, model, max_length, options)
    assert isinstance(policy, Policy)
    policy.exclude_undefined(tokenizer)
    return policy


def load_reward_model(model: str, *, max_length: int | None = None, **options: Any) -> RewardModel:
    """Load a reward model: of a run of `task=rm`, or a sequence classification model with one label.

    It scores the targets of `collate(..., targets="last")`.

    Args:
        model: a run directory, a folder or a hub id.
        max_length: tokens of the longest sequence that it will see; by default 512, or the model's positions if fewer.
        options: of the group `model`; a run has its own.

    Raises:
        SheepError: it cannot be loaded.
    """
    reward, _ = _load(REWARD_MODEL, model, max_length, options)
    assert isinstance(reward, RewardModel)
    return reward


def prepare_data(
    data: str = "docstrings", tokenizer: PreTrainedTokenizerBase | None = None, *, kind: str = "sft", **options: Any
) -> PreparedData:
    """Tokenise a dataset, or find it in the cache.

    Args:
        data: a choice of `data=`, or a file of rows.
        tokenizer: the model's; that of the embedded model by default.
        kind: "sft", "preference", "unpaired", "rewarded", "stepwise" or "prompts", as in `sheeprlhf.data.prepare`.
        options: of the group `data`, such as max_length=256.

    Returns:
        Its splits: `splits["train"].examples(range(8))` are the first rows.

    Raises:
        SheepError: the data cannot be read, or no training row is left.
    """
    if kind not in _TASKS:
        listed = f"it may be {', '.join(_TASKS)}"
        raise ConfigError(f"kind={kind} is unknown: {did_you_mean(kind, _TASKS, listed)}")
    words = [f"data={data}"] if data in choices("data") else as_words({"data": "local", "data.train_file": data})
    words += as_words({f"data.{name}": value for name, value in options.items()})
    config = compose("inspect", [f"task={_TASKS[kind]}", *words]).config
    assert isinstance(config, InspectConfig)
    tokenizer = load_tokenizer() if tokenizer is None else tokenizer
    return prepare.prepare_data(config.data, tokenizer, kind=kind, say=_say, progress=sys.stderr.isatty())


def collate(examples: Sequence[Example], model: Policy | RewardModel, *, targets: str = "response") -> Batch:
    """Make one batch of examples, on the model's device: packed end to end, or padded if the model needs it.

    Args:
        examples: at least one, each with a response.
        model: the model that will read the batch.
        targets: "response", "all", "scores", "last" or "steps", as in `sheeprlhf.data.example`.

    Raises:
        DataError: a response is empty.
    """
    if model.packed:
        batch = collate_packed(examples, targets=targets)
    else:
        batch = collate_padded(examples, pad_id=0, targets=targets)
    return cast(Batch, move_data_to_device(batch, next(model.parameters()).device))


def sample(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Example | str],
    *,
    num_responses: int = 1,
    max_new_tokens: int = 48,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    token_budget: int = 4096,
) -> Samples:
    """Sample responses; the result depends on the weights, the prompts and the seed only.

    Args:
        policy: the model.
        tokenizer: its tokenizer.
        prompts: rows of prepared data, or texts.
        num_responses: responses to each prompt.
        max_new_tokens: most tokens of a response.
        temperature: divides the logits; above 0.
        top_k: sample from the k likeliest tokens; 0: all.
        top_p: sample from the fewest likeliest tokens with this probability; 1: all.
        seed: use another one for each call.
        token_budget: most tokens of a forward pass over prompts.
    """
    rows = [_as_example(number, prompt, tokenizer) for number, prompt in enumerate(prompts)]
    uniforms = np.random.default_rng(seed).random((len(rows), num_responses, max_new_tokens))
    with policy.in_use():
        sampled = sample_responses(
            policy.causal_lm(),
            [row.prompt_ids for row in rows],
            uniforms,
            temperature=temperature,
            end_ids=end_token_ids(tokenizer),
            token_budget=token_budget,
            packed=policy.packed,
            top_k=top_k,
            top_p=top_p,
            undefined_U=policy.undefined_U,
        )
    decode = ResponseDecoder(tokenizer)
    examples = [row._replace(responses=one.responses, trained=None) for row, one in zip(rows, sampled, strict=True)]
    texts = [[decode(ids.tolist()) for ids in one.responses] for one in sampled]
    logprobs = np.concatenate([values for one in sampled for values in one.logprobs])
    return Samples(examples, texts, torch.from_numpy(logprobs).to(next(policy.parameters()).device))


def _load(
    kind: str, model: str, max_length: int | None, options: dict[str, Any]
) -> tuple[Policy | RewardModel, PreTrainedTokenizerBase]:
    trained = _trained(kind, model, options)
    longest = max_length or min(512, weights.num_positions(trained.model) or 512)
    with _no_progress_bar():
        return load_trained(trained, _say, longest=longest, batching="auto")


def _trained(kind: str | None, model: str, options: dict[str, Any]) -> Trained:
    """The configuration of a model, and the run that trained it; None takes a model of any kind."""
    if is_newest(model) or (expand_home(model) / "config.yaml").is_file():
        if options:
            raise ConfigError(f"{', '.join(options)}: the run {model} has its own options; leave them out")
        return find_trained(model, wanted=kind)
    named = {"model": model} if model in choices("model") else {"model": "auto", "model.repo_name": model}
    words = as_words(named | {f"model.{name}": value for name, value in options.items()})
    config = compose("inspect", ["task=sft", *words]).config
    assert isinstance(config, InspectConfig)
    return Trained(model, kind or POLICY, config.model)


def _as_example(number: int, prompt: Example | str, tokenizer: PreTrainedTokenizerBase) -> Example:
    if isinstance(prompt, Example):
        return prompt
    ids = [*SpecialIds(tokenizer).bos, *encode(tokenizer, [prompt])[0]]
    return Example(number, np.array(ids, dtype=np.int32), ())


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hide the bars that transformers shows while it loads weights."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _say(text: str) -> None:
    print(redact_text(plain_text(text)), file=sys.stderr)
