"""The figures of evaluations against definitions that are slow: all choices of n, all pairs, a mean of ratios."""

import math
from itertools import combinations
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from sheeprlhf.data.example import Example
from sheeprlhf.rollout.rollout import Rollout
from sheeprlhf.task.eval.frontier import expected_best
from sheeprlhf.task.eval.load import Answers, kl_of_responses
from sheeprlhf.task.eval.preference import pairs_of_rows
from sheeprlhf.task.eval.reward import RewardModelAccuracy
from sheeprlhf.task.eval.statistics import interval_of, mean_and_interval, resampled, standard_error

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7])
def test_the_expected_best_is_the_mean_over_all_choices(n: int) -> None:
    scores_PK = RNG.normal(size=(5, 7)).round(1)  # with ties
    expected = [np.mean([max(chosen) for chosen in combinations(row, n)]) for row in scores_PK.tolist()]
    assert_allclose(expected_best(scores_PK, n), expected, rtol=0, atol=1e-12)


def test_the_expected_best_of_many_stays_finite_and_unbiased() -> None:
    """Of 64 uniform numbers: n / (n + 1) for the best of n, within four standard errors of 4,000 prompts."""
    scores_PK = RNG.random((4000, 64))
    for n in (1, 8, 64):
        best_P = expected_best(scores_PK, n)
        assert abs(best_P.mean() - n / (n + 1)) < 4 * best_P.std() / math.sqrt(4000)


def test_pairs_of_rows_with_two_and_three_responses() -> None:
    scores = np.array([5.0, 4.0, 1.0, 2.0, 3.0])
    sizes = np.array([[7, 9, -1], [3, 1, 2]])
    chosen, rejected, longer = pairs_of_rows(scores, sizes)
    assert chosen.tolist() == [5, 1, 1, 2]
    assert rejected.tolist() == [4, 2, 3, 3]
    assert longer.tolist() == [-2, 2, 1, -1]
    assert pairs_of_rows(scores[:2], sizes, 1)[0].tolist() == [5]


def test_kl_is_summed_over_the_tokens_of_each_response() -> None:
    ids = np.arange(3, dtype=np.int32)
    rows = (Example(0, ids, (ids[:2], ids[:1])), Example(1, ids, (ids[:3], ids[:1])))
    rollout = Rollout(rows, np.zeros((2, 2)), np.ones((2, 2), bool), {})
    policy = torch.tensor([-1.0, -2.0, -3.0, -0.5, -0.25, -1.0, -4.0])
    start = torch.tensor([-1.5, -1.0, -3.0, -1.0, -1.0, -1.0, -2.0])
    answers = Answers(rollout, cast(Any, None), cast(Any, None))
    assert kl_of_responses(answers, policy, start).tolist() == [-0.5, 0.0, 1.25, -2.0]


def test_one_helper_makes_all_intervals() -> None:
    values_N = RNG.normal(3.0, 2.0, 50)
    mean, (low, high) = interval_of(values_N, seed=4)
    assert [mean, low, high] == mean_and_interval(values_N[:, None], seed=4)[:, 0].tolist()
    assert standard_error(values_N) == pytest.approx(values_N.std() * math.sqrt(50 / 49) / math.sqrt(50), abs=1e-12)
    assert standard_error(values_N[:1]) is None
    drawn = resampled(np.stack([values_N, 2 * values_N], axis=1), seed=4)
    assert_allclose(drawn[:, 1], 2 * drawn[:, 0])


@pytest.mark.parametrize(("interval", "chance"), [([0.4, 0.6], True), ([0.5, 0.7], True), ([0.51, 0.7], False)])
def test_a_judge_that_a_coin_equals_is_known(interval: list[float], chance: bool) -> None:
    assert RewardModelAccuracy(0.55, interval, 40).at_chance() is chance
