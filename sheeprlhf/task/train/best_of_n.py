"""Rejection sampling (arXiv 2112.09332, 2203.02155; Llama 2, 2307.09288, sec. 3.2): of n responses the best one.

No model is trained: the best response to each prompt becomes a row of a dataset for `task=sft`. The dataset is a
function of weights, data, reward and seed: a run that was killed continues after its last rollout and ends in the same
bytes.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from sheeprlhf.config.command_words import command, option_word
from sheeprlhf.config.run_lookup import model_options
from sheeprlhf.data.example import Example
from sheeprlhf.data.store import TokenizedSplit
from sheeprlhf.data.tokenize import SpecialIds
from sheeprlhf.engine.checkpoint import TrainState
from sheeprlhf.engine.manifest import write_folder
from sheeprlhf.engine.run import Run, open_run
from sheeprlhf.engine.rundir import mark_finished
from sheeprlhf.reward.score import Texts
from sheeprlhf.rollout.rollout import JUDGE_FAILURES, Rollout, kl_bound
from sheeprlhf.security.json_records import BEST_ROW, parse_json
from sheeprlhf.structure.rollout import BestOfNConfig
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.task.finish import check_sampler
from sheeprlhf.task.models import build_collector, load_online_setup
from sheeprlhf.utils.errors import (
    CheckpointError,
    DataError,
    Notify,
    RecordError,
    RewardError,
    RolloutServerError,
)
from sheeprlhf.utils.lightning import Fabric
from sheeprlhf.utils.output import create_file, safe_path, sweep_scratch, write_file
from sheeprlhf.utils.processes import STOP_SIGNALS

COLUMNS = ("prompt", "response", "score", "n", "mean_score", "first_score")  # of the dataset
FIRST = {"train": 0, "validation": 1 << 31}  # number of each split's first rollout; it decides what is sampled


class SelectionStats(NamedTuple):
    """Counts and scores of the prompts; scores are means over all of them, kept or not."""

    prompts: int  # their number
    kept: int  # rows of the dataset
    cut: int  # dropped, because no response of theirs ended
    low: int  # dropped, because the best score was below `task.min_score`
    first: float  # score of the first response, which is any of them
    best: float  # score of the one that is kept, or of the best where none is
    mean: float  # of all of them


def best_of(scores: np.ndarray, finished: np.ndarray, min_score: float | None) -> tuple[int | None, str]:
    """Choose the response to one prompt that is kept: its number and "kept"; or None and "cut" (none ended) or "low".

    A response that was cut is never chosen: training on it teaches to end in the middle. Of equal scores the first
    counts. A score below `min_score` is low.
    """
    if not finished.any():
        return None, "cut"
    best = int(np.where(finished, scores, -np.inf).argmax())
    return (None, "low") if min_score is not None and scores[best] < min_score else (best, "kept")


def select_rows(rollout: Rollout, texts: Texts, min_score: float | None) -> list[dict[str, Any]]:
    """Return a row for each prompt of a rollout, also of a dropped one; "status" is the reason, as of `best_of`.

    "rejected" is the response with the lowest score among those that ended.
    """
    num_responses, rows = rollout.scores.shape[1], []
    for number, (scores, finished) in enumerate(zip(rollout.scores, rollout.finished, strict=True)):
        best, status = best_of(scores, finished, min_score)
        chosen = int(scores.argmax()) if best is None else best
        worst = int(np.where(finished, scores, np.inf).argmin())
        place = number * num_responses + chosen
        rows.append(
            {
                "status": status,
                "prompt": texts.prompts[place],
                "response": texts.responses[place],
                "score": float(scores[chosen]),
                "rejected": texts.responses[number * num_responses + worst],
                "rejected_score": float(scores[worst]),
                "n": num_responses,
                "mean_score": float(scores.mean()),
                "first_score": float(scores[0]),
            }
        )
    return rows


def selection_stats(rows: Sequence[dict[str, Any]]) -> SelectionStats:
    """Count the prompts of a split, one or more."""
    statuses = [row["status"] for row in rows]
    means = [math.fsum(row[name] for row in rows) / len(rows) for name in ("first_score", "score", "mean_score")]
    return SelectionStats(len(rows), *(statuses.count(status) for status in ("kept", "cut", "low")), *means)


class RowWriter:
    """Writes the rows of each rollout to a file of its own in a folder; it is complete if it exists. Rank zero only."""

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
    """Write the kept rows of each split, and pairs of the best and the worst response, as `data=local` reads them."""
    for split, rows in splits.items():
        kept = [row for row in rows if row["status"] == "kept"]
        create_file(folder, f"{split}.jsonl", _lines({name: row[name] for name in COLUMNS} for row in kept))
        pairs = [
            {"prompt": row["prompt"], "chosen": row["response"], "rejected": row["rejected"]}
            for row in kept
            if row["rejected_score"] < row["score"] and row["rejected"] != row["response"]
        ]
        if pairs:
            create_file(folder, f"{split}_pairs.jsonl", _lines(pairs))


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


def train(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> None:
    """All ranks: sample, score, keep the best, and leave `dataset/` in the run directory."""
    task = cfg.task
    assert isinstance(task, BestOfNConfig)
    with open_run(fabric, cfg, run_dir) as run:
        setup = load_online_setup(fabric, run)
        splits = {"train": setup.rows} | ({} if setup.held_out is None else {"validation": setup.held_out})
        policy, tokenizer = setup.models.policy, setup.tokenizer
        fabric.setup_module(policy)  # onto the device, in the precision asked for
        # The policy is not trained, so it is its own reference: the KL shows the sampler's rounding.
        collect = build_collector(fabric, run, setup, policy)

        writer, todo = RowWriter(run.dir / "parts"), _rollouts(task, splits)
        if fabric.is_global_zero:
            sweep_scratch(run.dir)
            done = [writer.has(split, number, len(places), run.say) for split, number, places in todo]
        done = fabric.broadcast(done if fabric.is_global_zero else [])
        state = TrainState(step=sum(done))
        run.begin(state.step)
        run.begin_progress(state.step, len(todo))
        for split, number, places in (one for one, is_done in zip(todo, done, strict=True) if not is_done):
            examples = splits[split].examples(places)
            _check_text(examples, tokenizer)
            with run.saved_at(RewardError, RolloutServerError):
                rollout = collect(examples, FIRST[split] + number)
            if state.step == 0 and task.self_check != "off":
                check_sampler(run, collect, rollout)
            rows = select_rows(rollout, rollout.texts, task.min_score)
            if fabric.is_global_zero:
                _write(writer, split, number, rows)
            state.step += 1
            if state.step == 1 and task.num_sample_prompts:
                shown = sample_text(rollout, rollout.texts, task.num_sample_prompts)
                run.log_text("samples", shown, state.step)
                run.say(shown)
            stats = selection_stats(rows)
            kept = stats.kept / stats.prompts
            found = {"best/first": stats.first, "best/scores": stats.best, "best/kept": kept}
            scores = f"score {stats.first:.3f}, best {stats.best:.3f}"
            run.show_progress(state.step, scores, sum(rollout.response_lengths))
            found |= {name: value for name, value in rollout.metrics.items() if name == JUDGE_FAILURES}
            run.log(found | run.usage(), state.step)
            signum = run.stop_signal()
            if signum in STOP_SIGNALS and state.step < len(todo):
                run.stop(signum)
        if fabric.is_global_zero:
            rows_of_split = {split: writer.read(split, sum(name == split for name, _, _ in todo)) for split in splits}
            longest = max(int(rows.sizes[:, 0].max()) for rows in splits.values()) + cfg.generation.max_new_tokens
            following = _finish(run, rows_of_split, state, longest=longest)
            writer.remove(todo)
            run.say(f"finished: {run.dir}\nnext: {following}")
        if collect.servers is not None:
            collect.servers.finish()
        fabric.barrier()


def _rollouts(task: BestOfNConfig, splits: dict[str, TokenizedSplit]) -> list[tuple[str, int, list[int]]]:
    """Return each rollout's split, number and rows, in the order of the data."""
    size = task.prompts_per_rollout()
    return [
        (split, number, list(range(first, min(first + size, len(rows)))))
        for split, rows in splits.items()
        for number, first in enumerate(range(0, len(rows), size))
    ]


