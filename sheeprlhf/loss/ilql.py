"""Implicit language Q-learning (arXiv 2206.11871): losses of the values of tokens that are already written.

Letters: H Q heads, S responses, N tokens of all responses laid end to end (response by response). Token n is an action
in the state before it. Every function returns one loss per token, unreduced.
"""

import torch
from torch import Tensor

from sheeprlhf.loss.advantage import gae


def q_losses(
    q_HN: Tensor, values_N: Tensor, rewards_S: Tensor, lengths_S: Tensor, *, width: int, gamma: float, lam: float
) -> Tensor:
    """Squared errors of the Q heads, summed over heads: sum over i of (Q_i - G)^2.

    G_t = r_t + gamma ((1 - lam) V_{t+1} + lam G_{t+1}), without gradient. The last token of a response alone has a
    reward; behind it V and G are 0.

    Args:
        q_HN: (H, N) Q of the tokens by each head, reward units.
        values_N: (N,) values of the states before the tokens.
        rewards_S: (S,) reward of each response.
        lengths_S: (S,) int64, tokens of each response.
        width: of the longest one, known to the host.
        gamma: discount of a token.
        lam: lambda; 0 looks one token ahead, 1 takes the reward.
    """
    shift_S = torch.arange(len(lengths_S), device=values_N.device) * width - lengths_S.cumsum(0) + lengths_S
    index_N = torch.arange(len(values_N), device=values_N.device)
    index_N = index_N + shift_S.repeat_interleave(lengths_S, output_size=len(values_N))
    shape = (len(lengths_S), width)
    values_ST = values_N.new_zeros(len(lengths_S) * width).index_copy(0, index_N, values_N.detach()).view(shape)
    rewards_ST = torch.zeros_like(values_ST).scatter(1, lengths_S[:, None] - 1, rewards_S.to(values_ST)[:, None])
    mask_ST = torch.arange(width, device=values_N.device) < lengths_S[:, None]
    _, targets_ST = gae(rewards_ST, values_ST, mask_ST, gamma=gamma, lam=lam)
    return (q_HN - targets_ST.flatten()[index_N]).square().sum(dim=0)


def expectile_losses(values_N: Tensor, target_q_N: Tensor, *, expectile: float) -> Tensor:
    """Expectile regression of the values to Q: w (Q - V)^2, w = expectile where Q >= V, else 1 - expectile.

    Args:
        values_N: (N,) values of the states before the tokens.
        target_q_N: (N,) Q of the tokens, the smallest of the target heads, without gradient.
        expectile: 0.5 makes V the mean of Q, 1 the greatest Q of the data.
    """
    differences_N = target_q_N - values_N
    weights_N = torch.where(differences_N >= 0, expectile, 1.0 - expectile)
    return weights_N * differences_N.square()
