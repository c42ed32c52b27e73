"""Held-out pairs and steps: accuracy of a reward model.

Of pairs also that of a policy's implicit reward (arXiv 2305.18290, sec. 4); of steps, how often a process reward model
tells right ones from wrong ones, and finds the first wrong one.
"""

from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from sheeprlhf.agent.batches import Batches, BatchOptions, longest_row
from sheeprlhf.agent.policy import Policy
from sheeprlhf.agent.reward import AdapterValueModel, RewardModel
from sheeprlhf.config.run_lookup import read_run_config, task_of_run
from sheeprlhf.data.example import Batch
from sheeprlhf.data.report import available_columns
from sheeprlhf.data.rows import STEPS, printable
from sheeprlhf.data.store import TokenizedSplit
from sheeprlhf.engine.shard import place
from sheeprlhf.rollout.rollout import predict_targets, response_scores
from sheeprlhf.structure.evaluation import PreferenceConfig, StepsConfig
from sheeprlhf.structure.run import EvalConfig
from sheeprlhf.task.eval.load import Evaluation, start_of, task_options
from sheeprlhf.task.eval.result import (
    calibration,
    calibration_error,
    draw_calibration,
    draw_histogram,
    interval_of,
    pair_figures,
    save_result,
)
from sheeprlhf.task.models import load_trained_reward_model
from sheeprlhf.utils.errors import ConfigError, DataError
from sheeprlhf.utils.lightning import Fabric

_BETA = 0.1


def evaluate(fabric: Fabric, cfg: EvalConfig) -> Path | None:
    """All ranks: print the figures and save them as JSON, with their calibration as a plot."""
    task = cfg.task
    assert isinstance(task, PreferenceConfig)
    job = Evaluation(fabric, cfg)
    data = job.prepare("preference", columns=() if task.subset_column is None else (task.subset_column,))
    split = job.split(data)
    if task.subset_column is not None and task.subset_column not in split.columns:
        there = printable(available_columns(data.report, task.data_split))
        raise DataError(f"task.subset_column={task.subset_column} is not a column of the rows: give one of {there}")
    trained = None if cfg.experiment_dir is None else task_of_run(read_run_config(cfg.experiment_dir))
    numbers: dict[str, Any] = {}
    if trained is not None and trained.trains == "reward model":
        assert cfg.experiment_dir is not None
        of = (job.model, Path(cfg.experiment_dir), task.model_name, job.tokenizer)
        model = load_trained_reward_model(*of, **job.options(longest_row({"": split})))
        place(fabric, model)  # onto the device, in the precision asked for
        scores_S = scores_of_rows(fabric, model, task, split, job.tokenizer, num_rows=task.num_samples)
    else:
        scores_S, numbers = _implicit_rewards(job, split)
    chosen_P, rejected_P, longer_P = pairs_of_rows(scores_S, split.sizes[:, 1:], task.num_samples)
    calibrated = calibration(chosen_P - rejected_P)
    numbers = pair_figures(chosen_P, rejected_P, longer_P) | numbers
    right_P = (chosen_P > rejected_P) + 0.5 * (chosen_P == rejected_P)
    if task.subset_column is not None:
        numbers["accuracy_by_subset"] = accuracy_by_subset(split, task.subset_column, right_P, task.num_samples)
    numbers["accuracy_interval"] = interval_of(right_P, seed=cfg.seed)[1]
    numbers |= {"rows": min(len(split), task.num_samples or len(split)), "calibration": calibrated}
    numbers["calibration_error"] = calibration_error(calibrated)
    name, draw = f"preference-{task.data_split}", partial(draw_calibration, calibrated)
    return save_result(fabric, cfg, name, numbers, table=_table(numbers), draw=draw, always_draw=True)


def scores_of_rows(
    fabric: Fabric,
    model: RewardModel | AdapterValueModel,
    options: BatchOptions,
    split: TokenizedSplit,
    tokenizer: PreTrainedTokenizerBase,
    *,
    step_score: str = "min",
    num_rows: int | None = None,
    label: str = "evaluating",
) -> np.ndarray:
    """All ranks: (S,) float64, the score of each response of the first `num_rows` rows (None: all), row after row."""
    how: dict[str, Any] = {"num_rows": num_rows, "label": label, "step_score": step_score}
    return response_scores(fabric, options, model, split, tokenizer, **how).double().numpy()


