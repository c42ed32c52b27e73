"""GRPO's and RLOO's losses of a batch against loops over its responses, and RLOO's rewards against their definition."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from sheeprlhf.data.collate import collate_packed
from sheeprlhf.model.head import TokenLogprobs
from sheeprlhf.structure.online import GRPOConfig, RLOOConfig
from sheeprlhf.task.train.grpo import grpo_loss
from sheeprlhf.task.train.rloo import leave_one_out_advantages, rloo_loss
from tests.support.batches import random_examples

ModelFolder = Callable[..., Path]
EXAMPLES = random_examples(3, 2, seed=4)
BATCH = collate_packed(EXAMPLES)
LENGTHS = BATCH.response_lengths
N = sum(LENGTHS)


class Said(nn.Module):
    """A policy whose log-probabilities are given."""

    def __init__(self, logprobs_N: Tensor) -> None:
        super().__init__()
        self.logprobs_N = logprobs_N

    def forward(self, batch: Any, temperature: float) -> TokenLogprobs:
        assert temperature == 0.7
        return TokenLogprobs(self.logprobs_N, None)


def numbers() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(2)
    old = -torch.rand(N, generator=rng)
    of_response = torch.randn(len(LENGTHS), generator=rng)
    return {
        "new": old + 0.3 * torch.randn(N, generator=rng),
        "logprobs": old,
        "reference": old + 0.3 * torch.randn(N, generator=rng),
        "advantages": of_response.repeat_interleave(torch.tensor(LENGTHS)),
    }


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_grpo_by_a_loop(loss_type: str) -> None:
    task = GRPOConfig(loss_type=loss_type, init_kl_coeff=0.3, clip_coeff=0.1, clip_high=0.25)
    given = numbers()
    found = grpo_loss(Said(given["new"]), (BATCH, given), task=task, temperature=0.7, max_length=20)
    total, place = 0.0, 0
    for length in LENGTHS:
        terms = []
        for t in range(place, place + length):
            ratio, a = float((given["new"][t] - given["logprobs"][t]).exp()), float(given["advantages"][t])
            u = float(given["reference"][t] - given["new"][t])
            terms.append(max(-a * ratio, -a * min(max(ratio, 0.9), 1.25)) + 0.3 * (np.exp(u) - 1 - u))
        total += {"grpo": sum(terms) / length, "dapo": sum(terms), "dr_grpo": sum(terms) / 20}[loss_type]
        place += length
    assert float(found.total) == pytest.approx(total, abs=1e-5)


def test_rloo_by_a_loop() -> None:
    given = numbers()
    found = rloo_loss(Said(given["new"]), (BATCH, given), task=RLOOConfig(clip_coeff=0.2), temperature=0.7)
    total, place = 0.0, 0
    for length in LENGTHS:
        part = slice(place, place + length)
        ratio = float((given["new"][part].sum() - given["logprobs"][part].sum()).exp())
        a = float(given["advantages"][place])
        total += max(-a * ratio, -a * min(max(ratio, 0.8), 1.2))
        place += length
    assert float(found.total) == pytest.approx(total, abs=1e-5)


def test_rloos_reward_is_the_score_less_the_kl() -> None:
    given, scores = numbers(), np.array([[1.0, 0.0], [0.5, 0.25], [0.0, 0.0]])
    rewards, place = [], 0
    for length, score in zip(LENGTHS, scores.flatten().tolist(), strict=True):
        part = slice(place, place + length)
        rewards.append(score - 0.1 * float((given["logprobs"] - given["reference"])[part].sum()))
        place += length
    told, found = leave_one_out_advantages(given["logprobs"], given["reference"], scores, LENGTHS, kl_coeff=0.1)
    expected = [rewards[i] - rewards[i ^ 1] for i in range(6)]
    assert_close(found.flatten(), torch.tensor(expected).double(), rtol=0, atol=1e-6)
    assert_close(told.flatten(), torch.tensor(rewards).double(), rtol=0, atol=1e-6)
