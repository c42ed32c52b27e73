"""`fabric.strategy=fsdp2`: weights, gradients and optimizer state are cut into one part per process.

Torch's `fully_shard` changes a module in place: its parameters become parts (`DTensor`), and are whole from a block's
forward to its end, and again in its backward. All ranks take part in each of these, so all have to run the same passes.
Code that needs whole weights at another time calls these functions. Without fsdp2 they do nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sheeprlhf.engine.ranks import JoiningModelParallel
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.lightning import Fabric, ModelParallelStrategy

T = TypeVar("T")


def sharding_strategy(num_processes: int, timeout: timedelta) -> ModelParallelStrategy:
    """Fabric's strategy of fsdp2 over all processes, which wait for each other at most for `timeout`.

    Raises:
        ConfigError: this torch is too old.
    """
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise ConfigError(
            "fabric.strategy=fsdp2 needs torch 2.13 or newer: pip install -U torch, or give fabric.strategy=ddp"
        )
    return JoiningModelParallel(_shard, data_parallel_size=num_processes, tensor_parallel_size=1, timeout=timeout)


def _shard(module: nn.Module, mesh: Any) -> nn.Module:
    """Every block for itself, and what is around them together: weights are whole one block at a time."""
    of_data = mesh["data_parallel"]
    blocks = next((part for part in module.modules() if isinstance(part, nn.ModuleList)), ())
    for block in blocks:
        fully_shard(block, mesh=of_data)
    fully_shard(module, mesh=of_data)
    return module


def is_sharded(module: nn.Module) -> bool:
    """True if the weights of a module are sharded."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """All ranks: inside, each has all weights, and may run other forward passes than the rest; no backward pass."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not parts[0], recurse=False)  # the outermost one is needed next
        for root in parts[:1]:
            root.reset_iter_state()  # forward passes without a backward would make ranks fetch weights in other orders


def same_number(fabric: Fabric, passes: Sequence[T], num_of_rank: Sequence[int]) -> list[T]:
    """All ranks: this rank's passes, the last repeated until all ranks have the same number.

    Args:
        fabric: where it runs.
        passes: what this rank has to compute.
        num_of_rank: how many every rank has; one has some.
    """
    last = list(passes[-1:])
    if 0 in num_of_rank:
        given = fabric.broadcast(last, src=next(rank for rank, number in enumerate(num_of_rank) if number))
        last = last or given
    return [*passes, *last * (max(num_of_rank) - len(passes))]


def whole(tensor: Tensor) -> Tensor:
    """All ranks: the tensor that this is a part of, on every rank; a whole one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_tensors(fabric: Fabric, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All ranks: whole tensors, those of parts on the host of rank zero only."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if full is tensor or fabric.is_global_zero:
            found[name] = tensor if full is tensor else full.cpu()
    return found


def cut_like(tensor: Tensor, target: Tensor) -> Tensor:
    """A whole tensor that every rank has, cut as the target is; as it is for a whole target."""
    if not isinstance(target, DTensor):
        return tensor
    on_device = tensor.to(target.device)
    return distribute_tensor(on_device, target.device_mesh, target.placements, src_data_rank=None)


def assemble(fabric: Fabric, module: nn.Module) -> None:
    """All ranks, after the last step: rank zero's module gets whole weights on the host, to be written; no more passes.

    Weights that several modules share stay shared.
    """
    made: dict[Tensor, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                continue
            if parameter not in made:
                full = whole(parameter.detach())
                kept = full.cpu() if fabric.is_global_zero else torch.empty(0)
                made[parameter] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
            setattr(part, name, made[parameter])
