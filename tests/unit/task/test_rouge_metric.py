"""ROUGE against numbers worked out by hand and rouge-score itself; without a network or a file; its intervals."""

import random
import socket
import tempfile
from pathlib import Path

import evaluate
import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from sheeprlhf.task.eval.rouge import ROUGE_TYPES, Rouge
from sheeprlhf.task.eval.statistics import mean_and_interval

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
