"""Losses of GRPO, RLOO and online DPO by loops over responses; RLOO's rewards and the pairs by their definition."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from sheeprlhf.data.example import Example, collate_packed
from sheeprlhf.loss.ppo import cispo_losses, policy_losses
from sheeprlhf.model.lm_head import TokenLogprobs
from sheeprlhf.reward.score import RawScores, Texts
from sheeprlhf.rollout.rollout import Rollout
from sheeprlhf.structure.rollout import (
    DistillConfig,
    GRPOConfig,
    OnlineDPOConfig,
    PPOConfig,
    ReinforcePPConfig,
    RLOOConfig,
)
from sheeprlhf.structure.run import GenConfig
from sheeprlhf.task.train import distill, grpo, reinforce_pp
from sheeprlhf.task.train.grpo import grpo_loss
from sheeprlhf.task.train.online_dpo import online_dpo_loss, ranked_pairs
from sheeprlhf.task.train.ppo import policy_loss
from sheeprlhf.task.train.rloo import leave_one_out_advantages, rloo_loss
from tests.support.batches import random_examples

ModelFolder = Callable[..., Path]
EXAMPLES = random_examples(3, 2, seed=4)
BATCH = collate_packed(EXAMPLES)
LENGTHS = BATCH.response_lengths
N = sum(LENGTHS)


class Said(nn.Module):
    """A policy whose log-probabilities are given."""

    def __init__(self, logprobs_N: Tensor, entropy_N: Tensor | None = None) -> None:
        super().__init__()
        self.logprobs_N, self.entropy_N = logprobs_N, entropy_N

    def forward(self, batch: Any, temperature: float, entropy: bool = False) -> TokenLogprobs:
        assert temperature == 0.7
        return TokenLogprobs(self.logprobs_N, None, self.entropy_N if entropy else None)


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


ENTROPY_LOSSES = {
    "grpo": (partial(grpo_loss, task=GRPOConfig(entropy_coeff=0.1), max_length=20), "sequence"),
    "dapo": (partial(grpo_loss, task=GRPOConfig(loss_type="dapo", entropy_coeff=0.1), max_length=20), "token"),
    "rloo": (partial(rloo_loss, task=RLOOConfig(entropy_coeff=0.1)), "sequence"),
    "reinforce_pp": (partial(reinforce_pp.reinforce_pp_loss, task=ReinforcePPConfig(entropy_coeff=0.1)), "token"),
    "ppo": (partial(policy_loss, task=PPOConfig(entropy_coeff=0.1)), "token"),
    "distill": (partial(distill.distill_loss, task=DistillConfig(entropy_coeff=0.1)), "token"),
}


@pytest.mark.parametrize("name", ENTROPY_LOSSES)
def test_the_entropy_is_subtracted_from_the_loss(name: str) -> None:
    loss_fn, average = ENTROPY_LOSSES[name]
    given, entropy_N = numbers(), torch.rand(N, generator=torch.Generator().manual_seed(3), requires_grad=True)
    zero, found = (
        loss_fn(Said(given["new"], values), (BATCH, given), temperature=0.7) for values in (torch.zeros(N), entropy_N)
    )
    of_response = [part.mean() if average == "sequence" else part.sum() for part in entropy_N.split(list(LENGTHS))]
    assert_close(found.total, zero.total - 0.1 * sum(of_response), rtol=1e-5, atol=1e-6)
    assert_close(found.metrics["entropy"], sum(of_response))
    assert not found.metrics["entropy"].requires_grad


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_gspo_by_a_loop(estimator: str) -> None:
    """Value and gradient of one ratio for each response, the geometric mean of its tokens' ratios."""
    task = GRPOConfig(loss_type="gspo", init_kl_coeff=0.3, clip_coeff=0.02, clip_high=0.04, kl_estimator=estimator)
    given = numbers()
    new = given["new"].clone().requires_grad_()
    found = grpo_loss(Said(new), (BATCH, given), task=task, temperature=0.7, max_length=20)
    found.total.backward()
    exact = given["new"].clone().requires_grad_()
    total, place = torch.zeros(()), 0
    for length in LENGTHS:
        part = slice(place, place + length)
        ratio = (exact[part] - given["logprobs"][part]).mean().exp()
        a, u = given["advantages"][place], given["reference"][part] - exact[part]
        kl = 0.5 * u**2 if estimator == "k2" else u.exp() - 1 - u
        total = total + torch.maximum(-a * ratio, -a * ratio.clamp(0.98, 1.04)) + 0.3 * kl.mean()
        place += length
    total.backward()
    assert_close(found.total, total.detach(), rtol=1e-5, atol=1e-5)
    assert_close(new.grad, exact.grad, rtol=1e-5, atol=1e-6)


