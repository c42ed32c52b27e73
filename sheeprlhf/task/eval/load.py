"""Inputs of an evaluation, and responses of a model to prompts.

Inputs: rows of a split, and the weights of a run, of its initial model, or of a model. Responses are the same for any
batch size and any number of ranks: sampled tokens are drawn with numbers that belong to the prompt
(`rollout/sampler.py`). Beam search is that of transformers and draws nothing.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sheeprlhf.agent.batches import Batches
from sheeprlhf.agent.policy import Policy
from sheeprlhf.config.model_lookup import with_own_tokenizer
from sheeprlhf.config.run_lookup import is_same_model, read_run_config, saved_group
from sheeprlhf.data.example import Batch, Example
from sheeprlhf.data.prepare import PreparedData, prepare_data
from sheeprlhf.data.sampler import cut_micro_batches
from sheeprlhf.data.store import TokenizedSplit
from sheeprlhf.engine.shard import place
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.model.folder.weights import num_positions
from sheeprlhf.reward.score import Texts
from sheeprlhf.rollout.engines import StopStrings, generate_ids
from sheeprlhf.rollout.episodes import EpisodeSampler
from sheeprlhf.rollout.rollout import (
    Rollout,
    decode_rollout,
    play_on_all_ranks,
    predict_targets,
    sample_on_all_ranks,
    sampling_uniforms,
    to_rollout,
)
from sheeprlhf.rollout.sampler import Sampled, sample_responses
from sheeprlhf.rollout.sources import Episode
from sheeprlhf.security.redaction import plain_text, redact_text
from sheeprlhf.structure.data import KeptColumns
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.structure.rollout import LocalRolloutConfig, environment_of
from sheeprlhf.structure.run import EvalConfig
from sheeprlhf.task.models import LoadOptions, load_initial_policy, load_options, load_policy_from_run, prepare_prompts
from sheeprlhf.utils.end_tokens import end_token_ids
from sheeprlhf.utils.errors import ConfigError, DataError
from sheeprlhf.utils.lightning import Fabric


class Start(NamedTuple):
    """Initial model of a run's training: these weights of another run, or without one the model as it was."""

    run_dir: str | None
    weights: str
    name: str


class Evaluation:
    """An evaluation task: where it runs, its configuration, its inputs, and the tokenizer of the evaluated model."""

    def __init__(self, fabric: Fabric, cfg: EvalConfig) -> None:
        assert cfg.model is not None and cfg.data is not None  # the command line composes both
        self.fabric, self.cfg, self.model, self.data = fabric, cfg, cfg.model, cfg.data
        self.tokenizer = load_evaluated_tokenizer(cfg)
        self._episodes: dict[int, EpisodeSampler] = {}  # by the identity of the tokenizer
        self.episodes(self.tokenizer)  # reports a wrong environment before a model loads

    def episodes(self, tokenizer: PreTrainedTokenizerBase) -> EpisodeSampler | None:
        """Return what samples responses in several turns; None without `rollout.environment`."""
        rollout = self.cfg.rollout
        if not isinstance(rollout, LocalRolloutConfig) or rollout.environment is None:
            return None
        if id(tokenizer) not in self._episodes:
            self._episodes[id(tokenizer)] = EpisodeSampler(tokenizer, rollout, self.say)
        return self._episodes[id(tokenizer)]

    def say(self, text: str) -> None:
        """Print a line on rank zero, on standard error: results are on standard output."""
        if self.fabric.is_global_zero:
            print(redact_text(plain_text(text)), file=sys.stderr)

    def prepare(
        self, kind: str, tokenizer: PreTrainedTokenizerBase | None = None, *, columns: tuple[str, ...] = ()
    ) -> PreparedData:
        """Prepare the data with these columns, by default with the evaluated model's tokenizer."""
        how: dict[str, Any] = {"say": self.say, "progress": self.fabric.is_global_zero}
        kept = KeptColumns(columns, every=environment_of(self.cfg) is not None)
        return prepare_data(self.data, tokenizer or self.tokenizer, kind=kind, kept=kept, **how)

    def prepare_scored(self, tokenizer: PreTrainedTokenizerBase | None = None) -> PreparedData:
        """Prepare prompts with the columns that the reward reads."""
        progress = self.fabric.is_global_zero
        return prepare_prompts(self.cfg, tokenizer or self.tokenizer, say=self.say, progress=progress)

    def split(self, data: PreparedData) -> TokenizedSplit:
        """Return the split that `task.data_split` names. Raises DataError if it has no rows."""
        name = self.cfg.task.data_split
        split = data.splits.get(name)
        if split is None or len(split) == 0:
            there = ", ".join(name for name, rows in data.splits.items() if len(rows))
            raise DataError(f"task.data_split={name}: the dataset has no such rows; it has {there}")
        return split

    def rows(self, data: PreparedData, num_rows: int | None) -> list[Example]:
        """Return the first rows of that split, or all."""
        split = self.split(data)
        return split.examples(range(min(len(split), num_rows or len(split))))

    def rows_as(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example]) -> list[Example]:
        """Return the same rows by another tokenizer. Raises DataError if it has left one of them out."""
        split = self.split(self.prepare_scored(tokenizer))
        found = {row.row_id: row for row in split.examples(range(len(split)))}
        lost = [row.row_id for row in rows if row.row_id not in found]
        if lost:
            raise DataError(
                f"row {lost[0]} of task.data_split={self.cfg.task.data_split} is there for one of the two tokenizers "
                "alone: give data.on_overflow=truncate_prompt data.minimum_response_length=1"
            )
        return [found[row.row_id] for row in rows]

    def options(self, longest: int) -> LoadOptions:
        """Options of the functions that load a model, for sequences of up to `longest` tokens."""
        return load_options(self.cfg, longest, self.say)

    def load_policy(self, longest: int, weights: str | None = None) -> Policy:
        """Load the evaluated policy, by default its `task.model_name` weights."""
        run_dir = None if self.cfg.experiment_dir is None else Path(self.cfg.experiment_dir)
        weights = self.cfg.task.model_name if weights is None else weights
        return load_policy_from_run(self.model, run_dir, weights, self.tokenizer, **self.options(longest))

    def load_start(self, start: "Start", longest: int) -> Policy:
        """Load the policy that its training started from."""
        whole = dataclasses.replace(self.model, finetune_mode="ALL")  # with model.adapter merged, if there is one
        return load_initial_policy(whole, start.run_dir, start.weights, self.tokenizer, **self.options(longest))


