"""Rewards, advantages and whitening against hand-computed numbers and against loops over the definitions."""

import math
import random
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
NUM_CASES = 200


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rollouts() -> Iterator[tuple[random.Random, list[int], Tensor, Tensor, Tensor]]:
    """Lengths, rewards, values and mask of random responses; the padding is not a number."""
    for seed in range(NUM_CASES):
        rng, torch_rng = random.Random(seed), torch.Generator().manual_seed(seed)
        lengths = [rng.randint(1, 7) for _ in range(rng.randint(1, 4))]
        num_tokens = sum(lengths)
        rewards_ST, mask_ST = by_position(torch.randn(num_tokens, generator=torch_rng, dtype=torch.float64), lengths)
        values_ST, _ = by_position(torch.randn(num_tokens, generator=torch_rng, dtype=torch.float64), lengths)
        yield rng, lengths, *(x.masked_fill(~mask_ST, math.nan) for x in (rewards_ST, values_ST)), mask_ST


def test_by_position_pads_behind_the_last_token() -> None:
    values_ST, mask_ST = by_position(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), [2, 1, 3])
    assert values_ST.tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6]]
    assert mask_ST.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert mask_ST.dtype == torch.bool


def test_by_position_keeps_the_order() -> None:
    rng = random.Random(0)
    for _ in range(NUM_CASES):
        lengths = [rng.randint(0, 6) for _ in range(rng.randint(1, 5))]
        values_N = torch.randn(sum(lengths))
        values_ST, mask_ST = by_position(values_N, lengths)
        assert torch.equal(values_ST[mask_ST], values_N)
        assert mask_ST.sum(1).tolist() == lengths
        assert not values_ST[~mask_ST].any()


@pytest.mark.parametrize(("number", "lengths"), [(5, [2, 2]), (3, [2, 2]), (1, [2, 1])])
def test_by_position_wants_all_values(number: int, lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=f"{number} values for responses of {sum(lengths)} tokens"):
        by_position(torch.ones(number), lengths)


def test_kl_estimates_by_hand() -> None:
    logprobs_N, reference_N = rows([-1.0, -2.0, -0.5]), rows([-1.5, -1.0, -0.5])
    assert_close(kl_estimates(logprobs_N, reference_N, "k1"), rows([0.5, -1.0, 0.0]), **EXACT)
    expected_N = rows([math.exp(-0.5) - 0.5, math.exp(1.0) - 2.0, 0.0])
    assert_close(kl_estimates(logprobs_N, reference_N, "k3"), expected_N, **EXACT)
    with pytest.raises(ValueError, match="'k2' is none of k1, k3"):
        kl_estimates(logprobs_N, reference_N, "k2")


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_mean_of_the_estimates_is_the_kl(kind: str) -> None:
    """Over all tokens, each as often as the policy samples it."""
    torch.manual_seed(0)
    policy_BV, reference_BV = torch.randn(2, NUM_CASES, 12, dtype=torch.float64).log_softmax(-1)
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


def test_token_rewards_are_the_definitions() -> None:
    for rng, lengths, kl_ST, _, mask_ST in rollouts():
        scores_S = rows([rng.gauss(0, 3) for _ in lengths])[0]
        rewards_ST = token_rewards(scores_S, kl_ST, mask_ST, 0.3)
        for s, length in enumerate(lengths):
            for t in range(mask_ST.shape[1]):
                expected = -0.3 * kl_ST[s, t].item() + (scores_S[s].item() if t == length - 1 else 0.0)
                assert rewards_ST[s, t].item() == pytest.approx(expected if t < length else 0.0, abs=1e-12)
        assert_close(rewards_ST.sum(1), scores_S - 0.3 * kl_ST.nansum(1), **EXACT)


def test_identical_policies_are_paid_the_score_alone() -> None:
    logprobs_N = -torch.rand(9)
    kl_ST, mask_ST = by_position(kl_estimates(logprobs_N, logprobs_N.clone(), "k1"), [4, 5])
    rewards_ST = token_rewards(torch.tensor([1.5, -2.0]), kl_ST, mask_ST, 0.05)
    assert rewards_ST.tolist() == [[0, 0, 0, 1.5, 0], [0, 0, 0, 0, -2.0]]


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
        last_values_S = rows(last)[0] if bootstrap else None
        advantages_ST, returns_ST = gae(
            rewards_ST, values_ST, mask_ST, gamma=gamma, lam=lam, last_values_S=last_values_S
        )
        expected_ST = torch.zeros_like(rewards_ST)
        for s, length in enumerate(lengths):
            rewards, values = rewards_ST[s, :length].tolist(), [*values_ST[s, :length].tolist(), last[s]]
            deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(length)]
            for t in range(length):
                expected_ST[s, t] = sum((gamma * lam) ** m * deltas[t + m] for m in range(length - t))
        assert_close(advantages_ST, expected_ST, **EXACT)
        assert_close(returns_ST, expected_ST + torch.where(mask_ST, values_ST, 0.0), **EXACT)


