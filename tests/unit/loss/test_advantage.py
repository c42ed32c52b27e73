"""Rewards, advantages and whitening against hand-computed numbers and against loops over the definitions."""

import math
import random
import statistics
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sheeprlhf.loss.advantage import (
    by_position,
    gae,
    group_advantages,
    kl_estimates,
    leave_one_out,
    moments,
    next_kl_coeff,
    token_rewards,
    whiten,
)

EXACT = dict(rtol=0.0, atol=1e-12)


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rollouts() -> Iterator[tuple[random.Random, list[int], Tensor, Tensor, Tensor]]:
    """Lengths, rewards, values and mask of random responses; the padding is not a number."""
    for seed in range(50):
        rng, torch_rng = random.Random(seed), torch.Generator().manual_seed(seed)
        lengths = [rng.randint(1, 7) for _ in range(rng.randint(1, 4))]
        rewards_ST, values_ST = torch.randn(2, len(lengths), max(lengths), generator=torch_rng, dtype=torch.float64)
        mask_ST = torch.tensor([[t < length for t in range(max(lengths))] for length in lengths])
        yield rng, lengths, *(x.masked_fill(~mask_ST, math.nan) for x in (rewards_ST, values_ST)), mask_ST


def test_by_position_lays_tokens_out_in_order() -> None:
    values_ST, mask_ST = by_position(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), [2, 0, 1, 3])
    assert values_ST.tolist() == [[1, 2, 0], [0, 0, 0], [3, 0, 0], [4, 5, 6]]
    assert mask_ST.tolist() == [[t < length for t in range(3)] for length in (2, 0, 1, 3)]
    assert by_position(torch.ones(0), [])[1].shape == (0, 0)


@pytest.mark.parametrize(("number", "lengths"), [(5, [2, 2]), (3, [2, 2]), (1, [2, 1])])
def test_by_position_wants_all_values(number: int, lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=f"{number} .* {sum(lengths)} "):
        by_position(torch.ones(number), lengths)


def test_kl_estimates_by_hand() -> None:
    logprobs_N, reference_N = rows([-1.0, -2.0, -0.5]), rows([-1.5, -1.0, -0.5])
    assert_close(kl_estimates(logprobs_N, reference_N, "k1"), rows([0.5, -1.0, 0.0]), **EXACT)
    expected_N = rows([math.exp(-0.5) - 0.5, math.exp(1.0) - 2.0, 0.0])
    assert_close(kl_estimates(logprobs_N, reference_N, "k3"), expected_N, **EXACT)
    assert_close(kl_estimates(logprobs_N, reference_N, "k2"), rows([0.125, 0.5, 0.0]), **EXACT)
    with pytest.raises(ValueError, match="k4"):
        kl_estimates(logprobs_N, reference_N, "k4")


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_mean_of_the_estimates_is_the_kl(kind: str) -> None:
    """Over all tokens, each as often as the policy samples it."""
    torch.manual_seed(0)
    policy_BV, reference_BV = torch.randn(2, 200, 12, dtype=torch.float64).log_softmax(-1)
    kl_B = (policy_BV.exp() * (policy_BV - reference_BV)).sum(-1)
    assert_close((policy_BV.exp() * kl_estimates(policy_BV, reference_BV, kind)).sum(-1), kl_B, **EXACT)
    assert kl_B.min() > 0


def test_k3_is_never_negative_and_both_are_zero_for_identical_policies() -> None:
    """In float32, too, where exp(u) - 1 - u is off by 6e-8 for small u."""
    torch.manual_seed(0)
    logprobs_N = -5 * torch.rand(20_000)
    reference_N = logprobs_N + torch.randn(20_000) * 10.0 ** torch.randint(-7, 2, (20_000,))
    assert kl_estimates(logprobs_N, reference_N, "k3").min() >= 0
    assert kl_estimates(logprobs_N, reference_N, "k1").min() < 0
    for kind in ("k1", "k3"):
        assert not kl_estimates(logprobs_N, logprobs_N.clone(), kind).any()


def test_k3_as_a_loss_has_its_own_gradient() -> None:
    logprobs_N = rows([-1.0, -2.0]).requires_grad_()
    kl_estimates(logprobs_N, rows([-1.5, -1.0]), "k3").sum().backward()
    assert logprobs_N.grad is not None
    assert_close(logprobs_N.grad, rows([1 - math.exp(-0.5), 1 - math.exp(1.0)]), **EXACT)


