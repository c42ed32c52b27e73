"""Charts of the report: where points fall, what thinning keeps, which curves share a chart."""

import math
import random
import re

import pytest

from sheeprlhf.apps.report.chart import DASHES, LIGHT, charts_of, draw_svg, group_tags, style_of, thin, ticks
from sheeprlhf.apps.report.html import duration_text, element, figure_text, text
from sheeprlhf.apps.report.record import Curve


def curve(values: list[float], first: int = 0) -> Curve:
    return Curve([first + number for number in range(len(values))], values, [0.0] * len(values))


def test_points_are_drawn_where_they_belong():
    svg = draw_svg("loss", {0: curve([0.0, 1.0, 4.0])}, ["a"])
    path = re.search(r'<path d="M([^"]*)" class="line"', svg)
    # the plot is 302 wide from 46 on, and 174 tall from 10 down; the axes go from 0 to 2 and from 0 to 4
    assert path is not None and path[1] == "46.0,184.0L197.0,140.5L348.0,10.0"
    assert 'transform="translate(348.0,10.0)"' in svg
    assert "<title>a: 0 at step 0, 4 at step 2; from 0 to 4</title>" in svg


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 4, [0, 1, 2, 3, 4]),
        (0.0, 1.0, [0, 0.5, 1]),
        (-3, 17, [-5, 0, 5, 10, 15, 20]),
        (2.31, 2.79, [2.2, 2.4, 2.6, 2.8]),
    ],
)
def test_ticks_are_round_and_enclose(low, high, expected):
    assert ticks(low, high, most=4) == pytest.approx(expected, abs=1e-12)


def test_ticks_of_any_range():
    rng = random.Random(0)
    for _ in range(500):
        low = rng.uniform(-1, 1) * 10 ** rng.randint(-8, 8)
        high = low + 10 ** rng.uniform(-3, 3) * max(abs(low), 1e-9)
        found = ticks(low, high, most=4)
        step = found[1] - found[0]
        assert found[0] <= low + 1e-6 * step and found[-1] >= high - 1e-6 * step
        assert 2 <= len(found) <= 6
        digits = step / 10 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(digits - round_one) for round_one in (1, 2, 5, 10)) < 1e-4


def test_thinning_loses_no_extreme_and_no_mean():
    rng = random.Random(1)
    values = [rng.gauss(0, 1) for _ in range(1_000)]
    values[503] = 99.0
    line = thin(curve(values))
    assert len(line.means) == 167  # six points each, four in the last
    assert max(line.highs) == 99.0 and min(line.lows) == min(values)
    counts = [6] * 166 + [4]
    assert math.fsum(m * n for m, n in zip(line.means, counts, strict=True)) == pytest.approx(math.fsum(values))
    assert all(low <= mean <= high for low, mean, high in zip(line.lows, line.means, line.highs, strict=True))
    assert 'class="band"' in draw_svg("x", {0: curve(values)}, ["a"])
    few = thin(curve(values[:180]))
    assert few.means == few.lows == few.highs == values[:180]


@pytest.mark.parametrize("value", [0.0, 3.5, -1e-12, 1e12])
def test_a_flat_or_single_curve_has_a_chart(value):
    for values in ([value], [value] * 3):
        assert "nan" not in draw_svg("x", {0: curve(values)}, ["a"]).lower()


def test_flat_is_shown_flat():
    svg = draw_svg("x", {0: curve([3.0870, 3.0866])}, ["a"])
    first, last = re.findall(r"[ML][\d.]+,([\d.]+)", re.search(r'd="(M[^"]*)" class="line"', svg)[1])
    assert abs(float(first) - float(last)) < 5  # of 174


def test_tags_are_grouped_what_tells_most_first():
    tags = [
        "train/lr",
        "val/length",
        "rewards/mean",
        "objective/kl",
        "train/loss",
        "val/rewards/margins",
        "val/kl",
    ]
    assert [(group.title, group.tags, group.open) for group in group_tags(tags)] == [
        ("Loss", ["train/loss"], True),
        ("Objective", ["objective/kl", "val/kl"], True),
        ("Rewards", ["rewards/mean", "val/rewards/margins"], True),
        ("Validation", ["val/length"], False),
        ("Training", ["train/lr"], False),
    ]


def test_losses_of_different_tasks_have_charts_of_their_own():
    a, b = curve([1.0]), curve([2.0])
    runs = [{"train/loss": a, "val/kl": a}, {"train/loss": b, "val/kl": b}, {"train/loss": a}]
    assert charts_of(["train/loss", "val/kl"], ["sft", "dpo", "sft"], runs) == {
        "train/loss of sft": {0: a, 2: a},
        "train/loss of dpo": {1: b},
        "val/kl": {0: a, 1: b},
    }
    assert list(charts_of(["train/loss"], ["sft"] * 3, runs)) == ["train/loss"]


def test_every_run_of_a_page_looks_different():
    styles = [style_of(number) for number in range(len(LIGHT) * len(DASHES))]
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


def test_plain_strings_are_always_escaped():
    assert text("<a>&\"'") == "&lt;a&gt;&amp;&quot;&#x27;"
    assert element("b", element("i", "<"), ">", title='"') == '<b title="&quot;"><i>&lt;</i>&gt;</b>'
    assert element("b", title=element("i", "x")) == '<b title="&lt;i&gt;x&lt;/i&gt;"></b>'
