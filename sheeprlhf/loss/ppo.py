"""Losses of policy-gradient training: PPO's policy and value, RLOO's whole responses, and GRPO's averages.

Letters: S responses, N tokens of all responses laid end to end (response by response). Losses are unreduced.
"""

import torch
from torch import Tensor

from sheeprlhf.loss.advantage import moments

AGGREGATIONS = ("token", "sequence", "constant")
MAX_LOG_RATIO = 20.0  # exp() of float32 overflows at 88, and 0 * inf, an advantage or a gradient of 0, would be NaN


def policy_losses(
    logprobs_N: Tensor,
    old_N: Tensor,
    advantages_N: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    max_ratio: float | None = None,
) -> Tensor:
    """PPO's clipped loss (arXiv 1707.06347, eq. 7): max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)).

    r = exp(logprobs - old), at most exp(MAX_LOG_RATIO). DAPO (arXiv 2503.14476, eq. 8) has clip_high > clip_low. With
    `max_ratio` the first r is at most that (two-sided clipping, arXiv 2505.07291, which limits the loss where A < 0).

    Args:
        logprobs_N: (N,) log-probabilities of the tokens by the policy, nats, with their gradient.
        old_N: (N,) those by the policy that sampled them, without.
        advantages_N: (N,) advantages, without.
        clip_low: how far the ratio may fall below 1.
        clip_high: how far it may rise above.
        max_ratio: the largest ratio of the unclipped term, above 1 + clip_high; None does not limit it.

    Returns:
        (N,) losses.
    """
    ratio_N = _ratio(logprobs_N, old_N)
    clipped_N = ratio_N.clamp(1.0 - clip_low, 1.0 + clip_high)
    limited_N = ratio_N if max_ratio is None else ratio_N.clamp(max=max_ratio)
    return torch.maximum(-advantages_N * limited_N, -advantages_N * clipped_N)


def cispo_losses(logprobs_N: Tensor, old_N: Tensor, advantages_N: Tensor, *, clip_high: float) -> Tensor:
    """CISPO (MiniMax-M1, arXiv 2506.13585, eqs. 4 and 5): -A min(r, 1 + clip_high) logprobs, no gradient through r.

    Every token keeps a gradient, whatever its ratio. Arguments as in `policy_losses`.
    """
    weights_N = _ratio(logprobs_N, old_N).clamp(max=1.0 + clip_high).detach()
    return -advantages_N * weights_N * logprobs_N


def with_mean_ratio(logprobs_N: Tensor, old_N: Tensor, index_N: Tensor, lengths_S: Tensor) -> Tensor:
    """Log-probabilities whose ratio to `old_N` is GSPO's (arXiv 2507.18071, eqs. 7 and 13), one for each response.

    log s = mean over the response's tokens of logprobs - old. Token t gets logprobs_t - sg(logprobs_t) + old_t + sg(log
    s): with one advantage for all tokens of a response, the mean of their losses has GSPO's value and gradient.

    Args:
        logprobs_N: (N,) log-probabilities of the tokens by the policy, nats, with their gradient.
        old_N: (N,) those by the policy that sampled them.
        index_N: (N,) the response of each token.
        lengths_S: (S,) tokens of each response.

    Returns:
        (N,) nats.
    """
    log_ratio_N = (logprobs_N - old_N).detach()
    mean_S = log_ratio_N.new_zeros(len(lengths_S)).index_add(0, index_N, log_ratio_N) / lengths_S
    return logprobs_N - logprobs_N.detach() + old_N + mean_S[index_N]


def sequence_policy_losses(sums_S: Tensor, old_S: Tensor, advantages_S: Tensor, *, clip: float) -> Tensor:
    """RLOO (arXiv 2402.14740) with one ratio for a whole response: -A r, clipped as PPO's.

    r = exp(lp(y) - lp_old(y)). While the policy is still the one that sampled, the gradient is that of -A lp(y).

    Args:
        sums_S: (S,) log-probabilities of whole responses, SUMS over tokens, nats, with their gradient.
        old_S: (S,) those by the policy that sampled them, without.
        advantages_S: (S,) advantages, without.
        clip: how far the ratio may be from 1 (TRL 1.16: 0.2).

    Returns:
        (S,) losses.
    """
    return policy_losses(sums_S, old_S, advantages_S, clip_low=clip, clip_high=clip)