def test_token_rewards_by_hand() -> None:
    """The score of a toy reward model that knows where it stands: 10 times the place of the last token."""
    kl_ST, mask_ST = by_position(rows([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])[0], [2, 1, 3])
    rewards_ST = token_rewards(rows([10.0, 0.0, 20.0])[0], kl_ST, mask_ST, 0.1)
    expected_ST = rows([-0.1, -0.2 + 10.0, 0.0], [-0.3, 0.0, 0.0], [-0.4, -0.5, -0.6 + 20.0])
    assert_close(rewards_ST, expected_ST, **EXACT)
    assert_close(token_rewards(rows([10.0, 0.0, 20.0])[0], kl_ST / mask_ST, mask_ST, 0.1), expected_ST, **EXACT)


def test_rewards_of_tokens_by_hand() -> None:
    """Scores 10 and 4 include 2 + 3 and 5 at single tokens; the rest, 5 and -1, is at the last token."""
    kl_ST, mask_ST = by_position(rows([1.0, 2.0, 3.0, 4.0, 5.0])[0], [3, 2])
    given_ST, _ = by_position(rows([2.0, 0.0, 3.0, 5.0, 0.0])[0], [3, 2])
    rewards_ST = token_rewards(rows([10.0, 4.0])[0], kl_ST, mask_ST, 0.1, given_ST)
    assert_close(rewards_ST, rows([1.9, -0.2, 3 - 0.3 + 5], [5 - 0.4, -0.5 - 1, 0.0]), **EXACT)
    # without values, gamma 1 and lambda 1: the rewards to come
    advantages_ST, _ = gae(rewards_ST, torch.zeros_like(rewards_ST), mask_ST, gamma=1.0, lam=1.0)
    assert_close(advantages_ST, rows([9.4, 7.5, 7.7], [3.1, -1.5, 0.0]), rtol=0, atol=1e-5)


def test_gae_by_hand() -> None:
    """Rewards 1, 2 and values 0.5, 1; behind them nothing, or a cut response that is worth 4."""
    mask_ST = torch.tensor([[True, True, False]])
    arguments = (rows([1.0, 2.0, 9.0]), rows([0.5, 1.0, 9.0]), mask_ST)
    advantages_ST, returns_ST = gae(*arguments, gamma=0.5, lam=0.5)
    # deltas 1 + 0.5 * 1 - 0.5 = 1 and 2 - 1 = 1; A_0 = 1 + 0.25 * 1
    assert_close(advantages_ST, rows([1.25, 1.0, 0.0]), **EXACT)
    assert_close(returns_ST, rows([1.75, 2.0, 0.0]), **EXACT)
    advantages_ST, returns_ST = gae(*arguments, gamma=0.5, lam=0.5, last_values_S=rows([4.0])[0])
    # the last delta is 2 + 0.5 * 4 - 1 = 3; A_0 = 1 + 0.25 * 3
    assert_close(advantages_ST, rows([1.75, 3.0, 0.0]), **EXACT)
    assert_close(returns_ST, rows([2.25, 4.0, 0.0]), **EXACT)


