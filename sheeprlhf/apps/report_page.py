"""The page of the report, `assets/report.html.jinja`: its tables, its charts by matplotlib, and its texts, escaped."""

import base64
import io
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

import sheeprlhf
from sheeprlhf.apps.pipeline import Row, cells, used_columns
from sheeprlhf.apps.runs import MARK, Answer, Curve, Evaluation, Exchange, Record
from sheeprlhf.apps.show import shown
from sheeprlhf.apps.terminal import clean, counted, is_number
from sheeprlhf.config.command_words import command
from sheeprlhf.security.redaction import plain_text, redact_text
from sheeprlhf.utils.home import expand_home
from sheeprlhf.utils.memory import size_text

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
_PLOT_STYLE: dict[str, Any] = {
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
_MAX_LINE_POINTS = 180  # of a line
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
    size = math.ceil(len(curve.steps) / _MAX_LINE_POINTS)
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
    with style.context(["default", _PLOT_STYLE]):
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
    with style.context(["default", _PLOT_STYLE]):
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
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return min(low, right), max(high, right)  # rounding must not leave the share outside


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
    with style.context(["default", _PLOT_STYLE]):
        figure = Figure(figsize=(5, 3.6))
        upper, lower = figure.add_axes((0.13, 0.39, 0.82, 0.57)), figure.add_axes((0.13, 0.12, 0.82, 0.19))
        upper.plot([0.5, 1], [0.5, 1], color=_FAINT, linestyle="--", linewidth=1)
        errors = [[row.right - row.low for row in bins], [row.high - row.right for row in bins]]
        upper.errorbar(predicted, [row.right for row in bins], errors, color=color, marker="o", markersize=4, capsize=3)
        upper.set_ylim(min([0.45, *(row.low for row in bins)]) - 0.02, 1.02)
        upper.set_ylabel("share right")
        upper.set_xticklabels([])
        middles = [0.525 + min(math.floor(20 * value - 10), 9) / 20 for value in predicted]  # of parts of [0.5, 1]
        lower.bar(middles, [row.pairs for row in bins], width=0.045, color=color)
        for middle, row in zip(middles, bins, strict=True):
            text = f"{row.pairs:,}" if row.pairs < 10_000 else f"{row.pairs / 1000:,.0f}k"
            lower.annotate(text, (middle, row.pairs), (0, 2), textcoords="offset points", ha="center", size=7)
        lower.set(ylim=(0, 1.35 * max(row.pairs for row in bins)), yticks=[], ylabel="pairs")
        lower.set_xlabel("probability that the model gives")
        for axes in (upper, lower):
            axes.set_xlim(min([0.48, *predicted]) - 0.01, 1.02)
            axes.tick_params(length=0)
        upper.grid(axis="y", color=_RULE, linewidth=0.6)
        return _svg(figure)


def draw_rounds(points: Mapping[int, tuple[float, float]]) -> Markup:
    """Plot the score against the KL divergence of runs by their numbers, in the order of training, as SVG."""
    with style.context(["default", _PLOT_STYLE]):
        figure = Figure(figsize=(5, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.plot(*zip(*points.values(), strict=True), color=_FAINT, linewidth=1)
        for number, (kl, score) in points.items():
            axes.plot([kl], [score], color=LIGHT[number % len(LIGHT)], marker=_MARKERS[number % len(_MARKERS)])
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


NONE = "-"
_ASSETS = Path(sheeprlhf.__file__).parent / "assets"
_SECTIONS = ("Runs", "Results", "Curves", "Samples", "Configuration", "Data", "Speed and memory")
_HIDDEN_OPTIONS = {  # options that do not affect a result
    *("root_dir", "run_name", "resume", "resume_from", "debug", "experiment", "data.cache_dir")
}
_LINKS = {"task.sft_experiment_dir": "starts from", "task.rm_experiment_dir": "judged by"}
_HEADLINES = ("perplexity", "rougeL", "accuracy", "score", "win rate", "rm accuracy")
_MAX_NUMBERS = 8  # of an evaluation, before the rest is folded
_MAX_NAMED = 5  # runs in the title
_MAX_PROMPTS = 6
_MAX_EARLIER_ANSWERS = 6  # answers of one prompt
_MAX_SPLITS = 8
_MAX_COLUMNS = 12  # of a list of points


class Cell(NamedTuple):
    """A cell of a table that is more than text; `kind` is a macro of the template or a CSS class."""

    text: str
    note: str = ""
    kind: str = ""
    run: int = 0


class Table(NamedTuple):
    """A table: the cells of its head, and of its rows; each row's first cell is its name."""

    head: Sequence[str | Cell]
    rows: Sequence[Sequence[str | Cell]]
    numbers: bool = True
    summary: str | Cell = ""  # of what is folded
    class_: str = ""


def build_page(records: list[Record], pipelines: Mapping[str, list[Row]], notes: list[str]) -> str:
    """Render the page of runs, of the stages of pipelines by their folders, and of further remarks."""
    many = counted(len(records), "run")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_without_secrets
    )
    template = environment.from_string((_ASSETS / "report.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        mark=MARK,
        style=Markup((_ASSETS / "report.css").read_text(encoding="utf-8")) + run_colors(),
        names=", ".join(record.label for record in records) if len(records) <= _MAX_NAMED else many,
        about=f"{many}, {time.strftime('%Y-%m-%d %H:%M')}, sheeprlhf {sheeprlhf.__version__}",
        notes=[*notes, *(f"{record.label} {note}" for record in records for note in record.notes)],
        sections=[*(["Pipeline"] if pipelines else []), *_SECTIONS],
        labels=[record.label for record in records],
        run_style=run_style,
        pipelines=[(name, _pipeline_table(rows)) for name, rows in pipelines.items()],
        overview=Table(_heads(records), list(_overview_rows(records)), numbers=False),
        results=list(_results(records)),
        images=[
            (name, number, base64.b64encode(content).decode())
            for number, record in enumerate(records)
            for name, content in record.images.items()
        ],
        groups=list(_groups(records)),
        short_curves=_short_curves(records),
        min_points=MIN_POINTS,
        samples=list(_samples(records)),
        configuration=_configuration(records),
        data=list(_data(records)),
        speed=Table(_heads(records), list(_speed_rows(records))),
    )


def _without_secrets(value: Any) -> Any:
    """Every expression of the template passes here before it is escaped."""
    return redact_text(plain_text(value)) if isinstance(value, str) and not isinstance(value, Markup) else value


def figure_text(value: float | None) -> str:
    """A number with four significant digits; whole numbers whole, a dash for None."""
    if value is None:
        return NONE
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 10_000:
        return f"{value:,.0f}" if size < 1e9 else f"{value:.3g}"
    if size >= 1_000:
        return f"{value:,.1f}"
    return f"{value:#.4g}".rstrip(".") if size >= 1e-3 else f"{value:.2e}"


def duration_text(seconds: float | None) -> str:
    """A duration: "42 s", "3 min 20 s", "2 h 05 min"."""
    if seconds is None:
        return NONE
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def _run_cell(records: list[Record], number: int, note: str = "") -> Cell:
    return Cell(records[number].label, note, "run", number)


def _heads(records: list[Record]) -> list[str | Cell]:
    return ["", *(_run_cell(records, number) for number in range(len(records)))]


def _pipeline_table(rows: list[Row]) -> Table:
    columns = used_columns(rows)
    lines = [[clean(name, 40), *(cell or NONE for cell in line)] for name, *line in cells(rows, columns)]
    return Table(["stage", *(column.heading for column in columns)], lines)


def _overview_rows(records: list[Record]) -> Iterator[list[str | Cell]]:
    pasts = [record.past for record in records]
    yield ["task", *(past.names[2] for past in pasts)]
    yield ["model", *(past.names[1] for past in pasts)]
    yield ["data", *(past.names[0] for past in pasts)]
    for key, name in _LINKS.items():
        values = [_option(record, key, records) for record in records]
        if any(value not in (NONE, "null") for value in values):
            yield [name, *(NONE if value == "null" else value for value in values)]
    yield ["trains", *(_trains(record) for record in records)]
    yield ["state", *(Cell(past.state, kind=f"state {past.state}") for past in pasts)]
    yield ["steps", *(figure_text(past.step) for past in pasts)]
    yield ["best validation", *(figure_text(past.best) for past in pasts)]
    for title in sorted({evaluation.title for record in records for evaluation in record.evaluations}):
        values = [_headline(record, title) for record in records]
        if any(value != NONE for value in values):
            yield [title, *values]
    yield ["started", *(past.started or "?" for past in pasts)]
    yield ["took", *(duration_text(_seconds(record)) for record in records)]
    yield ["seed", *(_option(record, "seed", records) for record in records)]
    yield ["directory", *(Cell(clean(past.dir, 300), kind="code") for past in pasts)]
    yield ["command", *(_command(record) for record in records)]


def _headline(record: Record, title: str) -> str:
    """The most informative numbers of an evaluation of the final weights."""
    found = next((e for e in record.evaluations if e.title == title and e.weights == "final"), None)
    names = [] if found is None else [name for name in _HEADLINES if name in found.numbers]
    return ", ".join(f"{name} {figure_text(found.numbers[name][0])}" for name in names if found) or NONE


def _trains(record: Record) -> str:
    if record.config.get("model.finetune_mode") == "LORA":
        return f"LoRA, rank {clean(record.config.get('model.lora_cfg.rank', '?'), 10)}"
    return "all weights" if record.config.get("model.finetune_mode") == "ALL" else "?"


def _command(record: Record) -> str | Cell:
    words = record.info.get("command")
    if not isinstance(words, list) or not words:
        return NONE
    return Cell(clean(command(map(str, words)), 2_000), kind="command")


def _seconds(record: Record) -> float | None:
    """Seconds from the start to the end, or to the last row of metrics.csv."""
    began, ended = record.info.get("started"), record.info.get("finished")
    times = [curve.times[-1] for curve in record.curves.values()]
    last = ended if isinstance(ended, int | float) else max(times, default=0.0)
    took = last - began if isinstance(began, int | float) else -1
    return float(took) if 0 <= took < 1e9 else None


def _option(record: Record, key: str, records: list[Record]) -> str:
    """An option as the command line takes it; a run of this page by its label."""
    if key not in record.config:
        return NONE
    value = record.config[key]
    if key in _LINKS and isinstance(value, str):
        labels = {_resolved(other.past.dir): other.label for other in records}
        return labels.get(_resolved(Path(value)), clean(value, 200))
    return clean(shown(value), 200)


def _resolved(path: Path) -> Path:
    return expand_home(path).absolute()


def _results(records: list[Record]) -> Iterator[dict[str, Any]]:
    """One entry per evaluation: its table with a column for each run and weights, points, and calibrations."""
    titles: dict[str, list[tuple[int, Evaluation]]] = {}
    for number, record in enumerate(records):
        for evaluation in record.evaluations:
            titles.setdefault(evaluation.title, []).append((number, evaluation))
    for title, columns in sorted(titles.items()):
        columns.sort(key=lambda column: (column[0], column[1].weights != "final", column[1].weights))
        heads = [_run_cell(records, number, "" if e.weights == "final" else e.weights) for number, e in columns]
        names = list(dict.fromkeys(name for _, evaluation in columns for name in evaluation.numbers))
        rows = [[name, *(_number_cell(e.numbers.get(name)) for _, e in columns)] for name in names]
        tables = [Table(["", *heads], rows[:_MAX_NUMBERS])] if rows else []
        if rows[_MAX_NUMBERS:]:
            more = counted(len(rows) - _MAX_NUMBERS, "more number")
            tables.append(Table(["", *heads], rows[_MAX_NUMBERS:], summary=more))
        calibrations = []
        for head, (number, evaluation) in zip(heads, columns, strict=True):
            for name, points in evaluation.lists.items():
                tables.append(point_table(points)._replace(summary=head._replace(text=f"{name} of {head.text}")))
                bins = calibration_bins(points) if name == "calibration" else []
                if bins:
                    label = "; ".join(f"{b.predicted:.0%} predicted, {b.right:.0%} right" for b in bins)
                    calibrations.append({"runs": [head], "label": label, "svg": draw_calibration(bins, number)})
        finals = {number: e.numbers for number, e in columns if e.weights == "final"}
        yield {"title": title, "tables": tables, "calibrations": calibrations, "rounds": _rounds(records, finals)}


def _rounds(records: list[Record], numbers: Mapping[int, Mapping[str, tuple[float, ...]]]) -> dict[str, Any] | None:
    """The chart of score against KL over the longest chain of runs, each of which starts from the last.

    `numbers` are those of an evaluation, by run. A run's KL is that from its start; those of the chain are added.
    """
    places = {_resolved(record.past.dir): number for number, record in enumerate(records)}
    starts = {
        number: places.get(_resolved(Path(str(records[number].config.get("task.sft_experiment_dir")))))
        for number, found in numbers.items()
        if "score" in found
    }

    def chain(number: int) -> list[int]:
        start = starts[number]
        return [*(chain(start) if start in starts and start < number else ()), number]

    longest = max(map(chain, starts), key=len, default=[])
    if len(longest) < 3:  # a start with one training is no iterated training
        return None
    kl, points = 0.0, dict[int, tuple[float, float]]()
    for number in longest:
        kl += numbers[number].get("kl", (0.0,))[0] if points else 0.0
        points[number] = kl, numbers[number]["score"][0]
    labels = [record.label for record in records]
    text = "; ".join(f"{labels[n]}: score {figure_text(y)} at KL {figure_text(x)}" for n, (x, y) in points.items())
    return {"runs": [_run_cell(records, number) for number in longest], "label": text, "svg": draw_rounds(points)}


def _number_cell(values: tuple[float, ...] | None) -> str | Cell:
    """A number, a number with its interval, or an interval."""
    if values is None:
        return NONE
    if len(values) == 1:
        return figure_text(values[0])
    *mean, low, high = map(figure_text, values)
    return Cell("".join(mean), f"{low} to {high}", "number")


def point_table(points: list[dict[str, Any]]) -> Table:
    """Points as a table; columns without a value are left out."""
    keys = list(dict.fromkeys(key for point in points for key in point if point[key] is not None))[:_MAX_COLUMNS]
    rows = [[_point_text(point.get(key)) for key in keys] for point in points]
    return Table([clean(key.replace("_", " "), 30) for key in keys], rows)


def _point_text(value: Any) -> str:
    if value is None:
        return NONE
    return figure_text(value) if is_number(value) else clean(value, 40)


def charts_by_group(records: list[Record]) -> Iterator[tuple[Group, Mapping[str, Curves]]]:
    """All charts of the runs."""
    tasks = [record.past.names[2] for record in records]
    curves = [record.curves for record in records]
    for group in group_tags(list(dict.fromkeys(tag for found in curves for tag in found))):
        charts = charts_of(group.tags, tasks, curves)
        if charts:
            yield group, charts


def _groups(records: list[Record]) -> Iterator[dict[str, Any]]:
    for group, charts in charts_by_group(records):
        drawn = [
            {
                "title": title,
                "runs": [_run_cell(records, number) for number in curves],
                "label": f"{title}: " + "; ".join(f"{records[n].label} {_summary(c)}" for n, c in curves.items()),
                "svg": svg,
            }
            for (title, curves), svg in zip(charts.items(), draw_curves(charts.values()), strict=True)
        ]
        yield {"title": group.title, "open": group.open, "charts": drawn}


def _summary(curve: Curve) -> str:
    first, last, low, high = map(figure_text, (curve.values[0], curve.values[-1], min(curve.values), max(curve.values)))
    return f"{first} at step {curve.steps[0]:,}, {last} at step {curve.steps[-1]:,}; from {low} to {high}"


def _short_curves(records: list[Record]) -> Table | None:
    """The values that are too few for a curve."""
    rows: list[list[str | Cell]] = []
    for tag in dict.fromkeys(tag for record in records for tag in record.curves):
        found = [record.curves.get(tag, Curve([], [], [])) for record in records]
        values = [
            ", ".join(f"{figure_text(v)} at step {s:,}" for s, v in zip(curve.steps, curve.values, strict=True))
            if len(curve.steps) < MIN_POINTS
            else NONE
            for curve in found
        ]
        if any(value not in ("", NONE) for value in values):
            rows.append([tag, *(value or NONE for value in values)])
    summary = counted(len(rows), "more number")
    return Table(_heads(records), rows, numbers=False, summary=summary) if rows else None


def _samples(records: list[Record]) -> Iterator[dict[str, Any]]:
    """Texts of the runs for the same prompts: from training, and from each evaluation that kept its texts."""
    sources: dict[str, dict[int, dict[str, Exchange]]] = {}
    for number, record in enumerate(records):
        if record.samples:
            sources.setdefault("While training", {})[number] = record.samples
        if record.rollouts:
            sources.setdefault("Saved rollouts", {})[number] = record.rollouts
        for name, rows in record.generations.items():
            if rows:
                sources.setdefault(f"From eval/{name}", {})[number] = rows
    for title, runs in sources.items():
        shared = Counter(key for exchanges in runs.values() for key in exchanges)
        keys = [key for key, _ in shared.most_common(_MAX_PROMPTS)]  # prompts of most runs first
        many = counted(len(shared), "prompt")
        yield {
            "title": title,
            "count": f"the first {len(keys)} of {many}" if len(shared) > len(keys) else many,
            "exchanges": [
                _exchange(records, {number: found[key] for number, found in runs.items() if key in found})
                for key in keys
            ],
        }


def _exchange(records: list[Record], runs: dict[int, Exchange]) -> dict[str, Any]:
    """One prompt, the dataset's response, and the newest and some earlier answers of each run."""
    first = next(iter(runs.values()))
    answers = []
    for number, exchange in runs.items():
        *earlier, last = exchange.answers or [Answer(None, "", "", "")]
        stride = -(-len(earlier) // _MAX_EARLIER_ANSWERS) or 1
        answers.append((_run_cell(records, number, last.label()), last, earlier[::stride]))
    return {"prompt": first.prompt, "references": first.references[:1], "answers": answers}


def _configuration(records: list[Record]) -> dict[str, Any]:
    """The options that differ, those that only some runs have, and all."""
    keys = list(dict.fromkeys(key for record in records for key in record.config if key not in _HIDDEN_OPTIONS))
    rows: list[list[str]] = [[key, *(_option(record, key, records) for record in records)] for key in keys]
    values = [{cell for cell in cells if cell != NONE} for _, *cells in rows]
    differing = [row for row, found in zip(rows, values, strict=True) if len(found) > 1]
    partial = [row for row, found in zip(rows, values, strict=True) if len(found) <= 1 and NONE in row[1:]]
    heads = _heads(records)
    folded = [Table(heads, rows, numbers=False, summary=f"all {len(rows)} options", class_="all")] if rows else []
    if partial:
        summary = f"{counted(len(partial), 'option')} that only some of the runs have"
        folded.insert(0, Table(heads, partial, numbers=False, summary=summary))
    return {"differing": Table(heads, differing, numbers=False) if differing else None, "folded": folded}


def _data(records: list[Record]) -> Iterator[dict[str, Any]]:
    """The summary of each dataset, once for all runs that used it."""
    found: list[tuple[dict[str, Any], list[str]]] = []
    for record in records:
        same = next((labels for report, labels in found if report == record.data), None)
        if same is not None:
            same.append(record.label)
        elif record.data:
            found.append((record.data, [record.label]))
    for report, labels in found:
        splits = report.get("splits")
        named = splits.items() if isinstance(splits, dict) else ()
        parts = {clean(name, 20): part for name, part in islice(named, _MAX_SPLITS) if isinstance(part, dict)}
        notes = report.get("notes")
        yield {
            "title": f"{clean(report.get('name', '?'))}, as {clean(report.get('kind', '?'))} rows",
            "runs": f"of {', '.join(labels)}",
            "table": Table(["", *parts], list(_data_rows(list(parts.values())))),
            "notes": [clean(note, 400) for note in (notes[:20] if isinstance(notes, list) else [])],
        }


def _data_rows(parts: list[dict[str, Any]]) -> Iterator[list[str]]:
    def inner(part: dict[str, Any], *keys: str) -> Any:
        value: Any = part
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def counts(name: str, *keys: str, always: bool = False) -> Iterator[list[str]]:
        values = [inner(part, *keys) for part in parts]
        values = [value if isinstance(value, int) else None for value in values]
        if always or any(values):
            yield [name, *map(figure_text, values)]

    yield from counts("rows read", "read", always=True)
    yield from counts("rows kept", "kept", always=True)
    dropped = [inner(part, "dropped") for part in parts]
    for reason in sorted({str(key) for reasons in dropped if isinstance(reasons, dict) for key in reasons})[:30]:
        yield from counts(f"dropped: {clean(reason.replace('_', ' '))}", "dropped", reason)
    named = {"prompts cut": "truncated prompt", "responses cut": "truncated response", "duplicate rows": "duplicates"}
    named |= {"rows with text of special tokens": "special_token_rows", "pairs": "pairs"}
    for name, keys in (named | {"rows with a margin": "rows_with_margin"}).items():
        yield from counts(name, *keys.split())
    yield from counts("tokens to learn", "trained_tokens", always=True)
    for part in ("prompt", "response", "total"):
        for key, name in {"p50": "median", "p95": "95 % up to", "max": "longest"}.items():
            yield from counts(f"{part} tokens, {name}", "tokens", part, key)


def _speed_rows(records: list[Record]) -> Iterator[list[str]]:
    paces = [_pace(record) for record in records]
    items = [_items(record) for record in records]
    yield ["whole run", *(duration_text(_seconds(record)) for record in records)]
    yield ["one step", *(duration_text(pace) for pace in paces)]
    yield ["items of a step", *map(figure_text, items)]
    rates = [amount / pace if amount and pace else None for amount, pace in zip(items, paces, strict=True)]
    yield ["items a second", *map(figure_text, rates)]
    tags = dict.fromkeys(tag for record in records for tag in record.curves if tag.startswith(("time/", "memory/")))
    for tag in tags:
        curves = [record.curves.get(tag) for record in records]
        show = figure_text if tag.endswith("_per_second") or tag.startswith("memory/") else duration_text
        yield [tag, *(show(statistics.median(curve.values)) if curve else NONE for curve in curves)]
    peaks = [record.info.get("peak_memory") for record in records]
    yield ["peak memory", *(size_text(peak) if isinstance(peak, int) else NONE for peak in peaks)]
    options = {"fabric.accelerator": "device", "fabric.devices": "devices", "fabric.precision": "precision"}
    for key, name in options.items():
        yield [name, *(_option(record, key, records) for record in records)]


def _pace(record: Record) -> float | None:
    """Median seconds of an optimizer step, from the times of the rows."""
    times = {at: time for of in record.curves.values() for at, time in zip(of.steps, of.times, strict=True)}
    paces = [
        (later - sooner) / (after - before)
        for (before, sooner), (after, later) in pairwise(sorted(times.items()))
        if later >= sooner  # else the clock was set back
    ]
    return statistics.median(paces) if paces else None


def _items(record: Record) -> float | None:
    curve = record.curves.get("train/items") or record.curves.get("policy/items")
    return statistics.median(curve.values) if curve else None
