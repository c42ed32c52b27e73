"""Histograms of token lengths: as an image, and as lines of text."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sheeprlhf.data.store import TokenizedSplit
from sheeprlhf.structure.data import DataConfig

Lengths = dict[str, np.ndarray]

_COLORS = {
    "prompt": "#8a8f98",
    "response": "#3f9c54",
    "better": "#3f9c54",
    "worse": "#b8862d",
    "total": "#3a6ea5",
}
_LIMIT_COLOR = "#c8412b"
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
_MOST_BARS = 40
_MOST_LINES = 10
_FAR = 2.5  # a limit this many times as long as the longest row would leave no room for the bars


def lengths_of(split: TokenizedSplit) -> Lengths:
    """Tokens of every prompt, every response and every row of a split; of ranked responses, the best one and the rest.

    Where no row has a response, there are no lengths of responses.

    Where the better responses are the longer ones, a model can learn length instead of what is meant.
    """
    best, worse = split.sizes[:, 1:2], split.sizes[:, 2:]
    parts = {"better": best, "worse": worse} if worse.size else {"response": best}
    of_responses = {kind: sizes[sizes >= 0] for kind, sizes in parts.items() if (sizes >= 0).any()}
    return {"prompt": split.sizes[:, 0], **of_responses, "total": split.lengths}


def text_histogram(lengths: Lengths, *, bar: str, longest_bar: int) -> list[str]:
    """A head and at most ten lines: a range of lengths, and for each kind of length a bar and its count."""
    longest = int(max(values.max() for values in lengths.values()))
    step = _step(longest)
    shortest = int(min(values.min() for values in lengths.values()))
    edges = np.arange(1 + (shortest - 1) // step * step, longest + step + 1, step)
    counts = {kind: np.histogram(values, bins=edges)[0] for kind, values in lengths.items()}
    labels = [f"{low}-{low + step - 1}" if step > 1 else f"{low}" for low in edges[:-1].tolist()]
    first = max(map(len, [*labels, "tokens"]))
    digits = {kind: len(f"{count.max():,}") for kind, count in counts.items()}
    head = "  ".join(f"{kind:<{longest_bar + digits[kind] + 1}}" for kind in counts)
    lines = [f"{'tokens':>{first}}  {head}".rstrip()]
    for number, label in enumerate(labels):
        cells = []
        for kind, count in counts.items():
            size = math.ceil(longest_bar * count[number] / count.max())  # one row in a thousand still shows
            count_text = f"{count[number]:,}" if count[number] else ""
            cells.append(f"{bar * size:<{longest_bar}} {count_text:>{digits[kind]}}")
        lines.append(f"{label:>{first}}  {'  '.join(cells)}".rstrip())
    return lines


def _step(longest: int) -> int:
    """The width of a bar, so that ten at most reach to the longest: a round number if it is more than a few."""
    step = math.ceil(longest / _MOST_LINES)
    unit = 1 if step <= 5 else 5 if step <= 50 else 50
    return math.ceil(step / unit) * unit


def draw_histograms(splits: Mapping[str, TokenizedSplit], cfg: DataConfig, title: str, software: str) -> bytes:
    """A PNG: a row for each split, a column for each kind of length, the limits of the configuration as lines.

    Args:
        splits: those that have rows.
        cfg: gives the limits.
        title: of the whole image.
        software: what made it; it is kept in the file.
    """
    from matplotlib import style
    from matplotlib.figure import Figure  # without pyplot: no window, and no figures that others share

    lengths = {name: lengths_of(split) for name, split in splits.items()}
    kinds = [kind for kind in _COLORS if any(kind in of_split for of_split in lengths.values())]
    limits = {"prompt": ("data.max_prompt_length", cfg.max_prompt_length)}
    if "better" not in kinds:  # else the limit is that of the prompt with its longest response
        limits["total"] = ("data.max_length", cfg.max_length)
    with style.context(["default", _STYLE]):  # the user's own settings may not fit
        figure = Figure(figsize=(11, 1.3 + 1.75 * len(splits)), layout="constrained")
        figure.suptitle(title, fontsize=11)
        grid = figure.subplots(len(splits), len(kinds), sharex="col", squeeze=False)
        for column, kind in enumerate(kinds):
            longest = int(max(of_split[kind].max() for of_split in lengths.values() if kind in of_split))
            step = math.ceil(longest / _MOST_BARS)
            edges = np.arange(1, longest + step + 1, step) - 0.5
            for axes, (name, values) in zip(grid[:, column], lengths.items(), strict=True):
                if kind in values:
                    _draw_one(axes, values[kind], edges, _COLORS[kind])
                else:
                    axes.set_title("none", fontsize=8)
                    axes.set_yticks([])
                if column == 0:
                    axes.set_ylabel(f"{name}: {len(splits[name]):,} rows")
            grid[-1, column].set_xlabel("tokens")
            key, limit = limits.get(kind, ("", 0))
            far = limit > _FAR * longest
            grid[0, column].set_xlim(0, 1.04 * max(edges[-1], 0 if far else limit))
            _head(grid[0, column], 1.36, f"{kind} length", fontsize=11)
            if key:
                _draw_limit(list(grid[:, column]), key, limit, far=far)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=130, metadata={"Software": software})
    return image.getvalue()


def _draw_one(axes: Any, values: np.ndarray, edges: np.ndarray, color: str) -> None:
    """One histogram, its figures above it."""
    axes.hist(values, bins=edges, color=color)
    axes.yaxis.get_major_locator().set_params(integer=True)
    median, most = (int(np.percentile(values, p, method="inverted_cdf")) for p in (50, 95))
    axes.set_title(f"median {median},  95 % up to {most},  longest {values.max()}", fontsize=8)


def _draw_limit(column: Sequence[Any], key: str, limit: int, *, far: bool) -> None:
    """A limit of the configuration: a line in each histogram of a column, or a note that it is beyond all of them."""
    _head(column[0], 1.2, f"{key} = {limit}" + (", far to the right" if far else ""), fontsize=8, color=_LIMIT_COLOR)
    if not far:
        for axes in column:
            axes.axvline(limit + 0.5, color=_LIMIT_COLOR, linestyle="--", linewidth=1.2)


def _head(axes: Any, height: float, text: str, **style: Any) -> None:
    """A line above a column."""
    axes.text(0.5, height, text, transform=axes.transAxes, ha="center", **style)
