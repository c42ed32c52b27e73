"""Responses to the prompts of a split, as a file of rows: what other tools read, or people."""

from functools import partial
from pathlib import Path

import numpy as np

from sheeprlhf.config.registry import config_to_dict
from sheeprlhf.rollout.rollout import distinct_bigrams
from sheeprlhf.rollout.sources import episode_metrics
from sheeprlhf.structure.evaluation import GenerateConfig
from sheeprlhf.structure.reward import EPISODE_COLUMNS
from sheeprlhf.structure.run import EvalConfig
from sheeprlhf.task.eval.load import Evaluation, answer_split
from sheeprlhf.task.eval.result import draw_histogram, records_of, save_result
from sheeprlhf.utils.lightning import Fabric


def evaluate(fabric: Fabric, cfg: EvalConfig) -> Path | None:
    """All ranks: write a response to each prompt; the rows, and figures of their lengths, go into files."""
    task = cfg.task
    assert isinstance(task, GenerateConfig)
    job = Evaluation(fabric, cfg)
    rows, answers = answer_split(job, job.prepare("prompts"), task.num_samples)
    texts, of_episodes = answers.texts, episode_metrics(answers.episodes)
    references = texts.columns.get("reference", [None] * len(rows))
    finished = [bool(end) for end in texts.finished]
    columns = {name: texts.columns[name] for name in EPISODE_COLUMNS[:1] if answers.episodes}
    kept = records_of(rows, texts, reference=references, tokens=texts.num_tokens, finished=finished, **columns)
    numbers = {
        "rows": len(rows),
        "response_tokens": float(np.mean(texts.num_tokens)),
        "finished": float(np.mean(texts.finished)),
        "distinct_2": distinct_bigrams(texts.responses),
        **of_episodes,
        "seed": cfg.seed,
        "generation": config_to_dict(cfg.generation),
    }
    shown = {key: numbers[key] for key in ("rows", "response_tokens", "finished", "distinct_2", *of_episodes)}
    draw = partial(draw_histogram, {"responses": np.array(texts.num_tokens)}, "tokens of a response")
    return save_result(fabric, cfg, f"generate-{task.data_split}", numbers, shown=shown, rows=kept, draw=draw)