def value_losses(values_N: Tensor, old_N: Tensor, returns_N: Tensor, *, clip: float | None) -> Tensor:
    """Half the squared error of the value, or the clipped value's where that is larger (N+, arXiv 2403.17031).

    0.5 max((V - R)^2, (clip(V, old - c, old + c) - R)^2)

    Args:
        values_N: (N,) the critic's values, reward units, with their gradient.
        old_N: (N,) its values when the responses were sampled, without.
        returns_N: (N,) returns.
        clip: c, reward units; None does not clip.

    Returns:
        (N,) losses.
    """
    losses_N = (values_N - returns_N).square()
    if clip is not None:
        clipped_N = torch.clamp(values_N, old_N - clip, old_N + clip)
        losses_N = torch.maximum(losses_N, (clipped_N - returns_N).square())
    return 0.5 * losses_N


@torch.no_grad()
def ratio_metrics(
    logprobs_N: Tensor, old_N: Tensor, advantages_N: Tensor, clip_low: float, clip_high: float
) -> dict[str, Tensor]:
    """Metrics of an update for each token, without gradient; arguments as in `policy_losses`.

    Returns:
        "approxkl": (N,) half the squared log-ratio, nats, as N+ and TRL log it; "clipfrac": (N,) 1 where the clipped
        loss is the larger one, 0 elsewhere; "ratio": (N,).
    """
    ratio_N = _ratio(logprobs_N, old_N)
    clipped_N = ratio_N.clamp(1.0 - clip_low, 1.0 + clip_high)
    return {
        "approxkl": 0.5 * (logprobs_N - old_N).square(),
        "clipfrac": (-advantages_N * clipped_N > -advantages_N * ratio_N).to(ratio_N.dtype),
        "ratio": ratio_N,
    }


def _ratio(logprobs: Tensor, old: Tensor) -> Tensor:
    """exp(logprobs - old), cut where it would overflow."""
    return torch.exp((logprobs - old).clamp(max=MAX_LOG_RATIO))


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - var(returns - values) / var(returns): 1 is a perfect critic, 0 one that knows no more than the mean.

    It is 0, too, where the returns do not vary or there are none.

    Args:
        values: the critic's values, any shape.
        returns: what they should have been, the same shape.
    """
    if returns.numel() == 0 or returns.min() == returns.max():
        return 0.0
    return (1.0 - moments(returns.double() - values.double())[1] / moments(returns)[1]).item()


def token_weights(index_N: Tensor, lengths_S: Tensor, aggregation: str, *, max_length: int) -> Tensor:
    """Weights of the tokens' losses: a step's loss is sum(weight * loss) / items over all its micro-batches and ranks.

    "token": weight 1, items are tokens (PPO; DAPO, arXiv 2503.14476, eq. 8): every token counts alike.
    "sequence": weight 1 / length, items are responses (GRPO, arXiv 2402.03300, eq. 3): every response counts alike.
    "constant": weight 1 / max_length, items are responses (Dr. GRPO, arXiv 2503.20783): a response's sum of losses.

    Args:
        index_N: (N,) the response of each token.
        lengths_S: (S,) tokens of each response.
        aggregation: one of AGGREGATIONS.
        max_length: the most tokens that a response may have; read by "constant".

    Returns:
        (N,) float32.

    Raises:
        ValueError: the aggregation is unknown.
    """
    if aggregation == "token":
        return torch.ones_like(index_N, dtype=torch.float32)
    if aggregation == "sequence":
        return (1.0 / lengths_S)[index_N]
    if aggregation == "constant":
        return torch.full_like(index_N, 1.0 / max_length, dtype=torch.float32)
    raise ValueError(f"aggregation={aggregation!r} is none of {', '.join(AGGREGATIONS)}")
