"""Draw quickstart_curves.png from the runs of docs/quickstart.md: `python docs/images/make_quickstart.py logs/runs`."""

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

PANELS = (  # task, what is drawn, title, label of the axis
    ("rm", "train/margin", "task=rm", "better less worse score"),
    ("dpo", "train/rewards/margins", "task=dpo", "margin of the implicit rewards"),
    ("grpo", "objective/scores", "task=grpo", "share of imperative summaries"),
    ("grpo", "objective/kl", "task=grpo", "KL from the start, nats a response"),
)


def curve(runs: Path, task: str, tag: str) -> tuple[list[int], list[float]]:
    """Steps and values of a number of the newest run of a task."""
    file = sorted(runs.glob(f"*/*/{task}/*/*/metrics.csv"))[-1]
    with file.open(newline="") as rows:
        points = [(int(row["step"]), float(row["value"])) for row in csv.DictReader(rows) if row["tag"] == tag]
    return [step for step, _ in points], [value for _, value in points]


def draw(runs: Path) -> pyplot.Figure:
    """Four panels side by side."""
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(13, 3.1), layout="constrained")
    for ax, (task, tag, title, label) in zip(axes, PANELS, strict=True):
        ax.plot(*curve(runs, task, tag), color="#2f6db3", linewidth=2)
        ax.set_title(title, fontsize=11, family="monospace")
        ax.set_xlabel("optimizer steps")
        ax.set_ylabel(label)
        ax.set_xlim(left=0)
        ax.grid(color="#dde3e8", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    draw(Path(sys.argv[1])).savefig(Path(__file__).with_name("quickstart_curves.png"), dpi=110, facecolor="white")
