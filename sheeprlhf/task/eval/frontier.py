"""Frontier: score against KL for a run's checkpoints, compared with the best of n of its initial model.

Every point is made of the same prompts with the same numbers. The best of n costs no training, so a policy that is
below its curve has paid more than it had to (arXiv 2009.01325, 2204.05862, 2210.10760).
"""

import csv
import io
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sheeprlhf.data.example import Example
from sheeprlhf.engine.checkpoint import saved_steps
from sheeprlhf.engine.rundir import read_run
from sheeprlhf.rollout.rollout import kl_bound
from sheeprlhf.structure.evaluation import FrontierConfig
from sheeprlhf.structure.run import EvalConfig
from sheeprlhf.task.eval.load import (
    Answers,
    Evaluation,
    answer,
    evaluated_files,
    kl_of_responses,
    logprobs_of,
    longest_with_response,
    set_up,
    start_of,
)
from sheeprlhf.task.eval.result import draw_frontier, save_result
from sheeprlhf.task.eval.reward import Judge
from sheeprlhf.task.eval.statistics import interval_of, standard_error
from sheeprlhf.task.models import check_reward_columns
from sheeprlhf.utils.lightning import Fabric

COLUMNS = ("what", "n", "score", "score_low", "score_high", "kl", "kl_error", "rougeL", "response_tokens")


def evaluate(fabric: Fabric, cfg: EvalConfig) -> Path | None:
    """All ranks: sample from the start and from every checkpoint, score, and save the curve as JSON, CSV and PNG."""
    task = cfg.task
    assert isinstance(task, FrontierConfig)
    job = Evaluation(fabric, cfg)
    data = job.prepare_scored()
    rows = job.rows(data, task.num_samples)
    check_reward_columns(cfg, data, {task.data_split: all(row.responses for row in rows)})
    longest = longest_with_response(cfg, evaluated_files(cfg), rows)
    pool, written = _write(job, rows, longest)
    judge = Judge(job, longest)
    trust = judge.trust()
    pool_PK = judge.scores(pool).reshape(len(rows), task.best_of)
    powers = (2**k for k in range(task.best_of.bit_length()) if 2**k <= task.best_of)
    points = [_best_of_point(pool_PK, n, pool, cfg.seed) for n in sorted({task.best_of, *powers})]
    points += [_point(what, own, judge.scores(own), kl_N, cfg.seed) for what, (own, kl_N) in written.items()]
    if trust is not None and trust.at_chance():
        job.say(trust.warning())
    numbers = {
        "points": points,
        "rows": len(rows),
        "rm_accuracy": None if trust is None else trust.accuracy,
        "rm_pairs": None if trust is None else trust.pairs,
    }
    name, table = judge.name(), _table(points, judge.name())
    return save_result(
        fabric,
        cfg,
        f"frontier-{name}-{task.data_split}",
        numbers,
        table=table,
        weights="all",
        more={"csv": lambda: _csv(points)},
        draw=partial(draw_frontier, points, name),
        always_draw=True,
    )


def _write(job: Evaluation, rows: list[Example], longest: int) -> tuple[Answers, dict[str, tuple[Answers, np.ndarray]]]:
    """The start's pool of answers, and each checkpoint's answers with the KL of each; one model after the other."""
    cfg, task, start = job.cfg, job.cfg.task, start_of(job.cfg)
    assert isinstance(task, FrontierConfig) and cfg.experiment_dir is not None and start is not None
    job.say(f"start: {start.name}")
    written: dict[str, tuple[Answers, Any]] = {}
    for weights in checkpoints_of(Path(cfg.experiment_dir)):
        writer = set_up(job, job.load_policy(longest, weights))
        own = answer(job, writer, rows, samples=True)
        written[weights] = own, logprobs_of(job, writer, own, weights)
        del writer
    begun = set_up(job, job.load_start(start, longest))
    pool = answer(job, begun, rows, group=task.best_of, samples=True)
    return pool, {
        weights: (own, kl_of_responses(own, logprobs_N, logprobs_of(job, begun, own, f"start of {weights}")))
        for weights, (own, logprobs_N) in written.items()
    }


