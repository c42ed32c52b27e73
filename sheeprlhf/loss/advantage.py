"""From scores of responses to the advantages of their tokens: KL-shaped rewards, GAE, whitening and group baselines.

Letters: S responses, T positions of a response, N tokens of all responses laid end to end (response by response),
P prompts, G responses per prompt. A mask_ST is that of `by_position`: True at the first places of a row.
Nothing here needs a gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

KL_KINDS = ("k1", "k2", "k3")


def by_position(values_N: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Lay the values of all tokens into a row per response, padded with 0 behind the last token.

    Args:
        values_N: (N,) a value of each token.
        lengths: tokens of each of the S responses; their sum is N.

    Returns:
        (S, T) the values, T the greatest length, and (S, T) bool, True at tokens; `values_ST[mask_ST]` is `values_N`.

    Raises:
        ValueError: the lengths do not add up to N.
    """
    if sum(lengths) != len(values_N):
        raise ValueError(f"{len(values_N)} values for responses of {sum(lengths)} tokens together")
    lengths_S = torch.tensor(lengths, dtype=torch.long, device=values_N.device)
    mask_ST = torch.arange(max(lengths, default=0), device=values_N.device) < lengths_S[:, None]
    values_ST = values_N.new_zeros(mask_ST.shape)
    values_ST[mask_ST] = values_N
    return values_ST, mask_ST


def kl_estimates(logprobs_N: Tensor, reference_N: Tensor, kind: str) -> Tensor:
    """Estimates of KL(policy, reference) from tokens that the policy sampled (Schulman, "Approximating KL divergence").

    With u = log reference - log policy: k1 = -u, unbiased, of either sign; k2 = u^2 / 2, biased, whose gradient as a
    loss is that of the KL on the policy's own samples; k3 = exp(u) - 1 - u, unbiased (GRPO, arXiv 2402.03300, eq. 4)
    and never negative, whose gradient is that of KL(reference, policy). All are 0 where the two agree.

    Args:
        logprobs_N: (N,) log-probabilities of the tokens by the policy, nats.
        reference_N: (N,) those by the reference.
        kind: one of KL_KINDS.

    Returns:
        (N,) estimates, nats. As a loss k3's gradient is as it stands: nothing is detached.

    Raises:
        ValueError: the kind is unknown.
    """
    u_N = reference_N - logprobs_N
    if kind == "k1":
        return -u_N
    if kind == "k2":
        return 0.5 * u_N.square()
    if kind == "k3":
        return torch.expm1(u_N) - u_N
    raise ValueError(f"kind={kind!r} is none of {', '.join(KL_KINDS)}")


def token_rewards(
    scores_S: Tensor, kl_ST: Tensor, mask_ST: Tensor, kl_coeff: float, given_ST: Tensor | None = None
) -> Tensor:
    """Rewards of tokens: -kl_coeff * kl at every token and the response's score at its last (InstructGPT, eq. 2).

    Of a score that includes rewards of tokens, `given_ST`, these stay at their tokens, and the last gets the rest.

    The last token is the end-of-sequence token if there is one (N+, arXiv 2403.17031, adds the score one place later).

    Args:
        scores_S: (S,) scores of the responses, reward units.
        kl_ST: (S, T) estimates of the KL, nats; padding means nothing.
        mask_ST: (S, T) bool, True at tokens.
        kl_coeff: beta, reward units per nat.
        given_ST: (S, T) the parts of the scores that single tokens have, 0 on padding; None: none.

    Returns:
        (S, T) rewards, 0 outside the responses.
    """
    given_ST = torch.zeros_like(kl_ST) if given_ST is None else given_ST
    at_end_S1 = (scores_S - given_ST.sum(dim=1))[:, None]
    return torch.where(mask_ST, -kl_coeff * kl_ST, 0.0) + torch.where(_last(mask_ST), at_end_S1, 0.0) + given_ST


def gae(
    rewards_ST: Tensor,
    values_ST: Tensor,
    mask_ST: Tensor,
    *,
    gamma: float,
    lam: float,
    last_values_S: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al., arXiv 1506.02438, eq. 16) over each response.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  return_t = A_t + V_t

    V_t is the value before token t is chosen. Behind the last token A is 0, and V is 0 or as given.

    Args:
        rewards_ST: (S, T) rewards; padding means nothing here and below.
        values_ST: (S, T) values, reward units.
        mask_ST: (S, T) bool, True at tokens.
        gamma: discount of a token.
        lam: lambda; 1 sums all rewards, 0 looks one token ahead.
        last_values_S: (S,) values behind the last tokens: the critic's for a response that was cut off, 0 for one that
            ended. None is 0 for all: every response counts as ended.

    Returns:
        (S, T) advantages, not whitened, and (S, T) returns; 0 outside the responses.
    """
    values_ST = torch.where(mask_ST, values_ST, 0.0)
    next_values_ST = torch.zeros_like(values_ST)
    next_values_ST[:, :-1] = values_ST[:, 1:]
    if last_values_S is not None:
        next_values_ST = torch.where(_last(mask_ST), last_values_S[:, None], next_values_ST)
    deltas_ST = torch.where(mask_ST, rewards_ST + gamma * next_values_ST - values_ST, 0.0)
    advantages_ST = torch.zeros_like(deltas_ST)
    advantage_S = deltas_ST.new_zeros(len(deltas_ST))
    for t in reversed(range(deltas_ST.shape[1])):
        advantage_S = deltas_ST[:, t] + gamma * lam * advantage_S
        advantages_ST[:, t] = advantage_S
    return advantages_ST, advantages_ST + values_ST


def _last(mask_ST: Tensor) -> Tensor:
    """(S, T) bool, True at each response's last token."""
    return torch.arange(mask_ST.shape[1], device=mask_ST.device) == mask_ST.sum(1, keepdim=True) - 1


