"""Losses of policy-gradient training against hand-computed numbers and against loops over the definitions."""

import math
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sheeprlhf.loss.ppo import (
    AGGREGATIONS,
    MAX_LOG_RATIO,
    explained_variance,
    policy_losses,
    ratio_metrics,
    sequence_policy_losses,
    token_weights,
    value_losses,
)

EXACT = dict(rtol=0.0, atol=1e-12)
NUM_CASES = 50


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def logs(*values: float) -> Tensor:
    return row(*values).log()


# ratios 1.5, 1.5, 0.5, 0.5, 1.1 with advantages of both signs; the ratio may go from 0.8 to 1.3
RATIOS, ADVANTAGES = (1.5, 1.5, 0.5, 0.5, 1.1), row(2.0, -2.0, 2.0, -2.0, 1.0)
OLD = logs(0.2, 0.2, 0.6, 0.6, 0.5)
NEW = OLD + logs(*RATIOS)


def test_policy_losses_by_hand() -> None:
    """Where the clipped ratio counts there is no gradient."""
    new = NEW.clone().requires_grad_()
    losses_N = policy_losses(new, OLD, ADVANTAGES, clip_low=0.2, clip_high=0.3)
    assert_close(losses_N.detach(), row(-2.0 * 1.3, 2.0 * 1.5, -2.0 * 0.5, 2.0 * 0.8, -1.1), **EXACT)
    losses_N.sum().backward()
    assert new.grad is not None
    assert_close(new.grad, row(0.0, 2.0 * 1.5, -2.0 * 0.5, 0.0, -1.1), **EXACT)


def test_policy_figures_by_hand() -> None:
    figures = ratio_metrics(NEW.clone().requires_grad_(), OLD, ADVANTAGES, 0.2, 0.3)
    assert_close(figures["ratio"], row(*RATIOS), **EXACT)
    assert_close(figures["clipfrac"], row(1, 0, 0, 1, 0), **EXACT)
    assert_close(figures["approxkl"], row(*(0.5 * math.log(ratio) ** 2 for ratio in RATIOS)), **EXACT)
    assert not any(figure.requires_grad for figure in figures.values())


def test_policy_losses_are_the_definition() -> None:
    rng = random.Random(0)
    for _ in range(NUM_CASES):
        number, low, high = rng.randint(1, 9), rng.uniform(0.05, 0.4), rng.uniform(0.05, 0.4)
        new, old, advantages = ([rng.gauss(0, 0.5) for _ in range(number)] for _ in range(3))
        expected, clipped = [], []
        for n, o, a in zip(new, old, advantages, strict=True):
            ratio = math.exp(n - o)
            cut = min(max(ratio, 1 - low), 1 + high)
            expected.append(-min(a * ratio, a * cut))
            clipped.append(float((a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low)))
        arguments = (row(*new), row(*old), row(*advantages))
        assert_close(policy_losses(*arguments, clip_low=low, clip_high=high), row(*expected), **EXACT)
        assert ratio_metrics(*arguments, low, high)["clipfrac"].tolist() == clipped
        symmetric = policy_losses(*arguments, clip_low=low, clip_high=low)
        assert_close(sequence_policy_losses(*arguments, clip=low), symmetric, **EXACT)


def test_at_ratio_one_the_gradient_is_reinforces() -> None:
    """That of -A log p, of each token or of each whole response; nothing is clipped or diverged."""
    torch.manual_seed(0)
    advantages_N = torch.randn(50, dtype=torch.float64)
    logprobs_N = torch.randn(50, dtype=torch.float64).requires_grad_()
    old_N = logprobs_N.detach().clone()
    for losses_N in (
        policy_losses(logprobs_N, old_N, advantages_N, clip_low=0.2, clip_high=0.2),
        sequence_policy_losses(logprobs_N, old_N, advantages_N, clip=0.2),
    ):
        [gradient_N] = torch.autograd.grad(losses_N.sum(), logprobs_N)
        assert_close(gradient_N, -advantages_N, rtol=0, atol=0)
        assert_close(losses_N.detach(), -advantages_N, rtol=0, atol=0)
    figures = ratio_metrics(logprobs_N, old_N, advantages_N, 0.2, 0.2)
    assert not figures["approxkl"].any() and not figures["clipfrac"].any() and figures["ratio"].eq(1).all()


