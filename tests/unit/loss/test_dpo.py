"""The losses of preference optimisation against numbers worked out by hand from the papers' equations."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sheeprlhf.loss import dpo

# one pair: lp(w) = -6 of 3 tokens, lp(l) = -8 of 2 tokens, reference -7 and -7.5: h_w = 1, h_l = -0.5, d = 1.5
H_W, H_L, LP_W, LP_L = (torch.tensor([x], dtype=torch.float64) for x in (1.0, -0.5, -6.0, -8.0))
LENGTHS = (torch.tensor([3.0], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64))


def sig(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_odds(p: float) -> float:
    return math.log(p / (1 - p))


CASES: dict[str, tuple[Callable[[], Tensor], float]] = {
    # beta d = 0.15
    "sigmoid": (lambda: dpo.sigmoid(H_W, H_L, 0.1), -math.log(sig(0.15))),
    "conservative": (lambda: dpo.sigmoid(H_W, H_L, 0.1, 0.2), -0.8 * math.log(sig(0.15)) - 0.2 * math.log(sig(-0.15))),
    "robust": (lambda: dpo.robust(H_W, H_L, 0.1, 0.2), (-0.8 * math.log(sig(0.15)) + 0.2 * math.log(sig(-0.15))) / 0.6),
    "hinge": (lambda: dpo.hinge(H_W, H_L, 0.1), 0.85),
    "hinge beyond": (lambda: dpo.hinge(H_W, H_L, 1.0), 0.0),
    # h_w / 3 - h_l / 2 - 1 / 0.2 = 0.333333 + 0.25 - 5
    "ipo": (lambda: dpo.ipo(H_W, H_L, *LENGTHS, 0.1), (1 / 3 + 0.25 - 5) ** 2),
    "apo_zero": (lambda: dpo.apo_zero(H_W, H_L, 0.1), 1 - sig(0.1) + sig(-0.05)),
    # 2 * (-2 - -4) - 1 = 3
    "simpo": (lambda: dpo.simpo(LP_W, LP_L, *LENGTHS, 2.0, 1.0), -math.log(sig(3.0))),
    "orpo": (
        lambda: dpo.orpo(LP_W, LP_L, *LENGTHS, 0.1),
        2.0 - 0.1 * math.log(sig(log_odds(math.exp(-2)) - log_odds(math.exp(-4)))),
    ),
    # 0.1 * (1 / 3 + 0.25)
    "sigmoid_norm": (lambda: dpo.sigmoid_norm(H_W, H_L, *LENGTHS, 0.1), -math.log(sig(0.1 * (1 / 3 + 0.25)))),
    "exo": (
        lambda: dpo.exo(H_W, H_L, 0.1, 0.2),
        sig(0.15) * math.log(sig(0.15) / 0.8) + sig(-0.15) * math.log(sig(-0.15) / 0.2),
    ),
    "exo at its optimum": (lambda: dpo.exo(H_W * math.log(4) / 1.5, H_L * math.log(4) / 1.5, 1.0, 0.2), 0.0),
    "nca": (
        lambda: dpo.nca(H_W, H_L, 0.1),
        -math.log(sig(0.1)) - 0.5 * math.log(sig(-0.1)) - 0.5 * math.log(sig(0.05)),
    ),
    "sppo": (lambda: dpo.sppo(H_W, H_L, 0.1), (1.0 - 5.0) ** 2 + (-0.5 + 5.0) ** 2),
    # m = sig(0.15 / 0.05)
    "discopop": (
        lambda: dpo.discopop(H_W, H_L, 0.1, 0.05),
        -(1 - sig(3.0)) * math.log(sig(0.15)) + sig(3.0) * math.exp(-0.15),
    ),
    "apo_down": (lambda: dpo.apo_down(H_W, H_L, 0.1), sig(0.1) + 1 - sig(0.15)),
    "apo_down of 2 h": (lambda: dpo.apo_down(2 * H_W, 2 * H_L, 0.1), sig(0.2) + 1 - sig(0.3)),
    "bco of 2 h": (lambda: dpo.bco(2 * H_W, 2 * H_L, 0.1, 0.02), -math.log(sig(0.18)) - math.log(sig(0.12))),
    "bco": (lambda: dpo.bco(H_W, H_L, 0.1, 0.02), -math.log(sig(0.1 - 0.02)) - math.log(sig(0.05 + 0.02))),
    "forward_kl": (lambda: dpo.f_derivative(H_L, "forward_kl", 0.5), -math.exp(0.5)),
    "js": (lambda: dpo.f_derivative(H_L, "js", 0.5), math.log(sig(-0.5))),
    "alpha": (lambda: dpo.f_derivative(H_L, "alpha", 0.5), (math.exp(-0.5) ** -0.5 - 1) / -0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_by_hand(name: str) -> None:
    loss, expected = CASES[name]
    assert_close(loss(), torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-12)


def test_aot_sorts_both_sides() -> None:
    """Published value of h_w = (0, 2) and h_l = (1, -1) at beta 1: 0.3133, where DPO has 0.6809; and its gradient."""
    h_w, h_l = torch.tensor([0.0, 2.0], requires_grad=True), torch.tensor([1.0, -1.0], requires_grad=True)
    partners = [dpo.aot_partners(h_w.detach(), h_l.detach()), dpo.aot_partners(h_l.detach(), h_w.detach())]
    assert [one.tolist() for one in partners] == [[-1.0, 1.0], [2.0, 0.0]]
    losses = dpo.aot_unpaired(h_w, h_l, torch.stack(partners, dim=1), 1.0, 0.0)
    assert_close(losses.mean().item(), 0.3133, rtol=0, atol=1e-4)
    assert_close(dpo.sigmoid(h_w, h_l, 1.0).mean().item(), 0.6809, rtol=0, atol=1e-4)
    found = torch.autograd.grad(losses.sum(), (h_w, h_l))
    expected = torch.autograd.grad(dpo.sigmoid(h_w.sort().values, h_l.sort().values, 1.0).sum(), (h_w, h_l))
    assert_close(found, expected)


def test_kto_by_hand() -> None:
    h, desirable = torch.tensor([1.0, -0.5, 2.0]), torch.tensor([True, False, False])
    losses = dpo.kto(h, desirable, torch.tensor(0.3), 0.1, 1.0, 1.5)
    expected = [1 - sig(0.1 * 0.7), 1.5 * (1 - sig(0.1 * 0.8)), 1.5 * (1 - sig(-0.1 * 1.7))]
    assert_close(losses, torch.tensor(expected), rtol=0, atol=1e-6)
    below = dpo.kto(h, desirable, torch.tensor(-3.0), 0.1, 1.0, 1.5)  # the estimate of a KL is cut at 0
    assert_close(below, dpo.kto(h, desirable, torch.tensor(0.0), 0.1, 1.0, 1.5))
    kl = torch.tensor(0.3, requires_grad=True)
    assert not dpo.kto(h, desirable, kl, 0.1, 1.0, 1.5).requires_grad


def test_at_zero_margin() -> None:
    zero = torch.zeros(1)
    assert_close(dpo.sigmoid(zero, zero, 0.1, 0.3), torch.tensor([math.log(2)]))
    assert_close(dpo.robust(zero, zero, 0.1, 0.3), torch.tensor([math.log(2)]))
    assert dpo.hinge(zero, zero, 0.1).item() == dpo.apo_zero(zero, zero, 0.1).item() == 1.0
    assert_close(dpo.ipo(zero, zero, torch.ones(1), torch.ones(1), 0.1), torch.tensor([25.0]))


# values of the papers' and TRL's formulas where policy and reference agree
@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda h: dpo.exo(h, h, 0.1, 1e-3), 2.7612),
        (lambda h: dpo.nca(h, h, 0.01), 1.3863),
        (lambda h: dpo.sppo(h, h, 0.001), 500_000.0),
        (lambda h: dpo.discopop(h, h, 0.05, 0.05), 0.8466),
    ],
)
def test_published_values_at_zero_margin(loss: Callable[[Tensor], Tensor], expected: float) -> None:
    assert_close(loss(torch.zeros(1, dtype=torch.float64)).item(), expected, rtol=0, atol=1e-4)


def test_discopop_far_from_the_reference_and_an_unknown_divergence() -> None:
    """The exponent is cut at 20, so that a pair 1,000 nats apart has finite losses and gradients."""
    h = torch.tensor([-1000.0, 1000.0], requires_grad=True)
    losses = dpo.discopop(h, torch.zeros(2), 1.0, 100.0)
    losses.sum().backward()
    m = sig(-10.0)
    assert_close(losses[0].item(), (1 - m) * 1000.0 + m * math.exp(20.0), rtol=1e-5, atol=0)
    assert h.grad is not None and torch.isfinite(h.grad).all()
    with pytest.raises(ValueError, match="kl"):
        dpo.f_derivative(h, "kl", 0.5)


@pytest.mark.parametrize("tau", [0.05, 0.2])
def test_discopop_pushes_a_margin_of_zero_down_or_up(tau: float) -> None:
    """The slope there is (1 - ln 2) / (4 tau) - 3 / 4, by the derivative of the mixture by hand: 0.784 and -0.366."""
    h = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    [slope] = torch.autograd.grad(dpo.discopop(h, torch.zeros(1), 1.0, tau).sum(), h)
    assert_close(slope.item(), (1 - math.log(2)) / (4 * tau) - 0.75, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("divergence", "slope"), [("reverse_kl", 1), ("forward_kl", 1), ("js", 0.5), ("alpha", 1)])
def test_divergences_at_the_reference_and_far_from_it(divergence: str, slope: float) -> None:
    """f'' at 1 by the definition, and finite values and gradients 1,000 nats away."""
    h = torch.tensor([0.0, -1000.0, 1000.0], requires_grad=True)
    values = dpo.f_derivative(h, divergence, 0.5)
    values.sum().backward()
    assert h.grad is not None
    assert_close(h.grad[0].item(), float(slope))
    assert torch.isfinite(values).all()
    assert torch.isfinite(h.grad).all()


@pytest.mark.parametrize("mean", [0.0, -1e-30, -1e-7, -0.01, -0.6931, -0.6932, -5.0, -80.0])
def test_log_odds_are_finite_and_exact(mean: float) -> None:
    """For probabilities near 1 and near 0, in float32, against float64."""
    m = torch.tensor([mean], requires_grad=True)
    loss = dpo.orpo(m, torch.tensor([-1.0]), torch.ones(1), torch.ones(1), 0.5)
    loss.sum().backward()
    at = mean or -1e-37  # of probability 1 the log odds are those of the number before it
    exact = at - (math.log(-math.expm1(at)) if at > -1 else math.log1p(-math.exp(at)))
    difference = exact - log_odds(math.exp(-1))
    expected = -mean + 0.5 * (math.log1p(math.exp(-difference)) if difference > -30 else -difference)
    assert_close(loss.detach(), torch.tensor([expected]), rtol=1e-5, atol=1e-6)
    assert m.grad is not None
    assert torch.isfinite(m.grad).all()