def longest_with_response(cfg: EvalConfig, model: ModelConfig, rows: Sequence[Example]) -> int:
    """Tokens of the longest prompt and response. Raises ConfigError if the model has fewer positions."""
    prompt, new = max(len(row.prompt_ids) for row in rows), cfg.generation.max_new_tokens
    positions = num_positions(model)
    if positions is not None and prompt + new > positions:
        raise ConfigError(
            f"generation.max_new_tokens={new}: the longest prompt has {prompt} tokens, the model {positions} "
            f"positions; give generation.max_new_tokens={max(1, positions - prompt)}"
        )
    return prompt + new


def evaluated_files(cfg: EvalConfig) -> ModelConfig:
    """The model whose files hold tokenizer and configuration: the run's own where it can be, or as given."""
    assert cfg.model is not None
    if cfg.experiment_dir is None:
        return cfg.model
    saved = model_of_run(cfg.experiment_dir, "experiment_dir")
    if not is_same_model(saved.repo_name, cfg.model.repo_name):
        return cfg.model
    files = with_own_tokenizer(cfg.model, Path(cfg.experiment_dir))
    given = cfg.model.chat_template != saved.chat_template
    return dataclasses.replace(files, chat_template=cfg.model.chat_template) if given else files


def load_evaluated_tokenizer(cfg: EvalConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the evaluated run has left, with its chat template, or that of the model."""
    return load_tokenizer(evaluated_files(cfg))


def task_options(cfg: EvalConfig) -> dict[str, Any]:
    """The options of the task that the evaluated run had, as its file has them; none without a run."""
    task = None if cfg.experiment_dir is None else read_run_config(cfg.experiment_dir).get("task")
    return task if isinstance(task, dict) else {}


def start_of(cfg: EvalConfig) -> Start | None:
    """Initial model of the evaluated run; None for a model without a run, and for random weights."""
    assert cfg.model is not None
    if cfg.experiment_dir is None or cfg.model.random_init:
        return None
    task = task_options(cfg)
    run_dir, weights = task.get("sft_experiment_dir"), str(task.get("sft_model_name", "final"))
    run_dir = run_dir if isinstance(run_dir, str) else None
    name = str(cfg.model.repo_name) if run_dir is None else f"the {weights} weights of {run_dir}"
    return Start(run_dir, weights, name)


def model_of_run(run_dir: str, key: str) -> ModelConfig:
    """The model of a run that an option names."""
    model = saved_group(run_dir, "model", key=key)
    assert isinstance(model, ModelConfig)
    return model


NUMBER = (1 << 32) - 2  # of an evaluation's draws: no rollout and no validation of training samples with these


class EvalPolicy(NamedTuple):
    """A policy that answers, on its device."""

    policy: Policy
    tokenizer: PreTrainedTokenizerBase


class Answers(NamedTuple):
    """K responses to each of P prompts, the same on all ranks."""

    rollout: Rollout  # their tokens, with the sampler's log-probabilities ("sampled"); its scores are 0
    texts: Texts  # the P * K texts, each with its prompt and the dataset's own response ("reference")
    tokenizer: PreTrainedTokenizerBase  # of the tokens
    episodes: Sequence[Episode] = ()  # the P * K responses with `rollout.environment`


def set_up(job: Evaluation, policy: Policy, tokenizer: PreTrainedTokenizerBase | None = None) -> EvalPolicy:
    """A loaded policy on the device, in the precision asked for; by default with the evaluated model's tokenizer."""
    tokenizer = tokenizer or job.tokenizer
    policy.exclude_undefined(tokenizer)
    place(job.fabric, policy)
    return EvalPolicy(policy, tokenizer)


def answer_split(job: Evaluation, data: PreparedData, num_rows: int | None) -> tuple[list[Example], Answers]:
    """All ranks: the rows that are evaluated, and the evaluated policy's answer to each, as `cfg.generation` says."""
    rows = job.rows(data, num_rows)
    longest = longest_with_response(job.cfg, evaluated_files(job.cfg), rows)
    return rows, answer(job, set_up(job, job.load_policy(longest)), rows, samples=False)


def answer(
    job: Evaluation, writer: EvalPolicy, prompts: Sequence[Example], *, group: int = 1, samples: bool
) -> Answers:
    """All ranks: `group` responses to every prompt; each rank writes its share, in batches of about one length."""
    cfg = job.cfg
    uniforms = sampling_uniforms(cfg.seed, NUMBER, (len(prompts), group, cfg.generation.max_new_tokens))
    stop, played = StopStrings(cfg.generation.stop_strings, writer.tokenizer), list[Episode]()
    engine = _engine(cfg, writer, stop, group, samples=samples)

    def sample(mine: list[int], progress: Callable[[int], object]) -> list[Sampled]:
        part = [prompts[row] for row in mine]
        if cfg.generation.num_beams > 1 and not samples:
            return _by_beams(cfg, writer, part, stop, progress)
        return engine([row.prompt_ids for row in part], uniforms[mine], progress=progress)

    if episodes := job.episodes(writer.tokenizer):
        rollout, played = play_on_all_ranks(job.fabric, writer.policy, episodes, engine, prompts, uniforms)
    else:
        sampled = sample_on_all_ranks(job.fabric, writer.policy, sample, len(prompts), group, "answering")
        rollout = to_rollout(prompts, sampled)
    texts = decode_rollout(rollout, prompts, writer.tokenizer, stop, played)
    return Answers(rollout, texts, writer.tokenizer, played)


def _engine(
    cfg: EvalConfig, writer: EvalPolicy, stop: StopStrings, group: int, *, samples: bool
) -> Callable[..., list[Sampled]]:
    """The sampler, or that of the likeliest token at each place; called with prompts and random numbers."""
    how = cfg.generation
    narrowing: dict[str, Any] = {}
    if not samples:
        narrowing = {"top_k": how.top_k, "top_p": how.top_p} if how.do_sample else {"top_k": 1}
    return partial(
        sample_responses,
        writer.policy.causal_lm(),
        temperature=how.temperature if samples or how.do_sample else 1.0,
        end_ids=end_token_ids(writer.tokenizer),
        token_budget=cfg.task.token_budget,
        stop=stop if stop else None,
        packed=writer.policy.packed,
        undefined_U=writer.policy.undefined_U,
        max_prompts=max(1, cfg.task.mini_batch_size // group),
        **narrowing,
    )


def _by_beams(
    cfg: EvalConfig,
    writer: EvalPolicy,
    prompts: Sequence[Example],
    stop: StopStrings,
    progress: Callable[[int], object],
) -> list[Sampled]:
    """Responses of transformers' beam search."""
    lengths = np.array([len(row.prompt_ids) for row in prompts], dtype=np.int64)
    parts = cut_micro_batches(
        np.arange(len(prompts)),
        (lengths + cfg.generation.max_new_tokens) * cfg.generation.num_beams,
        max_rows=cfg.task.mini_batch_size,
        token_budget=cfg.task.token_budget,
        rank=0,
        world_size=1,
    )
    end_ids = end_token_ids(writer.tokenizer)
    found: dict[int, Sampled] = {}
    for part in parts:
        ids = [prompts[row].prompt_ids for row in part]
        written = generate_ids(writer.policy.causal_lm(), writer.tokenizer, ids, cfg.generation, stop)
        for row, response in zip(part, written, strict=True):
            ended = response[-1] in end_ids or (bool(stop) and stop(response))
            found[row] = Sampled((response.astype(np.int32),), (np.zeros(len(response), np.float32),), (bool(ended),))
        progress(len(part))
    return [found[row] for row in range(len(prompts))]


@torch.no_grad()
def logprobs_of(job: Evaluation, policy: EvalPolicy, answers: Answers, label: str) -> Tensor:
    """All ranks: (N,) log-probability of each token by a policy of the same tokenizer, nats, as sampled."""

    def call(batch: Batch) -> Tensor:
        return policy.policy(batch, temperature=job.cfg.generation.temperature).target_N

    batches = Batches(job.fabric, job.cfg.task, packed=policy.policy.packed, targets="response")
    return predict_targets(job.fabric, policy.policy, call, batches, answers.rollout, label)


def kl_of_responses(answers: Answers, logprobs_N: Tensor, start_N: Tensor) -> np.ndarray:
    """(P * K,) float64, nats: unbiased estimates of the KL from the start, one of each response, from its tokens."""
    apart_N = (logprobs_N.double() - start_N.double()).numpy()
    starts = np.cumsum([0, *answers.rollout.response_lengths[:-1]])
    return np.add.reduceat(apart_N, starts)
