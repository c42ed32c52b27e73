"""Reward modelling: the better response of a pair gets the higher score.

Letters: S responses, L the tokens of the longest one, P pairs, I items that a loss is averaged over.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LOSS_TYPES = ("last_token", "average", "per_sample")  # of pairs; `plackett_luce` is one of whole rankings


class Scores(NamedTuple):
    """A score after each token of some responses.

    Attributes:
        values_SL: (S, L) float32; places beyond a response's length mean nothing.
        token_ids_SL: (S, L) int64, the tokens that they follow.
        lengths_S: (S,) int64, tokens of each response, >= 1.
    """

    values_SL: Tensor
    token_ids_SL: Tensor
    lengths_S: Tensor

    def of(self, index_P: Tensor) -> "Scores":
        """Those of some responses, (P, L)."""
        return Scores(self.values_SL[index_P], self.token_ids_SL[index_P], self.lengths_S[index_P])


def by_response(
    values_N: Tensor, token_ids_N: Tensor, response_index_N: Tensor, lengths_S: Tensor, *, longest: int
) -> Scores:
    """Lay the scores of all tokens, ordered by response and place, into a matrix.

    Args:
        values_N: (N,) a score after each token.
        token_ids_N: (N,) the tokens.
        response_index_N: (N,) the response of each token, ascending.
        lengths_S: (S,) tokens of each response; their sum is N.
        longest: the largest of them, known to the host.
    """
    place_N = torch.arange(len(values_N), device=values_N.device) - (lengths_S.cumsum(0) - lengths_S)[response_index_N]
    shape = (len(lengths_S), longest)
    values_SL = values_N.new_zeros(shape).index_put((response_index_N, place_N), values_N)
    token_ids_SL = token_ids_N.new_zeros(shape).index_put((response_index_N, place_N), token_ids_N)
    return Scores(values_SL, token_ids_SL, lengths_S)


def last_scores(scores: Scores) -> Tensor:
    """(S,) the score after each response's last token: what a finished reward model says of it."""
    return scores.values_SL.gather(1, scores.lengths_S[:, None] - 1).squeeze(1)


