"""Rollouts on disk: one parquet file for each saved rollout, with a row for each response."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sheeprlhf.reward.call import Texts
from sheeprlhf.reward.score import RawScores
from sheeprlhf.rollout.rollout import Rollout
from sheeprlhf.utils.output import write_file

FOLDER = "rollouts"
TERM = "reward/"  # prefix of the columns with the unweighted scores of each term of the reward
_ROWS_PER_GROUP = 256


def saved_rollouts(num_rollouts: int, count: int) -> set[int]:
    """Return the numbers of the rollouts to save: the first, the last and others evenly between them.

    Args:
        num_rollouts: of the whole run.
        count: how many to save; the first alone for 1, all if there are fewer.
    """
    count = min(count, num_rollouts)
    return {index * (num_rollouts - 1) // max(count - 1, 1) for index in range(count)}


def write_rollout(run_dir: Path, rollout: Rollout, texts: Texts, raw: RawScores, number: int, step: int) -> Path:
    """Rank zero only: write a rollout; one that a killed process has written is replaced by the same rows.

    Args:
        run_dir: the run's directory.
        rollout: with all numbers of its tokens.
        texts: of the rollout.
        raw: the scores of each term of its reward.
        number: of the rollout, from 0.
        step: optimizer steps before it.
    """
    sink = io.BytesIO()
    pq.write_table(rollout_table(rollout, texts, raw, number, step), sink, row_group_size=_ROWS_PER_GROUP)
    return write_file(run_dir, f"{FOLDER}/rollout-{number:06d}.parquet", sink.getvalue())


def rollout_table(rollout: Rollout, texts: Texts, raw: RawScores, number: int, step: int) -> pa.Table:
    """Return a table with a row for each response; arguments as of `write_rollout`."""
    group, responses = rollout.finished.shape[1], [ids for row in rollout.rows for ids in row.responses]
    columns: dict[str, Any] = {
        "rollout": pa.array([number] * len(responses), pa.int64()),
        "step": pa.array([step] * len(responses), pa.int64()),
        "row_id": pa.array([row.row_id for row in rollout.rows for _ in range(group)], pa.int64()),
        "prompt": texts.prompts,
        "response": texts.responses,
        "prompt_ids": pa.array([row.prompt_ids for row in rollout.rows for _ in range(group)], pa.list_(pa.int32())),
        "response_ids": pa.array(responses, pa.list_(pa.int32())),
        "finished": rollout.finished.reshape(-1),
        "score": rollout.scores.reshape(-1),
    }
    columns |= {f"{TERM}{name}": pa.array(scores, pa.float64()) for name, scores in raw.by_term.items()}
    borders = np.cumsum(rollout.response_lengths)[:-1]
    for name in rollout.tokens:
        values = np.split(rollout.flat(name).numpy(), borders)
        columns[name] = pa.array(values, pa.list_(pa.float32()))
    return pa.table(columns)
