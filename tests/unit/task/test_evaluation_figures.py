"""Figures of evaluations against numbers worked out by hand and against rouge-score."""

import math
import random
import socket
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import evaluate
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from rouge_score.rouge_scorer import RougeScorer

from sheeprlhf.data.example import Example
from sheeprlhf.rollout.rollout import Rollout
from sheeprlhf.task.eval.load import Answers, kl_of_responses
from sheeprlhf.task.eval.preference import accuracy_by_subset, pairs_of_rows
from sheeprlhf.task.eval.result import (
    calibration,
    calibration_error,
    correlation,
    interval_of,
    mean_and_interval,
    pair_figures,
    resampled,
    standard_error,
)
from sheeprlhf.task.eval.reward import RewardModelAccuracy, expected_best
from sheeprlhf.task.eval.rouge import ROUGE_TYPES, Rouge

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


def test_figures_by_hand() -> None:
    chosen, rejected = np.array([2.0, 0.0, 1.0, 1.0]), np.array([0.0, 1.0, 1.0, 0.0])
    figures = pair_figures(chosen, rejected, np.array([3, -1, 0, 2]))
    assert figures["pairs"] == 4
    assert figures["accuracy"] == 2.5 / 4  # equal scores count half
    assert figures["margin"] == pytest.approx((2 - 1 + 0 + 1) / 4)
    losses = [math.log(1 + math.exp(-margin)) for margin in (2, -1, 0, 1)]
    assert figures["loss"] == pytest.approx(sum(losses) / 4, abs=1e-12)
    assert figures["accuracy_by_length"] == {
        "shorter": {"pairs": 1, "accuracy": 0.0},
        "equal": {"pairs": 1, "accuracy": 0.5},
        "longer": {"pairs": 2, "accuracy": 1.0},
    }


def test_accuracy_by_the_values_of_a_column() -> None:
    """Three responses are three pairs; equal scores count half and are told; the last row is not read."""
    subsets = ("math", "chat", 7, "chat")
    sizes = (2, 3, 2, 2)
    response = np.array([1], np.int32)
    rows = [
        Example(i, response, (response,) * size, columns={"subset": name})
        for i, (name, size) in enumerate(zip(subsets, sizes, strict=True))
    ]
    split: Any = type("Split", (), {"examples": lambda self, at: [rows[i] for i in at], "__len__": lambda self: 4})()
    found = accuracy_by_subset(split, "subset", np.array([1.0, 1.0, 0.5, 0.0, 0.5]), 3)
    assert found == {
        "7": {"pairs": 1, "accuracy": 0.5, "ties": 1},
        "chat": {"pairs": 3, "accuracy": 0.5, "ties": 1},
        "math": {"pairs": 1, "accuracy": 1.0, "ties": 0},
    }


def test_a_model_that_scores_only_length_is_reported() -> None:
    longer = np.array([5, -3, 2, -4, 1])
    figures = pair_figures(longer.astype(float), np.zeros(5), longer)
    assert figures["length_correlation"] == pytest.approx(1.0)
    assert figures["accuracy_by_length"]["shorter"]["accuracy"] == 0.0
    assert figures["accuracy_by_length"]["equal"] == {"pairs": 0, "accuracy": None}
    assert correlation(np.ones(3), np.arange(3.0)) is None


def test_calibration_by_hand() -> None:
    sure = math.log(0.93 / 0.07)  # sigmoid = 0.93
    rows = calibration(np.array([sure, sure, sure, -sure, 0.01]))
    assert [(row["low"], row["high"], row["pairs"]) for row in rows] == [
        (pytest.approx(0.5), pytest.approx(0.55), 1),
        (pytest.approx(0.9), pytest.approx(0.95), 4),
    ]
    assert rows[1]["predicted"] == pytest.approx(0.93) and rows[1]["right"] == 0.75
    first = 1 / (1 + math.exp(-0.01))
    assert calibration_error(rows) == pytest.approx((4 * 0.18 + 1 - first) / 5)
    assert calibration(np.array([50.0]))[0]["high"] == 1.0  # as sure as can be


