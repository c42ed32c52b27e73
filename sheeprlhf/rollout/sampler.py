"""Sample responses for reinforcement learning: token by token, with numbers that the caller drew.

Letters: P prompts, K responses of each, B live rows, V vocabulary, N tokens of a response.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sheeprlhf.model.cache import compact
from sheeprlhf.model.packing import packing_limit
from sheeprlhf.rollout.decoders import PackedRows, PaddedRows, RecomputedRows, unpacked_rows
from sheeprlhf.utils.memory import phase
from sheeprlhf.utils.modes import eval_mode

HELD = 8  # times the tokens of a forward pass may be in the cache: keys and values are small beside activations


class Sampled(NamedTuple):
    """Responses sampled after one prompt.

    Attributes:
        responses: K arrays (R_k,) int32, R_k >= 1, ending in an end token if one came.
        logprobs: K arrays (R_k,) float32, nats, log-probability of each token at the sampling temperature.
        finished: K bools, whether an end token or a stop string ended it; else it was cut at the most new tokens.
    """

    responses: tuple[np.ndarray, ...]
    logprobs: tuple[np.ndarray, ...]
    finished: tuple[bool, ...]


@phase("generation")
@torch.no_grad()
def sample_responses(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    uniforms: np.ndarray,
    *,
    temperature: float,
    end_ids: Sequence[int],
    token_budget: int,
    stop: Callable[[np.ndarray], bool] | None = None,
    progress: Callable[[int], None] = lambda _: None,
    packed: bool = True,
    top_k: int = 0,
    top_p: float = 1.0,
    max_prompts: int | None = None,
    undefined_U: Tensor | None = None,
) -> list[Sampled]:
    """Sample K responses after each prompt, from softmax(logits / temperature), or from its likeliest tokens alone.

    What is sampled is a function of the weights, the prompt and its numbers alone: not of the other prompts, their
    order, the rank, or any random generator. The model's own generation settings are not read.

    Args:
        model: the language model, not wrapped; its training flags are restored.
        prompts: token ids of each prompt, (P_i,), P_i >= 1.
        uniforms: (P, K, most new tokens) float64 in [0, 1): which token is taken at each place.
        temperature: divides the logits; above 0.
        end_ids: tokens each of which ends a response; without any, nothing does.
        token_budget: most tokens of a forward pass over prompts, beyond one prompt's; HELD times as many are held at a
            time.
        stop: called with a response's tokens so far, after each one; True ends it.
        progress: called with the number of responses that have just ended.
        packed: whether the model computes packed rows as it does padded ones; prompts are padded if it does not.
        top_k: as in `draw`; with 1 the numbers do not matter.
        top_p: as in `draw`.
        max_prompts: most prompts that are sampled after at a time.
        undefined_U: (U,) int64, ids that are never sampled.

    Returns:
        One `Sampled` per prompt, in their order.

    Raises:
        ValueError: the temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0; nothing is sampled at 0")
    lengths = [len(prompt) for prompt in prompts]
    num_responses, num_new = uniforms.shape[1:]
    packed = packed and not packing_limit(model, max(lengths, default=0) + num_new)
    results: dict[int, Sampled] = {}
    with eval_mode(model):
        groups = prompt_groups(lengths, num_responses, num_new, token_budget, shared=packed, most=max_prompts)
        undefined_U = None if undefined_U is None else undefined_U.to(model.device)
        draw_next = partial(draw, temperature=temperature, top_k=top_k, top_p=top_p, undefined_U=undefined_U)
        for group in groups:
            group_prompts = [prompts[index] for index in group]
            own = [lengths[index] for index in group]
            rows = PackedRows(model, token_budget) if packed else unpacked_rows(model, own, num_new)
            sampled = _sample_group(rows, group_prompts, uniforms[group], draw_next, end_ids, stop, progress)
            results |= zip(group, sampled, strict=True)
    return [results[index] for index in range(len(prompts))]


