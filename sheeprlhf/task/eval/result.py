"""Result of an evaluation: its statistics, a table on the screen, JSON and PNG files in the run.

Letters: N rows, M columns, P pairs with the better response first.
"""

import io
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import sheeprlhf
from sheeprlhf.data.example import Example
from sheeprlhf.reward.score import Texts
from sheeprlhf.security.json_records import RESULT, load_json
from sheeprlhf.structure.run import EvalConfig
from sheeprlhf.utils.errors import ConfigError, RecordError
from sheeprlhf.utils.lightning import Fabric
from sheeprlhf.utils.output import write_file

INK, GREY, SECOND = "#3a6ea5", "#8a8f98", "#b8862d"
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
_MOST_BARS = 24
NUM_RESAMPLES = 1000
BINS = 10


def save_result(
    fabric: Fabric,
    cfg: EvalConfig,
    name: str,  # of the file
    numbers: Mapping[str, Any],  # the results, for JSON
    *,
    table: Table | None = None,  # by default one number a line
    shown: Mapping[str, Any] | None = None,  # the numbers to print; by default all
    rows: Iterable[Mapping[str, Any]] = (),  # the sources of the numbers, for `<name>-<weights>.jsonl`
    weights: str | None = None,  # by default those that were evaluated
    more: Mapping[str, Callable[[], bytes]] = MappingProxyType({}),  # makes further files, by their ending
    draw: Callable[[], bytes],  # makes `<name>-<weights>.png`, if asked for one
    always_draw: bool = False,  # also if not asked
) -> Path | None:
    """All ranks; rank zero prints the numbers and writes `<name>-<weights>.json`, which is returned there."""
    if not fabric.is_global_zero:
        return None
    assert cfg.model is not None and cfg.data is not None
    if cfg.experiment_dir is not None:
        root, usual = Path(cfg.experiment_dir), cfg.task.model_name
        folder = root / "eval"
    else:
        root, usual = Path(cfg.output_dir), cfg.model.config_name
        folder = root
    weights = usual if weights is None else weights
    record = {
        **numbers,
        "task": cfg.task.config_name,
        "split": cfg.task.data_split,
        "data": cfg.data.config_name,
        "model": cfg.model.repo_name,
        "weights": weights,
        "experiment_dir": cfg.experiment_dir,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(max([time.time(), *_times(folder)]))),
        "version": sheeprlhf.__version__,
    }
    lines = [json.dumps(row) + "\n" for row in rows]
    files = {folder / f"{name}-{weights}.jsonl": "".join(lines).encode()} if lines else {}
    files |= {folder / f"{name}-{weights}.{ending}": make() for ending, make in more.items()}
    if cfg.plot or always_draw:
        files[folder / f"{name}-{weights}.png"] = draw()
    path = folder / f"{name}-{weights}.json"
    files[path] = json.dumps(record, indent=1).encode()  # last: the rest is there then
    for file, content in files.items():
        _write(root, file, content)
    if table is None:
        table = Table("metric", "value")
        for key, value in (numbers if shown is None else shown).items():
            table.add_row(key, cell(value))
    table.title = f"{cfg.task.config_name} of {weights} on {cfg.data.config_name}/{cfg.task.data_split}"
    Console().print(table)
    print("\n".join(f"saved: {file}" for file in files))
    return path


def records_of(rows: Sequence[Example], texts: Texts, **columns: Sequence[Any]) -> list[dict[str, Any]]:
    """The rows of an evaluation for its file: number, prompt and response of each, and its values of the columns."""
    records = []
    for number, row in enumerate(rows):
        record = {"row": row.row_id, "prompt": texts.prompts[number], "response": texts.responses[number]}
        records.append(record | {name: values[number] for name, values in columns.items()})
    return records


def _times(folder: Path) -> Iterator[float]:
    """A second after each result of a folder: the newest result has the latest time even if the clock moved back."""
    for path in folder.glob("*.json"):
        with suppress(RecordError, ValueError, OverflowError, OSError):
            yield datetime.fromisoformat(load_json(path, RESULT).get("time", "")).timestamp() + 1


