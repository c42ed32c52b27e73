"""Several adapters on one base: who computes, who gets gradients, and that nothing is left switched."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.testing import assert_close

from sheeprlhf.agent.policy import Policy, SharedReference, reference_of
from sheeprlhf.agent.reward import AdapterValueModel, reward_model_of
from sheeprlhf.data.example import collate_packed
from sheeprlhf.model.adapter import (
    add_lora,
    add_second_adapter,
    copy_adapter,
    load_score_adapter,
    lora_config,
    save_model,
)
from sheeprlhf.model.folder.load import load_causal_lm, load_tokenizer
from sheeprlhf.structure.model import AutoModelConfig, LORAConfig
from tests.support.batches import random_examples

ModelFolder = Callable[..., Path]
ADAPTERS = LORAConfig(rank=4, dropout=0.1)
BATCH = collate_packed(random_examples(3, 2))


class Shared(NamedTuple):
    """A policy and a critic on one base, and that base alone."""

    policy: Policy
    critic: AdapterValueModel
    base: Policy
    config: AutoModelConfig


def randomise(model: nn.Module, name: str) -> None:
    """Adapters begin at zero; give them something to say."""
    torch.manual_seed(len(name))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if f".{name}." in key:
                weight.normal_(std=0.3)


@pytest.fixture(params=["llama", "gpt2"])
def shared(request: pytest.FixtureRequest, model_folder: ModelFolder) -> Shared:
    config = AutoModelConfig(repo_name=str(model_folder(request.param)), lora_cfg=ADAPTERS)
    model = load_causal_lm(config, vocabulary=0, longest=0)
    base = Policy(copy.deepcopy(model).eval())
    policy = Policy(add_lora(model, ADAPTERS))
    assert isinstance(policy.model, PeftModel)
    add_second_adapter(policy.model, "critic", lora_config(model, ADAPTERS), trains=True)
    torch.manual_seed(0)
    critic = AdapterValueModel(policy, "critic", nn.Linear(16, 1, bias=False))
    randomise(policy.model, "default")
    randomise(policy.model, "critic")
    return Shared(policy, critic, base, config)


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: weight.requires_grad for name, weight in model.named_parameters()}


def gradients(module: Policy | AdapterValueModel) -> dict[str, Tensor]:
    """Those of a forward and a backward pass in eval mode, where adapters drop nothing."""
    with module.in_use():
        output = module(BATCH)
        (output if isinstance(output, Tensor) else output.target_N).square().sum().backward()
    found = {name: weight.grad.clone() for name, weight in module.named_parameters() if weight.grad is not None}
    module.zero_grad()
    return found


def test_without_adapters_it_is_the_base_bit_for_bit(shared: Shared) -> None:
    """Also in training mode, with dropout in the adapters; and afterwards they compute again."""
    reference = reference_of(shared.policy)
    assert isinstance(reference, SharedReference)
    assert list(reference.parameters()) == []
    shared.policy.train()
    before = flags(shared.policy)
    with torch.no_grad():
        expected = shared.base(BATCH).target_N
        assert torch.equal(reference(BATCH).target_N, expected)
        assert not torch.allclose(shared.policy(BATCH).target_N, expected, atol=1e-3)
    assert flags(shared.policy) == before


def test_an_error_leaves_nothing_switched(shared: Shared) -> None:
    shared.policy.eval()
    before, flags_before = shared.policy(BATCH).target_N.detach(), flags(shared.critic)
    with pytest.raises(AttributeError):
        SharedReference(shared.policy)("no batch")  # type: ignore[arg-type]
    with pytest.raises(AttributeError), shared.critic.in_use():
        shared.critic("no batch")
    assert torch.equal(shared.policy(BATCH).target_N.detach(), before)
    assert flags(shared.critic) == flags_before


def test_each_learns_by_its_own_adapter(shared: Shared) -> None:
    shared.policy.eval()
    before = flags(shared.critic)
    of_policy, of_critic = gradients(shared.policy), gradients(shared.critic)
    assert of_policy
    assert all(".default." in name for name in of_policy)
    assert {name for name in of_critic if ".critic." not in name} == {"head.weight"}
    assert len(of_critic) == len(of_policy) + 1
    assert flags(shared.critic) == before


def test_gradient_checkpointing_computes_with_the_same_adapter(shared: Shared) -> None:
    """Gradients equal those without it to 2e-6 of the largest; a backward pass after the switch would have others."""
    shared.policy.train()
    for module in shared.policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for module in (shared.critic, shared.policy):
        plain = gradients(module)
        causal_lm = shared.policy.causal_lm()
        causal_lm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        again = gradients(module)
        causal_lm.activation_checkpointing_disable()
        for name, grad in plain.items():
            assert_close(again[name], grad, rtol=0, atol=2e-6 * float(grad.abs().max()))


def test_a_reward_models_adapters_fit_beside_the_policys(shared: Shared, tmp_path: Path) -> None:
    """The scores are those of the run's own model, the adapters are frozen, and a critic begins as their copy."""
    tokenizer = load_tokenizer(shared.config)
    config = AutoModelConfig(repo_name=shared.config.repo_name, finetune_mode="LORA", lora_cfg=ADAPTERS)
    own = reward_model_of(Policy(copy.deepcopy(shared.base.causal_lm())), config, tokenizer)
    randomise(own, "default")
    save_model(own.model, tmp_path / "final")
    model = shared.policy.model
    assert isinstance(model, PeftModel)
    head = nn.Linear(1, 1, bias=False)
    head.weight = nn.Parameter(load_score_adapter(model, tmp_path / "final", "reward"))
    reward = AdapterValueModel(shared.policy, "reward", head)
    assert not any(weight.requires_grad for name, weight in model.named_parameters() if ".reward." in name)
    assert any(weight.requires_grad for name, weight in model.named_parameters() if ".default." in name)
    own.eval(), model.eval()
    with torch.no_grad(), reward.in_use():
        assert_close(reward(BATCH), own(BATCH), rtol=0, atol=1e-6)
        assert not any(weight.requires_grad for name, weight in model.named_parameters())  # it is frozen in use too
    copy_adapter(model, "reward", "critic")
    critic = AdapterValueModel(shared.policy, "critic", head)
    with torch.no_grad(), critic.in_use():
        assert_close(critic(BATCH), own(BATCH), rtol=0, atol=1e-6)
