"""The losses of implicit language Q-learning against loops and known optima."""

import pytest
import torch
from torch.testing import assert_close

from sheeprlhf.loss.ilql import expectile_losses, q_losses

LENGTHS = (3, 1, 2)


def test_q_losses_by_a_loop() -> None:
    rng = torch.Generator().manual_seed(0)
    q, values, rewards = torch.randn(2, 6, generator=rng), torch.randn(6, generator=rng), torch.tensor([1.0, -2.0, 0.5])
    expected, place = [], 0
    for length, reward in zip(LENGTHS, rewards, strict=True):
        for t in range(place, place + length):
            last = t == place + length - 1
            target = float(reward) if last else 0.9 * float(values[t + 1])
            expected.append(sum((float(q[head, t]) - target) ** 2 for head in range(2)))
        place += length
    values.requires_grad_()
    q.requires_grad_()
    found = q_losses(q, values, rewards, torch.tensor(LENGTHS), gamma=0.9)
    assert_close(found.tolist(), expected, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert values.grad is None and q.grad is not None  # the next value is a constant


@pytest.mark.parametrize(("share", "expectile", "optimum"), [(0.5, 0.7, 0.7), (0.25, 0.7, 0.4375), (0.25, 0.5, 0.25)])
def test_the_expectile_of_two_rewards(share: float, expectile: float, optimum: float) -> None:
    """tau p / (tau p + (1 - tau) (1 - p)) for the rewards 1, with share p, and 0: there the gradient is 0."""
    q = torch.tensor([0.0] * round(4 - 4 * share) + [1.0] * round(4 * share), dtype=torch.float64)

    def slope(at: float) -> float:
        values = torch.full((4,), at, dtype=torch.float64, requires_grad=True)
        [gradient] = torch.autograd.grad(expectile_losses(values, q, expectile=expectile).sum(), values)
        return float(gradient.sum())

    assert slope(optimum) == pytest.approx(0.0, abs=1e-6)
    assert slope(optimum - 0.1) < 0 < slope(optimum + 0.1)
