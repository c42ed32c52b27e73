"""The language head, run on chosen positions only, with log-probabilities in float32.

Letters: C hidden width, R head rows (positions where the head runs), N targets, V vocabulary.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 1 << 26  # float32 logits kept for one backward pass; more is recomputed in chunks of this size


class TokenLogprobs(NamedTuple):
    """Log-probabilities of the targets of a batch, in nats.

    Attributes:
        target_N: (N,) float32, of the target token itself.
        mean_N: (N,) float32, averaged over the vocabulary (label smoothing), or None where it was not asked for.
    """

    target_N: Tensor
    mean_N: Tensor | None


class _GatherLogprobs(torch.autograd.Function):
    """log_softmax at chosen entries, keeping one (R, V) buffer: the gradient is written over the logits."""

    @staticmethod
    def forward(ctx: Any, logits_RV: Tensor, index_N: Tensor, target_ids_N: Tensor) -> tuple[Tensor, Tensor]:
        logsumexp_R = torch.logsumexp(logits_RV, dim=-1)
        mean_R = logits_RV.mean(dim=-1)
        ctx.save_for_backward(logits_RV, logsumexp_R, index_N, target_ids_N)
        target_N = logits_RV[index_N, target_ids_N] - logsumexp_R[index_N]
        return target_N, (mean_R - logsumexp_R)[index_N]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits_RV, logsumexp_R, index_N, target_ids_N = ctx.saved_tensors
        grad_target_N, grad_mean_N = grads
        total_N = grad_target_N + grad_mean_N
        total_R = torch.zeros_like(logsumexp_R).index_add_(0, index_N, total_N)
        mean_R = torch.zeros_like(logsumexp_R).index_add_(0, index_N, grad_mean_N) / logits_RV.shape[-1]
        # In place: the buffer is this function's own float32 copy and has no reader after this point.
        grad_RV = logits_RV.sub_(logsumexp_R[:, None]).exp_().mul_(-total_R[:, None]).add_(mean_R[:, None])
        grad_RV.index_put_((index_N, target_ids_N), grad_target_N, accumulate=True)
        return grad_RV, None, None


def logprobs_from_logits(logits_RV: Tensor, index_N: Tensor, target_ids_N: Tensor, *, mean: bool) -> TokenLogprobs:
    """Log-probabilities of targets, in float32 whatever the logits' type.

    Args:
        logits_RV: (R, V) logits; consumed: the backward pass writes their gradient over float32 ones.
        index_N: (N,) the row of `logits_RV` that predicts target n; rows may repeat.
        target_ids_N: (N,) target tokens.
        mean: also return the vocabulary's mean log-probability.
    """
    if not logits_RV.requires_grad:  # no gradient: nothing to save
        logprobs_RV = logits_RV.float().log_softmax(dim=-1)
        mean_N = logprobs_RV.mean(dim=-1)[index_N] if mean else None
        return TokenLogprobs(logprobs_RV[index_N, target_ids_N], mean_N)
    target_N, mean_N = _GatherLogprobs.apply(logits_RV.float(), index_N, target_ids_N)
    return TokenLogprobs(target_N, mean_N if mean else None)


def head_logprobs(
    hidden_RC: Tensor,
    head: nn.Module,
    index_N: Tensor,
    target_ids_N: Tensor,
    *,
    mean: bool,
    max_logits: int = MAX_LOGITS,
) -> TokenLogprobs:
    """`logprobs_from_logits` of `head(hidden)`; beyond `max_logits` entries, chunk by chunk with recomputation.

    Args:
        hidden_RC: (R, C) inputs of the head.
        head: the language head, C to V.
        index_N: (N,) the row of `hidden_RC` that predicts target n; rows may repeat.
        target_ids_N: (N,) target tokens.
        mean: also return the vocabulary's mean log-probability.
        max_logits: most entries of a logits tensor that is kept for the backward pass.
    """

    def run(hidden: Tensor, index: Tensor, targets: Tensor) -> TokenLogprobs:
        return logprobs_from_logits(head(hidden), index, targets, mean=mean)

    rows, vocabulary = hidden_RC.shape[0], cast(Tensor, head.weight).shape[0]
    if rows * vocabulary <= max_logits:
        return run(hidden_RC, index_N, target_ids_N)
    size = max(1, max_logits // vocabulary)
    starts = range(0, rows, size)
    order_N = torch.argsort(index_N, stable=True)
    index_N, target_ids_N = index_N[order_N], target_ids_N[order_N]
    # Which targets each chunk of head rows predicts; one host read for all borders.
    borders = torch.searchsorted(index_N, torch.tensor([*starts, rows], device=index_N.device)).tolist()
    parts = []
    for start, low, high in zip(starts, borders, borders[1:], strict=False):
        inputs = (hidden_RC[start : start + size], index_N[low:high] - start, target_ids_N[low:high])
        parts.append(checkpoint(run, *inputs, use_reentrant=False) if torch.is_grad_enabled() else run(*inputs))
    inverse_N = torch.argsort(order_N)
    target_N = torch.cat([part.target_N for part in parts])[inverse_N]
    mean_N = torch.cat([part.mean_N for part in parts if part.mean_N is not None])[inverse_N] if mean else None
    return TokenLogprobs(target_N, mean_N)
