"""Metrics of the losses of pairs, steps and fine-tuning by loops, and what each loss asks of its policy."""

import math
from collections import Counter
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from sheeprlhf.data.example import collate_packed
from sheeprlhf.model.lm_head import TokenLogprobs
from sheeprlhf.structure.task import DPOConfig
from sheeprlhf.task.train.dpo import dpo_loss
from sheeprlhf.task.train.prm import prm_loss
from sheeprlhf.task.train.rm import rm_loss
from sheeprlhf.task.train.sft import sft_loss
from tests.support.batches import random_examples

ROWS = [*random_examples(1, 3, seed=1), *random_examples(1, 2, seed=2)]  # a ranking, which has three pairs, and a pair
PAIRS = [(w, r, 1 / 3) for w, r in combinations(range(3), 2)] + [(3, 4, 1.0)]  # responses, and the weight of the pair


class Given(nn.Module):
    """A policy whose numbers are given; it tells what it was asked for."""

    def __init__(self, target_N: Tensor, **others: Tensor) -> None:
        super().__init__()
        self.target_N, self.others, self.asked = target_N, others, set[str]()

    def forward(self, batch: Any, **asked: bool) -> TokenLogprobs:
        self.asked = {name for name, value in asked.items() if value}
        found = {name: of_N if name in self.asked else None for name, of_N in self.others.items()}
        return TokenLogprobs(self.target_N, found.get("mean"), found.get("entropy"))


def numbers(count: int, seed: int) -> Tensor:
    return -torch.rand(count, generator=torch.Generator().manual_seed(seed))


def reward_metrics(rewards: list[float]) -> Counter[str]:
    """Sums of what all losses of pairs report."""
    metrics: Counter[str] = Counter()
    for w, r, weight in PAIRS:
        metrics["rewards/chosen"] += weight * rewards[w]
        metrics["rewards/rejected"] += weight * rewards[r]
        metrics["rewards/margins"] += weight * (rewards[w] - rewards[r])
        metrics["rewards/accuracies"] += weight * (rewards[w] > rewards[r])
    return metrics


def test_the_metrics_of_dpo() -> None:
    batch = collate_packed(ROWS)
    lengths = list(batch.response_lengths)
    policy = Given(numbers(sum(lengths), 3).requires_grad_(), entropy=-numbers(sum(lengths), 4))
    sums = [float(part.sum()) for part in policy.target_N.detach().split(lengths)]
    entropies = [float(part.mean()) for part in policy.others["entropy"].split(lengths)]
    reference = [total - 0.2 * number for number, total in enumerate(sums)]
    rewards = [0.5 * (total - of_start) for total, of_start in zip(sums, reference, strict=True)]
    expected, loss = reward_metrics(rewards), 0.0
    for w, r, weight in PAIRS:
        loss += weight * math.log1p(math.exp(rewards[r] - rewards[w]))
        expected["logps/chosen"] += weight * sums[w]
        expected["logps/rejected"] += weight * sums[r]
        expected["kl/chosen"] += weight * (reference[w] - sums[w])
        expected["tokens/chosen"] += weight * lengths[w]
        expected["entropy"] += weight * entropies[w]
    arguments: Any = (policy, (batch, torch.tensor(reference)))
    trained = dpo_loss(*arguments, task=DPOConfig(beta=0.5))
    assert policy.asked == set()
    with torch.no_grad():
        validated = dpo_loss(*arguments, task=DPOConfig(beta=0.5))
    assert policy.asked == {"entropy"}
    for output in (trained, validated):
        assert float(output.total) == pytest.approx(loss, rel=1e-5)
        assert not any(value.requires_grad for value in output.metrics.values())
    assert {name: float(value) for name, value in validated.metrics.items()} == pytest.approx(expected, abs=1e-5)
    assert trained.metrics.keys() == expected.keys() - {"entropy"}


@pytest.mark.parametrize("loss_type", ["last_token", "plackett_luce"])
def test_the_loss_and_metrics_of_a_reward_model(loss_type: str) -> None:
    batch = collate_packed(ROWS, targets="last")
    scores = numbers(5, 5).requires_grad_()
    values, total = scores.tolist(), 0.0
    for w, r, weight in PAIRS:
        pair = math.log1p(math.exp(values[r] - values[w])) if loss_type == "last_token" else 0.0
        total += weight * (pair + 0.3 * (values[w] + values[r]) ** 2)
    if loss_type == "plackett_luce":  # of the best among those that are left, until one is
        for ranked in (values[0:3], values[1:3], values[3:5]):
            total += math.log(sum(math.exp(value - ranked[0]) for value in ranked))
    output = rm_loss(lambda _: scores, batch, loss_type=loss_type, center=0.3)  # type: ignore[arg-type]
    assert float(output.total) == pytest.approx(total, rel=1e-5)
    found = {name: float(value) for name, value in output.metrics.items()}
    assert found == pytest.approx(reward_metrics(values), abs=1e-5)
    assert not any(value.requires_grad for value in output.metrics.values())


def test_the_metrics_of_steps() -> None:
    """A step is called right by a positive score; a score of 0 calls it wrong."""
    scores, labels = torch.tensor([0.5, 0.0, -2.0]), torch.tensor([True, False, True])
    output = prm_loss(lambda _: scores, (collate_packed(ROWS), labels))  # type: ignore[arg-type]
    losses = [math.log1p(math.exp(-0.5)), math.log(2), math.log1p(math.exp(2.0))]
    assert float(output.total) == pytest.approx(sum(losses), rel=1e-5)
    assert {name: float(value) for name, value in output.metrics.items()} == {"accuracy": 2.0, "share_right": 2.0}


def test_smoothed_labels_and_the_share_of_a_router() -> None:
    batch = collate_packed(ROWS)
    target_N = numbers(sum(batch.response_lengths), 6).requires_grad_()
    policy, nll = Given(target_N, mean=2 * target_N.detach()), -target_N.detach().sum()
    for label_smoothing in (0.0, 0.1):
        output = sft_loss(policy, batch, label_smoothing=label_smoothing)  # -(1 - e) log p - 2 e log p
        assert policy.asked == ({"mean"} if label_smoothing else set())
        assert_close(output.total, (1 + label_smoothing) * nll, rtol=1e-6, atol=1e-6)
        assert_close(output.metrics, {"nll": nll}, rtol=1e-6, atol=1e-6)
    router: Any = SimpleNamespace(share=lambda _: torch.tensor(0.5, requires_grad=True))
    output = sft_loss(policy, batch, router=router)
    assert policy.asked == {"router"}
    assert_close(output.total, nll + 0.5, rtol=1e-6, atol=1e-6)
    assert_close(output.metrics, {"nll": nll, "router_loss": torch.tensor(0.5)}, rtol=1e-6, atol=1e-6)
    assert not any(value.requires_grad for value in output.metrics.values())