def _check_text(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that no prompt would lose special tokens of a chat template when it is written as text.

    Raises:
        DataError: a prompt has special tokens besides BOS.
    """
    special, bos = tokenizer.all_special_ids, SpecialIds(tokenizer).bos
    for example in examples:
        if np.isin(example.prompt_ids[len(bos) :], special).any():
            raise DataError(
                "task=best_of_n writes prompts as text, and a chat template has put special tokens into these: give "
                "data whose column prompt is plain text, not messages"
            )


def _write(writer: RowWriter, split: str, number: int, rows: list[dict[str, Any]]) -> None:
    try:
        writer.write(split, number, rows)
    except OSError as error:
        raise CheckpointError(
            f"the best responses cannot be written: {error}; free space, then continue with resume=true"
        ) from error


def _finish(run: Run, rows: dict[str, list[dict[str, Any]]], state: TrainState, *, longest: int) -> str:
    """Rank zero only: write the dataset and its report, mark the run finished. Returns the command that comes next.

    Raises:
        DataError: not one training row was kept.
    """
    task, data = run.cfg.task, run.cfg.data
    assert isinstance(task, BestOfNConfig)
    stats = {split: selection_stats(part) for split, part in rows.items() if part}
    run.say(selection_table(stats, task.num_generations))
    train = stats["train"]
    if not train.kept:
        raise DataError(
            f"no response was kept: to {train.cut} of {train.prompts} prompts none ended, to {train.low} the best one "
            f"scored below task.min_score: raise generation.max_new_tokens={run.cfg.generation.max_new_tokens} or "
            f"lower task.min_score={task.min_score}, and start anew"
        )
    kept = [split for split, one in stats.items() if one.kept]
    folder = safe_path(run.dir, "dataset")
    if not folder.exists():  # complete whenever it is there: it is renamed into place
        write_folder(folder, lambda new: write_splits(new, {split: rows[split] for split in kept}))
    report: dict[str, Any] = {split: one._asdict() for split, one in stats.items()}
    report |= {"n": task.num_generations, "kl_bound": kl_bound(task.num_generations)}
    write_file(run.dir, "best_of_n.json", json.dumps(report, indent=1).encode())
    mark_finished(run.dir, step=state.step, **{f"best_of_{task.num_generations}": train.best})
    files = [option_word(f"data.{split}_file", str(folder / f"{split}.jsonl")) for split in kept]
    lengths = [f"data.max_length={max(data.max_length, longest)}", f"data.max_prompt_length={data.max_prompt_length}"]
    words = [*model_options(run.cfg.model), "data=local", *files, "data.test_split=0", *lengths]
    return command(["train", "task=sft", *words])
