"""KTO: the policy learns from single responses, each desirable or not, which are worth writing (arXiv 2402.01306).

The loss of an optimizer step is the mean over its examples, of all rows of the step and all devices. A response is
judged against what the policy has moved on average: the KL estimate z0 of eq. 7, from prompts with the responses of
other rows. Here z0 is the mean over the same rows, of all devices, computed by the policy as it is before the step and
without dropout, so that neither micro-batches nor the number of devices change it. Which row lends its response is
fixed (see `data.mismatch`). The reference is the policy before its first step: its log-probabilities of both kinds of
pairs are computed once and kept beside the data.
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sheeprlhf.data.example import Batch
from sheeprlhf.data.loader import load_ahead
from sheeprlhf.data.mismatch import MismatchedSplit
from sheeprlhf.data.prepare import prepare_data
from sheeprlhf.data.sampler import StepPlan
from sheeprlhf.engine.optim import build_optimizer, follow_schedule
from sheeprlhf.engine.run import open_run
from sheeprlhf.engine.signals import STOP_SIGNALS
from sheeprlhf.engine.step import LossOutput, MicroBatch, evaluate, update
from sheeprlhf.loss.dpo import kto
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.structure.task import KTOConfig
from sheeprlhf.task.batches import Batches, longest_row, training_split
from sheeprlhf.task.finish import finish_run, note_validation, report_data
from sheeprlhf.task.reference import check_reference, of_rows, reference_logprobs, sum_by_response, weights_digest
from sheeprlhf.task.router import say_router_loss_left_out
from sheeprlhf.task.samples import log_samples
from sheeprlhf.task.start import begin_training, load_start, with_adapters
from sheeprlhf.utils.errors import DataError
from sheeprlhf.utils.lightning import Fabric

_BALANCED = (1.0, 4 / 3)  # arXiv 2402.01306, eq. 9: desirable over undesirable examples, each times its weight


def log_ratios(policy: nn.Module, content: tuple[Batch, Tensor]) -> tuple[Tensor, Tensor]:
    """(S,) summed log-probabilities of responses, and how much they exceed the reference's, nats."""
    batch, reference_S = content
    sums_S = sum_by_response(policy(batch).target_N, batch.response_index_N, len(batch.response_lengths))
    return sums_S, sums_S - reference_S


def mismatched_loss(policy: nn.Module, content: tuple[Batch, Tensor]) -> LossOutput:
    """The log-ratios of responses to other rows' prompts, as an evaluation adds them up."""
    return LossOutput(log_ratios(policy, content)[1].sum(), {})


def estimate_kl(fabric: Fabric, module: nn.Module, mismatched: Iterable[MicroBatch]) -> float:
    """All ranks: z0 = max(0, mean log-ratio of the mismatched pairs of all ranks), nats; no gradient, no dropout."""
    return max(0.0, evaluate(fabric, module, mismatched, mismatched_loss)["loss"])


def kto_loss(policy: nn.Module, content: tuple[Batch, Tensor], *, task: KTOConfig, kl: float) -> LossOutput:
    """The losses of examples, and the implicit rewards beta * (policy - reference) of each label behind them."""
    sums_S, h_S = log_ratios(policy, content)
    desirable_S = content[0].desirable_S
    weights = (task.desirable_weight, task.undesirable_weight)
    losses_S = kto(h_S, desirable_S, h_S.new_tensor(kl), task.beta, *weights)
    told: dict[str, Tensor] = {}
    for name, mask_S in (("chosen", desirable_S), ("rejected", ~desirable_S)):
        told[f"share/{name}"] = mask_S.sum()
        told[f"rewards/{name}"] = torch.where(mask_S, task.beta * h_S.detach(), 0.0).sum()
        told[f"logps/{name}"] = torch.where(mask_S, sums_S.detach(), 0.0).sum()
    return LossOutput(losses_S.sum(), told)


