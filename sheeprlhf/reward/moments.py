"""The running mean and variance of all scores of a run."""

import math
from typing import Any

SMALLEST_DEVIATION = 1e-8


class RunningMoments:
    """Count, mean and sum of squared differences from the mean of all numbers seen so far, as plain floats.

    Batches are merged by the rule of Chan, Golub and LeVeque (1979), with sums rounded once (`math.fsum`). The same
    batches in the same order give the same bits, also when `to_dict` and JSON were in between.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    def update(self, values: list[float]) -> None:
        """Take the numbers of one more batch in."""
        if not values:
            return
        count = len(values)
        mean = math.fsum(values) / count
        m2 = math.fsum((value - mean) ** 2 for value in values)
        total = self.count + count
        apart = mean - self.mean
        self.m2 += m2 + apart * apart * self.count * count / total
        self.mean += apart * count / total
        self.count = total

    @property
    def deviation(self) -> float:
        """The standard deviation of all numbers (their count in the denominator); 0.0 if there are none."""
        return math.sqrt(self.m2 / self.count) if self.count else 0.0

    def normalized(self, value: float) -> float:
        """How many standard deviations the number lies above the mean; unchanged while none was seen."""
        return (value - self.mean) / max(self.deviation, SMALLEST_DEVIATION) if self.count else value

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON gives back the same floats."""
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "RunningMoments":
        """The moments that `to_dict` gave."""
        moments = cls()
        moments.count, moments.mean, moments.m2 = int(saved["count"]), float(saved["mean"]), float(saved["m2"])
        return moments
