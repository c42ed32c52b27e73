"""Losses of GRPO, RLOO and online DPO by loops over responses; RLOO's rewards and the pairs by their definition."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from sheeprlhf.data.example import Example, collate_packed
from sheeprlhf.model.lm_head import TokenLogprobs
from sheeprlhf.rollout.rollout import Rollout
from sheeprlhf.structure.generation import GenConfig
from sheeprlhf.structure.rollout import GRPOConfig, OnlineDPOConfig, RLOOConfig
from sheeprlhf.task.train import grpo
from sheeprlhf.task.train.grpo import grpo_loss
from sheeprlhf.task.train.online_dpo import online_dpo_loss, ranked_pairs
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


def test_grpo_logs_the_share_of_prompts_whose_scores_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their advantages are 0; those of the others are the distances from the mean, in standard deviations."""
    scores_PG = np.array([[1.0, 1.0], [0.0, 2.0], [3.0, 3.0]])
    logged: dict[str, float] = {}
    trained: list[Rollout] = []

    class Loop:
        def __init__(self, *_: object) -> None:
            self.begin = self.finish = lambda: None

        def batches(self, *_: object, **__: object) -> None:
            return None

        def __iter__(self) -> Iterator[SimpleNamespace]:
            rollout = Rollout(tuple(EXAMPLES), scores_PG, scores_PG > -1, {})
            yield SimpleNamespace(rollout=rollout, log=logged.update, steps=lambda *a: trained.append(a[0]) or [])

    monkeypatch.setattr(grpo, "open_run", lambda *_: nullcontext())
    monkeypatch.setattr(grpo, "RolloutLoop", Loop)
    cfg: Any = SimpleNamespace(task=GRPOConfig(), generation=GenConfig())
    grpo.train(None, cfg, Path())  # type: ignore[arg-type]
    assert logged == {"frac_reward_zero_std": pytest.approx(2 / 3, abs=1e-6)}
    signs = torch.tensor([0.0, 0.0, -1.0, 1.0, 0.0, 0.0]).repeat_interleave(torch.tensor(LENGTHS))
    assert_close(trained[0].flat("advantages").sign(), signs)


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


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_online_dpo_by_a_loop(loss_type: str) -> None:
    given, task = numbers(), OnlineDPOConfig(loss_type=loss_type, beta=0.3)
    found = online_dpo_loss(Said(given["new"]), (BATCH, given), task=task, temperature=0.7)
    h, place = [], 0
    for length in LENGTHS:
        h.append(float((given["new"] - given["reference"])[place : place + length].sum()))
        place += length
    total = 0.0
    for w in range(0, len(LENGTHS), 2):
        d = 0.3 * (h[w] - h[w + 1])
        per_token = h[w] / LENGTHS[w] - h[w + 1] / LENGTHS[w + 1]
        of_pair = {"sigmoid": np.log1p(np.exp(-d)), "hinge": max(0.0, 1 - d), "ipo": (per_token - 1 / 0.6) ** 2}
        total += of_pair[loss_type]
    assert float(found.total) == pytest.approx(total, abs=1e-5)


def test_the_best_and_the_worst_response_are_a_pair() -> None:
    """Ties and equal texts are none; the reference's numbers go with their responses."""

    def row(*responses: list[int]) -> Example:
        return Example(0, np.array([1]), tuple(np.array(response, dtype=np.int32) for response in responses))

    rows = (row([1], [2, 2], [3, 3, 3]), row([4], [5], [6]), row([7], [7], [8, 8]), row([9, 9], [1], [2]))
    scores = np.array([[0.5, 0.1, 0.9], [0.3, 0.3, 0.3], [0.2, 0.8, 0.5], [0.0, 1.0, 1.0]])
    reference = tuple(np.concatenate([10.0 * r + np.arange(len(r)) for r in one.responses]) for one in rows)
    found = ranked_pairs(Rollout(rows, scores, scores > 0, {"reference": reference}))
    assert found is not None
    assert [[r.tolist() for r in one.responses] for one in found.rows] == [[[3, 3, 3], [2, 2]], [[1], [9, 9]]]
    assert [tokens.tolist() for tokens in found.tokens["reference"]] == [[30, 31, 32, 20, 21], [10, 90, 91]]
    assert ranked_pairs(Rollout(rows[1:2], scores[1:2], scores[1:2] > 0, {"reference": reference[1:2]})) is None
