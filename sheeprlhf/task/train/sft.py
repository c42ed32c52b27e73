"""Supervised fine-tuning: the model learns to write the response, given the prompt.

The loss of an optimizer step is the sum of its targets' cross-entropies divided by the number of its targets, over
all rows of the step and all devices: how the rows are cut into forward passes never changes it.
"""

import math
from functools import partial
from pathlib import Path

import torch
from torch import nn

from sheeprlhf.data.example import Batch
from sheeprlhf.data.loader import load_ahead
from sheeprlhf.data.prepare import prepare_data
from sheeprlhf.data.sampler import StepPlan
from sheeprlhf.engine.optim import follow_schedule, set_up
from sheeprlhf.engine.run import open_run
from sheeprlhf.engine.signals import STOP_SIGNALS
from sheeprlhf.engine.step import LossOutput, evaluate, update
from sheeprlhf.loss.sft import cross_entropy
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.structure.task import SFTConfig
from sheeprlhf.task.batches import Batches, longest_row
from sheeprlhf.task.finish import finish_run, note_validation, report_data
from sheeprlhf.task.router import StepRouterLoss, router_loss_in_training, router_loss_of_step
from sheeprlhf.task.samples import log_samples
from sheeprlhf.task.start import begin_training, load_policy_to_train
from sheeprlhf.utils.lightning import Fabric


def sft_loss(
    policy: nn.Module, batch: Batch, *, label_smoothing: float = 0.0, router: StepRouterLoss | None = None
) -> LossOutput:
    """Cross-entropy of the batch's targets, summed, and the batch's share of the router's loss, if there is one.

    `nll` is the first without label smoothing, `router_loss` the second.
    """
    logprobs = policy(batch, mean=label_smoothing > 0.0, router=router is not None)
    losses_N = cross_entropy(logprobs.target_N, logprobs.mean_N, label_smoothing)
    total, metrics = losses_N.sum(), {"nll": -logprobs.target_N.detach().sum()}
    if router is not None:
        share = router.share(logprobs.router_logits)
        total, metrics = total + share, metrics | {"router_loss": share.detach()}
    return LossOutput(total, metrics)


def train(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> None:
    """All ranks: prepare the data, train, validate, save, and leave `final/` in the run directory.

    Raises:
        SheepError: something that the user can mend; see its message.
    """
    task = cfg.task
    assert isinstance(task, SFTConfig)
    with open_run(fabric, cfg, run_dir) as run:
        tokenizer = begin_training(cfg)
        data = prepare_data(cfg.data, tokenizer, kind="sft", say=run.say, progress=fabric.is_global_zero)
        report_data(fabric, run, data)
        rows, held_out = data.splits["train"], data.splits.get("validation")
        plan = StepPlan(len(rows), task.mini_batch_size, task.epochs, cfg.seed)
        num_steps = min(plan.num_steps(), task.max_num_steps or plan.num_steps())
        shown = range(min(task.num_sample_prompts, len(held_out or ())))
        num_held_out = None if task.eval_iters is None else task.eval_iters * task.mini_batch_size

        longest = longest_row(data.splits)
        start = (task.sft_experiment_dir, task.sft_model_name)
        policy, packed = load_policy_to_train(
            cfg.model, *start, tokenizer, longest=longest, batching=task.batching, say=run.say
        )
        router = router_loss_in_training(policy.causal_lm(), run.say)
        module, optimizer = set_up(fabric, cfg.optim, policy, cfg.peak_lr())
        batches = Batches(fabric, task, packed=packed, targets="response" if task.use_masked_targets else "all")
        torch.manual_seed(cfg.seed + fabric.global_rank)  # weights began alike on all ranks, dropout does not
        state = run.restore(module, optimizer)

        loss_fn = partial(sft_loss, label_smoothing=task.label_smoothing)
        take_step = partial(update, max_grad_norm=task.gradient_clip_val, skip=run.skip_step)
        steps = range(state.step, num_steps)
        loaded = load_ahead(lambda step: batches.of(rows, plan.rows_of_step(step)), steps, task.num_workers)
        run.begin_progress(state, num_steps)
        for step, micro_batches in zip(steps, loaded, strict=True):
            lr = follow_schedule(optimizer, cfg.optim, step, warmup=task.lr_warmup_steps, total=num_steps)
            of_step = loss_fn
            if router is not None:
                of_step = partial(loss_fn, router=router_loss_of_step(fabric, module, micro_batches, router))
            metrics = take_step(fabric, module, optimizer, micro_batches, of_step)
            state.step, last = step + 1, step + 1 == num_steps
            state.items_seen += int(metrics["items"])
            num_tokens = rows.lengths[plan.rows_of_step(step)].sum()
            run.show_progress(state, num_steps, f"loss {metrics['loss']:.4f}", num_tokens)

            if last or state.step % task.log_interval == 0:
                run.log({f"train/{name}": value for name, value in metrics.items()} | {"train/lr": lr}, state.step)
            if held_out and (last or state.step % task.eval_interval == 0):
                result = evaluate(fabric, module, batches.first(held_out, num_held_out, "validating"), sft_loss)
                result["perplexity"] = math.exp(min(result["nll"], 700.0))
                note_validation(run, state, result)
                log_samples(fabric, run, policy, tokenizer, held_out.examples(shown), cfg.generation, state.step)
            signum = run.stop_signal()
            if last or signum or state.step % task.save_interval == 0 or state.best_step == state.step:
                run.save(state, module, optimizer)
            if signum in STOP_SIGNALS and not last:
                run.stop(signum)
        finish_run(fabric, run, policy, tokenizer, state)
