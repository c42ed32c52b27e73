"""Direct preference optimisation: the policy learns from pairs which response is the better one (arXiv 2305.18290).

The loss of an optimizer step is the mean over its prompts, of all rows of the step and all devices; a prompt with more
than two ranked responses gives the mean over its pairs. The reference is the policy before its first step: its
log-probabilities are computed once and kept with the data, unless `task.ref_sync_interval` moves it.
"""

import dataclasses
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sheeprlhf.agent.policy import EMA
from sheeprlhf.data.example import Batch
from sheeprlhf.engine.run import open_run
from sheeprlhf.engine.step import LossOutput, MicroBatch, evaluate
from sheeprlhf.loss import dpo
from sheeprlhf.loss.reward import accuracies
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.structure.task import NO_REFERENCE, DPOConfig
from sheeprlhf.task.finish import check_reference
from sheeprlhf.task.loop import TrainLoop
from sheeprlhf.task.models import with_adapters
from sheeprlhf.task.reference import (
    batches_with_reference,
    reference_key,
    response_sums,
    set_up_with_reference,
    sum_by_response,
    sums_of_step,
)
from sheeprlhf.utils.errors import DataError
from sheeprlhf.utils.lightning import Fabric, gather_objects

AOT = ("aot", "aot_unpaired")
_MAX_KL_PER_TOKEN = 0.5  # nats that the better responses may lose before a warning


def pair_losses(
    task: DPOConfig,
    sums_S: Tensor,
    reference_S: Tensor,
    lengths_S: Tensor,
    pairs_P2: Tensor,
    *,
    partners_P2: Tensor | None = None,
    delta: float = 0.0,
) -> Tensor:
    """(P,) losses of `task.loss_type`, from the summed log-probabilities of responses and their numbers of tokens.

    `partners_P2` are those of AOT in the whole step (see `with_partners`), `delta` is the shift of BCO. Letters as in
    loss/dpo.py.
    """
    w, r = pairs_P2.unbind(1)
    h_S = sums_S if task.reference_free else sums_S - reference_S
    h_S = dpo.f_derivative(h_S, task.f_divergence, task.f_alpha)
    h_w_P, h_l_P, lp_w_P, lp_l_P, lengths = h_S[w], h_S[r], sums_S[w], sums_S[r], (lengths_S[w], lengths_S[r])
    match task.loss_type:
        case "sigmoid":
            return dpo.sigmoid(h_w_P, h_l_P, task.beta, task.label_smoothing)
        case "sigmoid_norm":
            return dpo.sigmoid_norm(h_w_P, h_l_P, *lengths, task.beta)
        case "robust":
            return dpo.robust(h_w_P, h_l_P, task.beta, task.label_smoothing)
        case "exo":
            return dpo.exo(h_w_P, h_l_P, task.beta, task.label_smoothing)
        case "hinge":
            return dpo.hinge(h_w_P, h_l_P, task.beta)
        case "ipo":
            return dpo.ipo(h_w_P, h_l_P, *lengths, task.beta)
        case "discopop":
            return dpo.discopop(h_w_P, h_l_P, task.beta, task.discopop_tau)
        case "nca":
            return dpo.nca(h_w_P, h_l_P, task.beta)
        case "sppo":
            return dpo.sppo(h_w_P, h_l_P, task.beta)
        case "apo_zero":
            return dpo.apo_zero(h_w_P, h_l_P, task.beta)
        case "apo_down":
            return dpo.apo_down(h_w_P, h_l_P, task.beta)
        case "simpo":
            return dpo.simpo(lp_w_P, lp_l_P, *lengths, task.beta, task.simpo_gamma)
        case "orpo":
            return dpo.orpo(lp_w_P, lp_l_P, *lengths, task.beta)
        case "bco":
            return dpo.bco(h_w_P, h_l_P, task.beta, delta)
        case "aot" if partners_P2 is not None:
            return dpo.sigmoid(lp_w_P - lp_l_P, partners_P2[:, 0], task.beta, task.label_smoothing)
        case "aot_unpaired" if partners_P2 is not None:
            return dpo.aot_unpaired(h_w_P, h_l_P, partners_P2, task.beta, task.label_smoothing)
    raise ValueError(f"loss_type={task.loss_type!r}")