def test_a_whole_response_has_one_ratio() -> None:
    """Two tokens of ratio 1.1: the response's is 1.21, beyond a clip at 0.2 that neither token reaches."""
    tokens_N = logs(1.1, 1.1).requires_grad_()
    sums_S = tokens_N.sum(0, keepdim=True)
    losses_S = sequence_policy_losses(sums_S, row(0.0), row(3.0), clip=0.2)
    assert_close(losses_S.detach(), row(-3.6), **EXACT)
    losses_S.sum().backward()
    assert tokens_N.grad is not None and not tokens_N.grad.any()


def test_no_ratio_overflows() -> None:
    """Between policies that are far apart, in float32: whatever the advantage, no loss and no gradient is NaN."""
    logprobs_N = torch.zeros(3, requires_grad=True)
    arguments = (logprobs_N, torch.full((3,), -200.0), torch.tensor([0.0, 1.0, -1.0]))
    for losses_N in (
        policy_losses(*arguments, clip_low=0.2, clip_high=0.2),
        sequence_policy_losses(*arguments, clip=0.2),
    ):
        [gradient_N] = torch.autograd.grad(losses_N.sum(), logprobs_N)
        assert losses_N.isfinite().all() and gradient_N.isfinite().all()
    assert ratio_metrics(*arguments, 0.2, 0.2)["ratio"].tolist() == [pytest.approx(math.exp(MAX_LOG_RATIO))] * 3


def test_value_losses_are_the_definition() -> None:
    rng = random.Random(0)
    for _ in range(NUM_CASES):
        values, old, returns = ([rng.gauss(0, 1) for _ in range(4)] for _ in range(3))
        clip, expected = rng.uniform(0.05, 1.0), []
        for value, before, target in zip(values, old, returns, strict=True):
            cut = min(max(value, before - clip), before + clip)
            expected.append(0.5 * max((value - target) ** 2, (cut - target) ** 2))
        arguments = (row(*values), row(*old), row(*returns))
        assert_close(value_losses(*arguments, clip=clip), row(*expected), **EXACT)
        squares = [0.5 * (value - target) ** 2 for value, target in zip(values, returns, strict=True)]
        assert_close(value_losses(*arguments, clip=None), row(*squares), **EXACT)


def test_explained_variance_by_hand() -> None:
    returns = row(1.0, 2.0, 6.0)
    found = explained_variance(returns, returns)
    assert found == 1.0 and isinstance(found, float)
    assert explained_variance(returns + 7.0, returns) == pytest.approx(1.0, abs=1e-12)  # it does not see a shift
    assert explained_variance(row(3.0, 3.0, 3.0), returns) == pytest.approx(0.0, abs=1e-12)
    # errors 1, 1 and 4 vary by 2, returns by 14 / 3
    assert explained_variance(row(0.0, 1.0, 2.0), returns) == pytest.approx(1 - 2 / (14 / 3), abs=1e-12)
    assert explained_variance(row(1.0, 2.0), row(0.1, 0.1)) == 0.0
    assert explained_variance(row(1.0), row(2.0)) == 0.0
    assert explained_variance(row(), row()) == 0.0


# losses of 6 in a response of 8 tokens and of 0 in one of 2: 48 over 10 tokens, 6 + 0 over 2 responses, 48 / 16 over 2
STEPS = {"token": 4.8, "sequence": 3.0, "constant": 1.5}


def weights_of(lengths: Sequence[int], aggregation: str, *, max_length: int) -> Tensor:
    lengths_S = torch.tensor(lengths, dtype=torch.long)
    return token_weights(
        torch.arange(len(lengths)).repeat_interleave(lengths_S), lengths_S, aggregation, max_length=max_length
    )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_loss_of_a_step_by_hand(aggregation: str) -> None:
    lengths, losses_N = (8, 2), torch.tensor([6.0] * 8 + [0.0] * 2)
    weights_N = weights_of(lengths, aggregation, max_length=16)
    assert weights_N.dtype == torch.float32  # also of whole numbers
    weighted = (losses_N * weights_N).sum().item()
    assert weighted / (sum(lengths) if aggregation == "token" else len(lengths)) == pytest.approx(STEPS[aggregation])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_weight_does_not_depend_on_the_company(aggregation: str) -> None:
    """So a step's loss is the same however it is cut into micro-batches: sums of sums, not means of means."""
    lengths = [1, 3, 17, 64]
    whole_N = weights_of(lengths, aggregation, max_length=64)
    parts = [weights_of([length], aggregation, max_length=64) for length in lengths]
    assert torch.equal(whole_N, torch.cat(parts))
    assert weights_of([], aggregation, max_length=64).shape == (0,)


def test_an_unknown_aggregation_is_refused() -> None:
    with pytest.raises(ValueError, match="mean"):
        weights_of([1], "mean", max_length=1)
