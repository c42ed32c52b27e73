"""Supervised fine-tuning: the model learns to write the response, given the prompt.

The loss of an optimizer step is the sum of its targets' cross-entropies divided by the number of its targets, over
all rows of the step and all devices: how the rows are cut into forward passes never changes it.
"""

import math
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from sheeprlhf.agent.batches import Batches
from sheeprlhf.data.example import Batch
from sheeprlhf.engine.run import open_run
from sheeprlhf.engine.shard import equal_passes, sum_of_rows
from sheeprlhf.engine.step import LossOutput, MicroBatch, evaluate
from sheeprlhf.loss.sft import RouterLoss, StepRouterLoss, cross_entropy, expert_counts, probability_sums
from sheeprlhf.model.folder.architecture import configured_router_loss
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.structure.task import SFTConfig
from sheeprlhf.task.loop import TrainLoop
from sheeprlhf.task.models import with_adapters
from sheeprlhf.utils.errors import Notify
from sheeprlhf.utils.lightning import Fabric, _FabricModule
from sheeprlhf.utils.memory import phase
from sheeprlhf.utils.modes import eval_mode, isolated_rng

_RELATIVE = {torch.bfloat16: 0.1, torch.float16: 0.02}  # transformers rounds probabilities to the weights' format


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


def router_loss_of(model: PreTrainedModel, say: Notify) -> RouterLoss | None:
    """The router's loss that the configuration asks for, if a few tokens show it to be `RouterLoss`; a line says so."""
    coefficient = configured_router_loss(model)
    if not coefficient:
        return None
    top_k: Any = getattr(model, "num_experts_per_tok", None) or getattr(model.config, "num_experts_per_tok", None)
    ids = (torch.arange(12, device=model.device) % 5 + 3)[None]
    found = None
    with eval_mode(model), torch.no_grad(), suppress(TypeError, ValueError, AttributeError, LookupError):
        output = cast(Any, model)(input_ids=ids, output_router_logits=True, use_cache=False)
        logits = [layer.flatten(0, -2) for layer in output.router_logits]
        loss = RouterLoss(coefficient, top_k, logits[0].shape[-1])
        own = loss.value(expert_counts(logits, top_k), probability_sums(logits), sum(map(len, logits)))
        expected = coefficient * float(output.aux_loss)
        if abs(float(own) - expected) <= _RELATIVE.get(model.dtype, 1e-4) * abs(expected):
            found = loss
    counts = "includes" if found else f"leaves out, as that of {type(model).__name__} is another one,"
    say(f"the training loss {counts} the router's loss of the model's config, router_aux_loss_coef={coefficient:g}")
    return found


@torch.no_grad()
def router_loss_of_step(
    fabric: Fabric, module: _FabricModule, micro_batches: list[MicroBatch], loss: RouterLoss
) -> StepRouterLoss:
    """All ranks: count the picks of each expert over the whole step, in forward passes without gradients.

    They draw the random numbers that training draws next, so dropout is the same in both.
    """
    counts = torch.zeros(loss.num_experts + 2, dtype=torch.float64, device=fabric.device)
    with isolated_rng(), phase("forward pass"):
        for micro, counts_here in equal_passes(fabric, module, (micro for micro in micro_batches if micro.num_items)):
            router_logits = module(fabric.to_device(micro.batch), router=True).router_logits
            if counts_here:
                rows = torch.tensor([sum(map(len, router_logits)), micro.num_items], device=fabric.device)
                counts += torch.cat([expert_counts(router_logits, loss.top_k), rows.double()])
    counts = sum_of_rows(fabric, counts)
    *_, num_rows, num_items = counts.tolist()
    return StepRouterLoss(loss, counts[:-2].float(), max(1.0, num_rows), num_items)


def train(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> None:
    """All ranks: prepare the data, train, validate, save, and leave `final/` in the run directory."""
    task = cfg.task
    assert isinstance(task, SFTConfig)
    with open_run(fabric, cfg, run_dir) as run:
        loop = TrainLoop(fabric, run)
        policy = loop.load_policy()
        router = router_loss_of(policy.causal_lm(), run.say)
        policy = with_adapters(policy, cfg.model)
        policy.neftune_alpha = cfg.model.neftune_alpha
        module = loop.set_up(policy)
        targets = "response" if task.completion_only_loss else "all"
        batches = Batches(fabric, task, packed=policy.packed, targets=targets)
        loop.begin(lambda rows, _: partial(batches.of, rows))

        def validate() -> None:
            result = evaluate(fabric, module, loop.validation_batches(batches), sft_loss)
            loop.record(result | {"perplexity": math.exp(min(result["nll"], 700.0))})
            loop.log_samples(policy)

        if loop.validates_at_start:
            validate()
        for step in loop:
            loss_fn = partial(sft_loss, label_smoothing=task.label_smoothing)
            if router is not None:
                loss_fn = partial(loss_fn, router=router_loss_of_step(fabric, module, step.batches, router))
            step.update(loss_fn)
            if step.validates:
                validate()
        loop.finish(policy)
