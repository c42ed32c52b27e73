"""Supervised fine-tuning: cross-entropy of the next token.

Letters: N targets, V vocabulary.
"""

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
