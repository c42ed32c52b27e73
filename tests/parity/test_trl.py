"""From the same token ids and weights, the same losses and gradients as TRL's trainers (benchmarks/golden_trl.py).

The whole way: our loader, packed batches with shared prompts and padded ones, the tasks' own loss functions. Where we
mean something else than TRL, the difference is stated and the rest is compared.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from sheeprlhf.agent.policy import load_policy
from sheeprlhf.agent.reward import load_reward_model
from sheeprlhf.data.example import Batch, Example, collate_packed, collate_padded
from sheeprlhf.engine.step import MicroBatch
from sheeprlhf.loss.reward import LOSS_TYPES
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.structure.task import DPOConfig, KTOConfig
from sheeprlhf.task.reference import response_sums, sum_by_response
from sheeprlhf.task.train.dpo import AOT, NO_REFERENCE, dpo_loss, with_partners
from sheeprlhf.task.train.kto import kto_loss, log_ratios
from sheeprlhf.task.train.rm import rm_loss
from sheeprlhf.utils.lightning import Fabric
from tests.support.golden import CONFIG, SEEDS, golden_folder, golden_pairs, load_golden
from tests.support.models import PAD

GOLDEN = load_golden()
CHOICES = next(field for field in dataclasses.fields(DPOConfig) if field.name == "loss_type").metadata["choices"]
# TRL's case: the options with which our loss is the same. ORPO is compared part by part below.
OURS: dict[str, dict[str, Any]] = {
    "sigmoid": dict(loss_type="sigmoid", beta=0.1),
    "sigmoid, beta 0.5": dict(loss_type="sigmoid", beta=0.5),
    # its DPOTrainer takes label_smoothing and does not read it for sigmoid; ours is Mitchell's eq. 3, as its `aot` is
    "sigmoid, label smoothing ignored": dict(loss_type="sigmoid", beta=0.1, label_smoothing=0.0),
    "aot, label smoothing": dict(loss_type="aot", beta=0.1, label_smoothing=0.2),
    "hinge": dict(loss_type="hinge", beta=0.1),
    "ipo": dict(loss_type="ipo", beta=0.1),
    "robust": dict(loss_type="robust", beta=0.1, label_smoothing=0.2),
    "apo_zero": dict(loss_type="apo_zero", beta=0.1),
    "sigmoid_norm": dict(loss_type="sigmoid_norm", beta=0.5),
    "exo": dict(loss_type="exo", beta=0.1, label_smoothing=0.2),
    "nca": dict(loss_type="nca", beta=0.1),
    "sppo": dict(loss_type="sppo", beta=0.1),
    "discopop": dict(loss_type="discopop", beta=0.1),
    "apo_down": dict(loss_type="apo_down", beta=0.1),
    "bco": dict(loss_type="bco", beta=0.1),
    "aot": dict(loss_type="aot", beta=0.1),
    "aot_unpaired": dict(loss_type="aot_unpaired", beta=0.1, label_smoothing=0.2),
    "length desensitisation": dict(loss_type="sigmoid", beta=0.1, ld_alpha=0.5),
    "weighting": dict(loss_type="sigmoid", beta=0.1, use_weighting=True),
    "sigmoid, forward_kl": dict(loss_type="sigmoid", beta=0.1, f_divergence="forward_kl"),
    "sigmoid, js_divergence": dict(loss_type="sigmoid", beta=0.1, f_divergence="js"),
    "sigmoid, alpha_divergence": dict(loss_type="sigmoid", beta=0.1, f_divergence="alpha"),
    "simpo": dict(loss_type="simpo", beta=2.0, simpo_gamma=1.0),
    # CPO without its NLL is DPO without a reference
    "cpo sigmoid": dict(loss_type="sigmoid", beta=0.1, reference_free=True),
    "cpo sigmoid, label smoothing": dict(loss_type="sigmoid", beta=0.1, label_smoothing=0.2, reference_free=True),
    "cpo hinge": dict(loss_type="hinge", beta=0.1, reference_free=True),
    "cpo": dict(loss_type="sigmoid", beta=0.1, reference_free=True, sft_coeff=1.0),
}
# With more than one pair these are other losses: sorted over the batch; NLL averaged over the tokens of all responses.
OF_ONE_PAIR = ("cpo",)
EXAMPLES = [
    Example(
        row,
        np.array(pair["prompt_ids"], np.int32),
        (np.array(pair["chosen_ids"], np.int32), np.array(pair["rejected_ids"], np.int32)),
    )
    for row, pair in enumerate(GOLDEN["pairs"])
]
FABRIC = Fabric(accelerator="cpu", devices=1)
BATCHINGS = pytest.mark.parametrize("batching", ["packed", "padded"])
Load = Callable[[str, str], nn.Module]


def case_of(kind: str, name: str) -> dict[str, Any]:
    return next(case for case in GOLDEN[kind] if case["name"] == name)


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
    assert {case["kl"] > 0 for case in GOLDEN["kto"]} == {True, False}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    folders: dict[str, Path] = {}

    def load_one(name: str, batching: str) -> Any:
        if name not in folders:
            folders[name] = golden_folder(name, tmp_path_factory.mktemp(name))
        cfg = ModelConfig(config_name="auto", repo_name=str(folders[name]))
        loader = load_reward_model if name == "reward" else load_policy
        return loader(cfg, load_tokenizer(cfg), longest=64, batching=batching)

    return load_one


def collated(examples: Sequence[Example], batching: str, targets: str = "response") -> Batch:
    if batching == "packed":
        return collate_packed(examples, targets=targets)
    return collate_padded(examples, pad_id=PAD, targets=targets)


def sums_of(policy: nn.Module, batch: Batch) -> Tensor:
    return sum_by_response(policy(batch).target_N, batch.response_index_N, len(batch.response_lengths))


def assert_like_trl(module: nn.Module, loss_of: Callable[[list[Example]], Tensor], case: dict[str, Any]) -> None:
    """Each pair alone, all together, and the gradient of all together."""
    each = torch.stack([loss_of([example]) for example in EXAMPLES]).detach()
    assert_close(each, torch.tensor(case["each"]), rtol=1e-5, atol=1e-5)
    if case["name"] in OF_ONE_PAIR:
        return
    module.zero_grad()
    loss = loss_of(EXAMPLES) / len(EXAMPLES)  # a task's loss is a sum over the rows
    loss.backward()
    assert loss.item() == pytest.approx(case["all"], rel=1e-5, abs=1e-5)
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    assert torch.stack([g.norm() for g in gradients]).norm().item() == pytest.approx(case["gradient"], rel=1e-4)


@BATCHINGS
def test_log_probabilities(load: Load, batching: str) -> None:
    for name, sums in GOLDEN["sums"].items():
        found = sums_of(load(name, batching), collated(EXAMPLES, batching)).detach()
        assert_close(found, torch.tensor(sums).flatten(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "batching"), [*((name, "packed") for name in OURS), ("sigmoid", "padded"), ("ipo", "padded")]
)
def test_preference_losses(load: Load, name: str, batching: str) -> None:
    policy, reference, task = load("policy", batching), load("reference", batching), DPOConfig(**OURS[name])

    def loss_of(examples: list[Example]) -> Tensor:
        batches = [collated(examples, batching)]
        if task.loss_type in AOT and len(examples) > 1:  # however a step is cut
            batches = [collated(examples[:4], batching), collated(examples[4:], batching)]
        steps = []
        for batch in batches:
            with torch.no_grad():
                reference_S = response_sums(reference(batch).target_N, batch, task.ld_alpha)
            steps.append(MicroBatch((batch, reference_S), len(batch.row_ids), batch.row_ids))
        if task.loss_type in AOT:
            steps = with_partners(FABRIC, policy, steps, task)
        return torch.stack([dpo_loss(policy, step.batch, task=task).total for step in steps]).sum()

    assert_like_trl(policy, loss_of, case_of("preference", name))


def test_orpo_is_trls_but_for_the_prompt_in_its_nll(load: Load) -> None:
    """TRL's NLL is the mean over prompt and response of all rows together; ours, as the paper's, of each response."""
    policy, case = load("policy", "packed"), case_of("preference", "orpo")
    task = DPOConfig(loss_type="orpo", beta=case["options"]["beta"])
    for number, example in enumerate(EXAMPLES):
        chosen = [example._replace(responses=example.responses[:1])]
        with torch.no_grad():
            loss = dpo_loss(policy, (collated([example], "packed"), torch.zeros(2)), task=task).total.item()
            nll, with_prompt = (
                -policy(collated(chosen, "packed", t)).target_N.mean().item() for t in ("response", "all")
            )
        assert loss - nll == pytest.approx(-task.beta * case["log_sigmoid_of_odds_ratio"][number], abs=1e-5)
        assert with_prompt == pytest.approx(case["nll_with_prompt"][number], abs=1e-5)
        assert with_prompt + loss - nll == pytest.approx(case["each"][number], abs=1e-5)
        assert (abs(with_prompt - nll) > 0.01) == (len(example.prompt_ids) > 1)  # a first token has no NLL


@BATCHINGS
@pytest.mark.parametrize("name", [case["name"] for case in GOLDEN["reward"]])
def test_reward_losses(load: Load, name: str, batching: str) -> None:
    case, model = case_of("reward", name), load("reward", batching)
    center = case["options"].get("center_rewards_coefficient", 0.0)
    margins = [pair["margin"] if case["margin"] else 0.0 for pair in GOLDEN["pairs"]]

    def loss_of(examples: list[Example]) -> Tensor:
        rows = [example._replace(margin=margins[example.row_id]) for example in examples]
        return rm_loss(model, collated(rows, batching, "last"), loss_type="last_token", center=center).total

    assert_like_trl(model, loss_of, case)


@BATCHINGS
@pytest.mark.parametrize("name", [case["name"] for case in GOLDEN["kto"]])
def test_kto(load: Load, name: str, batching: str) -> None:
    """Each response is an example; the KL's pairs are its prompt with the response of the example before it."""
    case = case_of("kto", name)
    policy, reference = load(case["model"], batching), load(case["reference"], batching)
    task = KTOConfig(**case["options"])
    singles = [
        example._replace(row_id=2 * example.row_id + side, responses=(response,), desirable=side == 0)
        for example in EXAMPLES
        for side, response in enumerate(example.responses)
    ]
    others = [singles[-1], *singles[:-1]]
    mismatched = [one._replace(responses=other.responses) for one, other in zip(singles, others, strict=True)]

    def content(rows: list[Example]) -> tuple[Batch, Tensor]:
        batch = collated(rows, batching)
        with torch.no_grad():
            return batch, sums_of(reference, batch)

    with torch.no_grad():
        found = log_ratios(policy, content(mismatched))[1]
    assert_close(found, torch.tensor(case["mismatched_log_ratios"]), rtol=1e-5, atol=1e-5)
    kl = max(0.0, float(found.mean()))
    assert kl == pytest.approx(case["kl"], rel=1e-5, abs=1e-5)
    policy.zero_grad()
    loss = kto_loss(policy, content(singles), task=task, kl=kl).total / len(singles)
    loss.backward()
    assert loss.item() == pytest.approx(case["all"], rel=1e-5, abs=1e-5)
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    assert torch.stack([g.norm() for g in gradients]).norm().item() == pytest.approx(case["gradient"], rel=1e-4)
