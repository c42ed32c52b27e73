"""Curves of several runs in one chart: as SVG, whose colours follow the page, and as PNG."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from sheeprlhf.apps.report.html import MARK, Html, element, figure_text, join
from sheeprlhf.apps.report.record import Curve

# Told apart by people who are colour-blind too, on white and on black; after eight, lines are dashed.
LIGHT = ("#0067a5", "#c8500a", "#007d5c", "#a3478f", "#8a6a00", "#3d3d3d", "#1a8fc4", "#b02a37")
DARK = ("#5ab4f0", "#ff9a57", "#3fc79a", "#e493d0", "#e3c04a", "#d5d5d5", "#a5d8ff", "#ff8a94")
DASHES = ("", "5 3", "1.5 2.5")
MOST_RUNS = len(LIGHT) * len(DASHES)
_SHAPES = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "M-3.6,-3.6h7.2v7.2h-7.2z",
    "M0,-4.6L4.4,3.4H-4.4z",
    "M0,-5L5,0L0,5L-5,0z",
)
_PNG_SHAPES = ("o", "s", "^", "D")

_WIDTH, _HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 26
_FIRST = ("Loss", "Objective", "Rewards")  # groups that are shown unfolded
_OF_TASK = ("loss", "items")  # what another task calls by the same name is another thing
_MOST_BANDS = 3  # in one chart; more would hide each other
_MOST_POINTS = 180  # of a line; beyond, it is the mean of neighbours, with a band from their lowest to their highest


Curves = Mapping[int, Curve]  # by number of the run


class Line(NamedTuple):
    """A curve as it is drawn; low and high are those of the points that a mean is of."""

    steps: list[float]
    means: list[float]
    lows: list[float]
    highs: list[float]


class Group(NamedTuple):
    """Charts that belong together; the rest of the page knows them by this name."""

    title: str
    tags: list[str]
    open: bool


def group_tags(tags: list[str]) -> list[Group]:
    """Tags dealt to groups, what tells most first."""
    groups: dict[str, list[str]] = {name: [] for name in (*_FIRST, "Validation")}
    for tag in tags:
        groups.setdefault(_group_of(tag), []).append(tag)
    return [Group(name, found, name in _FIRST) for name, found in groups.items() if found]


def _group_of(tag: str) -> str:
    first, _, rest = tag.partition("/")
    if rest in ("loss", "nll", "perplexity") or first == "loss":
        return "Loss"
    if first in ("objective", "best") or tag in ("val/objective", "val/scores", "val/kl"):
        return "Objective"
    if first == "rewards" or rest.startswith("rewards/"):
        return "Rewards"
    names = {"val": "Validation", "time": "Time", "train": "Training"}
    return names.get(first, first.capitalize() if rest else "Other")


def charts_of(tags: Sequence[str], tasks: Sequence[str], curves: Sequence[Mapping[str, Curve]]) -> Mapping[str, Curves]:
    """The charts of these tags by title: one a tag, and of a loss one for each task.

    Args:
        tags: what is shown.
        tasks: of the runs.
        curves: of each run, by tag.
    """
    charts: dict[str, dict[int, Curve]] = {}
    for tag in tags:
        there = [number for number, found in enumerate(curves) if tag in found]
        several = len({tasks[number] for number in there}) > 1 and tag.rpartition("/")[2] in _OF_TASK
        for number in there:
            title = f"{tag} of {tasks[number]}" if several else tag
            charts.setdefault(title, {})[number] = curves[number][tag]
    return charts


def thin(curve: Curve) -> Line:
    """At most `_MOST_POINTS` points; none is lost: what a mean hides, the band shows."""
    size = math.ceil(len(curve.steps) / _MOST_POINTS)
    line = Line([], [], [], [])
    for start in range(0, len(curve.steps), size):
        steps, values = curve.steps[start : start + size], curve.values[start : start + size]
        line.steps.append(sum(steps) / len(steps))
        line.means.append(math.fsum(values) / len(values))
        line.lows.append(min(values))
        line.highs.append(max(values))
    return line


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, at most `most` steps apart from each other."""
    raw = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _span(values: list[float]) -> tuple[float, float]:
    """Lowest and highest; at least a hundredth of their size apart, so that what is flat looks flat."""
    low, high = min(values), max(values)
    least = 0.01 * max(abs(low), abs(high)) or 1.0
    room = max(0.0, least - (high - low)) / 2
    return low - room, high + room


def _extent(lines: list[Line]) -> tuple[list[float], tuple[float, float]]:
    """Ticks of the vertical axis, which begins and ends with one; first and last step of the other."""
    rows = ticks(*_span([value for line in lines for value in (*line.lows, *line.highs)]), most=4)
    steps = [step for line in lines for step in (line.steps[0], line.steps[-1])]
    return rows, (min(0.0, *steps), max(*steps, 1.0))


