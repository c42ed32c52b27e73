"""The router's loss of a mixture of experts in training: exact over a whole step, or reported as left out."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sheeprlhf.engine.checkpoint import Say
from sheeprlhf.engine.rng import isolated_rng
from sheeprlhf.engine.shard import gathered
from sheeprlhf.engine.step import MicroBatch
from sheeprlhf.model.router import (
    RouterLoss,
    configured_router_loss,
    expert_counts,
    probability_sums,
    router_loss_of,
)
from sheeprlhf.utils.lightning import Fabric, _FabricModule
from sheeprlhf.utils.memory import phase


class StepRouterLoss(NamedTuple):
    """The router's loss of one step, of which each micro-batch computes its share.

    Attributes:
        loss: the model's.
        counts_E: (E,) picks of each expert, over the step's tokens of all ranks.
        num_rows: tokens times layers, of all ranks.
        num_items: what the step divides its sums by.
    """

    loss: RouterLoss
    counts_E: Tensor
    num_rows: float
    num_items: float

    def share(self, router_logits: tuple[Tensor, ...]) -> Tensor:
        """() a micro-batch's part of the step's loss, times the items that the step divides by."""
        return self.loss.value(self.counts_E, probability_sums(router_logits), self.num_rows) * self.num_items


def router_loss_in_training(model: PreTrainedModel, say: Say) -> RouterLoss | None:
    """The loss that the model's configuration asks for; a line says that it counts, or that it cannot."""
    coefficient = configured_router_loss(model)
    if not coefficient:
        return None
    found = router_loss_of(model)
    if found is None:
        _say_left_out(coefficient, f"that of {type(model).__name__} is not computed here", say)
    else:
        say(f"the training loss includes the router's loss of the model's config, router_aux_loss_coef={coefficient:g}")
    return found


def say_router_loss_left_out(model: PreTrainedModel, task: str, say: Say) -> None:
    """Report once that a task does not train with the router's loss although the model's configuration asks for it."""
    if coefficient := configured_router_loss(model):
        _say_left_out(coefficient, f"task={task} trains without it", say)


def _say_left_out(coefficient: float, why: str, say: Say) -> None:
    say(
        f"the model's config asks for the router's loss (output_router_logits, router_aux_loss_coef={coefficient:g}): "
        f"{why}"
    )


@torch.no_grad()
def router_loss_of_step(
    fabric: Fabric, module: _FabricModule, micro_batches: list[MicroBatch], loss: RouterLoss
) -> StepRouterLoss:
    """All ranks: count the picks of each expert over the whole step, in forward passes without gradients.

    They draw the random numbers that training draws next, so dropout is the same in both.
    """
    counts = torch.zeros(loss.num_experts + 2, dtype=torch.float64, device=fabric.device)
    with isolated_rng(), gathered(module), phase("forward pass"):
        for micro in micro_batches:
            if micro.num_items:
                router_logits = module(fabric.to_device(micro.batch), router=True).router_logits
                rows = torch.tensor([sum(map(len, router_logits)), micro.num_items], device=fabric.device)
                counts += torch.cat([expert_counts(router_logits, loss.top_k), rows.double()])
    if fabric.world_size > 1:
        fabric.all_reduce(counts, reduce_op="sum")
    *_, num_rows, num_items = counts.tolist()
    return StepRouterLoss(loss, counts[:-2].float(), max(1.0, num_rows), num_items)
