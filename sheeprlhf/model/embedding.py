"""The gradient of an embedding, in the rows of a batch's tokens alone.

Letters: V vocabulary, C hidden width, U different tokens of a batch.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn


class _SparseLookup(torch.autograd.Function):
    """Rows of a weight by ids, whose gradient is sparse, with one row for each different id."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight_VC: Tensor, padding_id: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding_id = weight_VC.shape, padding_id
        return nn.functional.embedding(ids, weight_VC)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        [ids], [gradient] = ctx.saved_tensors, gradients
        ids_U, places = ids.unique(return_inverse=True)
        # of autograd's own dense gradient, the rows that are not zero
        sums_UC = torch.ops.aten.embedding_dense_backward(gradient, places, len(ids_U), -1, False)
        if ctx.padding_id is not None:
            sums_UC[ids_U == ctx.padding_id] = 0.0
        sparse = torch.sparse_coo_tensor(ids_U[None], sums_UC, ctx.shape, check_invariants=False, is_coalesced=True)
        return None, sparse, None


@contextmanager
def row_gradients(module: nn.Module) -> Iterator[None]:
    """Let backward passes within the block add to the rows of an embedding's gradient that their batch has read.

    Autograd's own gradient has a row for each token of the vocabulary, which each pass would clear and add. The sums
    have the same bits. For one process on a CPU: ranks synchronise dense gradients, and a GPU would wait for the host.
    """
    embeddings: list[Any] = [
        found for found in module.modules() if type(found) is nn.Embedding and found.weight.requires_grad
    ]
    with ExitStack() as stack:
        for embedding in embeddings:
            weight = embedding.weight
            embedding.forward = partial(_lookup, weight=weight, padding_id=embedding.padding_idx)
            stack.callback(delattr, embedding, "forward")
            stack.callback(weight.register_hook(partial(_begin_dense_sum, weight)).remove)
        yield


def _lookup(input: Tensor, *, weight: Tensor, padding_id: int | None) -> Tensor:
    return cast(Tensor, _SparseLookup.apply(input, weight, padding_id))


def _begin_dense_sum(weight: Tensor, gradient: Tensor) -> None:
    """Before a gradient is added: a sparse one is added in place to a dense one, but would itself become the first."""
    if gradient.is_sparse and weight.grad is None:
        weight.grad = torch.zeros_like(weight)
