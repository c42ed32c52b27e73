"""Reward modelling: the model learns to give the better response the higher score.

The loss of an optimizer step is the mean over its prompts, of all rows of the step and all devices; a prompt's loss is
the mean over the pairs of its responses (InstructGPT, arXiv 2203.02155, eq. 1). The score of a response is that after
its last token.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sheeprlhf.agent.reward import OFFSET, reward_model_of
from sheeprlhf.data.example import Batch
from sheeprlhf.data.loader import load_ahead
from sheeprlhf.data.prepare import prepare_data
from sheeprlhf.data.sampler import StepPlan
from sheeprlhf.engine.optim import follow_schedule, set_up
from sheeprlhf.engine.run import open_run
from sheeprlhf.engine.rundir import is_finished
from sheeprlhf.engine.signals import STOP_SIGNALS
from sheeprlhf.engine.step import LossOutput, evaluate, update
from sheeprlhf.loss.reward import by_response, centering, last_scores, reward_loss
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.structure.task import RMConfig
from sheeprlhf.task.batches import Batches, longest_row, training_split
from sheeprlhf.task.eval.preference import pairs_of_rows, scores_of_rows
from sheeprlhf.task.finish import finish_run, note_validation, report_data
from sheeprlhf.task.router import say_router_loss_left_out
from sheeprlhf.task.start import begin_training, load_start
from sheeprlhf.utils.lightning import Fabric


def rm_loss(model: nn.Module, batch: Batch, *, loss_type: str, center: float = 0.0) -> LossOutput:
    """Bradley-Terry losses of all pairs of each prompt, and how often and how far the better response is ahead."""
    lengths = (1,) * len(batch.response_lengths) if loss_type == "last_token" else batch.response_lengths
    scores = by_response(model(batch), batch.target_ids_N, batch.response_index_N, lengths)
    losses_P = reward_loss(scores, batch.pairs_P2, loss_type, batch.margins_P)
    chosen_P, rejected_P = last_scores(scores)[batch.pairs_P2].unbind(1)
    if center:
        losses_P = losses_P + center * centering(chosen_P, rejected_P)
    told = {
        "accuracy": (chosen_P > rejected_P).float(),
        "margin": chosen_P - rejected_P,
        "score_chosen": chosen_P,
        "score_rejected": rejected_P,
    }
    weights_P = batch.pair_weights_P
    return LossOutput((losses_P * weights_P).sum(), {k: (v.detach() * weights_P).sum() for k, v in told.items()})


def train(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> None:
    """All ranks: prepare the data, train, validate, save, and leave `final/` in the run directory.

    Raises:
        SheepError: something that the user can mend; see its message.
    """
    task = cfg.task
    assert isinstance(task, RMConfig)
    with open_run(fabric, cfg, run_dir) as run:
        tokenizer = begin_training(cfg)
        data = prepare_data(cfg.data, tokenizer, kind=task.data_kind, say=run.say, progress=fabric.is_global_zero)
        report_data(fabric, run, data)
        rows = data.splits[training_split(task, data)]
        held_out = data.splits.get("validation")
        plan = StepPlan(len(rows), task.mini_batch_size, task.epochs, cfg.seed)
        num_steps = min(plan.num_steps(), task.max_num_steps or plan.num_steps())
        num_held_out = None if task.eval_iters is None else task.eval_iters * task.mini_batch_size

        longest = longest_row(data.splits)
        start = (task.sft_experiment_dir, task.sft_model_name)
        how: dict[str, Any] = {"longest": longest, "batching": task.batching, "say": run.say}
        policy, packed = load_start(cfg.model, *start, tokenizer, **how, new_head=True)
        say_router_loss_left_out(policy.causal_lm(), task.config_name, run.say)
        model = reward_model_of(policy, cfg.model, tokenizer)
        module, optimizer = set_up(fabric, cfg.optim, model, cfg.peak_lr())
        targets = "last" if task.loss_type == "last_token" else "scores"
        batches = Batches(fabric, task, packed=packed, targets=targets, num_items=lambda batch: len(batch.row_ids))
        torch.manual_seed(cfg.seed + fabric.global_rank)  # weights began alike on all ranks, dropout does not
        state = run.restore(module, optimizer)

        loss_fn = partial(rm_loss, loss_type=task.loss_type, center=task.center_rewards_coefficient)
        take_step = partial(update, max_grad_norm=task.gradient_clip_val, skip=run.skip_step)
        steps = range(state.step, num_steps)
        loaded = load_ahead(lambda step: batches.of(rows, plan.rows_of_step(step)), steps, task.num_workers)
        run.begin_progress(state, num_steps)
        for step, micro_batches in zip(steps, loaded, strict=True):
            lr = follow_schedule(optimizer, cfg.optim, step, warmup=task.lr_warmup_steps, total=num_steps)
            metrics = take_step(fabric, module, optimizer, micro_batches, loss_fn)
            state.step, last = step + 1, step + 1 == num_steps
            state.items_seen += int(metrics["items"])
            num_tokens = rows.lengths[plan.rows_of_step(step)].sum()
            run.show_progress(state, num_steps, f"loss {metrics['loss']:.4f}", num_tokens)

            if last or state.step % task.log_interval == 0:
                run.log({f"train/{name}": value for name, value in metrics.items()} | {"train/lr": lr}, state.step)
            if held_out and (last or state.step % task.eval_interval == 0):
                result = evaluate(fabric, module, batches.first(held_out, num_held_out, "validating"), loss_fn)
                note_validation(run, state, result)
            signum = run.stop_signal()
            if last or signum or state.step % task.save_interval == 0 or state.best_step == state.step:
                run.save(state, module, optimizer)
            if signum in STOP_SIGNALS and not last:
                run.stop(signum)
        if task.normalize_on == "demonstrations" and not is_finished(run.dir):
            scores_S = scores_of_rows(fabric, model, task, rows, packed=packed, label="normalising")
            model.offset = float(pairs_of_rows(scores_S, rows.sizes[:, 1:])[0].mean())
            run.say(f"the preferred responses of the training rows score {model.offset:.4f}: {OFFSET} in config.json")
        finish_run(fabric, run, model, tokenizer, state)
