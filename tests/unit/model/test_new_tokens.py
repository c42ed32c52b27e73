"""New tokens: their rows begin as the mean, train beside adapters, and are saved for plain transformers and PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from sheeprlhf.agent.policy import Policy, load_policy
from sheeprlhf.model.adapter import load_lora, merge_lora
from sheeprlhf.model.folder.embedding_rows import trained_rows
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.structure.model import LORAConfig, ModelConfig
from sheeprlhf.utils.errors import ModelError
from sheeprlhf.utils.vocabulary import missing_tokens
from tests.support.models import ModelFolder

NEW = ["<|a|>", "<|b|>"]  # ids 259, a spare row of the model, and 260, which has none
IDS = torch.tensor([[5, 259, 7, 260]])


def made(folder: Path, mode: str, **options: Any) -> tuple[Policy, Any]:
    words = {"config_name": "auto", "repo_name": str(folder), "finetune_mode": mode, "resize_embeddings": True}
    cfg = ModelConfig(**(words | {"extra_vocabulary": NEW} | options))  # type: ignore[arg-type]
    tokenizer = load_tokenizer(cfg)
    return load_policy(cfg, tokenizer, longest=8, batching="auto"), tokenizer


def learn(model: Any) -> None:
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def test_new_rows_begin_as_the_mean_of_the_others(model_folder: ModelFolder) -> None:
    before = AutoModelForCausalLM.from_pretrained(model_folder("qwen3"))
    policy, tokenizer = made(model_folder("qwen3"), "ALL")
    assert tokenizer.convert_tokens_to_ids(NEW) == [259, 260]
    for part in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, part)().weight, getattr(policy.model, part)().weight
        assert new.shape == (261, 16) and torch.equal(new[:259], old[:259])
        assert_close(new[259:], old[:259].mean(0).expand(2, -1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "opt", "phi", "gpt_neox", "falcon", "gemma2"])
def test_plain_peft_and_a_merge_compute_the_same(architecture: str, tmp_path: Path, model_folder: ModelFolder) -> None:
    """Tied and untied heads, and one with a bias, of which PEFT cannot train rows."""
    policy, tokenizer = made(model_folder(architecture), "LORA")
    start = logits(policy.model)
    learn(policy.model.train())
    trained = logits(policy.model)
    assert isinstance(policy.model, PeftModel)
    assert (trained - start).abs().max() > 0.01
    with policy.model.disable_adapter():
        assert_close(logits(policy.model), start, rtol=0, atol=1e-6)  # the reference of a policy with adapters
    policy.save(tmp_path, tokenizer)
    assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path)), trained, rtol=0, atol=1e-5)
    again = load_lora(made(model_folder(architecture), "ALL")[0].causal_lm(), tmp_path)
    assert_close(logits(again), trained, rtol=0, atol=1e-5)
    assert_close(logits(merge_lora(policy.model).model), trained, rtol=0, atol=1e-5)


def test_only_the_new_rows_train_beside_adapters(model_folder: ModelFolder) -> None:
    policy, _ = made(model_folder("qwen3"), "LORA")
    others = [(name, weight.shape) for name, weight in policy.model.named_parameters() if weight.requires_grad]
    assert [shape for name, shape in others if "lora_" not in name] == [(2, 16), (2, 16)]  # embedding and head


def test_a_whole_model_with_new_tokens(tmp_path: Path, model_folder: ModelFolder) -> None:
    policy, tokenizer = made(model_folder(), "ALL")
    learn(policy.model)
    policy.save(tmp_path, tokenizer)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(policy.model), rtol=0, atol=1e-5)
    again, _ = made(tmp_path, "ALL")  # its rows are there, and stay as they are
    assert_close(logits(again.model), logits(policy.model), rtol=0, atol=1e-5)


def test_tokens_that_somebody_has_added(tmp_path: Path, model_folder: ModelFolder) -> None:
    """The first of them has a spare row of the model, which nobody has trained."""
    model = AutoModelForCausalLM.from_pretrained(model_folder())
    tokenizer = load_tokenizer(ModelConfig(config_name="auto", repo_name=str(model_folder())))
    tokenizer.add_tokens(["<x>", "<y>"])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy, _ = made(tmp_path, "LORA", extra_vocabulary=[])
    assert trained_rows(policy.causal_lm()) == [259, 260]
    with pytest.raises(ModelError, match=r"model\.resize_embeddings=true"):
        made(tmp_path, "ALL", resize_embeddings=False, extra_vocabulary=[])


@pytest.mark.parametrize(
    ("template", "tokens"),
    [
        ("chatml", ["<|im_start|>", "<|im_end|>"]),
        ("gemma", ["<start_of_turn>", "<end_of_turn>"]),
        ("zephyr", ["<|assistant|>", "<|system|>", "<|user|>"]),
        ("mistral", []),
    ],
)
def test_control_tokens_of_a_chosen_template(template: str, tokens: list[str], model_folder: ModelFolder) -> None:
    cfg = ModelConfig(config_name="auto", repo_name=str(model_folder()), chat_template=template)
    assert sorted(missing_tokens(load_tokenizer(cfg))) == sorted(tokens)
    cfg.resize_embeddings = True
    tokenizer = load_tokenizer(cfg)
    assert sorted(tokenizer.convert_tokens_to_ids(tokens)) == list(range(259, 259 + len(tokens)))
    assert not missing_tokens(tokenizer)


def test_no_adapter_on_a_layer_whose_rows_train(model_folder: ModelFolder) -> None:
    with pytest.raises(ModelError, match=r"model\.lora_cfg\.targets: lm_head"):
        made(model_folder("qwen3"), "LORA", lora_cfg=LORAConfig(targets=["lm_head", "q_proj"]))