def initial_loss(batch: Batch, *, task: DPOConfig) -> float:
    """Total loss of a batch if policy and reference are equal, without `task.sft_coeff` and `task.use_weighting`."""
    zeros_S, ones_S = torch.zeros(2), torch.ones(2)
    partners_P2 = torch.zeros(1, 2) if task.loss_type in AOT else None
    of_pair = pair_losses(task, zeros_S, zeros_S, ones_S, torch.tensor([[0, 1]]), partners_P2=partners_P2)
    return float(of_pair) * len(batch.row_ids)


def dpo_loss(policy: nn.Module, content: tuple[Any, ...], *, task: DPOConfig, delta: float = 0.0) -> LossOutput:
    """The losses of all pairs of each prompt, and the implicit rewards beta * (policy - reference) behind them.

    `kl/chosen` is what the better responses have lost in log-probability, an estimate of the reference's KL divergence
    from the policy on them, nats a response; `entropy` is nats a token, over the better responses.
    """
    batch, reference_S, *partners = content
    logprobs = policy(batch, entropy=not torch.is_grad_enabled(), log_sum_squares=task.use_weighting)
    sums_S = response_sums(logprobs.target_N, batch, task.ld_alpha)
    lengths_S = batch.lengths_S
    of_step: dict[str, Any] = {"partners_P2": partners[0] if partners else None, "delta": delta}
    losses_P = pair_losses(task, sums_S, reference_S, lengths_S, batch.pairs_P2, **of_step)
    w, r = batch.pairs_P2.unbind(1)  # winner, rejected
    if task.sft_coeff:
        losses_P = losses_P - task.sft_coeff * sums_S[w] / lengths_S[w]
    if task.use_weighting:  # WPO (arXiv 2406.11827, eq. 2): exp of the mean of log p(y_t) - log sum of p^2, no gradient
        relative_N = logprobs.target_N.detach() - logprobs.log_sum_squares_N
        means_S = sum_by_response(relative_N, batch.response_index_N, len(batch.response_lengths)) / lengths_S
        losses_P = losses_P * means_S[batch.pairs_P2].sum(dim=1).exp()
    rewards_S = task.beta * (sums_S - reference_S).detach()
    metrics_P = {
        "rewards/chosen": rewards_S[w],
        "rewards/rejected": rewards_S[r],
        "rewards/margins": rewards_S[w] - rewards_S[r],
        "rewards/accuracies": accuracies(rewards_S[w] - rewards_S[r]),
        "logps/chosen": sums_S[w].detach(),
        "logps/rejected": sums_S[r].detach(),
        "kl/chosen": (reference_S - sums_S)[w].detach(),
        "tokens/chosen": lengths_S[w].float(),
    }
    if logprobs.entropy_N is not None:  # in validation
        entropy_S = sum_by_response(logprobs.entropy_N, batch.response_index_N, len(batch.response_lengths)) / lengths_S
        metrics_P["entropy"] = entropy_S[w]
    weights_P = batch.pair_weights_P
    return LossOutput(
        (losses_P * weights_P).sum(), {name: (value * weights_P).sum() for name, value in metrics_P.items()}
    )


def with_partners(
    fabric: Fabric, module: nn.Module, micro_batches: list[MicroBatch], task: DPOConfig
) -> list[MicroBatch]:
    """All ranks: the micro-batches with (P, 2) partners of their pairs among all pairs of the step, for AOT.

    They follow from the present log-probabilities, so that neither micro-batches nor ranks change the loss. aot: the
    log-ratio of chosen and rejected by the reference, of the same rank as that by the policy, twice; aot_unpaired: as
    in `loss.dpo.aot_unpaired`.
    """
    sums = sums_of_step(fabric, module, micro_batches, task.ld_alpha)
    values, others = [], []
    for micro, sums_S in zip(micro_batches, sums, strict=True):
        batch, reference_S = micro.batch[:2]
        w, r = batch.pairs_P2.unbind(1)
        h_S = sums_S if task.reference_free else sums_S - reference_S
        values.append(sums_S[w] - sums_S[r] if task.loss_type == "aot" else h_S[w])
        others.append(reference_S[w] - reference_S[r] if task.loss_type == "aot" else h_S[r])
    of_ranks = gather_objects(fabric, (values, others))
    all_values_P = torch.cat([part for rank_values, _ in of_ranks for part in rank_values])
    all_others_P = torch.cat([part for _, rank_others in of_ranks for part in rank_others])
    first = sum(len(part) for rank_values, _ in of_ranks[: fabric.global_rank] for part in rank_values)
    partners_P = dpo.aot_partners(all_values_P, all_others_P)
    reverse_P = partners_P if task.loss_type == "aot" else dpo.aot_partners(all_others_P, all_values_P)
    own_P2 = torch.stack([partners_P, reverse_P], dim=1)[first : first + sum(map(len, values))]
    own = zip(micro_batches, own_P2.split([len(part) for part in values]), strict=True)
    return [micro._replace(batch=(*micro.batch[:2], part_P2)) for micro, part_P2 in own]


