"""Gradients of the rows of an embedding against autograd's own dense ones: the same bits."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.engine.step import LossOutput, MicroBatch, update
from sheeprlhf.model.embedding import row_gradients
from sheeprlhf.structure.run import FabricConfig
from sheeprlhf.utils.lightning import Fabric
from tests.unit.engine.toy import on_ranks

VOCABULARY, WIDTH = 50, 8


def model(*, tied: bool = False, padding: int | None = None) -> nn.Sequential:
    """An embedding, and a layer whose weight is the same if asked."""
    torch.manual_seed(0)
    embedding, head = nn.Embedding(VOCABULARY, WIDTH, padding_idx=padding), nn.Linear(WIDTH, VOCABULARY, bias=False)
    if tied:
        head.weight = embedding.weight
    return nn.Sequential(embedding, head)


def batches() -> list[Tensor]:
    """Ids of three passes, many of them repeated."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 12, (2, number), generator=generator) for number in (9, 40, 3)]


def gradients(trained: nn.Sequential, inside: Callable[[nn.Module], object]) -> list[Tensor | None]:
    with inside(trained):  # type: ignore[attr-defined]
        for ids in batches():
            trained(ids).log_softmax(-1).square().mean().backward()
    return [parameter.grad for parameter in trained.parameters()]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padding", [None, 5])
def test_sums_of_several_passes_have_the_same_bits(tied: bool, padding: int | None) -> None:
    expected = gradients(model(tied=tied, padding=padding), lambda _: nullcontext())
    trained = model(tied=tied, padding=padding)
    found = gradients(trained, row_gradients)
    assert len(found) == len(expected) == 2 - tied
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None and theirs is not None
        assert not ours.is_sparse and torch.equal(ours, theirs)
    assert "forward" not in vars(trained[0]) and not trained[0].weight._backward_hooks


def test_a_frozen_embedding_has_no_gradient() -> None:
    trained = model()
    trained[0].requires_grad_(False)
    found = gradients(trained, row_gradients)
    assert [gradient is None for gradient in found] == [True, False]


def kinds_of_gradients(fabric: Fabric) -> set[bool]:
    """Two updates, whose weights have to be those of plain torch; which gradients of the embedding are sparse."""
    trained, plain = model(), model()
    module, optimizer = fabric.setup(trained, torch.optim.SGD(trained.parameters(), lr=0.5))
    kinds: set[bool] = set()

    def loss_fn(called: nn.Module, ids: Tensor) -> LossOutput:
        trained[0].weight.register_hook(lambda gradient: kinds.add(gradient.is_sparse))
        return LossOutput(called(ids).square().mean(), {})

    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    for _ in range(2):
        micro_batches = [MicroBatch(ids, 1, (0,)) for ids in batches()]
        update(fabric, module, optimizer, micro_batches, loss_fn, max_grad_norm=None)
        for ids in batches():
            (plain(ids).square().mean() / 3).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    for ours, theirs in zip(trained.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    return kinds


def test_an_update_uses_them_in_one_process() -> None:
    fabric = make_fabric(FabricConfig(accelerator="cpu"))
    fabric.launch()
    assert kinds_of_gradients(fabric) == {True}


def test_ddp_has_dense_gradients() -> None:
    assert on_ranks(1, kinds_of_gradients) == [{False}]
