"""Supervised fine-tuning: cross-entropy of the next token, and the load-balancing loss of a mixture of experts.

The latter is that of Switch Transformer (arXiv 2101.03961, eq. 4 to 6), as transformers computes it for one forward
pass: E * sum f_e * P_e, with f_e the picks of expert e for each token and P_e its mean probability, both over all
tokens of all layers. This is no mean over tokens: the loss of two forward passes together is not the mean of their
losses. But f_e has no gradient, so with the f_e of the whole step the rest is a sum over tokens, and the cut into
micro-batches changes nothing.

Letters: N targets, V vocabulary, T tokens, E experts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def cross_entropy(logprobs_N: Tensor, mean_logprobs_N: Tensor | None = None, label_smoothing: float = 0.0) -> Tensor:
    """Negative log-likelihood of each target, with label smoothing (Szegedy et al., 2016, section 7).

    The target distribution is (1 - e) on the target token plus e / V on every token, so the loss of a target is
    -(1 - e) * log p(target) - e * mean_v log p(v).

    Args:
        logprobs_N: (N,) log-probabilities of the targets, nats.
        mean_logprobs_N: (N,) log-probabilities averaged over the vocabulary; needed when label_smoothing > 0.
        label_smoothing: e, in [0, 1).

    Returns:
        (N,) losses, nats; unreduced.

    Raises:
        ValueError: label_smoothing > 0 without `mean_logprobs_N`.
    """
    if label_smoothing == 0.0:
        return -logprobs_N
    if mean_logprobs_N is None:
        raise ValueError(f"label_smoothing={label_smoothing} needs mean_logprobs_N")
    return -(1.0 - label_smoothing) * logprobs_N - label_smoothing * mean_logprobs_N


class RouterLoss(NamedTuple):
    """Settings of the router's loss in a model's configuration."""

    coefficient: float  # what the loss is multiplied by
    top_k: int  # experts that compute each token
    num_experts: int  # E

    def value(self, counts_E: Tensor, probabilities_E: Tensor, num_rows: float) -> Tensor:
        """() the loss, times its coefficient.

        Args:
            counts_E: (E,) how often each expert was picked, in all layers.
            probabilities_E: (E,) sums of its probability.
            num_rows: tokens times layers that both are of.
        """
        mean_E = probabilities_E / num_rows
        return self.coefficient * self.num_experts * (counts_E.to(mean_E.dtype) / num_rows * mean_E).sum()


def expert_counts(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """(E,) float64, how often each expert is among the likeliest of a token; all layers together.

    Args:
        router_logits: of each layer with experts, (T, E).
        top_k: picks of a token.
    """
    num_experts = router_logits[0].shape[-1]
    picks = [logits_TE.topk(top_k, dim=-1).indices.flatten() for logits_TE in router_logits]
    return torch.bincount(torch.cat(picks), minlength=num_experts).double()


def probability_sums(router_logits: Sequence[Tensor]) -> Tensor:
    """(E,) float32, the probability of each expert, summed over tokens and layers; with its graph."""
    return torch.stack([logits_TE.float().softmax(dim=-1).sum(dim=0) for logits_TE in router_logits]).sum(dim=0)


class StepRouterLoss(NamedTuple):
    """The router's loss of one step, of which each micro-batch computes its share."""

    loss: RouterLoss  # the model's
    counts_E: Tensor  # (E,) picks of each expert, over the step's tokens of all ranks
    num_rows: float  # tokens times layers, of all ranks
    num_items: float  # what the step divides its sums by

    def share(self, router_logits: tuple[Tensor, ...]) -> Tensor:
        """() a micro-batch's part of the step's loss, times the items that the step divides by."""
        return self.loss.value(self.counts_E, probability_sums(router_logits), self.num_rows) * self.num_items