def loss_at_zero(batch: Batch, *, task: KTOConfig) -> float:
    """The total loss of a batch whose responses policy and reference like alike, at z0 = 0."""
    weight_S = torch.where(batch.desirable_S, task.desirable_weight, task.undesirable_weight)
    return 0.5 * float(weight_S.sum())


def by_label(means: dict[str, float]) -> dict[str, float]:
    """Means over all examples as means over those of their label; a label without examples has none.

    Args:
        means: what `update` or `evaluate` made of `kto_loss`.
    """
    shares = {label: means[f"share/{label}"] for label in ("chosen", "rejected")}
    told = {name: value for name, value in means.items() if not name.endswith(tuple(shares))}
    for label, share in shares.items():
        if share:
            told |= {f"{name}/{label}": means[f"{name}/{label}"] / share for name in ("rewards", "logps")}
    told["share/chosen"] = shares["chosen"]
    if all(shares.values()):
        told["rewards/margins"] = told["rewards/chosen"] - told["rewards/rejected"]
    return told


def weights_warning(num_desirable: int, num_undesirable: int, task: KTOConfig) -> str | None:
    """What to say about weights that let one of the labels rule; None if they are balanced as the paper advises.

    Raises:
        DataError: there is only one label, so that nothing tells good from bad.
    """
    if not (num_desirable and num_undesirable):
        there, lacking = ("desirable", "false") if num_desirable else ("undesirable", "true")
        raise DataError(
            f"all {num_desirable + num_undesirable} training examples are {there}, and KTO learns from both kinds: add "
            f"rows of label {lacking}; if the file has some, data.num_samples may stop before them: shuffle it"
        )
    ratio = task.desirable_weight * num_desirable / (task.undesirable_weight * num_undesirable)
    if _BALANCED[0] <= ratio <= _BALANCED[1]:
        return None
    middle = sum(_BALANCED) / 2
    if ratio < middle:
        advice = f"task.desirable_weight={task.desirable_weight * middle / ratio:.3g}"
    else:
        advice = f"task.undesirable_weight={task.undesirable_weight * ratio / middle:.3g}"
    return (
        f"warning: {num_desirable} desirable and {num_undesirable} undesirable examples, times their weights, are "
        f"{ratio:.3g} to 1, and between 1 and 1.33 is advised: give {advice}"
    )