def prompt_groups(
    lengths: list[int],
    num_responses: int,
    num_new: int,
    token_budget: int,
    *,
    shared: bool,
    most: int | None = None,
) -> Iterator[list[int]]:
    """Prompts of about one length that are sampled together, shortest first; at least one a group, `most` at most.

    With `shared`, a prompt is held once for all of its responses.
    """
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        held = lengths[index] * (1 if shared else num_responses) + num_responses * num_new
        computed = 0 if shared else (len(group) + 1) * lengths[index]  # packed prompts are computed part by part
        full = computed > token_budget or (len(group) + 1) * held > HELD * token_budget or len(group) == most
        if group and full:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _sample_group(
    rows: PackedRows | PaddedRows | RecomputedRows,
    prompts: Sequence[np.ndarray],
    uniforms_PKN: np.ndarray,
    draw_next: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    end_ids: Sequence[int],
    stop: Callable[[np.ndarray], bool] | None,
    progress: Callable[[int], None],
) -> list[Sampled]:
    """Sample after all prompts of a group at once. Row R = P * K holds a prompt's response; the first B are live."""
    num_responses, num_new = uniforms_PKN.shape[1:]
    logits_BV = rows.prefill(prompts, num_responses, num_new)
    device, num_rows = logits_BV.device, len(logits_BV)
    uniforms_RN = torch.from_numpy(uniforms_PKN.reshape(num_rows, num_new)).to(device)
    logprobs_RN = torch.zeros(num_rows, num_new, device=device)
    ids_RN = np.zeros((num_rows, num_new), dtype=np.int32)
    lengths_R, finished_R = np.zeros(num_rows, dtype=np.int64), np.zeros(num_rows, dtype=bool)
    live_B = np.arange(num_rows)
    for step in range(num_new):
        index_B = torch.from_numpy(live_B).to(device)
        next_B, logprobs_RN[index_B, step] = draw_next(logits_BV, uniforms_RN[index_B, step])
        ids_RN[live_B, step] = next_B.cpu().numpy()
        lengths_R[live_B] = step + 1
        finished_R[live_B] = np.isin(ids_RN[live_B, step], end_ids)
        if stop is not None:
            for row in live_B[~finished_R[live_B]]:
                finished_R[row] = stop(ids_RN[row, : step + 1])
        ended_B = finished_R[live_B] | (step + 1 == num_new)
        if ended_B.any():
            progress(int(ended_B.sum()))
            order = compact(ended_B)
            if not len(order):
                break
            rows.keep(order)
            live_B, next_B = live_B[order], next_B[order]
        logits_BV = rows.step(next_B)
    logprobs = logprobs_RN.cpu().numpy()
    found = [
        (ids_RN[row, :length], logprobs[row, :length], bool(finished_R[row])) for row, length in enumerate(lengths_R)
    ]
    starts = range(0, num_rows, num_responses)
    return [Sampled(*zip(*found[start : start + num_responses], strict=True)) for start in starts]


def draw(
    logits_BV: Tensor,
    uniform_B: Tensor,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    undefined_U: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take a token of softmax(logits / temperature) by the inverse of its distribution function, in token-id order.

    Args:
        logits_BV: (B, V) logits.
        uniform_B: (B,) float64 in [0, 1): token i is taken where the sum of the probabilities up to i first exceeds it.
        temperature: above 0.
        top_k: only the k likeliest tokens can be taken; 0: all.
        top_p: only the fewest likeliest tokens that have this probability together can be taken.
        undefined_U: (U,) ids that cannot be taken.

    Returns:
        (B,) token ids, and (B,) float32 log-probabilities in nats. A token of probability 0 is never taken.
    """
    scaled_BV = logits_BV.float() / temperature
    if undefined_U is not None:
        scaled_BV = scaled_BV.index_fill(-1, undefined_U, -torch.inf)
    logprobs_BV = scaled_BV.log_softmax(dim=-1)
    if top_k or top_p < 1.0:
        logprobs_BV = _likeliest(logprobs_BV, top_k, top_p).log_softmax(dim=-1)
    cumulative_BV = logprobs_BV.exp().cumsum(dim=-1, dtype=torch.float64)
    # The last sum is 1 but for rounding; a product with less than 1 is below it, so that some sum exceeds it.
    limit_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    ids_B1 = torch.searchsorted(cumulative_BV, limit_B1, right=True)
    ids_B1 = ids_B1.clamp(max=logits_BV.shape[1] - 1)  # past the end where a logit is NaN, as logprobs are
    return ids_B1[:, 0], logprobs_BV.gather(1, ids_B1)[:, 0]


def _likeliest(logprobs_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """(B, V) log-probabilities, minus infinity for the tokens that are not among the likeliest (see `draw`)."""
    likeliest_BK, ids_BK = logprobs_BV.topk(min(top_k or logprobs_BV.shape[-1], logprobs_BV.shape[-1]))
    before_BK = likeliest_BK.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
    before_BK[:, 0] = 0.0
    likeliest_BK = likeliest_BK.masked_fill(before_BK >= top_p, -torch.inf)
    return torch.full_like(logprobs_BV, -torch.inf).scatter(1, ids_BK, likeliest_BK)
