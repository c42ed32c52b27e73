"""Rejection sampling (arXiv 2112.09332, 2203.02155; Llama 2, 2307.09288, sec. 3.2): of n responses the best one.

Nothing learns here: the best response to each prompt becomes a row of a dataset, on which `task=sft` then learns. The
dataset is a function of weights, data, reward and seed: a run that was killed goes on after its last rollout and ends
in the same bytes.
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
from sheeprlhf.rollout.best_rows import Parts, Tally, kl_bound, rows_of, sample_text, tally, tally_table, write_splits
from sheeprlhf.rollout.collector import Collector, check_sampler
from sheeprlhf.structure.rollout import BestOfNConfig
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.task.online import exchange_of, load_parts
from sheeprlhf.utils.errors import CheckpointError, DataError
from sheeprlhf.utils.folders import sweep_scratch
from sheeprlhf.utils.lightning import Fabric
from sheeprlhf.utils.output import safe_path, write_file

FIRST = {"train": 0, "validation": 1 << 31}  # number of each split's first rollout; it decides what is sampled


def train(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> None:
    """All ranks: sample, score, keep the best, and leave `dataset/` in the run directory.

    Raises:
        SheepError: something that the user can mend; see its message.
    """
    task = cfg.task
    assert isinstance(task, BestOfNConfig)
    with open_run(fabric, cfg, run_dir) as run:
        tokenizer, train_rows, held_out, agents, columns = load_parts(fabric, run)
        splits = {"train": train_rows} | ({} if held_out is None else {"validation": held_out})
        policy = agents.policy
        fabric.setup_module(policy)  # onto the device, in the precision asked for
        reward = None if agents.reward is None else agents.reward.to(fabric.device)
        # The policy does not move, so it is its own reference: what the KL shows is the sampler's rounding.
        exchange = exchange_of(run, agents, tokenizer)
        how: dict[str, Any] = {"packed": agents.packed, "columns": columns, "exchange": exchange}
        collect = Collector(fabric, cfg, tokenizer, policy, policy, reward, **how)

        parts, todo = Parts(run.dir / "parts"), _rollouts(task, splits)
        if fabric.is_global_zero:
            sweep_scratch(run.dir)
            done = [parts.has(split, number, len(places), run.say) for split, number, places in todo]
        done = fabric.broadcast(done if fabric.is_global_zero else [])
        state = TrainState(step=sum(done))
        run.begin(state.step)
        run.begin_progress(state, len(todo))
        for split, number, places in (of for of, is_done in zip(todo, done, strict=True) if not is_done):
            examples = splits[split].examples(places)
            _check_text(examples, tokenizer)
            rollout = collect(examples, FIRST[split] + number)
            if state.step == 0 and task.self_check != "off":
                check_sampler(run, collect, rollout)
            rows = rows_of(rollout, collect.texts, task.min_score)
            if fabric.is_global_zero:
                _write(parts, split, number, rows)
            state.step += 1
            if state.step == 1 and task.num_sample_prompts:
                shown = sample_text(rollout, collect.texts, task.num_sample_prompts)
                run.log_text("samples", shown, state.step)
                run.say(shown)
            figures = tally(rows)
            kept = figures.kept / figures.prompts
            run.log({"best/first": figures.first, "best/scores": figures.best, "best/kept": kept}, state.step)
            what = f"score {figures.first:.3f}, best {figures.best:.3f}"
            run.show_progress(state, len(todo), what, sum(rollout.response_lengths))
            signum = run.stop_signal()
            if signum in STOP_SIGNALS and state.step < len(todo):
                run.stop(signum)
        if fabric.is_global_zero:
            read = {split: parts.read(split, sum(of == split for of, _, _ in todo)) for split in splits}
            longest = max(int(rows.sizes[:, 0].max()) for rows in splits.values()) + cfg.generation.max_new_tokens
            following = _finish(run, read, state, longest=longest)
            parts.remove(todo)
            run.say(f"finished: {run.dir}\nnext: {following}")
        fabric.barrier()


def _rollouts(task: BestOfNConfig, splits: dict[str, TokenizedSplit]) -> list[tuple[str, int, list[int]]]:
    """Each rollout's split, number and rows, in the order of the data."""
    size = task.prompts_per_rollout()
    return [
        (split, number, list(range(first, min(first + size, len(rows)))))
        for split, rows in splits.items()
        for number, first in enumerate(range(0, len(rows), size))
    ]


def _check_text(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    """A prompt is written as text: what a chat template put into it as special tokens would be lost.

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


def _write(parts: Parts, split: str, number: int, rows: list[dict[str, Any]]) -> None:
    try:
        parts.write(split, number, rows)
    except OSError as error:
        raise CheckpointError(
            f"the best responses cannot be written: {error}; free space, then go on with resume=true"
        ) from error


def _finish(run: Run, read: dict[str, list[dict[str, Any]]], state: TrainState, *, longest: int) -> str:
    """Rank zero only: write the dataset and its report, mark the run finished. Returns the command that comes next.

    Raises:
        DataError: not one training row was kept.
    """
    task, data = run.cfg.task, run.cfg.data
    assert isinstance(task, BestOfNConfig)
    tallies: dict[str, Tally] = {split: tally(rows) for split, rows in read.items() if rows}
    run.say(tally_table(tallies, task.num_generations))
    train = tallies["train"]
    if not train.kept:
        raise DataError(
            f"no response was kept: to {train.cut} of {train.prompts} prompts none ended, to {train.low} the best one "
            f"scored below task.min_score: raise generation.max_new_tokens={run.cfg.generation.max_new_tokens} or "
            f"lower task.min_score={task.min_score}, and start anew"
        )
    kept = [split for split, of in tallies.items() if of.kept]
    folder = safe_path(run.dir, "dataset")
    if not folder.exists():  # complete whenever it is there: it is renamed into place
        write_folder(folder, lambda new: write_splits(new, {split: read[split] for split in kept}))
    report: dict[str, Any] = {split: of._asdict() for split, of in tallies.items()}
    report |= {"n": task.num_generations, "kl_bound": kl_bound(task.num_generations)}
    write_file(run.dir, "best_of_n.json", json.dumps(report, indent=1).encode())
    mark_finished(run.dir, step=state.step, **{f"best_of_{task.num_generations}": train.best})
    files = [option_word(f"data.{split}_file", str(folder / f"{split}.jsonl")) for split in kept]
    lengths = [f"data.max_length={max(data.max_length, longest)}", f"data.max_prompt_length={data.max_prompt_length}"]
    words = [*model_options(run.cfg.model), "data=local", *files, "data.test_split=0", *lengths]
    return command(["train", "task=sft", *words])
