"""Charts of the report: coordinates, what thinning keeps, which curves share a chart."""

import math
import random
import re

import pytest

from sheeprlhf.apps.report.chart import (
    DASHES,
    LIGHT,
    calibration_bins,
    charts_of,
    downsample,
    draw_calibration,
    draw_curves,
    draw_png,
    group_tags,
    run_style,
    wilson,
)
from sheeprlhf.apps.report.page import duration_text, figure_text
from sheeprlhf.apps.runs import Curve


def curve(values: list[float], first: int = 0) -> Curve:
    return Curve([first + number for number in range(len(values))], values, [0.0] * len(values))


def points_of(svg: str) -> list[tuple[float, float]]:
    """The points of the first run's line."""
    path = re.search(r'd="(M[^"]*)" style="fill: none; stroke: var\(--run0\)', svg)
    assert path is not None
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path[1])]


def test_points_are_drawn_to_scale():
    [svg] = draw_curves([{0: curve([0.0, 1.0, 4.0])}])
    (x0, y0), (x1, y1), (x2, y2) = points_of(svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=1e-3)
    assert (y0 - y2) == pytest.approx(4 * (y0 - y1), abs=1e-3)


def test_a_chart_takes_its_colours_from_the_page():
    runs = {number: curve([1.0, 2.0, 0.5]) for number in range(9)}
    svg = "".join([*draw_curves([runs, {0: curve([1.0] * 500)}]), draw_calibration(calibration_bins([BIN]), 3)])
    assert set(re.findall(r"var\(--run(\d)\)", svg)) == set("01234567")
    assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r'(xlink:href="|url\()#\w+', "", svg))
    assert "font-family" not in svg and "<style" not in svg and "http" not in re.sub(r'xmlns[^ ]*"', "", svg)


def test_thinning_loses_no_extreme_and_no_mean():
    rng = random.Random(1)
    values = [rng.gauss(0, 1) for _ in range(1_000)]
    values[503] = 99.0
    line = downsample(curve(values))
    assert len(line.means) == 167  # six points each, four in the last
    assert max(line.highs) == 99.0 and min(line.lows) == min(values)
    counts = [6] * 166 + [4]
    assert math.fsum(m * n for m, n in zip(line.means, counts, strict=True)) == pytest.approx(math.fsum(values))
    assert all(low <= mean <= high for low, mean, high in zip(line.lows, line.means, line.highs, strict=True))
    few = downsample(curve(values[:180]))
    assert few.means == few.lows == few.highs == values[:180]


@pytest.mark.parametrize("values", [[0.0] * 3, [3.5] * 3, [-1e-12] * 3, [1e12] * 3, [1e299, -1e299, 0.0]])
def test_flat_and_huge_curves_have_a_chart(values):
    [svg] = draw_curves([{0: curve(values)}])
    assert "nan" not in svg.lower() and "inf" not in svg.lower()


def test_flat_is_shown_flat():
    [svg] = draw_curves([{0: curve([3.0870, 3.0868, 3.0866])}])
    points = points_of(svg)
    assert abs(points[0][1] - points[-1][1]) < 5  # of 163


def test_images_hold_all_charts_of_a_group():
    assert draw_png("Loss $x", {"a $b": {0: curve([1.0, 2.0, 3.0])}}, ["<run>"]).startswith(b"\x89PNG")


BIN = {"predicted": 0.75, "right": 0.5, "pairs": 100}


@pytest.mark.parametrize(
    ("right", "pairs", "expected"),
    [(0.5, 100, (0.4038, 0.5962)), (1.0, 10, (0.7225, 1.0)), (0.0, 1, (0.0, 0.7935))],  # statsmodels, method="wilson"
)
def test_intervals_of_shares(right, pairs, expected):
    assert wilson(right, pairs) == pytest.approx(expected, abs=1e-4)


def test_only_valid_rows_of_a_calibration_are_used():
    odd = [{"predicted": "x"}, BIN | {"right": 1.5}, BIN | {"pairs": 0}, BIN | {"pairs": 0.5}, BIN | {"right": None}]
    [row] = calibration_bins([*odd, BIN])
    assert (row.predicted, row.right, row.pairs) == (0.75, 0.5, 100)


def test_tags_are_grouped_what_tells_most_first():
    tags = ["train/lr", "val/length", "rewards/mean", "objective/kl", "train/loss", "val/rewards/margins", "val/kl"]
    assert [(group.title, group.tags, group.open) for group in group_tags(tags)] == [
        ("Loss", ["train/loss"], True),
        ("Objective", ["objective/kl", "val/kl"], True),
        ("Rewards", ["rewards/mean", "val/rewards/margins"], True),
        ("Validation", ["val/length"], False),
        ("Training", ["train/lr"], False),
    ]


def test_losses_of_different_tasks_have_charts_of_their_own():
    a, b = curve([1.0] * 3), curve([2.0] * 3)
    runs = [{"train/loss": a, "val/kl": a}, {"train/loss": b, "val/kl": b}, {"train/loss": a, "val/kl": curve([1, 2])}]
    assert charts_of(["train/loss", "val/kl"], ["sft", "dpo", "sft"], runs) == {
        "train/loss of sft": {0: a, 2: a},
        "train/loss of dpo": {1: b},
        "val/kl": {0: a, 1: b},
    }
    assert list(charts_of(["train/loss"], ["sft"] * 3, runs)) == ["train/loss"]


def test_every_run_of_a_page_looks_different():
    styles = [run_style(number) for number in range(len(LIGHT) * len(DASHES))]
    assert len(set(styles)) == len(styles)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "-"),
        (3, "3"),
        (12345, "12,345"),
        (4.0, "4"),
        (2.8, "2.800"),
        (-0.734, "-0.7340"),
        (31.339, "31.34"),
        (123456.7, "123,457"),
        (1000.5, "1,000.5"),
        (999.96, "1000"),
        (5e-5, "5.00e-05"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_for_people(value, expected):
    assert figure_text(value) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(None, "-"), (0.25, "0.2 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_times_for_people(seconds, expected):
    assert duration_text(seconds) == expected
