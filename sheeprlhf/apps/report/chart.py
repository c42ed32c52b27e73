"""Charts of the report by matplotlib: inline SVG in the page's colours, and PNG; without text of a run's files."""

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from markupsafe import Markup
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sheeprlhf.apps.runs import MARK, Curve

# Distinguishable for colour-blind readers, on white and on black; after eight runs, lines are dashed.
LIGHT = ("#0067a5", "#c8500a", "#007d5c", "#a3478f", "#8a6a00", "#3d3d3d", "#1a8fc4", "#b02a37")
DARK = ("#5ab4f0", "#ff9a57", "#3fc79a", "#e493d0", "#e3c04a", "#d5d5d5", "#a5d8ff", "#ff8a94")
DASHES = ("", "5 3", "1.5 2.5")
MAX_RUNS = len(LIGHT) * len(DASHES)
MIN_POINTS = 3  # of a curve; fewer values are listed in a table
_MARKERS = ("o", "s", "^", "D")
_OUTLINES = (  # of the markers, for the legend
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "M-3.6,-3.6h7.2v7.2h-7.2z",
    "M0,-4.6L4.4,3.4H-4.4z",
    "M0,-5L5,0L0,5L-5,0z",
)
_RULE, _FAINT, _BACKGROUND = "#d9dde3", "#5b6470", "#ffffff"  # grid, numbers, outlines of markers
_VARIABLES = {
    **{color: f"var(--run{number})" for number, color in enumerate(LIGHT)},
    **{_RULE: "var(--rule)", _FAINT: "var(--faint)", _BACKGROUND: "var(--back)"},
}
_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _RULE,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "axes.labelcolor": _FAINT,
    "text.color": _FAINT,
    "svg.fonttype": "none",
    "svg.hashsalt": "",  # equal runs give equal bytes
    "text.parse_math": False,
}
_OPEN_GROUPS = ("Loss", "Objective", "Rewards")  # groups that are not folded
_TASK_SPECIFIC = ("loss", "items")  # tags that mean something else in another task
_MAX_BANDS = 3  # in one chart; more would hide each other
_MAX_POINTS = 180  # of a line
_Z_95 = 1.959964  # of a 95 % interval

Curves = Mapping[int, Curve]  # by number of the run


class Line(NamedTuple):
    """A curve as it is drawn; low and high are the extremes of the points that a mean replaces."""

    steps: list[float]
    means: list[float]
    lows: list[float]
    highs: list[float]


class Group(NamedTuple):
    """Charts with a common heading."""

    title: str
    tags: list[str]
    open: bool


class Bin(NamedTuple):
    """One row of a calibration: predicted probability, share of correct predictions with 95 % interval, pairs."""

    predicted: float
    right: float
    low: float
    high: float
    pairs: int


def group_tags(tags: Sequence[str]) -> list[Group]:
    """Distribute tags over groups, the most informative group first."""
    groups: dict[str, list[str]] = {name: [] for name in (*_OPEN_GROUPS, "Validation")}
    for tag in tags:
        groups.setdefault(_group_of(tag), []).append(tag)
    return [Group(name, found, name in _OPEN_GROUPS) for name, found in groups.items() if found]


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
    """The charts of these tags by title: one per tag, and of a loss one per task. Short curves are left out."""
    charts: dict[str, dict[int, Curve]] = {}
    for tag in tags:
        numbers = [n for n, found in enumerate(curves) if tag in found and len(found[tag].steps) >= MIN_POINTS]
        several = len({tasks[number] for number in numbers}) > 1 and tag.rpartition("/")[2] in _TASK_SPECIFIC
        for number in numbers:
            title = f"{tag} of {tasks[number]}" if several else tag
            charts.setdefault(title, {})[number] = curves[number][tag]
    return charts


