"""Advantages and losses of online policies against what TRL's trainers computed (benchmarks/golden_trl_rollouts.py)."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sheeprlhf.loss.advantage import by_position, group_advantages, kl_estimates, leave_one_out
from sheeprlhf.loss.ppo import policy_losses, sequence_policy_losses, token_weights
from sheeprlhf.reward.score import overlong_penalty
from tests.support.golden import ROLLOUTS_PATH, golden_rollouts, load_golden

GOLDEN = load_golden(ROLLOUTS_PATH)
ROLLOUTS = GOLDEN["rollouts"]
LENGTHS = [len(ids) for ids in ROLLOUTS["response_ids"]]
AGGREGATION = {  # TRL's loss: ours
    "grpo": "sequence",
    "grpo, kl times ratio": "sequence",
    "grpo, no kl": "sequence",
    "dr_grpo": "constant",
    "dapo": "token",
}
CLOSE: dict[str, Any] = dict(rtol=1e-5, atol=1e-6)


def flat(rows: list[list[float]]) -> Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.float64)


NEW, TO_OLD, TO_REFERENCE = map(
    flat, (GOLDEN["logprobs"], ROLLOUTS["old_difference"], ROLLOUTS["reference_difference"])
)
OLD, REFERENCE = NEW - TO_OLD, NEW + TO_REFERENCE


def sums(values_N: Tensor) -> Tensor:
    """(S,) of each response."""
    return torch.stack([part.sum() for part in values_N.split(LENGTHS)])


def case_of(kind: str, name: str) -> dict[str, Any]:
    return next(case for case in GOLDEN[kind] if case["name"] == name)


def test_the_file_is_of_these_rollouts() -> None:
    assert GOLDEN["versions"]["trl"] == "1.16.0"
    assert golden_rollouts() == ROLLOUTS
    assert {case["name"] for case in GOLDEN["losses"]} == {*AGGREGATION, "rloo"}
    ratio_N = TO_OLD.exp()
    assert (ratio_N > 1.28).any() and (ratio_N < 0.8).any()  # both ends of the clip are compared


@pytest.mark.parametrize("name", [case["name"] for case in GOLDEN["advantages"]])
def test_advantages_are_trls(name: str) -> None:
    """RLOO's KL penalty is part of the scores: k1, summed over the tokens of a response."""
    case = case_of("advantages", name)
    kl_ST, _ = by_position(kl_estimates(NEW, REFERENCE, "k1"), LENGTHS)
    scores_S = torch.tensor(ROLLOUTS["scores"], dtype=torch.float64) - case["options"].get("beta", 0.0) * kl_ST.sum(1)
    scores_PG = scores_S.view(-1, ROLLOUTS["group"])
    advantages_PG = leave_one_out(scores_PG) if "rloo" in name else group_advantages(scores_PG, scale=name == "grpo")
    assert_close(advantages_PG.flatten(), torch.tensor(case["advantages"]).double(), **CLOSE)


@pytest.mark.parametrize("name", AGGREGATION)
def test_token_losses_are_trls(name: str) -> None:
    """Each response alone and all together, from their tokens' losses, weights and the count of items."""
    case = case_of("losses", name)
    options, aggregation = case["options"], AGGREGATION[name]
    advantages_N = torch.tensor(ROLLOUTS["advantages"], dtype=torch.float64).repeat_interleave(torch.tensor(LENGTHS))
    clip_high = options.get("epsilon_high", options["epsilon"])
    losses_N = policy_losses(NEW, OLD, advantages_N, clip_low=options["epsilon"], clip_high=clip_high)
    kl_N = kl_estimates(NEW, REFERENCE, "k3") * (TO_OLD.exp() if "ratio" in name else 1.0)
    lengths_S = torch.tensor(LENGTHS)
    index_N = torch.arange(len(LENGTHS)).repeat_interleave(lengths_S)
    weights_N = token_weights(index_N, lengths_S, aggregation, max_length=options.get("max_completion_length", 1))
    weighted_S = sums((losses_N + options["beta"] * kl_N) * weights_N)
    items_S = torch.tensor(LENGTHS) if aggregation == "token" else torch.ones(len(LENGTHS))
    assert_close(weighted_S / items_S, torch.tensor(case["each"]).double(), **CLOSE)
    assert (weighted_S.sum() / items_S.sum()).item() == pytest.approx(case["all"], rel=1e-5, abs=1e-6)


def test_response_losses_are_trls() -> None:
    case = case_of("losses", "rloo")
    advantages_S = torch.tensor(ROLLOUTS["advantages"], dtype=torch.float64)
    losses_S = sequence_policy_losses(sums(NEW), sums(OLD), advantages_S, clip=case["options"]["epsilon"])
    assert_close(losses_S, torch.tensor(case["each"]).double(), **CLOSE)
    assert losses_S.mean().item() == pytest.approx(case["all"], rel=1e-5, abs=1e-6)


def test_overlong_penalties_are_trls() -> None:
    case = GOLDEN["overlong"]
    found = [-overlong_penalty(length, case["max_length"], case["cache"]) for length in LENGTHS]
    assert found == pytest.approx(case["penalties"], abs=1e-6)
    assert len(set(case["penalties"])) >= 3