def checkpoints_of(run_dir: Path) -> list[str]:
    """The names of a run's weights, oldest first; the last step of a finished run is called `final`."""
    steps, finished = sorted(saved_steps(run_dir / "checkpoints")), (run_dir / "final").is_dir()
    last = read_run(run_dir).get("step") if finished else None
    return [f"step-{step}" for step in steps if step != last] + ["final"] * finished


def expected_best(scores_PK: np.ndarray, n: int) -> np.ndarray:
    """(P,) the expected best score of n of a prompt's K, over all ways to choose n of them: unbiased for K >= n.

    The i-th smallest of K scores is the best of C(i-1, n-1) of the C(K, n) choices (arXiv 2112.09332).

    Args:
        scores_PK: (P, K) scores of independent samples.
        n: from 1 to K.
    """
    num = scores_PK.shape[1]
    weights_K = np.array([math.comb(i, n - 1) / math.comb(num, n) for i in range(num)])
    return np.sort(scores_PK, axis=1) @ weights_K


def _best_of_point(scores_PK: np.ndarray, n: int, pool: Answers, seed: int) -> dict[str, Any]:
    """The best of n responses of the start; its KL is at most `kl_bound(n)`."""
    score, (low, high) = interval_of(expected_best(scores_PK, n), seed=seed)
    point = dict.fromkeys(COLUMNS) | {"what": f"best of {n}", "n": n, "kl": kl_bound(n), "kl_error": 0.0}
    if n == 1:
        point |= {"response_tokens": float(np.mean(pool.texts.num_tokens)), "rougeL": _rouge_l(pool)}
    return point | {"score": score, "score_low": low, "score_high": high}


def _point(what: str, answers: Answers, scores_N: np.ndarray, kl_N: np.ndarray, seed: int) -> dict[str, Any]:
    """One checkpoint."""
    score, (low, high) = interval_of(scores_N, seed=seed)
    return {
        **dict.fromkeys(COLUMNS),
        **{"what": what, "score": score, "score_low": low, "score_high": high},
        **{"kl": float(kl_N.mean()), "kl_error": standard_error(kl_N), "rougeL": _rouge_l(answers)},
        "response_tokens": float(np.mean(answers.texts.num_tokens)),
    }


def _rouge_l(answers: Answers) -> float | None:
    """The mean F-measure of ROUGE-L against the references, times 100; None without them."""
    if "reference" not in answers.texts.columns:
        return None
    from rouge_score.rouge_scorer import RougeScorer

    scorer, texts = RougeScorer(["rougeL"]), answers.texts
    rows = zip(texts.columns["reference"], texts.responses, strict=True)
    return 100 * float(np.mean([scorer.score(reference, text)["rougeL"].fmeasure for reference, text in rows]))


def _csv(points: list[dict[str, Any]]) -> bytes:
    """A row a point."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(points)
    return text.getvalue().encode()


def _table(points: list[dict[str, Any]], judge: str) -> Table:
    """A row a point, for people to read."""
    table = Table("", f"score ({judge})", "KL, nats a response", "ROUGE-L", "tokens")
    for point in points:
        kl = f"{point['kl']:.3f}" + (f" +- {point['kl_error']:.3f}" if point["kl_error"] else "")
        rouge = "" if point["rougeL"] is None else f"{point['rougeL']:.1f}"
        tokens = "" if point["response_tokens"] is None else f"{point['response_tokens']:.1f}"
        score = f"{point['score']:.4f} ({point['score_low']:.4f} to {point['score_high']:.4f})"
        table.add_row(point["what"], score, f"at most {kl}" if point["n"] else kl, rouge, tokens)
    return table
