"""Our losses of pairs and examples against what TRL's own trainers computed (benchmarks/golden_trl.py).

Fixed log-probabilities and scores go in, so only the formulas are compared; tests/parity/test_trl.py starts from token
ids. Where we mean something else than TRL, the difference is stated here and the rest is compared.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sheeprlhf.loss import dpo
from sheeprlhf.loss.reward import LOSS_TYPES, bradley_terry, centering
from sheeprlhf.structure.task import DPOConfig
from sheeprlhf.task.train.dpo import NO_REFERENCE, pair_losses
from tests.support.golden import CONFIG, SEEDS, golden_pairs, load_golden

GOLDEN = load_golden()
CHOICES = next(field for field in dataclasses.fields(DPOConfig) if field.name == "loss_type").metadata["choices"]
# TRL's case: the options with which our loss is the same. ORPO is compared part by part below.
OURS: dict[str, dict[str, Any]] = {
    "sigmoid": dict(loss_type="sigmoid", beta=0.1),
    "sigmoid, beta 0.5": dict(loss_type="sigmoid", beta=0.5),
    # its DPOTrainer takes label_smoothing and does not read it for sigmoid; ours is Mitchell's eq. 3, as its `aot` is
    "sigmoid, label smoothing ignored": dict(loss_type="sigmoid", beta=0.1, label_smoothing=0.0),
    "aot, label smoothing": dict(loss_type="sigmoid", beta=0.1, label_smoothing=0.2),
    "hinge": dict(loss_type="hinge", beta=0.1),
    "ipo": dict(loss_type="ipo", beta=0.1),
    "robust": dict(loss_type="robust", beta=0.1, label_smoothing=0.2),
    "apo_zero": dict(loss_type="apo_zero", beta=0.1),
    "simpo": dict(loss_type="simpo", beta=2.0, simpo_gamma=1.0),
    # CPO without its NLL is DPO without a reference
    "cpo sigmoid": dict(loss_type="sigmoid", beta=0.1, reference_free=True),
    "cpo sigmoid, label smoothing": dict(loss_type="sigmoid", beta=0.1, label_smoothing=0.2, reference_free=True),
    "cpo hinge": dict(loss_type="hinge", beta=0.1, reference_free=True),
}
SORTED_OVER_THE_BATCH = "aot, label smoothing"  # with more than one pair it is another loss
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def case_of(kind: str, name: str) -> dict[str, Any]:
    return next(case for case in GOLDEN[kind] if case["name"] == name)


def flat(values: list[list[float]], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype).flatten()


def losses_of(task: DPOConfig, dtype: torch.dtype) -> Tensor:
    """Ours, of the stored log-probabilities."""
    sums = GOLDEN["sums"]
    lengths = torch.tensor([len(pair[f"{side}_ids"]) for pair in GOLDEN["pairs"] for side in ("chosen", "rejected")])
    pairs = torch.arange(len(lengths)).view(-1, 2)
    return pair_losses(task, flat(sums["policy"], dtype), flat(sums["reference"], dtype), lengths, pairs)


def test_every_loss_type_is_compared() -> None:
    assert {options["loss_type"] for options in OURS.values()} | {"orpo"} == set(CHOICES)
    assert {case["name"] for case in GOLDEN["preference"]} == OURS.keys() | {"orpo"}
    compared_without = {
        options["loss_type"] for name, options in OURS.items() if case_of("preference", name)["trainer"] == "CPOTrainer"
    }
    assert {*compared_without, "orpo"} >= set(NO_REFERENCE)
    assert {case["name"].partition(",")[0] for case in GOLDEN["kto"]} == {"kto"}
    # TRL has no loss of scores between a response's tokens
    assert {case["name"].partition(",")[0] for case in GOLDEN["reward"]} == set(LOSS_TYPES) - {"average", "per_sample"}


def test_the_file_is_of_these_models_and_pairs() -> None:
    assert GOLDEN["versions"]["trl"] == "1.16.0"
    assert GOLDEN["model"] == CONFIG
    assert GOLDEN["seeds"] == SEEDS
    for stored, pair in zip(GOLDEN["pairs"], golden_pairs(), strict=True):
        assert stored == pair | {"margin": pytest.approx(pair["margin"])}


@DTYPES
@pytest.mark.parametrize("name", OURS)
def test_equal_to_trl(name: str, dtype: torch.dtype) -> None:
    case = case_of("preference", name)
    losses_P = losses_of(DPOConfig(**OURS[name]), dtype)
    assert_close(losses_P, torch.tensor(case["each"], dtype=dtype), rtol=1e-5, atol=1e-5)
    if name != SORTED_OVER_THE_BATCH:
        assert losses_P.mean().item() == pytest.approx(case["all"], rel=1e-5, abs=1e-5)


@DTYPES
def test_orpo_is_trls_but_for_the_prompt_in_its_nll(dtype: torch.dtype) -> None:
    """TRL's NLL is the mean over prompt and response of all rows together; ours, as the paper's, of each response."""
    case = case_of("preference", "orpo")
    beta = case["options"]["beta"]
    nll_P = -flat(GOLDEN["sums"]["policy"], dtype)[::2] / torch.tensor([len(p["chosen_ids"]) for p in GOLDEN["pairs"]])
    odds_P = losses_of(DPOConfig(loss_type="orpo", beta=beta), dtype) - nll_P
    expected_P = -beta * torch.tensor(case["log_sigmoid_of_odds_ratio"], dtype=dtype)
    assert_close(odds_P, expected_P, rtol=1e-5, atol=1e-5)
    with_prompt_P = torch.tensor(case["nll_with_prompt"], dtype=dtype)
    assert_close(with_prompt_P + odds_P, torch.tensor(case["each"], dtype=dtype), rtol=1e-5, atol=1e-5)
    more_than_bos_P = torch.tensor(
        [len(pair["prompt_ids"]) > 1 for pair in GOLDEN["pairs"]]
    )  # a first token has no NLL
    assert_close(with_prompt_P[~more_than_bos_P], nll_P[~more_than_bos_P].to(dtype), rtol=1e-5, atol=1e-5)
    assert (with_prompt_P - nll_P)[more_than_bos_P].abs().min() > 0.01  # otherwise they are not the same thing


@DTYPES
@pytest.mark.parametrize("name", [case["name"] for case in GOLDEN["kto"]])
def test_kto_is_trls(name: str, dtype: torch.dtype) -> None:
    """Chosen responses are desirable, rejected ones are not."""
    case = case_of("kto", name)
    h_E = flat(GOLDEN["sums"][case["model"]], dtype) - flat(GOLDEN["sums"][case["reference"]], dtype)
    desirable_E = torch.tensor([True, False]).repeat(len(h_E) // 2)
    kl = torch.tensor(case["mismatched_log_ratios"], dtype=dtype).mean()
    assert max(kl.item(), 0.0) == pytest.approx(case["kl"], rel=1e-5, abs=1e-5)
    options = {"desirable_weight": 1.0, "undesirable_weight": 1.0} | case["options"]
    losses_E = dpo.kto(h_E, desirable_E, kl, **options)
    assert losses_E.mean().item() == pytest.approx(case["all"], rel=1e-5, abs=1e-5)


def test_kto_is_compared_on_both_sides_of_zero() -> None:
    assert {case["kl"] > 0 for case in GOLDEN["kto"]} == {True, False}


@DTYPES
@pytest.mark.parametrize("name", [case["name"] for case in GOLDEN["reward"]])
def test_reward_loss_is_trls(name: str, dtype: torch.dtype) -> None:
    case = case_of("reward", name)
    chosen_P, rejected_P = torch.tensor(GOLDEN["scores"], dtype=dtype).unbind(1)
    margin_P = torch.tensor([pair["margin"] for pair in GOLDEN["pairs"]], dtype=dtype)
    losses_P = bradley_terry(chosen_P, rejected_P, margin_P if case["margin"] else 0.0)
    losses_P = losses_P + case["options"].get("center_rewards_coefficient", 0.0) * centering(chosen_P, rejected_P)
    assert_close(losses_P, torch.tensor(case["each"], dtype=dtype), rtol=1e-5, atol=1e-5)
    assert losses_P.mean().item() == pytest.approx(case["all"], rel=1e-5, abs=1e-5)
