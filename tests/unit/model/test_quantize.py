"""Quantised base models: the same numbers as plain transformers and PEFT, and the weights that they stand for."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from sheeprlhf.agent.batches import choose_packed
from sheeprlhf.agent.policy import Policy
from sheeprlhf.agent.reward import reward_model_of
from sheeprlhf.data.example import collate_packed
from sheeprlhf.model.adapter import CRITIC, adapters_off, add_lora, add_second_adapter, lora_config, merge_lora
from sheeprlhf.model.folder.load import load_causal_lm, load_tokenizer
from sheeprlhf.model.folder.quantize import dequantize, quantization_of, quantize
from sheeprlhf.model.memory import build_on_meta, measure
from sheeprlhf.structure.model import LORAConfig, ModelConfig
from sheeprlhf.utils.errors import ModelError
from tests.support.batches import random_examples
from tests.support.models import ModelFolder

pytest.importorskip("bitsandbytes")

SCHEMES = ("nf4", "int8")
IDS = torch.arange(5, 30)[None]


def config_of(folder: Path, scheme: str | None, **options: Any) -> ModelConfig:
    lora = LORAConfig(rank=4, **options)
    settings: dict[str, Any] = {"repo_name": str(folder), "finetune_mode": "LORA", "lora_cfg": lora}
    return ModelConfig(config_name="auto", quantization=scheme, **settings)


def loaded(folder: Path, scheme: str | None) -> PreTrainedModel:
    return load_causal_lm(config_of(folder, scheme), vocabulary=0, longest=0)


def shift(model: nn.Module) -> None:
    """Give the adapters numbers that change what the model computes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, weight in sorted((name, w) for name, w in model.named_parameters() if w.requires_grad):
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_loss_and_gradients_are_those_of_plain_peft(scheme: str, architecture: str, model_folder: ModelFolder) -> None:
    """Packed here, one row at a time there; an evaluation comes first, and must not change the weights."""
    folder = model_folder(architecture)
    policy = Policy(add_lora(loaded(folder, scheme), LORAConfig(rank=4)))
    options: dict[str, Any] = {"load_in_8bit": True} if scheme == "int8" else {"load_in_4bit": True}
    quantized = BitsAndBytesConfig(bnb_4bit_quant_type="nf4", llm_int8_threshold=0.0, **options)
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantized, dtype=torch.float32)
    if architecture == "gpt2":
        for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
            assert getattr(plain.config, name) == 0.1
        for module in plain.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    names = sorted(
        {name.rsplit(".", 1)[-1] for name, m in plain.named_modules() if "bitsandbytes" in type(m).__module__}
    )
    plain = get_peft_model(plain, LoraConfig(r=4, lora_alpha=32, target_modules=names, task_type="CAUSAL_LM"))
    for model in (policy.model, plain):
        shift(model)
    rows = random_examples(5, 2)
    batch = collate_packed(rows, targets="response")
    policy.eval()
    with torch.no_grad():
        evaluated = policy(batch).target_N
    policy.train()
    trained = policy(batch).target_N
    assert_close(trained, evaluated, rtol=0, atol=1e-6)
    trained.mean().backward()
    plain.train()
    total = torch.zeros(())
    for row in rows:
        for response in row.responses:
            ids = torch.tensor([[*row.prompt_ids.tolist(), *response.tolist()]])
            logprobs = plain(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            total = total + logprobs[len(row.prompt_ids) - 1 :].sum() / len(trained)
    total.backward()
    assert_close(trained.mean(), total, rtol=1e-5, atol=1e-5)
    expected = {name: weight.grad for name, weight in plain.named_parameters() if weight.requires_grad}
    ours = {name: weight.grad for name, weight in policy.model.named_parameters() if weight.requires_grad}
    assert ours.keys() == expected.keys() and len(ours) > 8
    for name, grad in ours.items():
        assert_close(grad, expected[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_rounded_in_memory_as_from_files_and_come_back(
    scheme: str, architecture: str, model_folder: ModelFolder
) -> None:
    folder = model_folder(architecture)
    whole, of_files = loaded(folder, None), loaded(folder, scheme)
    kinds, before, expected = [type(module) for module in whole.modules()], logits(whole), logits(of_files)
    quantize(whole, scheme)
    assert quantization_of(whole) == quantization_of(of_files) == scheme
    assert torch.equal(logits(whole), expected)
    assert float((expected - before).abs().max()) > 1e-4
    dequantize(whole)
    assert quantization_of(whole) is None and [type(module) for module in whole.modules()] == kinds
    assert_close(logits(whole), expected, rtol=1e-5, atol=1e-5)
    assert whole.get_output_embeddings().weight.dtype == torch.float32


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_merge_is_into_dequantised_weights(scheme: str, model_folder: ModelFolder) -> None:
    model = add_lora(loaded(model_folder(), scheme), LORAConfig(rank=4))
    shift(model)
    adapted = logits(model)
    merged = merge_lora(model)
    assert quantization_of(merged.model) is None and merged.difference < 1e-4
    assert {weight.dtype for weight in merged.model.parameters()} == {torch.float32}
    assert_close(logits(merged.model), adapted, rtol=1e-5, atol=1e-4)


def test_policy_reward_and_critic_share_one_quantised_base(model_folder: ModelFolder) -> None:
    """A further adapter, and a model with a score head, have the very layers of the policy."""
    cfg = config_of(model_folder(), "nf4")
    base = loaded(model_folder(), "nf4")
    before = logits(base)
    policy = Policy(add_lora(base, LORAConfig(rank=4)))
    add_second_adapter(policy.model, CRITIC, lora_config(base, LORAConfig(rank=4), language_head=False), trains=True)
    shift(policy.model)
    assert not torch.allclose(logits(policy.model), before, atol=1e-3)
    with adapters_off(policy.model):  # the reference
        assert torch.equal(logits(policy.model), before)
    weights = {weight.data_ptr() for name, weight in policy.model.named_parameters() if weight.dtype == torch.uint8}
    assert len(weights) == 14  # seven in each of two layers, whatever sits on them
    reward = reward_model_of(Policy(loaded(model_folder(), "nf4")), cfg, load_tokenizer(cfg))
    assert quantization_of(reward.classifier()) == "nf4"
    reward(collate_packed(random_examples(3), targets="scores")).sum().backward()
    assert all(weight.grad is not None for weight in reward.parameters() if weight.requires_grad)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_batches_are_packed_and_memory_is_planned(scheme: str, model_folder: ModelFolder) -> None:
    cfg = config_of(model_folder("gpt2"), scheme)
    model = loaded(model_folder("gpt2"), scheme)
    assert choose_packed(Policy(model), model, longest=40, batching="auto", say=lambda _: None)
    adapted = add_lora(model, LORAConfig(rank=4))
    weights: list[Any] = [weight for weight in adapted.parameters() if not weight.is_floating_point()]
    scales = [weight.quant_state.absmax if scheme == "nf4" else weight.SCB for weight in weights]
    assert len(scales) == 8
    exact = sum(tensor.nbytes for tensor in [*adapted.parameters(), *adapted.buffers(), *scales])
    assert measure(cfg, "32-true").weights == exact
    assert measure(dataclasses.replace(cfg, quantization=None), "32-true").weights > exact


def test_what_cannot_be_quantised_is_rejected_before_loading(model_folder: ModelFolder) -> None:
    with pytest.raises(ModelError, match=r"model.quantization=nf4.*experts"):
        build_on_meta(config_of(model_folder("gpt_oss"), "nf4"), scores=False)
    with pytest.raises(ModelError, match=r"model.lora_cfg.modules_to_save=q_proj"):
        build_on_meta(config_of(model_folder(), "int8", modules_to_save=["q_proj"], targets=["v_proj"]), scores=False)
