"""Statistics of evaluations. Letters: N rows, M columns, P pairs with the better response first."""

import math
from typing import Any

import numpy as np

NUM_RESAMPLES = 1000
BINS = 10


def mean_and_interval(values_NM: np.ndarray, *, seed: int) -> np.ndarray:
    """(3, M) mean, lower and upper end of a 95 % percentile bootstrap over N >= 1 rows, alike for all columns."""
    means = resampled(values_NM, seed=seed)
    return np.vstack([values_NM.mean(axis=0), np.percentile(means, [2.5, 97.5], axis=0)])


def resampled(values_NM: np.ndarray, *, seed: int) -> np.ndarray:
    """(NUM_RESAMPLES, M) means over rows drawn with replacement, the same for all columns; arguments as above."""
    num_rows = len(values_NM)
    rng = np.random.default_rng(seed)
    draws = (np.bincount(rng.integers(0, num_rows, num_rows), minlength=num_rows) for _ in range(NUM_RESAMPLES))
    return np.stack([counts @ values_NM / num_rows for counts in draws])


def interval_of(values_N: np.ndarray, *, seed: int) -> tuple[float, list[float]]:
    """The mean of (N,) values and the ends of its interval."""
    mean, low, high = mean_and_interval(np.asarray(values_N, dtype=np.float64)[:, None], seed=seed)[:, 0].tolist()
    return mean, [low, high]


def standard_error(values_N: np.ndarray) -> float | None:
    """Of the mean; None of a single value."""
    return float(values_N.std(ddof=1) / np.sqrt(len(values_N))) if len(values_N) > 1 else None


def pair_figures(chosen_P: np.ndarray, rejected_P: np.ndarray, longer_P: np.ndarray) -> dict[str, Any]:
    """Accuracy, margin and what length has to do with them.

    Args:
        chosen_P: scores of the better responses.
        rejected_P: scores of the worse ones.
        longer_P: tokens that the better response has more than the worse one (negative: fewer).

    Returns:
        pairs; loss: mean -log sigmoid(margin); accuracy: share of pairs whose better response scores higher, half a
        point for equal scores; margin: mean; accuracy_by_length: the same for pairs whose better response is shorter,
        equally long and longer, and how many these are; length_correlation: Pearson's, between the difference in
        length and in score; a model that only likes length has 1 and is near 0 right where the better one is shorter.
    """
    margin_P = chosen_P - rejected_P
    right_P = (margin_P > 0) + 0.5 * (margin_P == 0)
    kinds = {"shorter": longer_P < 0, "equal": longer_P == 0, "longer": longer_P > 0}
    return {
        "pairs": len(margin_P),
        "loss": float(np.logaddexp(0.0, -margin_P).mean()),
        "accuracy": float(right_P.mean()),
        "margin": float(margin_P.mean()),
        "score_chosen": float(chosen_P.mean()),
        "score_rejected": float(rejected_P.mean()),
        "accuracy_by_length": {
            kind: {"pairs": int(mask.sum()), "accuracy": float(right_P[mask].mean()) if mask.any() else None}
            for kind, mask in kinds.items()
        },
        "length_correlation": correlation(longer_P, margin_P),
    }


def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's; None if either does not vary."""
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
    return float((x * y).sum()) / size if size > 0 else None


def calibration(margin_P: np.ndarray, bins: int = BINS) -> list[dict[str, float]]:
    """Accuracy by confidence: a row for each part of [0.5, 1] that has pairs.

    The model calls the response with the higher score better, with probability sigmoid(|margin|).

    Returns:
        Rows of low and high (limits of the probability), pairs, predicted (mean probability) and right (share).
    """
    sure_P = 1.0 / (1.0 + np.exp(-np.abs(margin_P)))
    right_P = (margin_P > 0) + 0.5 * (margin_P == 0)
    edges = np.linspace(0.5, 1.0, bins + 1)
    place_P = np.clip(np.digitize(sure_P, edges) - 1, 0, bins - 1)
    rows = []
    for number in range(bins):
        inside = place_P == number
        if inside.any():
            rows.append(
                {
                    "low": float(edges[number]),
                    "high": float(edges[number + 1]),
                    "pairs": int(inside.sum()),
                    "predicted": float(sure_P[inside].mean()),
                    "right": float(right_P[inside].mean()),
                }
            )
    return rows


def calibration_error(rows: list[dict[str, float]]) -> float:
    """Mean distance between predicted and right, weighted by pairs (Guo et al., arXiv 1706.04599, eq. 3)."""
    total = sum(row["pairs"] for row in rows)
    return sum(row["pairs"] * abs(row["predicted"] - row["right"]) for row in rows) / total