def test_cispo_keeps_a_gradient_beyond_the_clip() -> None:
    """-A min(r, 1 + clip_high) logprobs, with the ratio as a constant."""
    new, old = torch.tensor([-1.0, -1.0, -3.0], requires_grad=True), torch.tensor([-2.0, -1.1, -1.0])
    advantages = torch.tensor([0.5, -2.0, 1.0])
    losses = cispo_losses(new, old, advantages, clip_high=0.28)
    losses.sum().backward()
    weights = torch.tensor([1.28, float(np.exp(0.1)), float(np.exp(-2.0))])
    assert_close(losses.detach(), -advantages * weights * new.detach())
    assert_close(new.grad, -advantages * weights)


def test_two_sided_clipping() -> None:
    """At ratio 10 and advantage -1 a limit of 4 gives the loss 4; a positive advantage is clipped as ever."""
    new, old = torch.tensor([0.0, 0.0]), torch.tensor([-np.log(10.0), -np.log(10.0)], dtype=torch.float32)
    losses = policy_losses(new, old, torch.tensor([-1.0, 1.0]), clip_low=0.2, clip_high=0.2, max_ratio=4.0)
    assert_close(losses, torch.tensor([4.0, -1.2]))


@pytest.mark.parametrize("group_baseline", [False, True])
def test_reinforce_pp_by_a_loop(group_baseline: bool) -> None:
    """Rewards to go, whitened over the rollout's tokens; or scores less their group's mean, and the KL in the loss."""
    given, scores_PG = numbers(), np.array([[1.0, 0.0], [0.5, 0.25], [0.0, 3.0]])
    task = ReinforcePPConfig(init_kl_coeff=0.1, gamma=0.5, group_baseline=group_baseline, num_generations=2)
    rollout = Rollout(tuple(EXAMPLES), scores_PG, scores_PG > -1, {})
    rollout = rollout.with_tokens(logprobs=given["logprobs"], reference=given["reference"])
    scores = (scores_PG - scores_PG.mean(axis=1, keepdims=True) if group_baseline else scores_PG).flatten()
    kl = (given["logprobs"] - given["reference"]).double().numpy() * (0.0 if group_baseline else 0.1)
    returns, place = [], 0
    for length, score in zip(LENGTHS, scores, strict=True):
        for t in range(length):
            rest = [-kl[place + k] * 0.5 ** (k - t) for k in range(t, length)]
            returns.append(sum(rest) + score * 0.5 ** (length - 1 - t))
        place += length
    whitened = (np.array(returns) - np.mean(returns)) / np.std(returns)
    found = reinforce_pp.with_advantages(rollout, task).flat("advantages")
    assert_close(found.double(), torch.from_numpy(whitened), rtol=1e-5, atol=1e-5)

    content = (BATCH, given | {"advantages": found})
    policy = Said(given["new"].clone().requires_grad_(), torch.ones(N))
    loss, metrics = reinforce_pp.reinforce_pp_loss(policy, content, task=task, temperature=0.7)
    ratio = (given["new"] - given["logprobs"]).exp()
    expected = torch.maximum(-found * ratio, -found * ratio.clamp(0.8, 1.2)).sum()
    if group_baseline:
        kl = 0.5 * (given["reference"] - given["new"]).square().sum()
        expected = expected + 0.1 * kl
        assert_close(metrics["kl"], kl)
    assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)
    assert "entropy" not in metrics and not any(value.requires_grad for value in metrics.values())