def train(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> None:
    """All ranks: prepare the data and the reference, train, validate, save, and leave `final/` in the run directory.

    Raises:
        SheepError: something that the user can mend; see its message.
    """
    task = cfg.task
    assert isinstance(task, KTOConfig)
    with open_run(fabric, cfg, run_dir) as run:
        tokenizer = begin_training(cfg)
        data = prepare_data(cfg.data, tokenizer, kind=task.data_kind, say=run.say, progress=fabric.is_global_zero)
        report_data(fabric, run, data)
        name = training_split(task, data)
        rows, held_out = data.splits[name], data.splits.get("validation")
        num_desirable = int(rows.desirable.sum())
        warning = weights_warning(num_desirable, len(rows) - num_desirable, task)
        if warning:
            run.say(warning)
        plan = StepPlan(len(rows), task.mini_batch_size, task.epochs, cfg.seed)
        num_steps = min(plan.num_steps(), task.max_num_steps or plan.num_steps())
        num_held_out = None if task.eval_iters is None else task.eval_iters * task.mini_batch_size
        desirable_first = [] if held_out is None else np.argsort(~held_out.desirable, kind="stable").tolist()
        shown = desirable_first[: task.num_sample_prompts]

        longest = longest_row(data.splits)
        start = (task.sft_experiment_dir, task.sft_model_name)
        policy, packed = load_start(cfg.model, *start, tokenizer, longest=longest, batching=task.batching, say=run.say)
        say_router_loss_left_out(policy.causal_lm(), task.config_name, run.say)
        key = f"{weights_digest(policy)}-{cfg.fabric.precision}-{packed}"
        policy = with_adapters(policy, cfg.model)
        optimizer = build_optimizer(cfg.optim, policy, cfg.peak_lr())
        module, optimizer = fabric.setup(policy, optimizer)

        used = [name, "validation"] if held_out else [name]
        others = {split: MismatchedSplit(data.folder / f"{split}.arrow", longest) for split in used}
        if others[name].has_one_prompt:
            raise DataError("every training row has the same prompt, and KTO compares with responses to other prompts")
        read = {name: plan.rows_until(num_steps)} | {"validation": np.arange(len(held_out or ()))[:num_held_out]}
        splits = data.splits | {f"{split}-mismatched": pairs for split, pairs in others.items()}
        cut = partial(Batches, fabric, task, packed=packed, targets="response")

        def with_reference(split: str, rows: np.ndarray) -> Batches:
            sums = reference_logprobs(fabric, module, cut(), data._replace(splits=splits), split, key, rows)
            return cut(num_items=lambda batch: len(batch.row_ids), beside=partial(of_rows, sums))

        own = {split: with_reference(split, read[split]) for split in used}
        mismatched = {split: with_reference(f"{split}-mismatched", read[split]) for split in used}
        torch.manual_seed(cfg.seed + fabric.global_rank)  # weights began alike on all ranks, dropout does not
        state = run.restore(module, optimizer)

        def load(step: int) -> tuple[list[MicroBatch], list[MicroBatch]]:
            of_step = plan.rows_of_step(step)
            return mismatched[name].of(others[name], of_step), own[name].of(rows, of_step)

        if task.self_check != "off" and state.step == 0:
            how = (task.self_check, cfg.fabric.precision, run.say)
            first_mismatched, first = load(0)
            check_reference(fabric, module, first_mismatched, mismatched_loss, lambda batch: 0.0, *how)
            check_reference(
                fabric, module, first, partial(kto_loss, task=task, kl=0.0), partial(loss_at_zero, task=task), *how
            )
        take_step = partial(update, max_grad_norm=task.gradient_clip_val, skip=run.skip_step)
        steps = range(state.step, num_steps)
        loaded = load_ahead(load, steps, task.num_workers)
        run.begin_progress(state, num_steps)
        for step, (mismatched_batches, micro_batches) in zip(steps, loaded, strict=True):
            lr = follow_schedule(optimizer, cfg.optim, step, warmup=task.lr_warmup_steps, total=num_steps)
            kl = estimate_kl(fabric, module, mismatched_batches)
            loss_fn = partial(kto_loss, task=task, kl=kl)
            metrics = take_step(fabric, module, optimizer, micro_batches, loss_fn)
            metrics = by_label(metrics) | {"kl": kl}
            state.step, last = step + 1, step + 1 == num_steps
            state.items_seen += int(metrics["items"])
            num_tokens = rows.lengths[plan.rows_of_step(step)].sum()
            run.show_progress(state, num_steps, f"loss {metrics['loss']:.4f}", num_tokens)

            if last or state.step % task.log_interval == 0:
                run.log({f"train/{name}": value for name, value in metrics.items()} | {"train/lr": lr}, state.step)
            if held_out and (last or state.step % task.eval_interval == 0):
                pairs = mismatched["validation"].first(others["validation"], num_held_out, "estimating the KL")
                kl = estimate_kl(fabric, module, pairs)
                validated = own["validation"].first(held_out, num_held_out, "validating")
                result = evaluate(fabric, module, validated, partial(kto_loss, task=task, kl=kl))
                note_validation(run, state, by_label(result) | {"kl": kl})
                log_samples(fabric, run, policy, tokenizer, held_out.examples(shown), cfg.generation, state.step)
            signum = run.stop_signal()
            if last or signum or state.step % task.save_interval == 0 or state.best_step == state.step:
                run.save(state, module, optimizer)
            if signum in STOP_SIGNALS and not last:
                run.stop(signum)
        finish_run(fabric, run, policy, tokenizer, state)
