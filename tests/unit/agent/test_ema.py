"""The moving average of a policy against the sum that it is, and where its weights go."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from sheeprlhf.agent.policy import EMA, Policy
from sheeprlhf.engine.checkpoint import saved_tensors
from sheeprlhf.model.lora import add_lora
from sheeprlhf.structure.model import LORAConfig

ModelFolder = Callable[..., Path]


@pytest.mark.parametrize("lora", [False, True])
def test_it_is_the_weighted_sum_of_all_steps(lora: bool, model_folder: ModelFolder) -> None:
    """After n steps: decay^n of the start and (1 - decay) * decay^(n-k) of the k-th."""
    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    policy = Policy(add_lora(model, LORAConfig(rank=2)) if lora else model)
    average = EMA(policy, 0.75)
    names = saved_tensors(policy.model).keys()
    assert saved_tensors(average).keys() == {f"model.{name}" for name in names}
    assert lora == all("lora_" in name for name in names)
    assert not any(p.requires_grad for p in average.parameters())

    torch.manual_seed(0)
    history = [{name: tensor.detach().clone() for name, tensor in saved_tensors(policy.model).items()}]
    for _ in range(3):
        with torch.no_grad():
            for tensor in saved_tensors(policy.model).values():
                tensor.add_(torch.randn_like(tensor))
        history.append({name: tensor.detach().clone() for name, tensor in saved_tensors(policy.model).items()})
        average.update()
    factors = [0.75**3, 0.25 * 0.75**2, 0.25 * 0.75, 0.25]
    expected = {name: sum(f * of[name] for f, of in zip(factors, history, strict=True)) for name in names}
    held = {name: tensor.clone() for name, tensor in saved_tensors(average).items()}
    for name in names:
        assert_close(held[f"model.{name}"], expected[name], rtol=0, atol=1e-6)

    with average.swap_in():
        inside = saved_tensors(policy.model)
        assert all(torch.equal(inside[name], held[f"model.{name}"]) for name in names)
    assert all(torch.equal(tensor, history[-1][name]) for name, tensor in saved_tensors(policy.model).items())
    assert all(torch.equal(tensor, held[name]) for name, tensor in saved_tensors(average).items())
