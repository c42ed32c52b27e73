"""`update` and `evaluate` in one process: the cut into micro-batches never shows."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.engine.step import LossOutput, MicroBatch, add_gradients, evaluate, update
from sheeprlhf.structure.run import FabricConfig
from sheeprlhf.utils.errors import DataError, NonFiniteError
from sheeprlhf.utils.modes import eval_mode, isolated_rng, rng_state
from tests.unit.engine.toy import Net, micro_batch, noisy_loss, toy_loss

CUTS = [[(0, 1, 2, 3)], [(0,), (1,), (2,), (3,)], [(3,), (0, 2), (1,)], [(2, 3), (), (0, 1)]]


def set_up(precision: str = "32-true", dropout: float = 0.0, lr: float = 1.0):
    fabric = make_fabric(FabricConfig(precision=precision))
    fabric.launch()
    torch.manual_seed(3)
    module = Net(dropout)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=lr)
    return fabric, *fabric.setup(module, optimizer)


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.module.named_parameters()}


def one_big_batch():
    """Independent oracle: plain torch on all rows at once; learning rate 1, so new weights = old - gradient."""
    torch.manual_seed(3)
    module = Net()
    x = micro_batch(0, 1, 2, 3).batch
    loss = ((module(x).squeeze(-1) - x.sum(-1)) ** 2).mean()
    loss.backward()
    gradients = [p.grad for p in module.parameters() if p.requires_grad]
    norm = torch.sqrt(sum((g.double() ** 2).sum() for g in gradients)).item()
    new = {name: p.detach() - (0 if p.grad is None else p.grad) for name, p in module.named_parameters()}
    return loss.item(), norm, new


@pytest.mark.parametrize("cut", CUTS)
def test_any_cut_is_one_batch(cut):
    loss, norm, expected = one_big_batch()
    fabric, module, optimizer = set_up()
    metrics = update(fabric, module, optimizer, [micro_batch(*rows) for rows in cut], toy_loss, max_grad_norm=None)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert metrics["items"] == 85
    for name, value in weights(module).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    assert all(p.grad is None for p in module.parameters())  # nothing is left over for the next step


def test_clipping_bounds_the_step_and_reports_the_norm_before():
    _, norm, _ = one_big_batch()
    fabric, module, optimizer = set_up()
    before = weights(module)
    metrics = update(fabric, module, optimizer, [micro_batch(0, 1, 2, 3)], toy_loss, max_grad_norm=0.1)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-6)
    step = torch.sqrt(sum(((value - before[name]).double() ** 2).sum() for name, value in weights(module).items()))
    assert step.item() == pytest.approx(0.1, rel=1e-4)


def test_every_call_is_one_optimizer_step():
    fabric, module, optimizer = set_up(lr=0.01)
    steps = []
    optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    for cut in CUTS:  # the first micro-batch alone must not step, the last partial window must
        update(fabric, module, optimizer, [micro_batch(*rows) for rows in cut], toy_loss, max_grad_norm=1.0)
    assert len(steps) == len(CUTS)


@pytest.mark.parametrize("micro_batches", [[], [micro_batch()], [micro_batch(), micro_batch()]])
def test_a_step_without_items_changes_nothing(micro_batches):
    fabric, module, optimizer = set_up()
    before = weights(module)
    module.module.second.weight.grad = torch.ones_like(module.module.second.weight)  # of `add_gradients`
    assert add_gradients(fabric, module, micro_batches, toy_loss, weight=0.5) == {"loss": 0.0, "items": 0.0}
    metrics = update(fabric, module, optimizer, micro_batches, toy_loss, max_grad_norm=1.0)
    assert metrics == {"loss": 0.0, "grad_norm": 0.0, "items": 0.0}
    assert all(torch.equal(value, before[name]) for name, value in weights(module).items())
    assert all(p.grad is None for p in module.parameters())


def test_a_micro_batch_without_items_cannot_spoil_the_step():
    loss, _, _ = one_big_batch()
    fabric, module, optimizer = set_up()
    without = MicroBatch(torch.full((2, 4), float("nan")), 0, (9,))
    found = evaluate(fabric, module, [micro_batch(0), without], toy_loss)
    assert found["items"] == 1 and np.isfinite(found["loss"])
    metrics = update(fabric, module, optimizer, [without, micro_batch(0, 1, 2, 3)], toy_loss, max_grad_norm=1.0)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6)


def test_gradients_of_another_loss_are_added_with_their_weight():
    _, _, once = one_big_batch()
    fabric, module, optimizer = set_up()
    before = weights(module)
    for cut, weight in ((CUTS[1], 0.5), ([(0,)], 0.0)):
        metrics = add_gradients(fabric, module, [micro_batch(*rows) for rows in cut], toy_loss, weight=weight)
        alone = evaluate(fabric, module, [micro_batch(*rows) for rows in cut], toy_loss)
        assert metrics == pytest.approx(alone, rel=1e-6)
    update(fabric, module, optimizer, [micro_batch(*rows) for rows in CUTS[2]], toy_loss, max_grad_norm=None)
    for name, value in weights(module).items():
        expected = before[name] + 1.5 * (once[name] - before[name])
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


def refuse(error: NonFiniteError) -> None:
    raise error


def infinite_loss(module: nn.Module, x: torch.Tensor) -> LossOutput:
    return LossOutput(module(x).sum() + float("inf"), {})  # of a finite gradient


def infinite_gradient(module: nn.Module, x: torch.Tensor) -> LossOutput:
    value = module(x).sum()
    return LossOutput(torch.sqrt((value - value.detach()) ** 2) + 1.0, {})  # sqrt'(0) * 0 = nan


NAN, INF = (MicroBatch(torch.full((1, 4), float(bad)), 1, (77, 78)) for bad in ("nan", "inf"))
NOT_FINITE = [  # the loss, the batch that spoils it, the rows to look at
    (toy_loss, NAN, "[77, 78]"),
    (toy_loss, INF, "[77, 78]"),
    (infinite_loss, micro_batch(2), "[0, 2, 1]"),
    (infinite_gradient, micro_batch(2), "[0, 2, 1]"),
]


@pytest.mark.parametrize("skip", [None, refuse])
@pytest.mark.parametrize(("loss", "bad", "rows"), NOT_FINITE)
def test_non_finite_loss_changes_nothing_and_names_the_rows(loss, bad, rows, skip):
    fabric, module, optimizer = set_up()
    before = weights(module)
    micros = [micro_batch(0), bad, micro_batch(1)]
    with pytest.raises(NonFiniteError) as refused:
        update(fabric, module, optimizer, micros, loss, max_grad_norm=1.0, skip=skip)
    assert f"rank 0: rows {rows})" in str(refused.value)
    assert all(torch.equal(value, before[name]) for name, value in weights(module).items())
    assert all(p.grad is None for p in module.parameters())
    if loss is not infinite_gradient:
        with pytest.raises(NonFiniteError) as refused:
            add_gradients(fabric, module, micros, loss, weight=0.5)
        assert f"rank 0: rows {rows})" in str(refused.value)


def test_a_step_is_left_out_as_if_it_had_not_been():
    """Weights and the optimizer's moments after good, bad, good are those after good, good; the bad one says so."""

    def run(*micros):
        fabric, module, _ = set_up()
        optimizer = fabric.setup_optimizers(torch.optim.AdamW([p for p in module.parameters() if p.requires_grad]))
        messages = []
        metrics = [
            update(fabric, module, optimizer, [m, micro_batch(1)], toy_loss, max_grad_norm=1.0, skip=messages.append)
            for m in micros
        ]
        moments = [value for state in optimizer.state.values() for value in state.values()]
        return [*weights(module).values(), *moments], metrics, messages

    bad = micro_batch(2)._replace(batch=torch.full((1, 4), float("inf")), num_items=1, row_ids=(77,))
    ours, metrics, messages = run(micro_batch(0), bad, micro_batch(3))
    expected, without, nothing = run(micro_batch(0), micro_batch(3))
    assert len(ours) > 8 and all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert [metrics[0], metrics[2]] == without and nothing == []
    assert metrics[1]["items"] == 0 and not np.isfinite(metrics[1]["loss"])
    assert ["rows [77])" in str(error) for error in messages] == [True]


