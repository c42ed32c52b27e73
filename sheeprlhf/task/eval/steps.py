"""Held-out steps: how often a process reward model tells right steps from wrong ones, and finds the first wrong one."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sheeprlhf.agent.batches import Batches, longest_row
from sheeprlhf.data.rows import STEPS
from sheeprlhf.engine.shard import place
from sheeprlhf.rollout.rollout import predict_targets
from sheeprlhf.structure.evaluation import StepsConfig
from sheeprlhf.structure.run import EvalConfig
from sheeprlhf.task.eval.load import Evaluation
from sheeprlhf.task.eval.result import draw_histogram, save_result
from sheeprlhf.task.eval.statistics import interval_of
from sheeprlhf.task.models import load_trained_reward_model
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.lightning import Fabric


def evaluate(fabric: Fabric, cfg: EvalConfig) -> Path | None:
    """All ranks: score the steps of a split, print the figures and save them as JSON."""
    task = cfg.task
    assert isinstance(task, StepsConfig) and cfg.experiment_dir is not None
    job = Evaluation(fabric, cfg)
    split = job.split(job.prepare("stepwise"))
    of = (job.model, Path(cfg.experiment_dir), task.model_name, job.tokenizer)
    model, packed = load_trained_reward_model(*of, **job.options(longest_row({"": split})))
    if model.step_separator is None:
        raise ConfigError(f"experiment_dir={cfg.experiment_dir} is no run of task=prm: evaluate it by task=preference")
    place(fabric, model)  # onto the device, in the precision asked for
    batches = Batches(fabric, task, packed=packed, targets="steps")
    scores_N = predict_targets(fabric, model, model, batches, split, "evaluating", task.num_samples).double().numpy()
    rows = split.examples(range(min(len(split), task.num_samples or len(split))))
    labels = [(row.columns or {})[STEPS[1]] for row in rows]
    numbers = step_figures(scores_N, labels, cfg.seed)
    table = Table("metric", "value")
    for name, value in numbers.items():
        parts = value if isinstance(value, list) else [value]
        table.add_row(name.replace("_", " "), " to ".join("-" if one is None else f"{one:.4g}" for one in parts))
    labels_N = np.concatenate(labels).astype(bool)
    shown = {"right steps": scores_N[labels_N], "wrong steps": scores_N[~labels_N]}
    draw = partial(draw_histogram, {name: part for name, part in shown.items() if len(part)}, "score of a step")
    return save_result(fabric, cfg, f"steps-{task.data_split}", numbers, table=table, draw=draw)


def step_figures(scores_N: np.ndarray, labels: list[list[bool]], seed: int) -> dict[str, Any]:
    """Figures of the scores of steps: a score above 0 says that the step is right.

    "first_wrong" is the share of responses of which the first wrong step is found (ProcessBench, arXiv 2412.06559), or
    that there is none. Shares of nothing are None.

    Args:
        scores_N: log-odds of all steps, response by response.
        labels: of the steps of each response.
        seed: of the intervals.
    """
    labels_N, said_N = np.concatenate(labels).astype(bool), scores_N > 0
    right_N = (said_N == labels_N).astype(float)
    said = np.split(said_N, np.cumsum([len(one) for one in labels])[:-1])
    firsts = [
        float(np.argmin([*one, False]) == np.argmin([*other, False])) for one, other in zip(said, labels, strict=True)
    ]
    accuracy, interval = interval_of(right_N, seed=seed)
    parts = {"right": right_N[labels_N], "wrong": right_N[~labels_N]}
    return {
        "loss": float(np.logaddexp(0.0, np.where(labels_N, -scores_N, scores_N)).mean()),
        "accuracy": accuracy,
        "accuracy_interval": interval,
        **{f"accuracy_of_{name}_steps": float(part.mean()) if len(part) else None for name, part in parts.items()},
        "first_wrong": float(np.mean(firsts)),
        "steps": len(labels_N),
        "rows": len(labels),
    }
