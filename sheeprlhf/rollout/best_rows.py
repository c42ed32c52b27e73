"""The best of n sampled responses as a row of a dataset, and files of rows that survive a kill."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sheeprlhf.reward.call import Texts
from sheeprlhf.rollout.rollout import Rollout
from sheeprlhf.security.json_records import parse_json
from sheeprlhf.security.record_schemas import BEST_ROW
from sheeprlhf.utils.errors import Notify, RecordError
from sheeprlhf.utils.output import create_file, write_file

COLUMNS = ("prompt", "response", "score", "n", "mean_score", "first_score")  # of the dataset


class SelectionStats(NamedTuple):
    """Counts and scores of the prompts; scores are means over all of them, kept or not.

    Attributes:
        prompts: their number.
        kept: rows of the dataset.
        cut: dropped, because no response of theirs ended.
        low: dropped, because the best score was below `task.min_score`.
        first: score of the first response, which is any of them.
        best: score of the one that is kept, or of the best where none is.
        mean: of all of them.
    """

    prompts: int
    kept: int
    cut: int
    low: int
    first: float
    best: float
    mean: float


def best_of(scores: np.ndarray, finished: np.ndarray, min_score: float | None) -> tuple[int | None, str]:
    """Choose the response to one prompt that is kept.

    A response that was cut is never chosen: training on it teaches to end in the middle. Of equal scores the first
    counts.

    Args:
        scores: (K,) the reward of each response.
        finished: (K,) bool, whether it ended.
        min_score: the least that is kept; None keeps all.

    Returns:
        Its number and "kept"; or None and "cut" (none of them ended) or "low".
    """
    if not finished.any():
        return None, "cut"
    best = int(np.where(finished, scores, -np.inf).argmax())
    return (None, "low") if min_score is not None and scores[best] < min_score else (best, "kept")


def select_rows(rollout: Rollout, texts: Texts, min_score: float | None) -> list[dict[str, Any]]:
    """Return a row for each prompt of a rollout, also of a dropped one; "fate" is the reason, as of `best_of`."""
    num_responses, rows = rollout.scores.shape[1], []
    for number, (scores, finished) in enumerate(zip(rollout.scores, rollout.finished, strict=True)):
        best, fate = best_of(scores, finished, min_score)
        chosen = int(scores.argmax()) if best is None else best
        place = number * num_responses + chosen
        rows.append(
            {
                "fate": fate,
                "prompt": texts.prompts[place],
                "response": texts.responses[place],
                "score": float(scores[chosen]),
                "n": num_responses,
                "mean_score": float(scores.mean()),
                "first_score": float(scores[0]),
            }
        )
    return rows


def kl_bound(n: int) -> float:
    """Nats from the sampler to its best of n at most, log n - (n-1)/n (arXiv 2009.01325; as a bound: 2401.01879)."""
    return math.log(n) - (n - 1) / n


def selection_stats(rows: Sequence[dict[str, Any]]) -> SelectionStats:
    """Count the prompts of a split, one or more."""
    fates = [row["fate"] for row in rows]
    means = [math.fsum(row[name] for row in rows) / len(rows) for name in ("first_score", "score", "mean_score")]
    return SelectionStats(len(rows), *(fates.count(fate) for fate in ("kept", "cut", "low")), *means)


class RowWriter:
    """Writes the rows of each rollout to a file of its own, which is complete if it exists. Rank zero only.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, split: str, number: int, num_prompts: int, say: Notify) -> bool:
        """Return whether a rollout of so many prompts is complete; a damaged file is reported and does not count."""
        path = self._path(split, number)
        try:
            rows = self._rows(path) if path.is_file() else []
        except (RecordError, OSError) as error:
            say(f"sampling again: {error}")
            return False
        if rows and len(rows) != num_prompts:
            say(f"sampling again: {path} is damaged: it has {len(rows)} rows instead of {num_prompts}")
        return len(rows) == num_prompts

    def write(self, split: str, number: int, rows: Sequence[dict[str, Any]]) -> None:
        """Write the rows of one rollout."""
        name = f"{self._folder.name}/{self._path(split, number).name}"
        write_file(self._folder.parent, name, _lines(rows))

    def read(self, split: str, count: int) -> list[dict[str, Any]]:
        """Read the rows of all `count` rollouts of a split, in their order."""
        return [row for number in range(count) for row in self._rows(self._path(split, number))]

    @staticmethod
    def _rows(path: Path) -> list[dict[str, Any]]:
        return [parse_json(line, path, BEST_ROW) for line in path.read_bytes().splitlines()]

    def remove(self, parts: Iterable[tuple[str, int, object]]) -> None:
        """Remove the files of these rollouts, and the folder if nothing else is in it."""
        with suppress(OSError):
            for split, number, _ in parts:
                self._path(split, number).unlink(missing_ok=True)
            self._folder.rmdir()

    def _path(self, split: str, number: int) -> Path:
        return self._folder / f"{split}-{number:06d}.jsonl"


def write_splits(folder: Path, splits: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Write the dataset: the kept rows of each split, as `data=local` reads them."""
    for split, rows in splits.items():
        kept = ({name: row[name] for name in COLUMNS} for row in rows if row["fate"] == "kept")
        create_file(folder, f"{split}.jsonl", _lines(kept))


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def selection_table(stats: Mapping[str, SelectionStats], n: int) -> str:
    """Format a line for each split, and the KL bound of the selection."""
    head = ("", "prompts", "kept", "dropped", "none ended", "below min_score", "first", "mean", f"best of {n}")
    lines = [
        (
            *(split, str(one.prompts), str(one.kept), f"{1 - one.kept / one.prompts:.1%}", str(one.cut), str(one.low)),
            *(f"{score:.4f}" for score in (one.first, one.mean, one.best)),
        )
        for split, one in stats.items()
    ]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    shown = ["  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in (head, *lines)]
    shown.append(f"the best of {n} is at most {kl_bound(n):.3f} nats from what was sampled from (log n - (n-1)/n)")
    return "\n".join(shown)


def sample_text(rollout: Rollout, texts: Texts, num_rows: int) -> str:
    """Format the best and the worst response to the first prompts."""
    blocks = []
    for number, scores in enumerate(rollout.scores[:num_rows]):
        first = number * len(scores)
        blocks.append(f"[prompt]\n{texts.prompts[first]}")
        for name, which in (("best", int(scores.argmax())), ("worst", int(scores.argmin()))):
            cut = "" if texts.finished[first + which] else ", cut"
            blocks.append(f"[{name}] score {scores[which]:.3f}{cut}\n{texts.responses[first + which]}")
    return "\n".join(blocks)
