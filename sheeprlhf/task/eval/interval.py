"""Confidence intervals of means over rows: the bootstrap of all evaluations.

Letters: N rows, M columns.
"""

import numpy as np

NUM_RESAMPLES = 1000


def mean_and_interval(values_NM: np.ndarray, *, seed: int) -> np.ndarray:
    """Means over rows and their 95 % intervals, by a percentile bootstrap that draws the same rows for all columns.

    Args:
        values_NM: (N, M) one value a row and column, N >= 1.
        seed: of the draws.

    Returns:
        (3, M): mean, lower and upper end.
    """
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
