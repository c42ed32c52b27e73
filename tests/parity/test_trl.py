"""From the same token ids and weights, the same losses and gradients as TRL's trainers (benchmarks/golden_trl.py).

The whole way: our loader, packed batches with shared prompts and padded ones, the tasks' own loss functions.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from sheeprlhf.agent.policy import Policy, load_policy
from sheeprlhf.agent.reward import load_reward_model
from sheeprlhf.data.collate import collate_packed, collate_padded
from sheeprlhf.data.example import Batch, Example
from sheeprlhf.model.load import load_tokenizer
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.structure.task import DPOConfig, KTOConfig
from sheeprlhf.task.reference import sum_by_response
from sheeprlhf.task.train.dpo import dpo_loss
from sheeprlhf.task.train.kto import kto_loss, log_ratios
from sheeprlhf.task.train.rm import rm_loss
from tests.support.golden import golden_folder, load_golden
from tests.support.models import PAD
from tests.unit.loss.test_golden_trl import OURS, SORTED_OVER_THE_BATCH, case_of

GOLDEN = load_golden()
EXAMPLES = [
    Example(
        row,
        np.array(pair["prompt_ids"], np.int32),
        (np.array(pair["chosen_ids"], np.int32), np.array(pair["rejected_ids"], np.int32)),
    )
    for row, pair in enumerate(GOLDEN["pairs"])
]
BATCHINGS = pytest.mark.parametrize("batching", ["packed", "padded"])
Load = Callable[[str, str], nn.Module]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    folders: dict[str, Path] = {}

    def load_one(name: str, batching: str) -> Any:
        if name not in folders:
            folders[name] = golden_folder(name, tmp_path_factory.mktemp(name))
        cfg = ModelConfig(config_name="auto", repo_name=str(folders[name]))
        loader = load_reward_model if name == "reward" else load_policy
        return loader(cfg, load_tokenizer(cfg), longest=64, batching=batching)[0]

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
    if case["name"] == SORTED_OVER_THE_BATCH:
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


@BATCHINGS
@pytest.mark.parametrize("name", OURS)
def test_preference_losses(load: Load, name: str, batching: str) -> None:
    policy, reference, task = load("policy", batching), load("reference", batching), DPOConfig(**OURS[name])

    def loss_of(examples: list[Example]) -> Tensor:
        batch = collated(examples, batching)
        with torch.no_grad():
            reference_S = sums_of(reference, batch)
        return dpo_loss(policy, (batch, reference_S), task=task).total

    assert_like_trl(policy, loss_of, case_of("preference", name))


def test_trls_nll_of_orpo_covers_the_prompt(load: Load) -> None:
    policy = load("policy", "packed")
    assert isinstance(policy, Policy)
    chosen = [example._replace(responses=example.responses[:1]) for example in EXAMPLES]
    nll = [-policy(collated([example], "packed", "all")).target_N.mean().item() for example in chosen]
    assert nll == pytest.approx(case_of("preference", "orpo")["nll_with_prompt"], rel=1e-5, abs=1e-5)


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
