"""Responses of a model to prompts: the same for any batch size and any number of ranks.

Sampled tokens are drawn with numbers that belong to the prompt (`rollout/sampler.py`). Beam search is that of
transformers and draws nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sheeprlhf.agent.batches import Batches
from sheeprlhf.agent.policy import Policy
from sheeprlhf.data.example import Batch, Example
from sheeprlhf.data.prepare import PreparedData
from sheeprlhf.data.sampler import cut_micro_batches
from sheeprlhf.engine.fabric import place
from sheeprlhf.reward.call import Texts
from sheeprlhf.rollout.engines import StopStrings, generate_ids
from sheeprlhf.rollout.rollout import (
    Rollout,
    decode_rollout,
    predict_targets,
    sample_on_all_ranks,
    sampling_uniforms,
    to_rollout,
)
from sheeprlhf.rollout.sampler import Sampled, sample_responses
from sheeprlhf.structure.run import EvalConfig
from sheeprlhf.task.eval.load import Evaluation, evaluated_files, longest_with_response
from sheeprlhf.utils.end_tokens import end_token_ids

NUMBER = (1 << 32) - 2  # of an evaluation's draws: no rollout and no validation of training samples with these


class EvalPolicy(NamedTuple):
    """A policy that answers, on its device.

    Attributes:
        policy: the model.
        tokenizer: its tokenizer.
        packed: its batches are packed.
    """

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    packed: bool


class Answers(NamedTuple):
    """K responses to each of P prompts, the same on all ranks.

    Attributes:
        rollout: their tokens, with the sampler's log-probabilities ("sampled"); its scores are 0.
        texts: the P * K texts, each with its prompt and the dataset's own response ("reference").
        tokenizer: of the tokens.
    """

    rollout: Rollout
    texts: Texts
    tokenizer: PreTrainedTokenizerBase


def set_up(
    job: Evaluation, loaded: tuple[Policy, bool], tokenizer: PreTrainedTokenizerBase | None = None
) -> EvalPolicy:
    """A loaded policy on the device, in the precision asked for; by default with the evaluated model's tokenizer."""
    policy, packed = loaded
    tokenizer = tokenizer or job.tokenizer
    policy.exclude_undefined(tokenizer)
    place(job.fabric, policy)
    return EvalPolicy(policy, tokenizer, packed)


def answer_split(job: Evaluation, data: PreparedData, num_rows: int | None) -> tuple[list[Example], Texts]:
    """All ranks: the rows that are evaluated, and the evaluated policy's answer to each, as `cfg.generation` says."""
    rows = job.rows(data, num_rows)
    longest = longest_with_response(job.cfg, evaluated_files(job.cfg), rows)
    return rows, answer(job, set_up(job, job.load_policy(longest)), rows, samples=False).texts


def answer(
    job: Evaluation, writer: EvalPolicy, prompts: Sequence[Example], *, group: int = 1, samples: bool
) -> Answers:
    """All ranks: responses to every prompt; each rank writes its share, in batches of prompts of about one length.

    Args:
        job: says how to write, and the seed.
        writer: the policy that answers.
        prompts: rows; their prompts are read, and their first response as the reference.
        group: responses to each.
        samples: sample with all probabilities, as a rollout; else as `generation.do_sample` says.
    """
    cfg = job.cfg
    uniforms = sampling_uniforms(cfg.seed, NUMBER, (len(prompts), group, cfg.generation.max_new_tokens))
    stop = StopStrings(cfg.generation.stop_strings, writer.tokenizer)

    def sample(mine: list[int], progress: Callable[[int], object]) -> list[Sampled]:
        part = [prompts[row] for row in mine]
        if cfg.generation.num_beams > 1 and not samples:
            return _by_beams(cfg, writer, part, stop, progress)
        return _by_sampler(cfg, writer, part, uniforms[mine], stop, progress, samples=samples)

    sampled = sample_on_all_ranks(job.fabric, writer.policy, sample, len(prompts), group, "answering")
    rollout = to_rollout(prompts, sampled)
    return Answers(rollout, decode_rollout(rollout, prompts, writer.tokenizer, stop), writer.tokenizer)


def _by_sampler(
    cfg: EvalConfig,
    writer: EvalPolicy,
    prompts: Sequence[Example],
    uniforms: np.ndarray,
    stop: StopStrings,
    progress: Callable[[int], object],
    *,
    samples: bool,
) -> list[Sampled]:
    """Sampled, or the likeliest token at each place."""
    how = cfg.generation
    narrowing: dict[str, Any] = {}
    if not samples:
        narrowing = {"top_k": how.top_k, "top_p": how.top_p} if how.do_sample else {"top_k": 1}
    return sample_responses(
        writer.policy.causal_lm(),
        [row.prompt_ids for row in prompts],
        uniforms,
        temperature=how.temperature if samples or how.do_sample else 1.0,
        end_ids=end_token_ids(writer.tokenizer),
        token_budget=cfg.task.token_budget,
        stop=stop if stop else None,
        progress=progress,
        packed=writer.packed,
        undefined_U=writer.policy.undefined_U,
        max_prompts=max(1, cfg.task.mini_batch_size // uniforms.shape[1]),
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
    """All ranks: (N,) log-probability of each token by a policy, nats, at the temperature that sampled them.

    The policy's tokenizer is that of the answers; `label` is shown by the progress bar.
    """

    def call(batch: Batch) -> Tensor:
        return policy.policy(batch, temperature=job.cfg.generation.temperature).target_N

    batches = Batches(job.fabric, job.cfg.task, packed=policy.packed, targets="response")
    return predict_targets(job.fabric, policy.policy, call, batches, answers.rollout, label)


def kl_of_responses(answers: Answers, logprobs_N: Tensor, start_N: Tensor) -> np.ndarray:
    """(P * K,) float64, nats: log-probability of each response by the policy that sampled it, less that by its start.

    Their mean estimates the KL divergence of the policy from its start without bias; one of them may be negative. The
    log-probabilities are of each token.
    """
    apart_N = (logprobs_N.double() - start_N.double()).numpy()
    starts = np.cumsum([0, *answers.rollout.response_lengths[:-1]])
    return np.add.reduceat(apart_N, starts)
