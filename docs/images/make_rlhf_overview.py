"""The README's figure, rlhf_overview.png: `python docs/images/make_rlhf_overview.py` draws it, by matplotlib alone."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, FAINT = "#22303c", "#5d6d7a"
BLUE, GREEN, VIOLET, AMBER, GREY = "#2f6db3", "#2e8b57", "#7a4fb0", "#c77d0a", "#8a97a3"
WIDTH, HEIGHT = 12.1, 6.8  # inches; the drawing's units are tenths of an inch


def box(
    ax: Axes, x: float, y: float, w: float, h: float, colour: str, *, fill: float = 0.1, dashed: bool = False
) -> None:
    """A rounded box from its lower left corner."""
    shape = {"boxstyle": "round,pad=0,rounding_size=1.6", "linewidth": 1.6, "linestyle": "--" if dashed else "-"}
    ax.add_patch(
        FancyBboxPatch((x, y), w, h, facecolor=(*matplotlib.colors.to_rgb(colour), fill), edgecolor=colour, **shape)
    )


def text(ax: Axes, x: float, y: float, words: str, size: float = 10, colour: str = INK, **more: object) -> None:
    """Words centred on a point."""
    ax.text(
        x, y, words, **{"ha": "center", "va": "center", "fontsize": size, "color": colour, "linespacing": 1.45} | more
    )


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK, **more: object) -> None:
    """An arrow between two points; `connectionstyle` bends it."""
    style = {"arrowstyle": "-|>", "mutation_scale": 14, "linewidth": 1.6, "color": colour, "shrinkA": 0, "shrinkB": 0}
    ax.add_patch(FancyArrowPatch(start, end, **style | more))


def stage(ax: Axes, x: float, w: float, colour: str, data: str, title: str, command: str, body: str) -> None:
    """A stage of the upper lane: what it reads on top, what it does below."""
    box(ax, x + 2, 59, w - 4, 6, GREY, fill=0.08)
    text(ax, x + w / 2, 62, data, 9, FAINT)
    arrow(ax, (x + w / 2, 59), (x + w / 2, 55), GREY)
    box(ax, x, 34, w, 21, colour)
    text(ax, x + w / 2, 50.4, title, 12, colour, weight="bold", va="baseline")
    text(ax, x + w / 2, 46.8, command, 9, FAINT, family="monospace", va="baseline")
    text(ax, x + w / 2, 43.6, body, 9.5, va="top")


def draw() -> pyplot.Figure:
    """The whole figure."""
    figure = pyplot.figure(figsize=(WIDTH, HEIGHT))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_xlim(0, WIDTH * 10)
    ax.set_ylim(0, HEIGHT * 10)
    ax.axis("off")

    stage(
        ax,
        3,
        25,
        BLUE,
        "prompts and responses",
        "1  Fine-tuning",
        "task=sft",
        "learns to write the response\nafter its prompt",
    )
    stage(
        ax,
        35,
        25,
        AMBER,
        "better and worse responses",
        "2  Reward model",
        "task=rm",
        "learns which response\npeople like better:\na response gets a score",
    )
    stage(
        ax,
        67,
        31,
        VIOLET,
        "prompts alone",
        "3  Reinforcement learning",
        "task=ppo | grpo | rloo | online_dpo",
        "samples responses, has them scored,\nand makes the good ones likelier,\nnot far from where it started",
    )
    arrow(ax, (28, 44.5), (35, 44.5))
    text(ax, 31.5, 46.4, "start", 8.5, FAINT)
    arrow(ax, (60, 44.5), (67, 44.5))
    text(ax, 63.5, 46.4, "score", 8.5, FAINT)

    box(ax, 35, 20, 63, 8.5, GREEN)
    text(ax, 47, 25.6, "DPO, KTO", 12, GREEN, weight="bold")
    text(ax, 47, 22.4, "task=dpo | kto", 9, FAINT, family="monospace")
    text(
        ax,
        77,
        24.2,
        "from the same pairs, or from single responses with labels,\n"
        "the model itself learns what is liked: no reward model",
        9.5,
    )
    arrow(ax, (15.5, 34), (35, 24.2), connectionstyle="angle,angleA=-90,angleB=180,rad=6")
    text(ax, 24.5, 25.6, "or directly", 8.5, FAINT)
    arrow(ax, (15.5, 31.2), (82.5, 34), connectionstyle="angle,angleA=0,angleB=-90,rad=6")
    text(ax, 47.5, 32.5, "the policy starts here too, and this is its reference", 8.5, FAINT)

    box(ax, 105, 28, 13, 19, INK, fill=0.06)
    text(ax, 111.5, 42.2, "aligned\nmodel", 12, weight="bold")
    text(ax, 111.5, 34.3, "eval, report,\nchat, export", 9, FAINT)
    arrow(ax, (98, 44.5), (105, 41))
    arrow(ax, (98, 24.2), (105, 33))

    box(ax, 3, 3, 115, 12, GREY, fill=0.07, dashed=True)
    text(ax, 17, 10.7, "With LoRA: one base", 10.5, weight="bold")
    text(ax, 17, 6.7, "in memory, frozen, for all of them", 9, FAINT)
    parts = (("policy", VIOLET, "adapter"), ("reference", BLUE, "adapters off"), ("critic", VIOLET, "adapter and head"))
    for number, (name, colour, how) in enumerate((*parts, ("reward model", AMBER, "adapter and head"))):
        x = 35 + number * 20.6
        box(ax, x, 5, 18.6, 8, colour, fill=0.12)
        text(ax, x + 9.3, 9.8, name, 10, colour, weight="bold", va="baseline")
        text(ax, x + 9.3, 6.6, how, 9, FAINT, va="baseline")
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_name("rlhf_overview.png"), dpi=130, facecolor="white")
