"""KTO: the policy learns from single responses, each desirable or not, which are worth writing (arXiv 2402.01306).

The loss of an optimizer step is the mean over its examples, of all rows of the step and all devices. A response is
judged against what the policy has moved on average: the KL estimate z0 of eq. 7, from prompts with the responses of
other rows. Here z0 is the mean over the same rows, of all devices, computed by the policy as it is before the step and
without dropout, so that neither micro-batches nor the number of devices change it. Which row lends its response is
fixed (see `MismatchedSplit`). The reference is the policy before its first step: its log-probabilities of both kinds of
pairs are computed once and kept with the data.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sheeprlhf.agent.batches import Batches
from sheeprlhf.data.example import Batch
from sheeprlhf.data.store import MismatchedSplit, TokenizedSplit
from sheeprlhf.engine.run import open_run
from sheeprlhf.engine.step import LossOutput, MicroBatch, evaluate
from sheeprlhf.loss.dpo import kto
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.structure.task import KTOConfig
from sheeprlhf.task.finish import check_reference
from sheeprlhf.task.loop import TrainLoop
from sheeprlhf.task.models import with_adapters
from sheeprlhf.task.reference import batches_with_reference, reference_key, set_up_with_reference, sum_by_response
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
    losses_S = kto(h_S, desirable_S, h_S.new_full((), kl), task.beta, *weights)
    metrics: dict[str, Tensor] = {}
    for name, mask_S in (("chosen", desirable_S), ("rejected", ~desirable_S)):
        metrics[f"share/{name}"] = mask_S.sum()
        metrics[f"rewards/{name}"] = torch.where(mask_S, task.beta * h_S.detach(), 0.0).sum()
        metrics[f"logps/{name}"] = torch.where(mask_S, sums_S.detach(), 0.0).sum()
    return LossOutput(losses_S.sum(), metrics)


def initial_loss(batch: Batch, *, task: KTOConfig) -> float:
    """Total loss of a batch if policy and reference are equal, at z0 = 0."""
    weight_S = torch.where(batch.desirable_S, task.desirable_weight, task.undesirable_weight)
    return 0.5 * float(weight_S.sum())


def by_label(means: dict[str, float]) -> dict[str, float]:
    """Means over all examples, of `kto_loss`, as means over those of their label; a label without examples has none."""
    shares = {label: means[f"share/{label}"] for label in ("chosen", "rejected")}
    metrics = {name: value for name, value in means.items() if not name.endswith(tuple(shares))}
    for label, share in shares.items():
        if share:
            metrics |= {f"{name}/{label}": means[f"{name}/{label}"] / share for name in ("rewards", "logps")}
    metrics["share/chosen"] = shares["chosen"]
    if all(shares.values()):
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics


def weights_warning(num_desirable: int, num_undesirable: int, task: KTOConfig) -> str | None:
    """Warning about weights that favour one of the labels; None if they are balanced as the paper advises.

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
    """All ranks: prepare the data and the reference, train, validate, save, and leave `final/` in the run directory."""
    task = cfg.task
    assert isinstance(task, KTOConfig)
    with open_run(fabric, cfg, run_dir) as run:
        loop = TrainLoop(fabric, run)
        num_desirable = int(loop.rows.desirable.sum())
        warning = weights_warning(num_desirable, len(loop.rows) - num_desirable, task)
        if warning:
            run.say(warning)
        policy = loop.load_policy()
        key = reference_key(policy, cfg)
        policy = with_adapters(policy, cfg.model)
        reference = set_up_with_reference(loop, policy)
        module = loop.module
        desirable_first = [] if loop.held_out is None else np.argsort(~loop.held_out.desirable, kind="stable").tolist()

        def open_split(split: str, read: np.ndarray) -> tuple[MismatchedSplit, Batches, Batches]:
            """The mismatched pairs of a split, their batches, and those of its own pairs."""
            pairs = MismatchedSplit(loop.data.folder / f"{split}.arrow", loop.longest)
            if split == loop.split and pairs.has_one_prompt:
                raise DataError("all training rows have one prompt, and KTO compares responses to several prompts")
            name = f"{split}-mismatched"
            data = loop.data._replace(splits=loop.data.splits | {name: pairs})
            cut = partial(batches_with_reference, fabric, task, reference, data, key=key, packed=policy.packed)
            return pairs, cut(name, read), cut(split, read)

        def load_of(
            rows: TokenizedSplit, read: np.ndarray
        ) -> Callable[[np.ndarray], tuple[list[MicroBatch], list[MicroBatch]]]:
            pairs, mismatched, own = open_split(loop.split, read)
            return lambda step: (mismatched.of(pairs, step), own.of(rows, step))

        held_out = open_split("validation", loop.held_out_rows) if loop.held_out else None
        loop.begin(load_of)
        if task.self_check != "off" and loop.state.step == 0:
            how: dict[str, Any] = {"mode": task.self_check, "precision": cfg.fabric.precision, "say": run.say}
            mismatched_batches, batches = loop.load(loop.plan.rows_of_step(0))
            check_reference(fabric, module, mismatched_batches, mismatched_loss, lambda batch: 0.0, **how)
            loss_fn = partial(kto_loss, task=task, kl=0.0)
            check_reference(fabric, module, batches, loss_fn, partial(initial_loss, task=task), **how)

        def validate() -> None:
            assert held_out is not None
            pairs, mismatched, own = held_out
            kl = estimate_kl(fabric, module, loop.validation_batches(mismatched, pairs))
            result = evaluate(fabric, module, loop.validation_batches(own), partial(kto_loss, task=task, kl=kl))
            loop.record(by_label(result) | {"kl": kl})
            loop.log_samples(policy, desirable_first)

        if loop.validates_at_start:
            validate()
        for step in loop:
            mismatched_batches, batches = step.batches
            kl = estimate_kl(fabric, module, mismatched_batches)
            metrics = step.update(partial(kto_loss, task=task, kl=kl), batches)
            step.metrics = by_label(metrics) | {"kl": kl}
            if step.validates:
                validate()
        loop.finish(policy)
