"""What an evaluation's file says: numbers by name, with their intervals, and lists of points."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from sheeprlhf.apps.report.html import NONE, Html, element, figure_text, join
from sheeprlhf.apps.terminal import clean

_FACTS = ("task", "split", "data", "model", "weights", "experiment_dir", "time", "version", "seed", "generation")
_HEADLINES = ("perplexity", "rougeL", "accuracy", "score", "win rate", "rm accuracy")  # the numbers that tell most
_INTERVAL = "_interval"  # the ending of a key whose value is that of the key without it
_MAX_NUMBERS = 60
_MAX_POINTS = 80
_MAX_COLUMNS = 12

Points = list[dict[str, Any]]


class Evaluation(NamedTuple):
    """One result file.

    Attributes:
        title: what was measured on what: "rouge on docstrings/test", "reward by length on docstrings/test".
        weights: of which weights.
        numbers: by name; behind it its interval, if it has one.
        lists: points by name, such as those of a calibration.
    """

    title: str
    weights: str
    numbers: dict[str, tuple[float, ...]]
    lists: dict[str, Points]

    def headline(self) -> str:
        """The numbers that tell most, if there are some."""
        names = [name for name in _HEADLINES if name in self.numbers]
        return ", ".join(f"{name} {figure_text(self.numbers[name][0])}" for name in names) or NONE


def parse_evaluation(stem: str, record: dict[str, Any]) -> Evaluation:
    """A result file.

    Args:
        stem: its name without the ending: <task>-<split>-<weights>, or <task>-<judge>-<split>-<weights>.
        record: its content.
    """
    task, data, split, weights = (clean(record.get(key, "?"), 24) for key in ("task", "data", "split", "weights"))
    judge = clean(stem.removesuffix(f"-{weights}").removesuffix(f"-{split}"), 40).removeprefix(f"{task}-")
    by = f" by {judge}" if judge != task and stem.startswith(f"{task}-") else ""
    told = {key: value for key, value in record.items() if key not in _FACTS}
    numbers: dict[str, tuple[float, ...]] = {}
    for name, values in _numbers(told, ""):
        if name in numbers or len(numbers) < _MAX_NUMBERS:
            numbers[name] = values
    lists = {clean(key.replace("_", " "), 50): value[:_MAX_POINTS] for key, value in told.items() if _is_points(value)}
    return Evaluation(f"{task}{by} on {data}/{split}", weights, numbers, lists)


def _numbers(tree: dict[str, Any], prefix: str, depth: int = 0) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Numbers by name; those of the model, beside which there may be baselines, have no prefix."""
    for key, value in tree.items():
        name, interval = clean(f"{prefix}{key}".replace("_", " "), 50), tree.get(f"{key}{_INTERVAL}")
        if isinstance(value, dict) and depth < 3:
            inner = prefix if key in ("mean_low_high", "model") else f"{prefix}{key} "
            yield from _numbers(value, inner, depth + 1)
        elif _is_number(value):
            yield name, (value, *(interval if interval is not None and _are_numbers(interval, 2) else ()))
        elif _are_numbers(value, 3) or (_are_numbers(value, 2) and not _belongs(key, tree)):
            yield name, tuple(value)


def _belongs(key: str, tree: dict[str, Any]) -> bool:
    """Whether it is the interval of another number."""
    return key.endswith(_INTERVAL) and key.removesuffix(_INTERVAL) in tree


def _are_numbers(value: Any, size: int) -> bool:
    return isinstance(value, list) and len(value) == size and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_points(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(point, dict) for point in value)


def number_cell(values: tuple[float, ...] | None) -> Html:
    """A number, a mean with its interval, or an interval."""
    if values is None:
        return Html(NONE)
    if len(values) == 1:
        return join([figure_text(values[0])])
    *mean, low, high = map(figure_text, values)
    return join([*mean, " ", element("small", f"{low} to {high}")])


def point_rows(points: Points) -> list[list[object]]:
    """The points as a table, its head first; columns without a value are left out."""
    keys = [key for key in dict.fromkeys(key for point in points for key in point) if _has(points, key)][:_MAX_COLUMNS]
    rows: list[list[object]] = [[clean(key.replace("_", " "), 30) for key in keys]]
    rows += [[_point_cell(point.get(key)) for key in keys] for point in points]
    return rows


def _has(points: Points, key: str) -> bool:
    return any(point.get(key) is not None for point in points)


def _point_cell(value: Any) -> str:
    if value is None:
        return NONE
    return figure_text(value) if _is_number(value) and math.isfinite(value) else clean(value, 40)