def trained_by_grpo(
    task: GRPOConfig, scores_PG: np.ndarray, finished: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, dict[str, float]]:
    """The advantages that one iteration of GRPO trains on, and the numbers that it logs."""
    logged: dict[str, float] = {}
    trained: list[Rollout] = []

    class Loop:
        def __init__(self, *_: object) -> None:
            self.begin = self.finish = lambda: None

        def batches(self, *_: object, **__: object) -> None:
            return None

        def __iter__(self) -> Iterator[SimpleNamespace]:
            rollout = Rollout(tuple(EXAMPLES), scores_PG, finished, {})
            yield SimpleNamespace(rollout=rollout, log=logged.update, steps=lambda *a: trained.append(a[0]) or [])

    monkeypatch.setattr(grpo, "open_run", lambda *_: nullcontext())
    monkeypatch.setattr(grpo, "RolloutLoop", Loop)
    cfg: Any = SimpleNamespace(task=task, generation=GenConfig())
    grpo.train(None, cfg, Path())  # type: ignore[arg-type]
    return trained[0].flat("advantages"), logged


def test_grpo_cuts_advantages_after_the_statistics_of_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A response that was cut counts in its group's mean and deviation, and gets the advantage 0."""
    scores_PG = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    finished = np.array([[True, True], [True, False], [True, True]])
    task = GRPOConfig(mask_truncated=True, max_advantage=0.5)
    found, _ = trained_by_grpo(task, scores_PG, finished, monkeypatch)
    expected = torch.tensor([0.5, -0.5, -0.5, 0.0, 0.5, -0.5]).repeat_interleave(torch.tensor(LENGTHS))
    assert_close(found, expected)


