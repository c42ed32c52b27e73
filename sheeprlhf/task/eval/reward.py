"""A reward model on held-out pairs: accuracy, margin, what length has to do with it, and calibration."""

import io
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import nn

from sheeprlhf.data.prepare import prepare_data
from sheeprlhf.engine.fabric import gather_objects
from sheeprlhf.engine.rng import isolated_rng
from sheeprlhf.engine.shard import gathered
from sheeprlhf.engine.step import MicroBatch
from sheeprlhf.model.load import load_tokenizer
from sheeprlhf.structure.run import EvalConfig
from sheeprlhf.structure.task import RewardConfig
from sheeprlhf.task.batches import Batches, longest_row
from sheeprlhf.task.eval.load import evaluated_split, say_on
from sheeprlhf.task.eval.pairs import calibration, calibration_error, pair_figures
from sheeprlhf.task.eval.result import save_result
from sheeprlhf.task.start import load_trained_reward_model
from sheeprlhf.utils.lightning import Fabric
from sheeprlhf.utils.modes import eval_mode


def evaluate(fabric: Fabric, cfg: EvalConfig) -> None:
    """All ranks: print the figures and save them as JSON and as a calibration plot.

    Raises:
        SheepError: something that the user can mend; see its message.
    """
    task = cfg.task
    assert isinstance(task, RewardConfig) and cfg.model is not None and cfg.data is not None
    assert cfg.experiment_dir is not None  # the command line asks for one
    say = partial(say_on, fabric)
    tokenizer = load_tokenizer(cfg.model)
    data = prepare_data(cfg.data, tokenizer, kind="preference", say=say, progress=fabric.is_global_zero)
    split = evaluated_split(data, task.data_split)
    run_dir, longest = Path(cfg.experiment_dir), longest_row({"": split})
    model, packed = load_trained_reward_model(
        cfg.model, run_dir, task.model_name, tokenizer, longest=longest, batching=task.batching, say=say
    )
    module = fabric.setup_module(model)
    batches = Batches(fabric, task, packed=packed, targets="last").first(split, task.num_samples, "evaluating")
    chosen_P, rejected_P, longer_P = score_pairs(fabric, module, batches)
    table = calibration(chosen_P - rejected_P)
    numbers = pair_figures(chosen_P, rejected_P, longer_P)
    numbers |= {"rows": min(len(split), task.num_samples or len(split)), "calibration": table}
    numbers["calibration_error"] = calibration_error(table)
    save_result(fabric, cfg, f"reward-{task.data_split}", numbers, table=_table(numbers))
    if fabric.is_global_zero:
        image = run_dir / "eval" / f"reward-{task.data_split}-{task.model_name}-calibration.png"
        image.write_bytes(draw_calibration(table))
        print(f"saved: {image}")


def score_pairs(
    fabric: Fabric, module: nn.Module, micro_batches: Iterable[MicroBatch]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All ranks: the scores of the better and the worse response of all pairs, and how much longer the better one is.

    Args:
        fabric: where it runs.
        module: the reward model, set up.
        micro_batches: this rank's, made with `targets="last"`.

    Returns:
        Three (P,) arrays, the pairs of rank 0 first.
    """
    found: list[np.ndarray] = [np.zeros((0, 3))]
    with isolated_rng(), gathered(module), eval_mode(module), torch.no_grad():
        for micro in micro_batches:
            batch = fabric.to_device(micro.batch)
            scores_P2 = module(batch)[batch.pairs_P2].cpu().numpy()
            lengths_P2 = np.array(batch.response_lengths)[micro.batch.pairs_P2.numpy()]
            found.append(np.column_stack([scores_P2, lengths_P2[:, 0] - lengths_P2[:, 1]]))
    chosen_P, rejected_P, longer_P = np.concatenate(gather_objects(fabric, np.concatenate(found))).T
    return chosen_P, rejected_P, longer_P


def _table(numbers: dict[str, Any]) -> Table:
    """The figures, one a line, then how sure the model was and how often right."""
    table = Table("metric", "value")
    for key in ("pairs", "accuracy", "loss", "margin", "score_chosen", "score_rejected"):
        table.add_row(key, f"{numbers[key]:,}" if key == "pairs" else f"{numbers[key]:.4f}")
    for kind, part in numbers["accuracy_by_length"].items():
        figure = "-" if part["accuracy"] is None else f"{part['accuracy']:.4f}"
        table.add_row(f"accuracy where the better one is {kind}", f"{figure} ({part['pairs']:,} pairs)")
    related = numbers["length_correlation"]
    table.add_row("correlation of score with length", "-" if related is None else f"{related:.4f}")
    table.add_row("calibration error", f"{numbers['calibration_error']:.4f}")
    for row in numbers["calibration"]:
        label = f"  sure to {row['low']:.0%}-{row['high']:.0%}"
        table.add_row(label, f"right in {row['right']:.1%} of {row['pairs']:,} pairs")
    return table


def draw_calibration(rows: list[dict[str, float]]) -> bytes:
    """A PNG: how often the model was right against how sure it was, and the number of pairs of each point."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}]):
        figure = Figure(figsize=(5.5, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.plot([0.5, 1], [0.5, 1], color="#8a8f98", linestyle="--", linewidth=1, label="as sure as right")
        sure, right = ([row[key] for row in rows] for key in ("predicted", "right"))
        axes.plot(sure, right, color="#3a6ea5", marker="o", label="the model")
        for row in rows:
            place = (row["predicted"], row["right"])
            axes.annotate(f"{row['pairs']:,}", place, textcoords="offset points", xytext=(5, -11), fontsize=7)
        axes.set(xlabel="probability that it gives", ylabel="share of pairs where it is right", xlim=(0.48, 1.02))
        axes.set_ylim(min([0.45, *right]) - 0.03, 1.04)
        axes.legend(frameon=False)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=130)
    return image.getvalue()