def next_delta(extra: dict[str, Any], metrics: dict[str, float]) -> None:
    """Move the shift of BCO, the mean of all implicit rewards of the steps so far, which is saved in checkpoints."""
    if metrics["items"]:
        steps, mean = extra.get("bco_steps", 0) + 1, (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2
        delta = extra.get("bco_delta", 0.0)
        extra |= {"bco_steps": steps, "bco_delta": delta + (mean - delta) / steps}


def train(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> None:
    """All ranks: prepare the data and the reference, train, validate, save, and leave `final/` in the run directory."""
    task = cfg.task
    assert isinstance(task, DPOConfig)
    with open_run(fabric, cfg, run_dir) as run:
        loop = TrainLoop(fabric, run)
        if task.loss_type in AOT and loop.rows.sizes.shape[1] > 3:
            raise DataError(f"task.loss_type={task.loss_type} needs pairs, and rows have more than two responses")
        policy = loop.load_policy()
        key: str | None = reference_key(policy, cfg)
        policy = with_adapters(policy, cfg.model)
        source = set_up_with_reference(loop, policy) if task.has_fixed_reference() else loop.set_up(policy)
        module = loop.module
        has_reference, learners, reference = task.loss_type not in NO_REFERENCE and not task.reference_free, None, None
        if task.ref_sync_interval is not None:
            reference = EMA(policy, 1.0 - task.ref_mixup_alpha)
            learners = nn.ModuleDict({"policy": policy, "reference": reference})
        key = key if has_reference and reference is None else None
        kept = partial(batches_with_reference, key=key, packed=policy.packed, tail_weight=task.ld_alpha)
        with_reference = partial(kept, fabric, task, source)
        held_out = with_reference(loop.data, "validation", loop.held_out_rows) if loop.held_out else None
        loop.begin(lambda rows, read: partial(with_reference(loop.data, loop.split, read).of, rows), learners)

        def loss_fn(policy: nn.Module, content: Any) -> LossOutput:
            return dpo_loss(policy, content, task=task, delta=loop.state.extra.get("bco_delta", 0.0))

        def prepared(micro_batches: Iterable[MicroBatch]) -> Iterable[MicroBatch]:
            if reference is not None:
                micro_batches = list(micro_batches)
                with reference.swap_in():
                    sums = zip(micro_batches, sums_of_step(fabric, module, micro_batches, task.ld_alpha), strict=True)
                micro_batches = [micro._replace(batch=(micro.batch[0], sums_S)) for micro, sums_S in sums]
            if task.loss_type in AOT:
                return with_partners(fabric, module, list(micro_batches), task)
            return micro_batches

        if task.self_check != "off" and loop.state.step == 0:
            if has_reference:
                plain = dataclasses.replace(task, sft_coeff=0.0, use_weighting=False)
                first = list(prepared(loop.load(loop.plan.rows_of_step(0))))
                how = (task.self_check, cfg.fabric.precision, run.say, task.ld_alpha)
                plain_loss, initial = partial(dpo_loss, task=plain), partial(initial_loss, task=plain)
                check_reference(fabric, module, first, plain_loss, initial, *how)
            else:
                run.say("no self-check: this loss has no reference")

        def validate() -> None:
            assert held_out is not None
            result = evaluate(fabric, module, prepared(loop.validation_batches(held_out)), loss_fn)
            loop.record(result)
            if has_reference and result["kl/chosen"] > _MAX_KL_PER_TOKEN * result["tokens/chosen"]:
                run.say(
                    f"warning: the better responses have lost {result['kl/chosen']:.0f} nats since the start: the "
                    "policy leaves the data; raise task.beta or lower optim.lr"
                )
            loop.log_samples(policy)

        if loop.validates_at_start:
            validate()
        for step in loop:
            metrics = step.update(loss_fn, list(prepared(step.batches)))
            if task.loss_type == "bco":
                next_delta(loop.state.extra, metrics)
            if reference is not None and loop.state.step % cast(int, task.ref_sync_interval) == 0:
                reference.update()
            if step.validates:
                validate()
        loop.finish(policy)
