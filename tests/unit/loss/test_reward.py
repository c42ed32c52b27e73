"""The losses of reward models against numbers worked out by hand and a plain double loop."""

import math

import pytest
import torch
from torch.testing import assert_close

from sheeprlhf.loss.reward import (
    LOSS_TYPES,
    Scores,
    accuracies,
    bradley_terry,
    by_response,
    centering,
    combine_steps,
    last_scores,
    plackett_luce,
    reward_loss,
    step_losses,
)

PAIR = torch.tensor([[0, 1]])


def scores(values: list[list[float]], tokens: list[list[int]]) -> Scores:
    """As the reward model gives them, one after the other."""
    lengths = torch.tensor([len(row) for row in tokens])
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    flat_values, flat_tokens = (torch.tensor([x for row in rows for x in row]) for rows in (values, tokens))
    return by_response(flat_values, flat_tokens, owner, lengths, longest=max(map(len, tokens)))


def nats(difference: float) -> float:
    """-log sigmoid, from its definition."""
    return math.log(1 + math.exp(-difference))


def test_by_hand() -> None:
    # they differ from the second token on; the chosen one is longer
    both = scores([[9.0, 1.0, 2.0, 6.0], [-9.0, 0.5, 3.0]], [[4, 5, 6, 2], [4, 7, 2]])
    assert last_scores(both).tolist() == [6.0, 3.0]
    expected = {
        "last_token": nats(6.0 - 3.0),
        "average": nats((1 + 2 + 6) / 3 - (0.5 + 3) / 2),
        "per_sample": (nats(1 - 0.5) + nats(2 - 3)) / 2,
    }
    for loss_type, value in expected.items():
        assert_close(reward_loss(both, PAIR, loss_type), torch.tensor([value]), rtol=0, atol=1e-6)


def test_one_response_begins_the_other() -> None:
    both = scores([[1.0, 2.0, 5.0], [0.0, 4.0]], [[4, 5, 6], [4, 5]])  # both were cut, so neither ends in EOS
    assert_close(reward_loss(both, PAIR, "average"), torch.tensor([nats((2 + 5) / 2 - 4)]), rtol=0, atol=1e-6)
    assert_close(reward_loss(both, PAIR, "per_sample"), torch.tensor([nats(2.0 - 4.0)]), rtol=0, atol=1e-6)


def test_margin_and_centering_by_hand() -> None:
    assert_close(bradley_terry(torch.tensor(2.0), torch.tensor(0.5), 1.0), torch.tensor(nats(0.5)), rtol=0, atol=1e-6)
    both = scores([[2.0], [0.5]], [[4], [5]])
    for loss_type in LOSS_TYPES:
        loss = reward_loss(both, PAIR, loss_type, torch.tensor([1.0]))
        assert_close(loss, torch.tensor([nats(0.5)]), rtol=0, atol=1e-6)
    assert centering(torch.tensor([2.0]), torch.tensor([-0.5])).tolist() == [2.25]


def by_loop(values: list[list[float]], tokens: list[list[int]], loss_type: str) -> float:
    (chosen, rejected), (a, b) = values, tokens
    if loss_type == "last_token":
        return nats(chosen[-1] - rejected[-1])
    shorter = min(len(a), len(b))
    first = next((i for i in range(shorter) if a[i] != b[i]), shorter - 1)
    if loss_type == "average":
        return nats(sum(chosen[first:]) / len(chosen[first:]) - sum(rejected[first:]) / len(rejected[first:]))
    losses = [nats(chosen[i] - rejected[i]) for i in range(first, shorter)]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_random_pairs_equal_a_loop_and_what_is_not_compared_has_no_gradient(loss_type: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    rows = []
    for _ in range(50):
        tokens = [[draw(3) for _ in range(1 + draw(6))] for _ in range(2)]
        rows.append(([torch.randn(len(row), generator=generator).tolist() for row in tokens], tokens))
    together = scores([v for values, _ in rows for v in values], [t for _, tokens in rows for t in tokens])
    leaf = together.values_SL.clone().requires_grad_()
    losses = reward_loss(together._replace(values_SL=leaf), torch.arange(100).view(50, 2), loss_type)
    assert_close(losses, torch.tensor([by_loop(*row, loss_type) for row in rows]), rtol=0, atol=1e-5)
    losses.sum().backward()
    assert leaf.grad is not None
    beyond = torch.arange(leaf.shape[1]) >= together.lengths_S[:, None]
    assert leaf.grad[beyond].abs().max() == 0
    assert torch.isfinite(leaf.grad).all()


def test_plackett_luce_by_hand_and_of_two() -> None:
    """Published value .7209 of scores (1, 0, -1); shifts change nothing; of two it is that of Bradley and Terry."""
    scores = torch.tensor([1.0, 0.0, -1.0, 3.0, 5.0], dtype=torch.float64, requires_grad=True)
    pairs = torch.tensor([[0, 1], [0, 2], [1, 2], [3, 4]])
    losses = plackett_luce(scores, pairs)
    assert_close(losses[:3].sum().item(), 0.7209, rtol=0, atol=1e-4)
    denominators = [math.e + 1 + 1 / math.e, 1 + 1 / math.e]
    expected = [math.log(denominators[0] / math.e), math.log(denominators[1]), 0.0, math.log1p(math.exp(2.0)), 0.0]
    assert_close(losses.tolist(), expected, rtol=0, atol=1e-12)
    assert_close(plackett_luce(scores + 500.0, pairs), losses, rtol=0, atol=1e-10)
    losses.sum().backward()
    assert scores.grad is not None
    better = 1 / (1 + math.exp(-2.0))
    first = math.e / denominators[0] - 1
    assert_close(scores.grad[[0, 3, 4]].tolist(), [first, -better, better], rtol=0, atol=1e-12)
    assert plackett_luce(torch.tensor([0.0, 1000.0]), PAIR).tolist() == [1000.0, 0.0]


def test_steps_by_hand() -> None:
    values, labels = torch.tensor([0.5, -2.0, 3.0, 0.1]), torch.tensor([True, False, False, True])
    expected = torch.nn.functional.cross_entropy(  # of two classes, as in a token classification
        torch.stack([torch.zeros(4), values], dim=1), labels.long(), reduction="none"
    )
    assert_close(step_losses(values, labels), expected, rtol=0, atol=1e-6)
    good = values.double().sigmoid()
    for how, first in (("min", good[1]), ("product", good[:3].prod()), ("last", good[2])):
        found = combine_steps(values, torch.tensor([3, 1]), how)
        assert_close(found, torch.stack([first, good[3]]), rtol=0, atol=1e-12)


def test_equal_scores_are_half_right() -> None:
    assert accuracies(torch.tensor([2.0, 0.0, -1.0, 1.0])).tolist() == [1.0, 0.5, 0.0, 1.0]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'mean'"):
        reward_loss(scores([[1.0], [2.0]], [[1], [2]]), PAIR, "mean")
    with pytest.raises(ValueError, match="'mean'"):
        combine_steps(torch.zeros(1), torch.tensor([1]), "mean")