def downsample(curve: Curve) -> Line:
    """Reduce a curve to at most 180 points: means of neighbours, and their extremes as a band."""
    size = math.ceil(len(curve.steps) / _MAX_POINTS)
    line = Line([], [], [], [])
    for start in range(0, len(curve.steps), size):
        steps, values = curve.steps[start : start + size], curve.values[start : start + size]
        line.steps.append(sum(steps) / len(steps))
        line.means.append(math.fsum(value / len(values) for value in values))
        line.lows.append(min(values))
        line.highs.append(max(values))
    return line


def run_style(number: int) -> tuple[str, str, str]:
    """CSS class of a run's colour, its dashes, and the outline of its marker."""
    return f"run{number % len(LIGHT)}", DASHES[number // len(LIGHT) % len(DASHES)], _OUTLINES[number % len(_OUTLINES)]


def run_colors() -> Markup:
    """The colours of the runs, as CSS."""
    light = "".join(f"--run{number}:{color};" for number, color in enumerate(LIGHT))
    dark = "".join(f"--run{number}:{color};" for number, color in enumerate(DARK))
    classes = "".join(f".run{number}{{color:var(--run{number})}}" for number in range(len(LIGHT)))
    return Markup(f":root{{{light}}}{classes}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}")


def _plot(axes: Any, curves: Curves, labels: Sequence[str] = ()) -> None:
    """Draw curves; `labels` of the runs are for a legend."""
    lows, highs = [], []
    for number, curve in curves.items():
        line, color = downsample(curve), LIGHT[number % len(LIGHT)]
        dashes = [float(part) for part in DASHES[number // len(LIGHT) % len(DASHES)].split()]
        lows.append(min(line.lows))
        highs.append(max(line.highs))
        if len(curves) <= _MAX_BANDS and len(line.steps) < len(curve.steps):
            axes.fill_between(line.steps, line.lows, line.highs, color=color, alpha=0.18, linewidth=0)
        (drawn,) = axes.plot(line.steps, line.means, color=color, linewidth=1.4, clip_on=False)
        if dashes:
            drawn.set_dashes(dashes)
        marker = _MARKERS[number % len(_MARKERS)]
        axes.plot(
            line.steps[-1:],
            line.means[-1:],
            marker,
            color=color,
            markeredgecolor=_BACKGROUND,
            markersize=6,
            clip_on=False,
        )
        if labels:
            axes.plot([], [], color=color, marker=marker, label=labels[number])
    least = 0.01 * max(map(abs, (*lows, *highs))) or 1.0  # a flat curve looks flat
    low, high = min(lows), max(highs)
    margin = max(0.05 * (high - low), (least - (high - low)) / 2)
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(min(0, *(of.steps[0] for of in curves.values())), max(of.steps[-1] for of in curves.values()))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.tick_params(length=0)


def draw_curves(charts: Iterable[Curves]) -> list[Markup]:
    """Draw charts as SVG; none is empty."""
    drawn = []
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(5, 2.9))
        axes = figure.add_axes((0.13, 0.13, 0.82, 0.78))  # one for all: most of the time goes into making axes
        axes.grid(axis="y", color=_RULE, linewidth=0.6, clip_on=False)
        for curves in charts:
            for artist in (*axes.lines, *axes.collections):
                artist.remove()
            _plot(axes, curves)
            drawn.append(_svg(figure))
    return drawn


def draw_png(title: str, charts: Mapping[str, Curves], labels: Sequence[str]) -> bytes:
    """The charts of one group as an image, with the labels of the runs as its legend."""
    columns = min(3, len(charts))
    rows = math.ceil(len(charts) / columns)
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(4.2 * columns, 0.8 + 2.7 * rows), layout="constrained")
        figure.suptitle(title, fontsize=11)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid[len(charts) :]:
            axes.set_axis_off()
        for axes, (name, curves) in zip(grid, charts.items(), strict=False):
            _plot(axes, curves, labels)
            axes.set_title(name, fontsize=9)
            axes.set_xlabel("optimizer steps", fontsize=8)
            axes.grid(axis="y", color=_RULE, linewidth=0.6)
            axes.legend(frameon=False, fontsize=7)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=130, metadata={"Software": MARK})
    return image.getvalue()