def accuracies(margin_P: Tensor) -> Tensor:
    """(P,) 1 where the better response of a pair is ahead, half a point where both are equal, else 0."""
    return (margin_P > 0) + 0.5 * (margin_P == 0)


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(r_w - r_l - m): InstructGPT (arXiv 2203.02155) eq. 1 with the margin of Llama 2 (2307.09288) eq. 2.

    Args:
        chosen: scores of the better responses, any shape.
        rejected: scores of the worse ones, the same shape.
        margin: how far apart they should be at least.

    Returns:
        Losses, nats, the same shape; unreduced.
    """
    return -logsigmoid(chosen - rejected - margin)


def reward_loss(scores: Scores, pairs_P2: Tensor, loss_type: str, margin_P: Tensor | None = None) -> Tensor:
    """The Bradley-Terry loss of each pair.

    "last_token" compares the scores after the last tokens. The others compare only where the pair's responses differ,
    from their first different token on: "average" the means of the scores there; "per_sample" the scores place by
    place up to the end of the shorter response, and the pair's loss is the mean over these places (DeepSpeed-Chat's,
    without the padding that it reads beyond the shorter one).

    Args:
        scores: of the responses; "last_token" needs a single column, the others all tokens.
        pairs_P2: (P, 2) the better and the worse response of each pair.
        loss_type: one of LOSS_TYPES.
        margin_P: (P,) how far apart each pair should be at least; None is 0.

    Returns:
        (P,) losses, nats; unreduced.

    Raises:
        ValueError: the loss type is unknown.
    """
    chosen, rejected = scores.of(pairs_P2[:, 0]), scores.of(pairs_P2[:, 1])
    margin_P = torch.zeros_like(chosen.values_SL[:, 0]) if margin_P is None else margin_P
    if loss_type == "last_token":
        return bradley_terry(last_scores(chosen), last_scores(rejected), margin_P)
    shorter_P = torch.minimum(chosen.lengths_S, rejected.lengths_S)
    first_P = _first_difference(chosen, rejected, shorter_P)
    if loss_type == "average":
        chosen_P, rejected_P = (
            _mean(part.values_SL, _between(part.values_SL, first_P, part.lengths_S)) for part in (chosen, rejected)
        )
        return bradley_terry(chosen_P, rejected_P, margin_P)
    if loss_type == "per_sample":
        losses_PL = bradley_terry(chosen.values_SL, rejected.values_SL, margin_P[:, None])
        return _mean(losses_PL, _between(losses_PL, first_P, shorter_P))
    raise ValueError(f"loss_type={loss_type!r} is none of {', '.join(LOSS_TYPES)}")


def plackett_luce(scores_S: Tensor, pairs_P2: Tensor) -> Tensor:
    """Negative log-likelihood of rankings (Plackett, 1975; Luce, 1959): -log(exp(r_k) / sum of exp(r_j) for j >= k).

    The sum over the responses of a row is the loss of its ranking; of two responses it is that of Bradley and Terry.

    Args:
        scores_S: (S,) scores of all responses.
        pairs_P2: (P, 2) all (better, worse) pairs of each row.

    Returns:
        (S,) nats, the loss of choosing each response among itself and all worse ones of its row; 0 for the worst.
    """
    better_P, worse_P = pairs_P2.unbind(1)
    top_S = scores_S.detach().scatter_reduce(0, better_P, scores_S.detach()[worse_P], "amax")
    sums_S = (scores_S - top_S).exp().index_add(0, better_P, (scores_S[worse_P] - top_S[better_P]).exp())
    return sums_S.log() + top_S - scores_S


def step_losses(scores_N: Tensor, labels_N: Tensor) -> Tensor:
    """(N,) -log of the probability of each step's label, sigmoid(score) for True (arXiv 2305.20050; 2312.08935, eq. 2).

    Args:
        scores_N: (N,) scores after the steps, log-odds that a step is right.
        labels_N: (N,) bool.
    """
    return -logsigmoid(torch.where(labels_N, scores_N, -scores_N))


def combine_steps(scores_N: Tensor, steps_S: Tensor, how: str) -> Tensor:
    """(S,) scores of responses from those of their steps, as probabilities: the lowest, the product, or the last one.

    Args:
        scores_N: (N,) log-odds after each step, response by response.
        steps_S: (S,) steps of each response, >= 1.
        how: "min", "product" or "last".

    Raises:
        ValueError: `how` is unknown.
    """
    logs = logsigmoid(scores_N.double()).split(steps_S.tolist())
    if how == "last":
        found = [part[-1] for part in logs]
    elif how in ("min", "product"):
        found = [part.min() if how == "min" else part.sum() for part in logs]
    else:
        raise ValueError(f"how={how!r} is none of min, product, last")
    return torch.stack(found).exp()


def _first_difference(chosen: Scores, rejected: Scores, shorter_P: Tensor) -> Tensor:
    """(P,) the first place where the tokens differ; the shorter one's last place if it begins the longer one."""
    differs_PL = (chosen.token_ids_SL != rejected.token_ids_SL) & _between(chosen.values_SL, None, shorter_P)
    return torch.where(differs_PL.any(1), differs_PL.int().argmax(1), shorter_P - 1)


def _between(like_PL: Tensor, first_P: Tensor | None, end_P: Tensor) -> Tensor:
    """(P, L) bool, the places from `first` to before `end`."""
    place_L = torch.arange(like_PL.shape[1], device=like_PL.device)
    inside_PL = place_L < end_P[:, None]
    return inside_PL if first_P is None else inside_PL & (place_L >= first_P[:, None])


def _mean(values_PL: Tensor, mask_PL: Tensor) -> Tensor:
    """(P,) mean of the masked places, of which each row has one."""
    return torch.where(mask_PL, values_PL, 0.0).sum(1) / mask_PL.sum(1)


def centering(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """(P,) (r_w + r_l)^2, which keeps scores near 0 when added with a small weight (arXiv 2312.09244, eq. 2)."""
    return (chosen_P + rejected_P).square()
