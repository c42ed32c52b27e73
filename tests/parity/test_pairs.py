"""Pairs that share their prompt, packed, against two separate padded sequences; scores alone and in company."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from sheeprlhf.agent.policy import load_policy
from sheeprlhf.agent.reward import RewardModel, reward_model_of
from sheeprlhf.data.example import Batch, collate_packed, collate_padded
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.structure.task import DPOConfig
from sheeprlhf.task.train.dpo import dpo_loss
from sheeprlhf.task.train.rm import rm_loss
from tests.parity.test_packed_equals_padded import PACKABLE
from tests.support.batches import random_examples
from tests.support.models import ARCHITECTURES, EOS, PAD

ModelFolder = Callable[..., Path]
SCORES = ("average", "per_sample")
COLLATES = {
    "padded": partial(collate_padded, pad_id=PAD),
    "padded with EOS": partial(collate_padded, pad_id=EOS),
    "left": partial(collate_padded, pad_id=PAD, side="left"),
}


def reward_model(folder: Path) -> RewardModel:
    cfg = ModelConfig(config_name="auto", repo_name=str(folder))
    tokenizer = load_tokenizer(cfg)
    policy, _ = load_policy(cfg, tokenizer, longest=64, batching="auto")
    torch.manual_seed(0)
    return reward_model_of(policy, cfg, tokenizer)


def value_and_gradients(module: torch.nn.Module, loss: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    module.zero_grad()
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("num_responses", [2, 4])
@pytest.mark.parametrize(
    ("architecture", "loss_type"), [*((name, "sigmoid") for name in PACKABLE), ("llama", "orpo"), ("gpt2", "orpo")]
)
def test_dpo_packed_equals_padded(
    architecture: str, loss_type: str, num_responses: int, model_folder: ModelFolder
) -> None:
    cfg = ModelConfig(config_name="auto", repo_name=str(model_folder(architecture)))
    policy, packed = load_policy(cfg, load_tokenizer(cfg), longest=64, batching="packed")
    assert packed
    examples = random_examples(4, num_responses)
    reference_S = torch.linspace(-40.0, -20.0, 4 * num_responses)
    task = DPOConfig(loss_type=loss_type)

    def result(batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return value_and_gradients(policy, dpo_loss(policy, (batch, reference_S), task=task).total / 4)

    expected = result(collate_packed(examples))
    for collate in COLLATES.values():
        loss, gradients = result(collate(examples))
        assert_close(loss, expected[0], rtol=0, atol=1e-6)
        assert_close(gradients, expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_responses", [2, 4])
@pytest.mark.parametrize(
    ("architecture", "loss_type"),
    [*((name, "last_token") for name in PACKABLE), *((name, kind) for name in ("llama", "gpt2") for kind in SCORES)],
)
def test_rm_packed_equals_padded(
    architecture: str, loss_type: str, num_responses: int, model_folder: ModelFolder
) -> None:
    model = reward_model(model_folder(architecture))
    examples = random_examples(4, num_responses)
    targets = "last" if loss_type == "last_token" else "scores"

    def result(batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return value_and_gradients(model, rm_loss(model, batch, loss_type=loss_type, center=0.01).total / 4)

    expected = result(collate_packed(examples, targets=targets))
    for collate in COLLATES.values():
        loss, gradients = result(collate(examples, targets=targets))
        assert_close(loss, expected[0], rtol=0, atol=1e-6)
        assert_close(gradients, expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_a_score_is_the_same_in_any_company(architecture: str, model_folder: ModelFolder) -> None:
    model = reward_model(model_folder(architecture)).eval()
    examples = random_examples(6, 3)
    collates = [*COLLATES.values(), *([] if architecture == "falcon" else [collate_packed])]
    alone = [e._replace(responses=(r,)) for e in examples for r in e.responses]
    with torch.no_grad():
        expected = torch.cat([model(collate_padded([one], pad_id=PAD, targets="last")) for one in alone])
        for collate in collates:
            assert_close(model(collate(examples, targets="last")), expected, rtol=0, atol=1e-5)
            assert_close(model(collate(alone[:5], targets="last")), expected[:5], rtol=0, atol=1e-5)
    assert len(set(expected.tolist())) == len(expected)
