"""The PNGs of evaluations."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

INK, GREY, SECOND = "#3a6ea5", "#8a8f98", "#b8862d"
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
_MOST_BARS = 24


@contextmanager
def _drawing(image: io.BytesIO, width: float = 5.5, height: float = 4.0, rows: int = 1) -> Iterator[Any]:
    """Axes; what was drawn on them inside is in `image` afterwards."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure.subplots(rows, sharex=True)
        figure.savefig(image, format="png", dpi=130)


def draw_calibration(rows: list[dict[str, float]]) -> bytes:
    """A PNG: how often the model was right against how sure it was, and the number of pairs of each point."""
    image = io.BytesIO()
    with _drawing(image, height=4.5) as axes:
        axes.plot([0.5, 1], [0.5, 1], color=GREY, linestyle="--", linewidth=1, label="as sure as right")
        sure, right = ([row[key] for row in rows] for key in ("predicted", "right"))
        axes.plot(sure, right, color=INK, marker="o", label="the model")
        for row in rows:
            place = (row["predicted"], row["right"])
            axes.annotate(f"{row['pairs']:,}", place, textcoords="offset points", xytext=(5, -11), fontsize=7)
        axes.set(xlabel="probability that it gives", ylabel="share of pairs where it is right", xlim=(0.48, 1.02))
        axes.set_ylim(min([0.45, *right]) - 0.03, 1.04)
        axes.legend(frameon=False)
    return image.getvalue()


def draw_histogram(columns: Mapping[str, np.ndarray], label: str) -> bytes:
    """A PNG: how a number is spread over the rows, for one or two systems, with their means.

    Args:
        columns: the numbers by system.
        label: what they are.
    """
    image = io.BytesIO()
    edges = np.histogram_bin_edges(np.concatenate(list(columns.values())), _MOST_BARS)
    with _drawing(image) as axes:
        for (name, values), color in zip(columns.items(), (INK, SECOND), strict=False):
            mean = float(np.mean(values))
            axes.hist(values, bins=edges, color=color, alpha=0.55, label=f"{name}: mean {mean:.4g}")
            axes.axvline(mean, color=color, linewidth=1.2)
        axes.set(xlabel=label, ylabel="rows")
        axes.legend(frameon=False)
    return image.getvalue()


def draw_bars(columns: Mapping[str, tuple[float, float, float]], label: str) -> bytes:
    """A PNG: a mean and its interval for each system.

    Args:
        columns: mean, lower and upper end by system.
        label: what they are.
    """
    image = io.BytesIO()
    with _drawing(image) as axes:
        for place, (mean, low, high) in enumerate(columns.values()):
            axes.bar(place, mean, color=GREY if place else INK, width=0.6)
            axes.errorbar(place, mean, [[mean - low], [high - mean]], color="black", capsize=4, linewidth=1)
            axes.annotate(f"{mean:.3g}", (place, high), textcoords="offset points", xytext=(0, 3), ha="center")
        axes.set_xticks(range(len(columns)), list(columns))
        axes.set_ylabel(label)
    return image.getvalue()


def draw_frontier(points: list[dict[str, Any]], judge: str) -> bytes:
    """A PNG: score against KL of a run's checkpoints, and of the best of n of its start; ROUGE-L below, if known.

    Args:
        points: of `task/eval/frontier.py`; those of the best of n have an "n".
        judge: how the score is called.
    """
    best, steps = ([point for point in points if bool(point["n"]) is drawn] for drawn in (True, False))
    measures = {"score": f"score ({judge})"}
    if any(point["rougeL"] is not None for point in steps):
        measures["rougeL"] = "ROUGE-L"
    image = io.BytesIO()
    with _drawing(image, height=3.6 * len(measures), rows=len(measures)) as all_axes:
        for axes, (key, label) in zip(np.atleast_1d(all_axes), measures.items(), strict=True):
            kl = [point["kl"] for point in steps]
            axes.plot(kl, [point[key] for point in steps], color=INK, marker="o", label="checkpoints")
            for point in steps:
                place = (point["kl"], point[key])
                axes.annotate(point["what"], place, textcoords="offset points", xytext=(5, -10), fontsize=7)
            if key == "score":
                bounds = [point["kl"] for point in best]
                axes.plot(
                    bounds,
                    [point[key] for point in best],
                    color=GREY,
                    marker=".",
                    linestyle="--",
                    label="best of n of the start, at most this far",
                )
                axes.fill_between(
                    kl,
                    *([point[f"score_{end}"] for point in steps] for end in ("low", "high")),
                    color=INK,
                    alpha=0.15,
                    linewidth=0,
                )
            axes.set(xlabel="KL from the start, nats a response", ylabel=label)
            axes.legend(frameon=False)
    return image.getvalue()
