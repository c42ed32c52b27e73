"""Direct preference optimisation: the policy learns from pairs which response is the better one (arXiv 2305.18290).

The loss of an optimizer step is the mean over its prompts, of all rows of the step and all devices; a prompt with more
than two ranked responses gives the mean over its pairs. The reference is the policy before its first step: its
log-probabilities are computed once and kept with the data.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sheeprlhf.data.example import Batch
from sheeprlhf.engine.run import open_run
from sheeprlhf.engine.step import LossOutput, evaluate
from sheeprlhf.loss import dpo
from sheeprlhf.loss.reward import accuracies
from sheeprlhf.model.router import say_router_loss_left_out
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.structure.task import DPOConfig
from sheeprlhf.task.loop import TrainLoop
from sheeprlhf.task.models import with_adapters
from sheeprlhf.task.reference import batches_with_reference, check_reference, reference_key, sum_by_response
from sheeprlhf.utils.lightning import Fabric

NO_REFERENCE = ("simpo", "orpo")
_MAX_KL_PER_TOKEN = 0.5  # nats that the better responses may lose before a warning


def pair_losses(task: DPOConfig, sums_S: Tensor, reference_S: Tensor, lengths_S: Tensor, pairs_P2: Tensor) -> Tensor:
    """(P,) losses of pairs, from the summed log-probabilities of responses and their numbers of tokens."""
    w, r = pairs_P2.unbind(1)  # winner, rejected
    h_S = sums_S if task.reference_free else sums_S - reference_S
    h_S = dpo.f_derivative(h_S, task.f_divergence, task.f_alpha)
    lengths = (lengths_S[w], lengths_S[r])
    losses_P = _losses_by_type(task, h_S[w], h_S[r], sums_S[w], sums_S[r], lengths)
    return losses_P if task.sft_coeff == 0 else losses_P - task.sft_coeff * sums_S[w] / lengths_S[w]


def _losses_by_type(
    task: DPOConfig, h_w_P: Tensor, h_l_P: Tensor, lp_w_P: Tensor, lp_l_P: Tensor, lengths: tuple[Tensor, Tensor]
) -> Tensor:
    """(P,) losses of `task.loss_type`; letters as in loss/dpo.py."""
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
        case "simpo":
            return dpo.simpo(lp_w_P, lp_l_P, *lengths, task.beta, task.simpo_gamma)
        case "orpo":
            return dpo.orpo(lp_w_P, lp_l_P, *lengths, task.beta)
    raise ValueError(f"loss_type={task.loss_type!r}")


def initial_loss(batch: Batch, *, task: DPOConfig) -> float:
    """Total loss of a batch if policy and reference are equal."""
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
    lengths_S = batch.lengths_S
    losses_P = pair_losses(task, sums_S, reference_S, lengths_S, batch.pairs_P2)
    rewards_S = task.beta * (sums_S - reference_S).detach()
    w, r = batch.pairs_P2.unbind(1)
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


def train(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> None:
    """All ranks: prepare the data and the reference, train, validate, save, and leave `final/` in the run directory."""
    task = cfg.task
    assert isinstance(task, DPOConfig)
    with open_run(fabric, cfg, run_dir) as run:
        loop = TrainLoop(fabric, run)
        policy, packed = loop.load_policy()
        say_router_loss_left_out(policy.causal_lm(), task.config_name, run.say)
        key: str | None = reference_key(policy, cfg, packed=packed)
        policy = with_adapters(policy, cfg.model)
        module = loop.set_up(policy)
        has_reference = task.loss_type not in NO_REFERENCE and not task.reference_free
        key = key if has_reference else None
        with_reference = partial(batches_with_reference, fabric, task, module, loop.data, key=key, packed=packed)
        batches = with_reference(loop.split, loop.plan.rows_until(loop.num_steps))
        held_out = with_reference("validation", loop.held_out_rows) if loop.held_out else batches
        loop.begin(partial(batches.of, loop.rows))

        loss_fn = partial(dpo_loss, task=task)
        if task.self_check != "off" and loop.state.step == 0:
            if has_reference:
                first, initial = loop.load(loop.plan.rows_of_step(0)), partial(initial_loss, task=task)
                check_reference(fabric, module, first, loss_fn, initial, task.self_check, cfg.fabric.precision, run.say)
            else:
                run.say("no self-check: this loss has no reference")

        def validate() -> None:
            result = evaluate(fabric, module, loop.validation_batches(held_out), loss_fn)
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
            step.update(loss_fn)
            if step.validates:
                validate()
        loop.finish(policy)
