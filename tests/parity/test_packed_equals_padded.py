"""Packed rows against padded ones, pairs included (traps 1, 2 and 6).

`tests/unit/agent/test_batching.py` compares both with plain forward passes.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch.testing import assert_close
from transformers import AutoTokenizer

from sheeprlhf.agent.policy import Policy, load_policy
from sheeprlhf.agent.reward import RewardModel, reward_model_of
from sheeprlhf.data.example import Batch, collate_packed, collate_padded
from sheeprlhf.data.prepare import prepare_data
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.structure.data import LocalDataConfig
from sheeprlhf.structure.model import LORAConfig, ModelConfig
from sheeprlhf.structure.task import DPOConfig
from sheeprlhf.task.train.dpo import dpo_loss
from sheeprlhf.task.train.rm import rm_loss
from tests.support.batches import random_examples
from tests.support.models import ARCHITECTURES, EOS, PAD, ModelFolder

PACKABLE = [name for name in ARCHITECTURES if name != "falcon"]


def policy_of(folder: Path, **options: Any) -> Policy:
    cfg = ModelConfig(config_name="auto", repo_name=str(folder), **options)
    return load_policy(cfg, load_tokenizer(cfg), longest=64, batching="auto")


def loss_and_gradients(policy: Policy, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    policy.zero_grad()
    logprobs_N = policy(batch).target_N
    loss = -(logprobs_N * torch.linspace(0.5, 1.5, len(logprobs_N))).mean()
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in policy.parameters() if p.grad is not None]


@pytest.mark.parametrize("num_responses", [1, 3])
@pytest.mark.parametrize("architecture", PACKABLE)
def test_packed_equals_padded(architecture: str, num_responses: int, model_folder: ModelFolder) -> None:
    policy = policy_of(model_folder(architecture))
    examples = random_examples(5, num_responses)
    loss, gradients = loss_and_gradients(policy, collate_packed(examples))
    for pad in (PAD, EOS):
        other_loss, other_gradients = loss_and_gradients(policy, collate_padded(examples, pad_id=pad))
        assert_close(other_loss, loss, rtol=0, atol=1e-6)
        assert_close(other_gradients, gradients, rtol=0, atol=1e-5)


def test_texts_cost_what_plain_transformers_computes_for_their_pieces(
    model_folder: ModelFolder, tmp_path: Path
) -> None:
    """Continued pretraining: long texts in pieces, all packed in one row; no text sees another."""
    folder, most = model_folder(), 24
    texts = ["a short one", "x" * 60, "exactly as long as one", "the last " * 5]
    (tmp_path / "rows.txt").write_text("".join(f"{text}\n" for text in texts))
    options = {"validation_split": 0.0, "test_split": 0.0, "max_length": most, "cache_dir": str(tmp_path / "cache")}
    cfg = LocalDataConfig(train_file=str(tmp_path / "rows.txt"), **options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    split = prepare_data(cfg, tokenizer, kind="sft", say=print, progress=False).splits["train"]
    policy = policy_of(folder)
    model, expected = policy.causal_lm(), []
    for text in texts:
        ids = torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
        for start in range(0, len(ids) - 1, most - 1):  # a piece begins with the last token of the one before
            piece = ids[None, start : start + most]
            expected.append(F.cross_entropy(model(piece).logits[0, :-1], piece[0, 1:], reduction="sum"))
    batch = collate_packed(split.examples(range(len(split))))
    assert len(batch.target_ids_N) == sum(len(tokenizer(text)["input_ids"]) for text in texts)  # without BOS, with EOS
    assert_close(-policy(batch).target_N.sum(), torch.stack(expected).sum(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"finetune_mode": "LORA"}])
def test_through_fabric_checkpointing_and_lora(
    precision: str, options: dict[str, Any], model_folder: ModelFolder
) -> None:
    """The same numbers inside Fabric's wrapper; bf16-mixed also shows that Fabric passes our batches through."""
    lora = LORAConfig(rank=4)
    torch.manual_seed(0)
    policy = policy_of(model_folder("llama"), lora_cfg=lora, **options)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)  # type: ignore[arg-type]
    wrapped = fabric.setup_module(policy)
    examples = random_examples(4, 2)
    results = []
    for batch in (collate_packed(examples), collate_padded(examples, pad_id=PAD)):
        policy.zero_grad()
        logprobs_N = wrapped(batch).target_N
        assert logprobs_N.dtype == torch.float32
        assert bool((logprobs_N <= 0).all())
        fabric.backward(-logprobs_N.mean())
        results.append((logprobs_N.detach(), [p.grad.clone() for p in policy.parameters() if p.grad is not None]))
    tolerance = 1e-5 if precision == "32-true" else 0.1
    assert_close(results[0], results[1], rtol=0, atol=tolerance)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_no_dropout_anywhere_when_disabled(architecture: str, model_folder: ModelFolder) -> None:
    """Trap 6: GPT-2's `*_pdrop`, attention dropout and layer drop included; on by the model's default otherwise."""
    examples = random_examples(3)
    batch = collate_padded(examples, pad_id=PAD)
    policy = policy_of(model_folder(architecture), disable_dropout=True).train()
    assert torch.equal(policy(batch).target_N, policy(batch).target_N)
    active = [m for m in policy.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    assert active == []
    if architecture in ("opt", "gpt2", "phi", "gpt_neox", "falcon"):
        noisy = policy_of(model_folder(architecture), disable_dropout=False).train()
        assert not torch.equal(noisy(batch).target_N, noisy(batch).target_N)


SCORES = ("average", "per_sample")
COLLATES = {
    "padded": partial(collate_padded, pad_id=PAD),
    "padded with EOS": partial(collate_padded, pad_id=EOS),
}


def reward_model(folder: Path) -> RewardModel:
    cfg = ModelConfig(config_name="auto", repo_name=str(folder))
    tokenizer = load_tokenizer(cfg)
    policy = load_policy(cfg, tokenizer, longest=64, batching="auto")
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
    policy = load_policy(cfg, load_tokenizer(cfg), longest=64, batching="packed")
    assert policy.packed
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
