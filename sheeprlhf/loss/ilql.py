"""Implicit language Q-learning (arXiv 2206.11871): losses of the values of tokens that are already written.

Letters: H Q heads, S responses, N tokens of all responses laid end to end (response by response). Token n is an action
in the state before it. Every function returns one loss per token, unreduced.
"""

import torch
from torch import Tensor


def q_losses(q_HN: Tensor, values_N: Tensor, rewards_S: Tensor, lengths_S: Tensor, *, gamma: float) -> Tensor:
    """Squared errors of the Q heads, summed over heads: sum over i of (Q_i - (r + gamma V'))^2.

    V' is the value of the state after the token, without gradient, and 0 after the last token of a response, which
    alone has a reward.

    Args:
        q_HN: (H, N) Q of the tokens by each head, reward units.
        values_N: (N,) values of the states before the tokens.
        rewards_S: (S,) reward of each response.
        lengths_S: (S,) tokens of each response.
        gamma: discount of a token.
    """
    last_S = lengths_S.cumsum(0) - 1
    next_values_N = torch.cat([values_N[1:], values_N[:1]]).detach().index_fill(0, last_S, 0.0)
    targets_N = (gamma * next_values_N).index_add(0, last_S, rewards_S.to(next_values_N.dtype))
    return (q_HN - targets_N).square().sum(dim=0)


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
