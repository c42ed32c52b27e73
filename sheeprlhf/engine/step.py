"""One optimizer step and one evaluation pass: what every task shares, and no algorithm.

A step's rows are cut into micro-batches and dealt to the ranks; how they are cut changes speed and memory, never the
result: every micro-batch contributes a sum, and the step divides by the number of items on all ranks together.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sheeprlhf.engine.shard import (
    broadcast_from_first,
    equal_passes,
    is_sharded,
    of_ranks,
    same_number,
    sum_of_rows,
    whole,
)
from sheeprlhf.model.embedding import row_gradients
from sheeprlhf.utils.errors import DataError, NonFiniteError
from sheeprlhf.utils.lightning import Fabric, SingleDeviceStrategy, _FabricModule, gather_objects
from sheeprlhf.utils.memory import phase
from sheeprlhf.utils.modes import eval_mode, forward_of_zero, isolated_rng


class LossOutput(NamedTuple):
    """Result of a loss function for one micro-batch."""

    total: Tensor  # () float, SUM of the loss over the micro-batch's items, with its graph
    metrics: dict[str, Tensor]  # detached () tensors, SUMS over the items; the same names from every micro-batch


class MicroBatch(NamedTuple):
    """Rows of one rank's forward pass."""

    batch: Any  # anything that `Fabric.to_device` moves; only the loss function looks inside
    num_items: int  # what the loss is averaged over, counted in this micro-batch (target tokens, pairs, ...)
    row_ids: tuple[int, ...]  # the rows' numbers, for error messages


LossFn = Callable[[nn.Module, Any], LossOutput]
Skip = Callable[[NonFiniteError], None]  # raises the error, or returns: then the step is left out


def update(
    fabric: Fabric,
    module: _FabricModule,
    optimizer: Optimizer,
    micro_batches: list[MicroBatch],
    loss_fn: LossFn,
    *,
    max_grad_norm: float | None,
    skip: Skip | None = None,
) -> dict[str, float]:
    """All ranks: one optimizer step on the mean loss of the items of all micro-batches of all ranks.

    Gradients are summed over a rank's micro-batches and synchronised once, at the last. A rank may be dealt no
    micro-batch: it takes part in that one synchronisation with a zero. Micro-batches without items are skipped. A step
    that has no item on any rank changes nothing.

    Args:
        fabric: has set up `module` and `optimizer`.
        module: the trained module.
        optimizer: steps once; its gradients are empty before, except for those of `add_gradients`, and after.
        micro_batches: this rank's share of the step.
        loss_fn: called as `loss_fn(module, batch)`, with the batch on the device.
        max_grad_norm: gradients are scaled down to this norm; None only measures it.
        skip: asked on all ranks when the loss or the gradient norm is not finite; None is to raise.

    Returns:
        loss and the loss function's metrics per item, "grad_norm" before clipping, "items" of all ranks: 0 if the step
        was left out. Raises NonFiniteError on all ranks, before a weight changes.
    """
    passes = _passes(fabric, module, micro_batches, loss_fn, weight=1.0)
    if passes.num_items == 0:
        optimizer.zero_grad(set_to_none=True)
        return {"loss": 0.0, "grad_norm": 0.0, "items": 0.0}
    grad_norm = fabric.clip_gradients(
        module, optimizer, max_norm=math.inf if max_grad_norm is None else max_grad_norm, error_if_nonfinite=False
    )
    assert grad_norm is not None
    means, grad_norm_float = _reduce(
        fabric, passes.sums, passes.names, whole(grad_norm)
    )  # the step's one wait for the device
    result = {name: value / passes.num_items for name, value in means.items()}
    result |= {"grad_norm": grad_norm_float, "items": float(passes.num_items)}
    if not (math.isfinite(result["loss"]) and math.isfinite(grad_norm_float)):
        optimizer.zero_grad(set_to_none=True)
        error = NonFiniteError(_non_finite_message(fabric, result, passes))
        if skip is None:
            raise error
        skip(error)
        return result | {"items": 0.0}
    with phase("optimizer step"):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return result


def add_gradients(
    fabric: Fabric,
    module: _FabricModule,
    micro_batches: list[MicroBatch],
    loss_fn: LossFn,
    *,
    weight: float,
    skip: Skip | None = None,
) -> dict[str, float]:
    """All ranks: add the gradient of another mean loss times a weight, before an `update`, whose arguments these are.

    Returns:
        loss, without the weight, and the loss function's metrics per item, "items" of all ranks. If the loss is not
        finite and `skip` returns, the step is left out by an `update` without micro-batches.

    Raises:
        NonFiniteError: the loss is not finite; on all ranks.
    """
    passes = _passes(fabric, module, micro_batches, loss_fn, weight=weight)
    if passes.num_items == 0:
        return {"loss": 0.0, "items": 0.0}
    means, _ = _reduce(fabric, passes.sums, passes.names, torch.zeros((), device=fabric.device))
    result = {name: value / passes.num_items for name, value in means.items()} | {"items": float(passes.num_items)}
    if not math.isfinite(result["loss"]):
        error = NonFiniteError(_non_finite_message(fabric, result, passes))
        if skip is None:
            raise error
        skip(error)
    return result


