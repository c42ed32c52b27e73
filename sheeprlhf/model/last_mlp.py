"""Skip unused outputs: the last block's MLP at the positions where the language head does not run.

Attention before it needs every position's keys and values; behind it there is only the norm, position by position.
Letters: T packed positions, R of them where the head runs, C hidden width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def last_mlp_at(backbone: nn.Module, positions_R: Tensor, num_positions: int) -> Iterator[None]:
    """Compute the last block's MLP only at these positions; its outputs elsewhere are zero.

    Nothing changes for a model whose last MLP is not found, and under gradient checkpointing, which computes the block
    again after this has ended.

    Args:
        backbone: the model without its head.
        positions_R: (R,) places of the packed row.
        num_positions: T, its length.
    """
    mlp = _last_mlp(backbone)
    if mlp is None or getattr(backbone, "is_activation_checkpointing", False):
        yield
        return

    def pick(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_1TC, *others = inputs
        return hidden_1TC.index_select(1, positions_R), *others

    def spread(_: nn.Module, inputs: tuple[Any, ...], output_1RC: Tensor) -> Tensor:
        return output_1RC.new_zeros(1, num_positions, output_1RC.shape[-1]).index_copy(1, positions_R, output_1RC)

    hooks = [mlp.register_forward_pre_hook(pick), mlp.register_forward_hook(spread)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _last_mlp(backbone: nn.Module) -> nn.Module | None:
    """The dense MLP of the last block; None for other kinds (experts, a block that holds its layers itself)."""
    blocks = getattr(backbone, "layers", None) or getattr(backbone, "h", None)
    mlp = getattr(blocks[-1], "mlp", None) if isinstance(blocks, nn.ModuleList) else None
    return mlp if type(mlp).__name__.endswith("MLP") else None