BY_HAND = [  # prediction, reference, F-measures of ROUGE-1, -2, -L, -Lsum
    # the, cat, on, mat are shared (4 of 6 and 6); of 5 and 5 pairs, "the cat"; in order: the cat on mat
    ("The cat sat on the mat.", "the cat lay on a mat", [2 / 3, 1 / 5, 2 / 3, 2 / 3]),
    # all 4 words and 2 of 3 pairs; in order 2; each line of the reference is somewhere in the prediction
    ("a b\nc d", "c d\na b", [1.0, 2 / 3, 1 / 2, 1.0]),
    # 2 of 2 words are in the reference's 4: precision 1, recall 1/2; 1 pair of 1 and of 3
    ("parse it", "parse it and return", [2 / 3, 1 / 2, 2 / 3, 2 / 3]),
    ("returns values", "return value", [0.0, 0.0, 0.0, 0.0]),
    ("", "return value", [0.0, 0.0, 0.0, 0.0]),
    ("...", "!?", [0.0, 0.0, 0.0, 0.0]),
]


@pytest.mark.parametrize(("prediction", "reference", "expected"), BY_HAND)
def test_numbers_worked_out_by_hand(prediction: str, reference: str, expected: list[float]) -> None:
    scores = Rouge().compute(predictions=[prediction], references=[reference])
    assert [scores[name] for name in ROUGE_TYPES] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("use_stemmer", [False, True])
def test_rows_are_those_of_rouge_score_and_their_mean(use_stemmer: bool) -> None:
    rng = random.Random(0)
    words = "return returns the a value values\n of file files read\n reads é 42".split(" ")
    texts = [" ".join(rng.choices(words, k=rng.randrange(12))) for _ in range(400)]
    predictions, references = texts[:200], texts[200:]
    metric = Rouge()
    rows = metric.compute(predictions=predictions, references=references, use_stemmer=use_stemmer, use_aggregator=False)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=use_stemmer)
    for number, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        expected = scorer.score(target=reference, prediction=prediction)
        assert {name: rows[name][number] for name in ROUGE_TYPES} == {k: v.fmeasure for k, v in expected.items()}
    metric.add_batch(predictions=predictions, references=references)  # the other way to use an evaluate.Metric, again
    means = metric.compute(use_stemmer=use_stemmer)
    assert means == pytest.approx({name: sum(values) / 200 for name, values in rows.items()}, abs=1e-12)


def test_an_interval_is_that_of_the_mean_and_repeats() -> None:
    """Against the normal approximation, mean +- 1.96 s / sqrt(n), good to a few percent of its width."""
    values_NM = np.random.default_rng(1).normal([10.0, 50.0], [2.0, 5.0], (400, 2))
    result = mean_and_interval(values_NM, seed=0)
    half_M = 1.96 * values_NM.std(axis=0) / 20
    expected = np.stack([values_NM.mean(axis=0), values_NM.mean(axis=0) - half_M, values_NM.mean(axis=0) + half_M])
    assert np.abs(result[0] - expected[0]).max() < 1e-12
    assert (np.abs(result[1:] - expected[1:]) < 0.12 * half_M).all()
    assert (mean_and_interval(values_NM, seed=0) == result).all()
    assert (mean_and_interval(values_NM, seed=1)[1:] != result[1:]).all()


def test_columns_are_drawn_together() -> None:
    """Two columns that differ by 1 in every row: the interval of their difference has no width."""
    values_N = np.random.default_rng(2).normal(size=50)
    result = mean_and_interval(np.stack([values_N, values_N + 1], axis=1), seed=0)
    assert np.abs(result[:, 1] - result[:, 0] - 1).max() < 1e-12
    assert mean_and_interval(np.array([[3.0]]), seed=0).tolist() == [[3.0], [3.0], [3.0]]


def test_it_needs_no_network_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*words: object, **options: object) -> None:
        raise AssertionError(f"asks the network: {words}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "metrics"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert Rouge().compute(predictions=["a b"], references=["b a"])["rouge1"] == 1.0
    assert list(tmp_path.iterdir()) == []
