"""Rejection sampling (arXiv 2112.09332, 2203.02155; Llama 2, 2307.09288, sec. 3.2): of n responses the best one.

No model is trained: the best response to each prompt becomes a row of a dataset for `task=sft`. The dataset is a
function of weights, data, reward and seed: a run that was killed goes on after its last rollout and ends in the same
bytes.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sheeprlhf.config.run_lookup import model_options
from sheeprlhf.config.shell import command, option_word
from sheeprlhf.data.example import Example
from sheeprlhf.data.prepare import TokenizedSplit
from sheeprlhf.data.tokenize import SpecialIds
from sheeprlhf.engine.checkpoint import TrainState
from sheeprlhf.engine.manifest import write_folder
from sheeprlhf.engine.run import Run, open_run
from sheeprlhf.engine.rundir import mark_finished
from sheeprlhf.engine.signals import STOP_SIGNALS
from sheeprlhf.rollout.best_rows import (
    RowWriter,
    kl_bound,
    sample_text,
    select_rows,
    selection_stats,
    selection_table,
    write_splits,
)
from sheeprlhf.rollout.rollout import check_sampler
from sheeprlhf.structure.rollout import BestOfNConfig
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.task.rl_models import build_collector, load_online_setup
from sheeprlhf.utils.errors import CheckpointError, DataError
from sheeprlhf.utils.folders import sweep_scratch
from sheeprlhf.utils.lightning import Fabric
from sheeprlhf.utils.output import safe_path, write_file

FIRST = {"train": 0, "validation": 1 << 31}  # number of each split's first rollout; it decides what is sampled


def train(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> None:
    """All ranks: sample, score, keep the best, and leave `dataset/` in the run directory.

    Raises:
        SheepError: something that the user can fix; see its message.
    """
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
        run.begin_progress(state, len(todo))
        for split, number, places in (one for one, is_done in zip(todo, done, strict=True) if not is_done):
            examples = splits[split].examples(places)
            _check_text(examples, tokenizer)
            rollout = collect(examples, FIRST[split] + number)
            if state.step == 0 and task.self_check != "off":
                check_sampler(run, collect, rollout)
            rows = select_rows(rollout, collect.texts, task.min_score)
            if fabric.is_global_zero:
                _write(writer, split, number, rows)
            state.step += 1
            if state.step == 1 and task.num_sample_prompts:
                shown = sample_text(rollout, collect.texts, task.num_sample_prompts)
                run.log_text("samples", shown, state.step)
                run.say(shown)
            stats = selection_stats(rows)
            kept = stats.kept / stats.prompts
            run.log({"best/first": stats.first, "best/scores": stats.best, "best/kept": kept}, state.step)
            scores = f"score {stats.first:.3f}, best {stats.best:.3f}"
            run.show_progress(state, len(todo), scores, sum(rollout.response_lengths))
            signum = run.stop_signal()
            if signum in STOP_SIGNALS and state.step < len(todo):
                run.stop(signum)
        if fabric.is_global_zero:
            rows_of_split = {split: writer.read(split, sum(name == split for name, _, _ in todo)) for split in splits}
            longest = max(int(rows.sizes[:, 0].max()) for rows in splits.values()) + cfg.generation.max_new_tokens
            following = _finish(run, rows_of_split, state, longest=longest)
            writer.remove(todo)
            run.say(f"finished: {run.dir}\nnext: {following}")
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
            f"the best responses cannot be written: {error}; free space, then go on with resume=true"
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