def _implicit_rewards(job: Evaluation, split: TokenizedSplit) -> tuple[np.ndarray, dict[str, Any]]:
    """All ranks: (S,) the policy's rewards of all responses, nats * beta, and what they were made with."""
    fabric, cfg, task, longest = job.fabric, job.cfg, job.cfg.task, longest_row({"": split})
    assert isinstance(task, PreferenceConfig)
    num_rows = min(len(split), task.num_samples or len(split))
    lengths = [int(mask.sum()) for row in split.examples(range(num_rows)) for mask in row.masks()]
    index_N = np.repeat(np.arange(len(lengths)), lengths)  # the response of each token

    def sums_of(policy: Policy, label: str) -> np.ndarray:
        place(fabric, policy)
        batches = Batches(fabric, task, packed=policy.packed, targets="response")

        def call(batch: Batch) -> torch.Tensor:
            return policy(batch).target_N

        logprobs_N = predict_targets(fabric, policy, call, batches, split, label, num_rows).double().numpy()
        return np.bincount(index_N, logprobs_N, len(lengths))

    start, of_run = start_of(cfg), task_options(cfg).get("beta")
    beta = task.beta or (float(of_run) if isinstance(of_run, int | float) and of_run > 0 else _BETA)
    rewards_S = sums_of(job.load_policy(longest), "evaluating")
    if start is None:
        job.say("no run has trained this model, so it has no reference: only its log-probabilities are compared")
    else:
        job.say(f"reference: {start.name}")
        rewards_S = rewards_S - sums_of(job.load_start(start, longest), "reference")
    return beta * rewards_S, {"beta": beta, "reference": None if start is None else start.name}


def pairs_of_rows(
    scores_S: np.ndarray, sizes: np.ndarray, num_rows: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(P,) scores of the better and the worse response of every pair, and how much longer the better one is."""
    found, first = [], 0
    for row in sizes[:num_rows]:
        lengths = row[row >= 0]
        scores = scores_S[first : first + len(lengths)]
        first += len(lengths)
        found += [(scores[i], scores[j], lengths[i] - lengths[j]) for i, j in combinations(range(len(lengths)), 2)]
    chosen_P, rejected_P, longer_P = np.array(found, dtype=np.float64).reshape(-1, 3).T
    return chosen_P, rejected_P, longer_P


def accuracy_by_subset(
    split: TokenizedSplit, column: str, right_P: np.ndarray, num_rows: int | None = None
) -> dict[str, dict[str, float]]:
    """Pairs, accuracy and ties by values of a column; `right_P` is 1 if better scores higher, 0.5 for ties."""
    examples = split.examples(range(min(len(split), num_rows or len(split))))
    names = [str((row.columns or {}).get(column)) for row in examples for _ in combinations(row.responses, 2)]
    names_P = np.array(names, dtype=object)
    return {
        name: {"pairs": len(part), "accuracy": float(part.mean()), "ties": int((part == 0.5).sum())}
        for name in sorted(set(names))
        for part in [right_P[names_P == name]]
    }


def _table(numbers: dict[str, Any]) -> Table:
    """The figures, one a line, then how sure the model was and how often right."""
    table = Table("metric", "value")
    low, high = numbers["accuracy_interval"]
    table.add_row("pairs", f"{numbers['pairs']:,}")
    table.add_row("accuracy", f"{numbers['accuracy']:.4f} ({low:.4f} to {high:.4f})")
    for key in ("loss", "margin", "score_chosen", "score_rejected"):
        table.add_row(key, f"{numbers[key]:.4f}")
    for kind, part in numbers["accuracy_by_length"].items():
        figure = "-" if part["accuracy"] is None else f"{part['accuracy']:.4f}"
        table.add_row(f"accuracy where the better one is {kind}", f"{figure} ({part['pairs']:,} pairs)")
    for name, part in numbers.get("accuracy_by_subset", {}).items():
        figure = f"{part['accuracy']:.4f} ({part['pairs']:,} pairs, {part['ties']:,} with equal scores)"
        table.add_row(f"accuracy of {escape(printable([name]))}", figure)
    related = numbers["length_correlation"]
    table.add_row("correlation of score with length", "-" if related is None else f"{related:.4f}")
    table.add_row("calibration error", f"{numbers['calibration_error']:.4f}")
    for row in numbers["calibration"]:
        label = f"  sure to {row['low']:.0%}-{row['high']:.0%}"
        table.add_row(label, f"right in {row['right']:.1%} of {row['pairs']:,} pairs")
    if "beta" in numbers:
        of = "no reference" if numbers["reference"] is None else f"reference: {escape(numbers['reference'])}"
        table.caption = f"implicit reward, beta {numbers['beta']:g}; {of}"
    return table


def evaluate_steps(fabric: Fabric, cfg: EvalConfig) -> Path | None:
    """All ranks: score the steps of a split, print the figures and save them as JSON."""
    task = cfg.task
    assert isinstance(task, StepsConfig) and cfg.experiment_dir is not None
    job = Evaluation(fabric, cfg)
    split = job.split(job.prepare("stepwise"))
    of = (job.model, Path(cfg.experiment_dir), task.model_name, job.tokenizer)
    model = load_trained_reward_model(*of, **job.options(longest_row({"": split})))
    if model.step_separator is None:
        raise ConfigError(f"experiment_dir={cfg.experiment_dir} is no run of task=prm: evaluate it by task=preference")
    place(fabric, model)  # onto the device, in the precision asked for
    batches = Batches(fabric, task, packed=model.packed, targets="steps")
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