def test_the_check_waits_for_the_device_once_a_step_however_it_is_cut(monkeypatch):
    """Each of these brings a number from the device to the host, where the program waits for it."""
    counts = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(tensor, *arguments, original=original, name=name):
            counts[-1] += [name]
            return original(tensor, *arguments)

        monkeypatch.setattr(torch.Tensor, name, counted)
    for cut in CUTS[:3]:
        fabric, module, optimizer = set_up()
        counts.append([])
        update(fabric, module, optimizer, [micro_batch(*rows) for rows in cut], toy_loss, max_grad_norm=1.0)
    assert counts[0] == counts[1] == counts[2] and counts[0].count("tolist") == 1


def test_bf16_mixed_accumulates_and_measures_in_float32():
    loss, norm, _ = one_big_batch()
    fabric, module, optimizer = set_up("bf16-mixed")
    metrics = update(fabric, module, optimizer, [micro_batch(*r) for r in CUTS[1]], toy_loss, max_grad_norm=None)
    assert metrics["loss"] == pytest.approx(loss, rel=2e-2)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=2e-2)
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_sums_are_kept_beyond_float32():
    """2**24 + 1 + 1 is 2**24 in float32: a long evaluation would stop counting."""

    def loss(module: nn.Module, x: torch.Tensor) -> LossOutput:
        return LossOutput(x.sum(), {})

    fabric, module, _ = set_up()
    micros = [MicroBatch(torch.tensor([2.0**24]), 1, (0,))] + [MicroBatch(torch.ones(1), 1, (i,)) for i in range(6)]
    assert evaluate(fabric, module, micros, loss)["loss"] * 7 == pytest.approx(2**24 + 6, abs=0.01)