def test_gae_at_both_ends_of_lambda() -> None:
    for _, lengths, rewards_ST, values_ST, mask_ST in rollouts():
        _, returns_ST = gae(rewards_ST, values_ST, mask_ST, gamma=1.0, lam=1.0)
        assert_close(returns_ST[:, 0], rewards_ST.nansum(1), **EXACT)  # all that is paid, whatever the critic says
        advantages_ST, _ = gae(rewards_ST, values_ST, mask_ST, gamma=1.0, lam=0.0)
        for s, length in enumerate(lengths):
            last = length - 1
            assert_close(advantages_ST[s, last], rewards_ST[s, last] - values_ST[s, last], **EXACT)


def test_moments_by_hand() -> None:
    mask = torch.tensor([True, True, False, True])
    assert [x.item() for x in moments(rows([1.0, 2.0, math.nan, 6.0])[0], mask)] == [3.0, pytest.approx(14 / 3)]
    assert [x.item() for x in moments(rows([1.0, 2.0, 6.0]))] == [3.0, pytest.approx(14 / 3)]
    assert [x.item() for x in moments(torch.tensor([5.0]))] == [5.0, 0.0]
    assert [x.item() for x in moments(torch.ones(3), torch.zeros(3, dtype=torch.bool))] == [0.0, 1.0]
    assert moments(torch.ones(3))[0].dtype == torch.float64


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_is_the_definition(shift_mean: bool) -> None:
    for _, lengths, values_ST, _, mask_ST in rollouts():
        whitened_ST = whiten(values_ST, mask_ST, shift_mean=shift_mean)
        tokens = [values_ST[s, t].item() for s, length in enumerate(lengths) for t in range(length)]
        mean = sum(tokens) / len(tokens)
        variance = sum((x - mean) ** 2 for x in tokens) / len(tokens)
        expected = [(x - mean) / math.sqrt(variance + 1e-8) + (0.0 if shift_mean else mean) for x in tokens]
        assert_close(whitened_ST[mask_ST], rows(expected)[0], rtol=0, atol=1e-10)
        assert not whitened_ST[~mask_ST].any()


def test_whitening_of_one_token_and_of_none() -> None:
    one_ST, mask_ST = by_position(torch.tensor([0.3]), [1])
    assert whiten(one_ST, mask_ST).item() == 0.0
    assert whiten(one_ST, mask_ST, shift_mean=False).item() == one_ST.item()
    nothing_ST, mask_ST = torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.bool)
    assert whiten(nothing_ST, mask_ST).eq(0).all() and whiten(nothing_ST, mask_ST, shift_mean=False).eq(0).all()


def test_equal_values_are_whitened_to_zero() -> None:
    """In float32 the mean of many 0.1 is not 0.1."""
    for number in range(1, 300):
        values_ST = torch.full((1, number), 0.1)
        assert not whiten(values_ST, torch.ones(1, number, dtype=torch.bool)).any()


def test_group_advantages_by_hand() -> None:
    """Scores 1, 2, 6 are 3 on average; the standard deviation of the sample is sqrt(14 / 2)."""
    scores_PG = rows([1.0, 2.0, 6.0], [4.0, 4.0, 4.0])
    assert_close(group_advantages(scores_PG, scale=False), rows([-2.0, -1.0, 3.0], [0.0, 0.0, 0.0]), **EXACT)
    std = math.sqrt(7.0)
    expected_PG = rows([-2.0, -1.0, 3.0], [0.0, 0.0, 0.0]) / (std + 1e-4)
    assert_close(group_advantages(scores_PG, scale=True), expected_PG, **EXACT)
    assert_close(group_advantages(scores_PG, scale=True, eps=1.0), expected_PG * (std + 1e-4) / (std + 1.0), **EXACT)


@pytest.mark.parametrize("scale", [False, True])
def test_equal_scores_teach_nothing(scale: bool) -> None:
    for group in (1, 3, 7, 8):
        scores_PG = torch.tensor([[0.1], [-3.3], [1e6]]).expand(3, group)
        assert not group_advantages(scores_PG, scale=scale).any()
        assert group == 1 or not leave_one_out(scores_PG).any()


def test_leave_one_out_by_hand() -> None:
    """1 - (2 + 6) / 2, 2 - (1 + 6) / 2 and 6 - (1 + 2) / 2."""
    assert_close(leave_one_out(rows([1.0, 2.0, 6.0])), rows([-3.0, -1.5, 4.5]), **EXACT)
    with pytest.raises(ValueError, match="needs 2 responses per prompt, got 1"):
        leave_one_out(torch.ones(4, 1))


def test_leave_one_out_is_a_multiple_of_the_deviation() -> None:
    for group in range(2, 9):
        scores_PG = torch.randn(5, group, dtype=torch.float64)
        expected_PG = group / (group - 1) * group_advantages(scores_PG, scale=False)
        assert_close(leave_one_out(scores_PG), expected_PG, **EXACT)


@pytest.mark.parametrize(("kl", "error"), [(6.6, 0.1), (5.4, -0.1), (60.0, 0.2), (-1.0, -0.2), (6.0, 0.0)])
def test_the_kl_coefficient_follows_the_kl(kl: float, error: float) -> None:
    coeff = next_kl_coeff(0.1, kl, target=6.0, horizon=10_000, num_responses=512)
    assert coeff == pytest.approx(0.1 * (1 + error * 512 / 10_000), rel=1e-12)