class _StepSums(NamedTuple):
    """Results of a rank's forward and backward passes: its sums by name; the names and number of items of all ranks."""

    micro_batches: list[MicroBatch]
    totals: list[Tensor]
    sums: dict[str, Tensor]
    names: list[str]
    num_items: int


def _passes(
    fabric: Fabric, module: _FabricModule, micro_batches: list[MicroBatch], loss_fn: LossFn, *, weight: float
) -> _StepSums:
    """All ranks: add to the gradients, synchronised at the last backward pass."""
    micro_batches = [m for m in micro_batches if m.num_items > 0]
    items_of_rank, num_of_rank = of_ranks(fabric, sum(m.num_items for m in micro_batches), len(micro_batches))
    num_items = sum(items_of_rank)
    sums: dict[str, Tensor] = {}
    totals: list[Tensor] = []
    if num_items == 0:
        return _StepSums(micro_batches, totals, sums, [], 0)
    scale = weight * len(items_of_rank) / num_items  # the gradient sync averages over ranks
    sharded = is_sharded(module)
    passes = same_number(fabric, micro_batches, num_of_rank) if sharded else micro_batches
    one_cpu = isinstance(fabric.strategy, SingleDeviceStrategy) and fabric.device.type == "cpu"
    with row_gradients(module) if one_cpu else nullcontext():
        for index, micro in enumerate(passes):
            counts = index < len(micro_batches)
            # forward too: the wrapper decides in its forward whether this backward synchronises
            with fabric.no_backward_sync(module, enabled=index + 1 < len(passes)):
                with phase("forward pass"):
                    output = loss_fn(module, fabric.to_device(micro.batch))
                with phase("backward pass"):
                    fabric.backward(output.total * (scale if counts else 0.0))
            if counts:
                totals.append(output.total.detach())
                _accumulate(sums, output)
    if not passes:
        with forward_of_zero(module.module):
            fabric.backward(module(torch.zeros((), device=fabric.device)))
    names = sorted(sums)
    if 0 in items_of_rank:  # those ranks do not know the names
        names = broadcast_from_first(fabric, names, items_of_rank)
    return _StepSums(micro_batches, totals, sums, names, num_items)


def evaluate(
    fabric: Fabric, module: nn.Module, micro_batches: Iterable[MicroBatch], loss_fn: LossFn
) -> dict[str, float]:
    """All ranks: mean loss and metrics per item over the micro-batches of all ranks.

    The module is in eval mode meanwhile; training flags and random number generators are as before afterwards. Ranks
    may have different numbers of micro-batches, or none.

    Returns:
        loss and the loss function's metrics per item, "items" of all ranks.

    Raises:
        DataError: there is no item on any rank.
    """
    sums: dict[str, Tensor] = {}
    num_local = 0
    with phase("evaluation"), isolated_rng(), eval_mode(module), torch.no_grad():
        for micro, counts in equal_passes(fabric, module, (micro for micro in micro_batches if micro.num_items)):
            output = loss_fn(module, fabric.to_device(micro.batch))
            if counts:
                _accumulate(sums, output)
                num_local += micro.num_items
    num_items = sum(of_ranks(fabric, num_local)[0])
    if num_items == 0:
        raise DataError("nothing to evaluate: no row has a target token; check data.* and the split's size")
    names = next(names for names in gather_objects(fabric, sorted(sums)) if names)
    means, _ = _reduce(fabric, sums, names, torch.zeros((), device=fabric.device))
    return {name: value / num_items for name, value in means.items()} | {"items": float(num_items)}


def _accumulate(sums: dict[str, Tensor], output: LossOutput) -> None:
    """Add a micro-batch's sums, on the device and in float64, so that the order of the cut does not show."""
    for name, value in {"loss": output.total.detach(), **output.metrics}.items():
        sums[name] = sums[name] + value if name in sums else value.double()


def _reduce(
    fabric: Fabric, sums: dict[str, Tensor], names: list[str], same_on_all: Tensor
) -> tuple[dict[str, float], float]:
    """All ranks: the sums over ranks, and a value that is already the same on all, in one transfer to the host."""
    zero = torch.zeros((), dtype=torch.float64, device=fabric.device)
    values = torch.stack([sums.get(name, zero) for name in names])
    values = sum_of_rows(fabric, values)
    *reduced, last = torch.cat([values, same_on_all.double().reshape(1).to(values.device)]).tolist()
    return dict(zip(names, reduced, strict=True)), last


def _non_finite_message(fabric: Fabric, result: dict[str, float], passes: _StepSums) -> str:
    """All ranks: which rows to look at, those of every rank."""
    losses = [total.item() for total in passes.totals]
    suspects = [m for m, loss in zip(passes.micro_batches, losses, strict=True) if not math.isfinite(loss)]
    found = gather_objects(fabric, (bool(suspects), [i for m in suspects or passes.micro_batches for i in m.row_ids]))
    if any(certain for certain, _ in found):
        found = [(certain, rows if certain else []) for certain, rows in found]
    rows = "; ".join(f"rank {rank}: rows {ids}" for rank, (_, ids) in enumerate(found) if ids)
    return (
        f"the step's loss is {result['loss']} and its gradient norm {result.get('grad_norm', math.nan)}; no weight was "
        f"changed. Look at these rows of the training split ({rows}), or lower optim.lr, or compute in "
        "fabric.precision=32-true, or leave such steps out: task.max_skipped_steps=10"
    )