def test_grpo_logs_the_share_of_prompts_whose_scores_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their advantages are 0; those of the others are the distances from the mean, in standard deviations."""
    scores_PG = np.array([[1.0, 1.0], [0.0, 2.0], [3.0, 3.0]])
    found, logged = trained_by_grpo(GRPOConfig(), scores_PG, scores_PG > -1, monkeypatch)
    assert logged == {"frac_reward_zero_std": pytest.approx(2 / 3, abs=1e-6)}
    signs = torch.tensor([0.0, 0.0, -1.0, 1.0, 0.0, 0.0]).repeat_interleave(torch.tensor(LENGTHS))
    assert_close(found.sign(), signs)


def test_distillation_has_the_gradient_of_the_divergence_from_the_teacher() -> None:
    """All three tokens of a vocabulary, weighted by their probabilities; a teacher like the policy has none."""
    logits = torch.tensor([0.3, -1.0, 0.8], requires_grad=True)
    logprobs, teacher = logits.log_softmax(0), torch.tensor([0.5, 0.2, -0.4]).log_softmax(0)
    rows = tuple(example._replace(responses=(example.responses[0][:1],)) for example in EXAMPLES)
    rollout = Rollout(rows, np.zeros((3, 1)), np.ones((3, 1), dtype=bool), {})
    rollout = rollout.with_tokens(logprobs=logprobs, reference=teacher)
    given = {name: rollout.flat(name) for name in ("logprobs", "reference")}
    advantages = distill.with_advantages(rollout).flat("advantages")
    assert_close(advantages, teacher - logprobs.detach())
    given["advantages"] = advantages * logprobs.detach().exp()
    loss = distill.distill_loss(Said(logprobs), (collate_packed(rows), given), task=DistillConfig(), temperature=0.7)
    [found] = torch.autograd.grad(loss.total, logits, retain_graph=True)
    [expected] = torch.autograd.grad((logprobs.exp() * (logprobs - teacher)).sum(), logits)
    assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert_close(-(given["advantages"]).sum(), (logprobs.exp() * (logprobs - teacher)).sum().detach())


def test_distillation_by_a_loop() -> None:
    given, clipped = numbers(), 0
    found = distill.distill_loss(
        Said(given["new"], torch.ones(N)), (BATCH, given), task=DistillConfig(clip_coeff=0.1), temperature=0.7
    )
    total, ratios = 0.0, (given["new"] - given["logprobs"]).exp().tolist()
    for ratio, a in zip(ratios, given["advantages"].tolist(), strict=True):
        limited = min(max(ratio, 0.9), 1.1)
        total += max(-a * ratio, -a * limited)
        clipped += -a * limited > -a * ratio
    assert float(found.total) == pytest.approx(total, abs=1e-5)
    expected = {"ratio": sum(ratios), "clipfrac": clipped, "kl": -float(given["advantages"].sum())}
    expected["approxkl"] = 0.5 * sum(math.log(ratio) ** 2 for ratio in ratios)
    assert {name: float(value) for name, value in found.metrics.items()} == pytest.approx(expected, abs=1e-5)


class Resampled:
    """A collector whose rollouts are given; the text of a response is "<round>-<row>"."""

    def __init__(self, scores_PG: list[list[float]]) -> None:
        self.asked: list[tuple[int, list[int]]] = []
        self.later = [np.array(scores_PG)]

    def __call__(self, examples: list[Example], number: int) -> Rollout:
        self.asked.append((number, [example.row_id for example in examples]))
        scores_PG = self.later.pop(0)
        texts = [f"{number >> 32}-{example.row_id}" for example in examples for _ in range(2)]
        decoded = Texts(texts, texts, [True] * len(texts), [1] * len(texts), {"answer": texts})
        raw = RawScores(scores_PG.flatten().tolist(), {"a": scores_PG.flatten().tolist()})
        rollout = Rollout(tuple(examples), scores_PG - 0.5, scores_PG > 0, {}, decoded, raw)
        return rollout.with_tokens(logprobs=torch.full((sum(rollout.response_lengths),), float(number >> 32)))


def test_prompts_whose_scores_are_equal_are_replaced() -> None:
    """Until none is left or the rounds are over: rows, scores, texts and numbers of tokens stay together."""
    collect = Resampled([[1.0, 1.0], [0.0, 2.0], [0.0, 0.0]])
    loop: Any = SimpleNamespace(collect=collect, rows=SimpleSplit(9), run=SimpleNamespace(cfg=SimpleNamespace(seed=1)))
    logged: dict[str, float] = {}
    iteration: Any = SimpleNamespace(number=5, rollout=collect(EXAMPLES, 5), log=logged.update)
    collect.later = [np.array([[3.0, 3.0], [4.0, 1.0]]), np.array([[7.0, 7.0]]), np.array([[0.0, 1.0]])]
    found = grpo.resample_equal_groups(loop, iteration, GRPOConfig(max_resamples=2))
    assert [(number, len(rows)) for number, rows in collect.asked] == [(5, 3), (5 + (1 << 32), 2), (5 + (2 << 32), 1)]
    first, second = collect.asked[1][1], collect.asked[2][1]
    assert [row.row_id for row in found.rows] == [second[0], EXAMPLES[1].row_id, first[1]]
    assert found.scores.tolist() == [[6.5, 6.5], [-0.5, 1.5], [3.5, 0.5]]
    assert found.finished.tolist() == [[True, True], [False, True], [True, True]]
    assert [values[0] for values in found.tokens["logprobs"]] == [2.0, 0.0, 1.0]
    assert found.texts.responses[::2] == [f"2-{second[0]}", f"0-{EXAMPLES[1].row_id}", f"1-{first[1]}"]
    assert found.texts.columns["answer"] == found.texts.prompts == found.texts.responses
    assert found.raw.total == found.raw.by_term["a"] == [7.0, 7.0, 0.0, 2.0, 4.0, 1.0]
    assert logged == {"rollout/resampled": 1.0}


class SimpleSplit:
    """Rows of a dataset."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def examples(self, rows: list[int]) -> list[Example]:
        return [EXAMPLES[row % 3]._replace(row_id=row) for row in rows]


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
    printed, found = leave_one_out_advantages(given["logprobs"], given["reference"], scores, LENGTHS, kl_coeff=0.1)
    expected = [rewards[i] - rewards[i ^ 1] for i in range(6)]
    assert_close(found.flatten(), torch.tensor(expected).double(), rtol=0, atol=1e-6)
    assert_close(printed.flatten(), torch.tensor(rewards).double(), rtol=0, atol=1e-6)


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
    episode, numbers = rows[0]._replace(trained=np.array([1, 1, 0, 1, 0, 1], bool)), np.array([10.0, 20, 30, 32])
    pairs = ranked_pairs(Rollout((episode,), scores[:1], scores[:1] > 0, {"reference": (numbers,)}))
    assert pairs is not None
    assert [mask.tolist() for mask in pairs.rows[0].masks()] == [[True, False, True], [True, False]]
    assert pairs.tokens["reference"][0].tolist() == [30, 32, 20]