@pytest.mark.parametrize("cut", CUTS)
def test_evaluation_is_the_same_for_any_cut(cut):
    def loss_fn(module: nn.Module, x: torch.Tensor) -> LossOutput:
        assert not torch.is_grad_enabled()
        return toy_loss(module, x)

    fabric, module, _ = set_up(dropout=0.5)
    metrics = evaluate(fabric, module, (micro_batch(*rows) for rows in cut), loss_fn)
    loss, _, _ = one_big_batch()
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6)
    assert metrics["items"] == 85


def test_evaluation_leaves_generators_and_training_flags_alone():
    fabric, module, _ = set_up(dropout=0.5)
    module.train()
    module.module.frozen.eval()
    before, flags = rng_state(), [m.training for m in module.modules()]
    evaluate(fabric, module, [micro_batch(0, 1)], noisy_loss)
    assert [m.training for m in module.modules()] == flags
    assert all(torch.equal(before[name], value) for name, value in rng_state().items())
    assert all(p.grad is None for p in module.parameters())


def test_flags_are_restored_after_an_error():
    net = Net(0.5)
    with pytest.raises(ZeroDivisionError), eval_mode(net):
        _ = 1 / int(net.dropout.training)
    assert net.dropout.training


def test_nothing_to_evaluate_is_an_error():
    fabric, module, _ = set_up()
    with pytest.raises(DataError, match=r"data\.\*"):
        evaluate(fabric, module, [micro_batch()], toy_loss)


def test_isolated_rng_restores_every_generator():
    random.gauss(0, 1), np.random.standard_normal()  # both keep a second number back
    before = copy.deepcopy((random.getstate(), np.random.get_state()[2:], torch.get_rng_state()))
    with isolated_rng():
        expected = random.gauss(0, 1), np.random.standard_normal(), torch.rand(3).tolist()
    after = random.getstate(), np.random.get_state()[2:], torch.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    assert (random.gauss(0, 1), np.random.standard_normal(), torch.rand(3).tolist()) == expected
