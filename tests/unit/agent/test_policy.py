"""Which models compute packed rows, and what a saved policy holds."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from sheeprlhf.agent import batches as batching_module
from sheeprlhf.agent.batches import packing_problem
from sheeprlhf.agent.policy import EMA, Policy, load_policy
from sheeprlhf.data.example import collate_packed, collate_padded
from sheeprlhf.engine.checkpoint import saved_tensors
from sheeprlhf.model.adapter import add_lora
from sheeprlhf.model.attention import packing_limit, placeholder_mask
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.structure.model import LORAConfig, ModelConfig
from sheeprlhf.utils.errors import ModelError
from tests.support.batches import random_examples
from tests.support.models import ARCHITECTURES

ModelFolder = Callable[..., Path]


def load(folder: Path, *, longest: int = 64, batching: str = "auto", **options: Any) -> tuple[Policy, bool]:
    cfg = ModelConfig(config_name="auto", repo_name=str(folder), **options)
    return load_policy(cfg, load_tokenizer(cfg), longest=longest, batching=batching)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_all_but_falcon_pack_in_every_number_format(architecture: str, dtype: str, model_folder: ModelFolder) -> None:
    policy, packed = load(model_folder(architecture), dtype=dtype)
    problem = packing_problem(policy, policy.causal_lm(), 64)
    assert packed == (not problem) == (architecture != "falcon"), problem
    if problem:
        assert "FalconForCausalLM" in problem
    assert not load(model_folder(architecture), batching="padded")[1]
    assert all(module.training for module in policy.modules())


def test_a_window_that_an_attention_does_not_get_limits_packed_rows(model_folder: ModelFolder) -> None:
    for name in ("llama", "mistral"):
        model = load(model_folder(name))[0].causal_lm()
        model.config.sliding_window = 16
        assert packing_limit(model, 16) == ""
        assert ("16" in packing_limit(model, 17)) == (name == "llama")
    model.config.use_sliding_window = False  # as in Qwen's configurations
    assert packing_limit(model, 17) == ""


def test_a_model_that_is_wrong_on_packed_rows_is_found_out(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_positions(examples: Any) -> Any:
        batch = collate_packed(examples)
        return batch._replace(position_ids_BT=torch.arange(batch.input_ids_BT.shape[1])[None])

    monkeypatch.setattr(batching_module, "collate_packed", without_positions)
    assert not load(model_folder("gpt2"))[1]
    with pytest.raises(ModelError, match=r"task\.batching=packed"):
        load(model_folder("gpt2"), batching="packed")


def test_the_check_consumes_no_random_number(model_folder: ModelFolder) -> None:
    policy, _ = load(model_folder("gpt2"), disable_dropout=False)
    state = torch.get_rng_state()
    assert packing_problem(policy, policy.causal_lm(), 64) == ""
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "falcon"])
def test_final_is_what_transformers_loads(architecture: str, tmp_path: Path, model_folder: ModelFolder) -> None:
    policy, _ = load(model_folder(architecture))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    tokenizer = load_tokenizer(ModelConfig(config_name="auto", repo_name=str(model_folder(architecture))))
    policy.save(tmp_path, tokenizer)
    ids = torch.arange(9)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, local_files_only=True)
    assert_close(dict(again.named_parameters()), dict(policy.causal_lm().named_parameters()), rtol=0, atol=0)
    logits = policy.causal_lm().eval()(input_ids=ids).logits
    assert_close(again(input_ids=ids).logits, logits, rtol=0, atol=1e-5)  # our norms add up in another order
    assert AutoTokenizer.from_pretrained(tmp_path)("hello")["input_ids"] == tokenizer("hello")["input_ids"]


def test_only_adapters_have_gradients(model_folder: ModelFolder) -> None:
    """The base is the same, bit for bit, after training steps."""
    torch.manual_seed(0)
    policy, _ = load(model_folder("llama"), finetune_mode="LORA", lora_cfg=LORAConfig(rank=2))
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        (-policy(collate_packed(random_examples(3))).target_N.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora_" in name), name


@pytest.mark.parametrize("mode", ["ALL", "LORA"])
def test_the_mean_over_the_vocabulary(mode: str, model_folder: ModelFolder) -> None:
    policy, _ = load(model_folder("llama"), finetune_mode=mode)
    example = random_examples(1)[0]
    ids = torch.tensor([*example.prompt_ids.tolist(), *example.responses[0].tolist()])
    logprobs = policy.causal_lm()(input_ids=ids[None]).logits[0].log_softmax(-1)
    start = len(example.prompt_ids)
    scored = policy(collate_packed([example]), mean=True)
    assert_close(scored.mean_N, logprobs[start - 1 : -1].mean(-1), rtol=0, atol=1e-5)
    assert_close(scored.target_N, logprobs[start - 1 : -1].gather(1, ids[start:, None])[:, 0], rtol=0, atol=1e-5)
    assert policy(collate_packed([example])).mean_N is None


@pytest.mark.parametrize("grad", [True, False])
def test_a_half_precision_model_is_scored_in_float32(grad: bool, model_folder: ModelFolder) -> None:
    """Trap 12: with and without a gradient, the log-softmax of its bf16 logits is taken in float32."""
    policy, _ = load(model_folder("llama"), dtype="bfloat16")
    examples = random_examples(1, longest=20)
    batch = collate_packed(examples)
    with torch.set_grad_enabled(grad):
        mask = placeholder_mask(batch.input_ids_BT)
        outputs = policy.causal_lm()(input_ids=batch.input_ids_BT, attention_mask=mask, layout=batch.layout)
        logits = outputs.logits[0, batch.head_positions_R]
        target_N = policy(batch).target_N
    assert logits.dtype == torch.bfloat16 and target_N.dtype == torch.float32
    expected = logits.float().log_softmax(-1).gather(1, batch.target_ids_N[:, None])[:, 0]
    assert_close(target_N, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("packed", [True, False])
def test_noise_is_scaled_by_the_length_of_each_row(packed: bool, model_folder: ModelFolder) -> None:
    """NEFTune against plain transformers, one row at a time, with the same random numbers (arXiv 2310.05914)."""
    policy, alpha = load(model_folder())[0], 30.0
    examples = random_examples(5)
    batch = collate_packed(examples) if packed else collate_padded(examples, pad_id=0)
    clean_N = policy(batch).target_N
    policy.neftune_alpha = alpha
    torch.manual_seed(3)
    noisy_N = policy(batch).target_N
    torch.manual_seed(3)
    model, width = policy.causal_lm(), policy.causal_lm().config.hidden_size
    noise_BTC = torch.rand(*batch.input_ids_BT.shape, width) * 2 - 1
    rows = noise_BTC.flatten(0, 1).split([e.num_tokens() for e in examples]) if packed else noise_BTC
    expected = []
    for example, noise_TC in zip(examples, rows, strict=True):
        ids_T = torch.from_numpy(np.concatenate([example.prompt_ids, *example.responses]).astype(np.int64))
        scaled_TC = noise_TC[: len(ids_T)] * alpha / math.sqrt(len(ids_T) * width)
        embeddings_TC = model.get_input_embeddings()(ids_T) + scaled_TC
        logprobs_TV = model(inputs_embeds=embeddings_TC[None]).logits[0].log_softmax(dim=-1)
        first = len(example.prompt_ids)
        expected.append(logprobs_TV[first - 1 : -1].gather(1, ids_T[first:, None])[:, 0])
    assert_close(noisy_N, torch.cat(expected), rtol=1e-5, atol=1e-5)
    assert (noisy_N - clean_N).abs().max() > 0.01
    noisy_N.sum().backward()
    assert model.get_input_embeddings().weight.grad is not None
    assert torch.equal(policy.eval()(batch).target_N, clean_N)  # a validation has none


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