def wilson(right: float, pairs: int) -> tuple[float, float]:
    """95 % interval of a share (0 to 1) of `pairs`, at least one (Wilson 1927)."""
    shrink = 1 + _Z_95**2 / pairs
    middle = (right + _Z_95**2 / (2 * pairs)) / shrink
    half = _Z_95 / shrink * math.sqrt(right * (1 - right) / pairs + _Z_95**2 / (4 * pairs**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def calibration_bins(points: Sequence[Mapping[str, Any]]) -> list[Bin]:
    """The rows of an evaluation's calibration that hold what they should."""
    bins = []
    for point in points:
        predicted, right, pairs = (point.get(key) for key in ("predicted", "right", "pairs"))
        if _is_share(predicted) and _is_share(right) and isinstance(pairs, int) and 0 < pairs < 10**12:
            bins.append(Bin(predicted, right, *wilson(right, pairs), pairs))
    return sorted(bins)


def _is_share(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and 0 <= value <= 1


def draw_calibration(bins: Sequence[Bin], number: int) -> Markup:
    """Plot the share of correct predictions against the predicted probability, and the number of pairs, as SVG."""
    color = LIGHT[number % len(LIGHT)]
    predicted = [row.predicted for row in bins]
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(5, 3.6))
        upper, lower = figure.add_axes((0.13, 0.39, 0.82, 0.57)), figure.add_axes((0.13, 0.12, 0.82, 0.19))
        upper.plot([0.5, 1], [0.5, 1], color=_FAINT, linestyle="--", linewidth=1)
        errors = [[row.right - row.low for row in bins], [row.high - row.right for row in bins]]
        upper.errorbar(predicted, [row.right for row in bins], errors, color=color, marker="o", markersize=4, capsize=3)
        upper.set_ylim(min([0.45, *(row.low for row in bins)]) - 0.02, 1.02)
        upper.set_ylabel("share right")
        upper.set_xticklabels([])
        lower.bar(predicted, [row.pairs for row in bins], width=0.022, color=color)
        for row in bins:
            text = f"{row.pairs:,}" if row.pairs < 10_000 else f"{row.pairs / 1000:,.0f}k"
            lower.annotate(text, (row.predicted, row.pairs), (0, 2), textcoords="offset points", ha="center", size=7)
        lower.set(ylim=(0, 1.35 * max(row.pairs for row in bins)), yticks=[], ylabel="pairs")
        lower.set_xlabel("probability that the model gives")
        for axes in (upper, lower):
            axes.set_xlim(min([0.48, *predicted]) - 0.01, 1.02)
            axes.tick_params(length=0)
        upper.grid(axis="y", color=_RULE, linewidth=0.6)
        return _svg(figure)


def draw_rounds(points: Mapping[int, tuple[float, float]], labels: Sequence[str]) -> Markup:
    """Plot the score against the KL divergence of runs by their numbers, in the order of training, as SVG."""
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(5, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.plot(*zip(*points.values(), strict=True), color=_FAINT, linewidth=1)
        for number, (kl, score) in points.items():
            axes.plot([kl], [score], color=LIGHT[number % len(LIGHT)], marker="o")
            axes.annotate(labels[number], (kl, score), (5, -10), textcoords="offset points", size=7)
        axes.set(xlabel="KL from the first run, nats a response, summed over rounds", ylabel="score")
        axes.grid(axis="y", color=_RULE, linewidth=0.6)
        return _svg(figure)


def _svg(figure: Figure) -> Markup:
    """A figure as an SVG element without ids of its own, fonts and fixed colours: those are the page's."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r' (width|height)="[\d.]+pt"| id="[a-z0-9.]+_\d+"| version="1.1"| transform="rotate\(-0 [^"]*"', "", svg
    )
    svg = re.sub(r"(font-size|font): ([\d.]+px)[^;\"]*(; font-family: [^;\"]*)?", r"font-size: \2", svg)
    svg = re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match[0]], svg)
    return Markup(re.sub(r"\n\s*", "\n", svg))