def cell(value: Any) -> str:
    """A number, or the two ends of an interval, for people to read."""
    if isinstance(value, list):
        return " to ".join(map(cell, value))
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def _write(root: Path, path: Path, content: bytes) -> None:
    try:
        write_file(root, str(path.relative_to(root)), content)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; check permissions and free space") from error


@contextmanager
def _drawing(image: io.BytesIO, height: float = 4.0, rows: int = 1) -> Iterator[Any]:
    """Axes; what was drawn on them inside is in `image` afterwards."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(5.5, height), layout="constrained")
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
    """A PNG: how a number is spread over the rows, for one or two systems, with their means; `label` names it."""
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
    """A PNG: a mean and its interval (mean, lower and upper end) for each system; `label` names them."""
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
    """A PNG: score against KL of a run's checkpoints, and of the best of n of its start; ROUGE-L below, if known."""
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


def mean_and_interval(values_NM: np.ndarray, *, seed: int) -> np.ndarray:
    """(3, M) mean, lower and upper end of a 95 % percentile bootstrap over N >= 1 rows, alike for all columns."""
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


def pair_figures(chosen_P: np.ndarray, rejected_P: np.ndarray, longer_P: np.ndarray) -> dict[str, Any]:
    """Accuracy, margin and what length has to do with them.

    Args:
        chosen_P: scores of the better responses.
        rejected_P: scores of the worse ones.
        longer_P: tokens that the better response has more than the worse one (negative: fewer).

    Returns:
        pairs; loss: mean -log sigmoid(margin); accuracy: share of pairs whose better response scores higher, half a
        point for equal scores; margin: mean; accuracy_by_length: the same for pairs whose better response is shorter,
        equally long and longer, and how many these are; length_correlation: Pearson's, between the difference in
        length and in score; a model that only likes length has 1 and is near 0 right where the better one is shorter.
    """
    margin_P = chosen_P - rejected_P
    right_P = (margin_P > 0) + 0.5 * (margin_P == 0)
    kinds = {"shorter": longer_P < 0, "equal": longer_P == 0, "longer": longer_P > 0}
    return {
        "pairs": len(margin_P),
        "loss": float(np.logaddexp(0.0, -margin_P).mean()),
        "accuracy": float(right_P.mean()),
        "margin": float(margin_P.mean()),
        "score_chosen": float(chosen_P.mean()),
        "score_rejected": float(rejected_P.mean()),
        "accuracy_by_length": {
            kind: {"pairs": int(mask.sum()), "accuracy": float(right_P[mask].mean()) if mask.any() else None}
            for kind, mask in kinds.items()
        },
        "length_correlation": correlation(longer_P, margin_P),
    }


def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's; None if either does not vary."""
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
    return float((x * y).sum()) / size if size > 0 else None


def calibration(margin_P: np.ndarray, bins: int = BINS) -> list[dict[str, float]]:
    """Accuracy by confidence: a row for each part of [0.5, 1] that has pairs.

    The model calls the response with the higher score better, with probability sigmoid(|margin|).

    Returns:
        Rows of low and high (limits of the probability), pairs, predicted (mean probability) and right (share).
    """
    sure_P = 1.0 / (1.0 + np.exp(-np.abs(margin_P)))
    right_P = (margin_P > 0) + 0.5 * (margin_P == 0)
    edges = np.linspace(0.5, 1.0, bins + 1)
    place_P = np.clip(np.digitize(sure_P, edges) - 1, 0, bins - 1)
    rows = []
    for number in range(bins):
        inside = place_P == number
        if inside.any():
            rows.append(
                {
                    "low": float(edges[number]),
                    "high": float(edges[number + 1]),
                    "pairs": int(inside.sum()),
                    "predicted": float(sure_P[inside].mean()),
                    "right": float(right_P[inside].mean()),
                }
            )
    return rows


def calibration_error(rows: list[dict[str, float]]) -> float:
    """Mean distance between predicted and right, weighted by pairs (Guo et al., arXiv 1706.04599, eq. 3)."""
    total = sum(row["pairs"] for row in rows)
    return sum(row["pairs"] * abs(row["predicted"] - row["right"]) for row in rows) / total
