"""The figures of a reward model against numbers worked out by hand."""

import math
from typing import Any

import numpy as np
import pytest

from sheeprlhf.data.example import Example
from sheeprlhf.task.eval.preference import accuracy_by_subset
from sheeprlhf.task.eval.statistics import calibration, calibration_error, correlation, pair_figures


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