@pytest.mark.parametrize("bootstrap", [False, True])
def test_gae_is_the_definition(bootstrap: bool) -> None:
    """A_t = sum over l of (gamma lam)^l delta_{t+l}; what stands in the padding changes nothing."""
    for rng, lengths, rewards_ST, values_ST, mask_ST in rollouts():
        gamma, lam = rng.choice([1.0, 0.9, rng.random(), 0.0]), rng.choice([1.0, 0.95, rng.random(), 0.0])
        last = [rng.gauss(0, 1) if bootstrap else 0.0 for _ in lengths]
        advantages_ST, returns_ST = gae(
            rewards_ST, values_ST, mask_ST, gamma=gamma, lam=lam, last_values_S=rows(last)[0] if bootstrap else None
        )
        expected_ST = torch.zeros_like(rewards_ST)
        for s, length in enumerate(lengths):
            rewards, values = rewards_ST[s, :length].tolist(), [*values_ST[s, :length].tolist(), last[s]]
            deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(length)]
            for t in range(length):
                expected_ST[s, t] = sum((gamma * lam) ** m * deltas[t + m] for m in range(length - t))
        assert_close(advantages_ST, expected_ST, **EXACT)
        assert_close(returns_ST, expected_ST + torch.where(mask_ST, values_ST, 0.0), **EXACT)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_is_the_definition(shift_mean: bool) -> None:
    """In float32, too, where values far from zero keep few digits of their distance to the mean."""
    for rng, _, values_ST, _, mask_ST in rollouts():
        values_ST = (values_ST + rng.choice([0.0, 1e4])).float()
        whitened_ST = whiten(values_ST, mask_ST, shift_mean=shift_mean)
        tokens = values_ST[mask_ST].tolist()
        mean, deviation = statistics.fmean(tokens), math.sqrt(statistics.pvariance(tokens) + 1e-8)
        expected = [(x - mean) / deviation + (0.0 if shift_mean else mean) for x in tokens]
        assert_close(whitened_ST[mask_ST], torch.tensor(expected), rtol=1e-6, atol=1e-6)
        assert whitened_ST.dtype == torch.float32 and not whitened_ST[~mask_ST].any()
        counted = [x.item() for x in moments(values_ST, mask_ST)]
        assert counted == pytest.approx([mean, statistics.pvariance(tokens)], rel=1e-9)
        assert [x.item() for x in moments(values_ST[mask_ST])] == counted


def test_whitening_of_one_token_and_of_none() -> None:
    one_ST, mask_ST = by_position(torch.tensor([0.3]), [1])
    assert whiten(one_ST, mask_ST).item() == 0.0
    assert whiten(one_ST, mask_ST, shift_mean=False).item() == one_ST.item()
    nothing_ST, mask_ST = torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.bool)
    assert whiten(nothing_ST, mask_ST).eq(0).all() and whiten(nothing_ST, mask_ST, shift_mean=False).eq(0).all()
    assert [(x.item(), x.dtype) for x in moments(nothing_ST, mask_ST)] == [(0, torch.float64), (1, torch.float64)]


def test_equal_values_are_whitened_to_zero() -> None:
    """In float32 the mean of many 0.1 is not 0.1."""
    for number in range(1, 300, 7):
        values_ST = torch.full((1, number), 0.1)
        assert not whiten(values_ST, torch.ones(1, number, dtype=torch.bool)).any()


def test_advantages_of_groups_are_the_definition() -> None:
    rng = random.Random(0)
    for group in (2, 3, 4, 8):
        scores_PG = torch.tensor([[rng.gauss(0, 3) for _ in range(group)] for _ in range(5)])
        deviations, scaled, against_others = [], [], []
        for scores in scores_PG.tolist():
            mean, deviation = statistics.fmean(scores), statistics.stdev(scores)
            deviations.append([x - mean for x in scores])
            scaled.append([(x - mean) / (deviation + 0.5) for x in scores])
            others = [statistics.fmean(scores[:g] + scores[g + 1 :]) for g in range(group)]
            against_others.append([x - other for x, other in zip(scores, others, strict=True)])
        assert_close(group_advantages(scores_PG, scale=False), torch.tensor(deviations))
        assert_close(group_advantages(scores_PG, scale=True, eps=0.5), torch.tensor(scaled))
        assert_close(leave_one_out(scores_PG), torch.tensor(against_others))
    with pytest.raises(ValueError, match="got 1"):
        leave_one_out(torch.ones(4, 1))


@pytest.mark.parametrize("scale", [False, True])
def test_equal_scores_teach_nothing(scale: bool) -> None:
    for group in (1, 3, 7, 8):
        scores_PG = torch.tensor([[0.1], [-3.3], [1e6]]).expand(3, group)
        assert not group_advantages(scores_PG, scale=scale).any()
        assert group == 1 or not leave_one_out(scores_PG).any()


@pytest.mark.parametrize(("kl", "error"), [(6.6, 0.1), (5.4, -0.1), (60.0, 0.2), (-1.0, -0.2), (6.0, 0.0)])
def test_the_kl_coefficient_follows_the_kl(kl: float, error: float) -> None:
    coeff = next_kl_coeff(0.1, kl, target=6.0, horizon=10_000, num_responses=512)
    assert coeff == pytest.approx(0.1 * (1 + error * 512 / 10_000), rel=1e-12)