def style_of(number: int) -> tuple[str, str, str]:
    """The class of a run's colour, its dashes and the outline of its mark."""
    return f"run{number % len(LIGHT)}", DASHES[number // len(LIGHT) % len(DASHES)], _SHAPES[number % len(_SHAPES)]


def name_of(number: int, label: str, note: str = "") -> Html:
    """A run's name behind its sign, which is a short line with its mark."""
    name, dashes, shape = style_of(number)
    line = element("path", d="M1,7H25", class_="line", stroke_dasharray=dashes or None)
    mark = element("path", d=shape, transform="translate(13,7)", class_="mark")
    sign = element("svg", line, mark, viewBox="0 0 26 14", class_=f"sign {name}", aria_hidden="true")
    return element("span", sign, label, *([" ", element("small", note)] if note else []), class_="run")


def draw_svg(tag: str, curves: Curves, labels: Sequence[str]) -> Html:
    """One chart.

    Args:
        tag: what it shows.
        curves: by number of the run; none is empty.
        labels: of the runs.
    """
    lines = {number: thin(curve) for number, curve in curves.items()}
    rows, (first, last) = _extent(list(lines.values()))
    columns = [tick for tick in ticks(first, last, most=5) if first <= tick <= last and tick == int(tick)]
    wide, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(step: float) -> str:
        return f"{_LEFT + wide * (step - first) / (last - first):.1f}"

    def y(value: float) -> str:
        return f"{_TOP + tall * (rows[-1] - value) / (rows[-1] - rows[0]):.1f}"

    parts = [element("path", d=f"M{_LEFT},{y(row)}H{_WIDTH - _RIGHT}", class_="grid") for row in rows]
    parts += [
        element("text", text, x=_LEFT - 6, y=y(row), dy="0.33em", text_anchor="end") for row, text in _named(rows)
    ]
    for column in columns:
        anchor = "end" if column == columns[-1] and column > 0.95 * last else "middle"
        parts.append(element("text", f"{column:,.0f}", x=x(column), y=_HEIGHT - 8, text_anchor=anchor))
    for number, line in lines.items():
        name, dashes, shape = style_of(number)
        points = [f"{x(step)},{y(value)}" for step, value in zip(line.steps, line.means, strict=True)]
        told = element("title", f"{labels[number]}: {_told(curves[number])}")
        drawn = [told, element("path", d=f"M{'L'.join(points)}", class_="line", stroke_dasharray=dashes or None)]
        if len(curves[number].steps) > len(points) and len(curves) <= _MOST_BANDS:
            above = [f"{x(step)},{y(value)}" for step, value in zip(line.steps, line.highs, strict=True)]
            under = [f"{x(step)},{y(value)}" for step, value in zip(line.steps, line.lows, strict=True)]
            drawn.insert(1, element("path", d=f"M{'L'.join([*above, *reversed(under)])}z", class_="band"))
        drawn.append(element("path", d=shape, transform=f"translate({points[-1]})", class_="mark"))
        parts.append(element("g", *drawn, class_=name))
    label = f"{tag}: " + "; ".join(f"{labels[number]} {_told(curve)}" for number, curve in curves.items())
    return element("svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=label, class_="chart")


def _told(curve: Curve) -> str:
    first, last, low, high = map(figure_text, (curve.values[0], curve.values[-1], min(curve.values), max(curve.values)))
    return f"{first} at step {curve.steps[0]:,}, {last} at step {curve.steps[-1]:,}; from {low} to {high}"


def _named(rows: list[float]) -> Iterator[tuple[float, str]]:
    """Ticks with their numbers, which all have as many digits behind the point as their distance needs."""
    step, most = rows[1] - rows[0], max(map(abs, rows))
    if most >= 1e6 or most < 1e-3:
        yield from ((row, f"{row:.1e}".replace("e-0", "e-").replace("e+0", "e") if row else "0") for row in rows)
        return
    digits = max(0, math.ceil(-math.log10(step) - 1e-9))
    yield from ((row, f"{row + 0.0:,.{digits}f}") for row in rows)


def draw_png(title: str, charts: Mapping[str, Curves], labels: list[str]) -> bytes:
    """The charts of one group as an image.

    Args:
        title: of the image.
        charts: tag, number of the run, curve.
        labels: of the runs.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    columns = min(3, len(charts))
    rows = math.ceil(len(charts) / columns)
    look: dict[str, float | bool] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.parse_math": False,
    }
    look |= {"figure.constrained_layout.h_pad": 0.12, "figure.constrained_layout.w_pad": 0.12}
    with style.context(["default", look]):
        figure = Figure(figsize=(4.2 * columns, 0.8 + 2.7 * rows), layout="constrained")
        figure.suptitle(title, fontsize=11)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid[len(charts) :]:
            axes.set_axis_off()
        for axes, (tag, curves) in zip(grid, charts.items(), strict=False):
            for number, curve in curves.items():
                line, color = thin(curve), LIGHT[number % len(LIGHT)]
                dash = ("-", "--", ":")[number // len(LIGHT) % len(DASHES)]
                if len(curves) <= _MOST_BANDS:
                    axes.fill_between(line.steps, line.lows, line.highs, color=color, alpha=0.18, linewidth=0)
                axes.plot(line.steps, line.means, dash, color=color, linewidth=1.4)
                shape = _PNG_SHAPES[number % len(_PNG_SHAPES)]
                axes.plot(line.steps[-1:], line.means[-1:], dash, color=color, marker=shape, label=labels[number])
            rows_of, steps = _extent([thin(curve) for curve in curves.values()])
            axes.set(ylim=(rows_of[0], rows_of[-1]), xlim=steps, yticks=rows_of)
            axes.set_title(tag, fontsize=9)
            axes.set_xlabel("optimizer steps", fontsize=8)
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
            axes.legend(frameon=False, fontsize=7)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=130, metadata={"Software": MARK})
    return image.getvalue()


def sign_style() -> str:
    """The colours of the runs, as CSS."""
    light = join(f"--run{number}:{color};" for number, color in enumerate(LIGHT))
    dark = join(f"--run{number}:{color};" for number, color in enumerate(DARK))
    classes = join(f".run{number}{{color:var(--run{number})}}" for number in range(len(LIGHT)))
    return f":root{{{light}}}{classes}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