def moments(values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and population variance, () float64; of no value 0 and 1, with which whitening does nothing.

    In float32 the mean of equal values is off by a rounding error, and whitening multiplies it by ten thousand.

    Args:
        values: any shape.
        mask: bool, the same shape, True where a value counts; None counts all.
    """
    counted = (values if mask is None else values[mask]).double()
    if counted.numel() == 0:
        return counted.new_zeros(()), counted.new_ones(())
    return counted.mean(), counted.var(correction=0)


def whiten(values_ST: Tensor, mask_ST: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scale to variance 1, and shift to mean 0 if asked: (x - mean) / sqrt(variance + eps), plus the mean otherwise.

    The moments are those of a whole rollout of all ranks, not of a row or a micro-batch (N+, arXiv 2403.17031);
    the variance is that of a population.
    A single token becomes 0, or stays itself if the mean is kept.

    Args:
        values_ST: (S, T) advantages or rewards; padding means nothing.
        mask_ST: (S, T) bool, True at tokens.
        shift_mean: False keeps the mean, as for rewards, whose sign means something.
        eps: added to the variance.

    Returns:
        (S, T) of the same type, 0 outside the responses.
    """
    mean, variance = moments(values_ST, mask_ST)
    whitened_ST = (values_ST.double() - mean) * torch.rsqrt(variance + eps)
    whitened_ST = whitened_ST if shift_mean else whitened_ST + mean
    return torch.where(mask_ST, whitened_ST, 0.0).to(values_ST.dtype)


def group_advantages(scores_PG: Tensor, *, scale: bool, eps: float = 1e-4) -> Tensor:
    """Score minus the mean of the prompt's responses: Dr. GRPO (arXiv 2503.20783); divided by std + eps: GRPO.

    GRPO (arXiv 2402.03300, section 4.1.2) does not say which standard deviation; this is the one of a sample, with
    G - 1 below, as TRL 1.16 takes it. Where all scores are equal, as they are for G = 1, advantages are 0.

    Args:
        scores_PG: (P, G) scores of the responses to each prompt.
        scale: whether to divide by the standard deviation.
        eps: added to the standard deviation.

    Returns:
        (P, G) advantages, of the same type.
    """
    deviations_PG = scores_PG.double() - scores_PG.double().mean(1, keepdim=True)
    if scale:
        variance_P1 = deviations_PG.square().sum(1, keepdim=True) / max(scores_PG.shape[1] - 1, 1)
        deviations_PG = deviations_PG / (variance_P1.sqrt() + eps)
    return deviations_PG.to(scores_PG.dtype)


def leave_one_out(scores_PG: Tensor) -> Tensor:
    """RLOO (arXiv 2402.14740): score minus the mean of the other responses to the same prompt.

    Args:
        scores_PG: (P, G) scores, G >= 2.

    Returns:
        (P, G) advantages, of the same type.

    Raises:
        ValueError: a prompt has a single response.
    """
    group = scores_PG.shape[1]
    if group < 2:
        raise ValueError(f"leaving one out needs 2 responses per prompt, got {group}")
    scores64_PG = scores_PG.double()
    others_PG = (scores64_PG.sum(1, keepdim=True) - scores64_PG) / (group - 1)
    return (scores64_PG - others_PG).to(scores_PG.dtype)


def next_kl_coeff(coeff: float, kl: float, *, target: float, horizon: int, num_responses: int) -> float:
    """Adaptive KL coefficient (Ziegler et al., arXiv 1909.08593, section 2.2): up where the KL is above the target.

    coeff * (1 + clip(kl / target - 1, -0.2, 0.2) * num_responses / horizon), as the paper's code has it.

    Args:
        coeff: present coefficient, reward units per nat.
        kl: mean KL of a response, nats summed over its tokens.
        target: what it should be, nats per response.
        horizon: responses in which the coefficient may change by about a fifth.
        num_responses: responses of all ranks since the last call.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coeff * (1.0 + error * num_responses / horizon)
