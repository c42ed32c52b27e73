"""Direct preference optimisation: the policy learns from pairs which response is the better one (arXiv 2305.18290).

The loss of an optimizer step is the mean over its prompts, of all rows of the step and all devices; a prompt with more
than two ranked responses gives the mean over its pairs. The reference is the policy before its first step: its
log-probabilities are computed once and kept beside the data.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sheeprlhf.data.example import Batch
from sheeprlhf.data.loader import load_ahead
from sheeprlhf.data.prepare import prepare_data
from sheeprlhf.data.sampler import StepPlan
from sheeprlhf.engine.optim import follow_schedule, set_up
from sheeprlhf.engine.run import open_run
from sheeprlhf.engine.signals import STOP_SIGNALS
from sheeprlhf.engine.step import LossOutput, evaluate, update
from sheeprlhf.loss import dpo
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.structure.task import DPOConfig
from sheeprlhf.task.batches import Batches, longest_row, training_split
from sheeprlhf.task.finish import finish_run, note_validation, report_data
from sheeprlhf.task.reference import check_reference, of_rows, reference_logprobs, sum_by_response, weights_digest
from sheeprlhf.task.router import say_router_loss_left_out
from sheeprlhf.task.samples import log_samples
from sheeprlhf.task.start import begin_training, load_start, with_adapters
from sheeprlhf.utils.lightning import Fabric

NO_REFERENCE = ("simpo", "orpo")
_FAR = 0.5  # nats a token that the better responses may lose before a warning


def pair_losses(task: DPOConfig, sums_S: Tensor, reference_S: Tensor, lengths_S: Tensor, pairs_P2: Tensor) -> Tensor:
    """(P,) losses of pairs, from the summed log-probabilities of responses and their numbers of tokens."""
    w, r = pairs_P2.unbind(1)  # winner, rejected
    h_S = sums_S if task.reference_free else sums_S - reference_S
    lengths = (lengths_S[w], lengths_S[r])
    match task.loss_type:
        case "sigmoid":
            return dpo.sigmoid(h_S[w], h_S[r], task.beta, task.label_smoothing)
        case "robust":
            return dpo.robust(h_S[w], h_S[r], task.beta, task.label_smoothing)
        case "hinge":
            return dpo.hinge(h_S[w], h_S[r], task.beta)
        case "ipo":
            return dpo.ipo(h_S[w], h_S[r], *lengths, task.beta)
        case "apo_zero":
            return dpo.apo_zero(h_S[w], h_S[r], task.beta)
        case "simpo":
            return dpo.simpo(sums_S[w], sums_S[r], *lengths, task.beta, task.simpo_gamma)
        case "orpo":
            return dpo.orpo(sums_S[w], sums_S[r], *lengths, task.beta)
    raise ValueError(f"loss_type={task.loss_type!r}")


def loss_at_zero(batch: Batch, *, task: DPOConfig) -> float:
    """The total loss of a batch whose responses policy and reference like alike."""
    zeros_S, ones_S = torch.zeros(2), torch.ones(2)
    of_pair = pair_losses(task, zeros_S, zeros_S, ones_S, torch.tensor([[0, 1]]))
    return float(of_pair) * len(batch.row_ids)


def dpo_loss(policy: nn.Module, content: tuple[Batch, Tensor], *, task: DPOConfig) -> LossOutput:
    """The losses of all pairs of each prompt, and the implicit rewards beta * (policy - reference) behind them.

    `kl/chosen` is what the better responses have lost in log-probability, an estimate of the reference's KL divergence
    from the policy on them, nats a response; `entropy` is nats a token, over the better responses.
    """
    batch, reference_S = content
    logprobs = policy(batch, entropy=not torch.is_grad_enabled())
    sums_S = sum_by_response(logprobs.target_N, batch.response_index_N, len(batch.response_lengths))
    lengths_S = torch.tensor(batch.response_lengths, device=sums_S.device)
    losses_P = pair_losses(task, sums_S, reference_S, lengths_S, batch.pairs_P2)
    rewards_S = task.beta * (sums_S - reference_S).detach()
    w, r = batch.pairs_P2.unbind(1)
    told = {
        "rewards/chosen": rewards_S[w],
        "rewards/rejected": rewards_S[r],
        "rewards/margins": rewards_S[w] - rewards_S[r],
        "rewards/accuracies": (rewards_S[w] > rewards_S[r]).float(),
        "logps/chosen": sums_S[w].detach(),
        "logps/rejected": sums_S[r].detach(),
        "kl/chosen": (reference_S - sums_S)[w].detach(),
        "tokens/chosen": lengths_S[w].float(),
    }
    if logprobs.entropy_N is not None:  # in validation
        entropy_S = sum_by_response(logprobs.entropy_N, batch.response_index_N, len(batch.response_lengths)) / lengths_S
        told["entropy"] = entropy_S[w]
    weights_P = batch.pair_weights_P
    return LossOutput((losses_P * weights_P).sum(), {name: (value * weights_P).sum() for name, value in told.items()})


def train(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> None:
    """All ranks: prepare the data and the reference, train, validate, save, and leave `final/` in the run directory.

    Raises:
        SheepError: something that the user can mend; see its message.
    """
    task = cfg.task
    assert isinstance(task, DPOConfig)
    with open_run(fabric, cfg, run_dir) as run:
        tokenizer = begin_training(cfg)
        data = prepare_data(cfg.data, tokenizer, kind=task.data_kind, say=run.say, progress=fabric.is_global_zero)
        report_data(fabric, run, data)
        name = training_split(task, data)
        rows, held_out = data.splits[name], data.splits.get("validation")
        plan = StepPlan(len(rows), task.mini_batch_size, task.epochs, cfg.seed)
        num_steps = min(plan.num_steps(), task.max_num_steps or plan.num_steps())
        shown = range(min(task.num_sample_prompts, len(held_out or ())))
        num_held_out = None if task.eval_iters is None else task.eval_iters * task.mini_batch_size

        longest = longest_row(data.splits)
        start = (task.sft_experiment_dir, task.sft_model_name)
        policy, packed = load_start(cfg.model, *start, tokenizer, longest=longest, batching=task.batching, say=run.say)
        say_router_loss_left_out(policy.causal_lm(), task.config_name, run.say)
        key = f"{weights_digest(policy)}-{cfg.fabric.precision}-{packed}"
        policy = with_adapters(policy, cfg.model)
        module, optimizer = set_up(fabric, cfg.optim, policy, cfg.peak_lr())
        cut = partial(Batches, fabric, task, packed=packed, targets="response")
        read = {name: plan.rows_until(num_steps)} | {"validation": np.arange(len(held_out or ()))[:num_held_out]}
        used = task.loss_type not in NO_REFERENCE and not task.reference_free

        def with_reference(split: str) -> Batches:
            sums = reference_logprobs(fabric, module, cut(), data, split, key, read[split]) if used else None
            beside = partial(of_rows, sums)
            return cut(num_items=lambda batch: len(batch.row_ids), beside=beside)

        batches = with_reference(name)
        held_out_batches = with_reference("validation") if held_out else batches
        torch.manual_seed(cfg.seed + fabric.global_rank)  # weights began alike on all ranks, dropout does not
        state = run.restore(module, optimizer)

        loss_fn = partial(dpo_loss, task=task)
        if task.self_check != "off" and state.step == 0:
            if used:
                first = batches.of(rows, plan.rows_of_step(0))
                how = (task.self_check, cfg.fabric.precision, run.say)
                check_reference(fabric, module, first, loss_fn, partial(loss_at_zero, task=task), *how)
            else:
                run.say("no self-check: this loss has no reference")
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
                validated = held_out_batches.first(held_out, num_held_out, "validating")
                result = evaluate(fabric, module, validated, loss_fn)
                note_validation(run, state, result)
                if used and result["kl/chosen"] > _FAR * result["tokens/chosen"]:
                    run.say(
                        f"warning: the better responses have lost {result['kl/chosen']:.0f} nats since the start: the "
                        "policy leaves the data; raise task.beta or lower optim.lr"
                    )
                log_samples(fabric, run, policy, tokenizer, held_out.examples(shown), cfg.generation, state.step)
            signum = run.stop_signal()
            if last or signum or state.step % task.save_interval == 0 or state.best_step == state.step:
                run.save(state, module, optimizer)
            if signum in STOP_SIGNALS and not last:
                run.stop(signum)
        finish_run(fabric, run, policy, tokenizer, state)
