"""Which models compute packed rows, what a saved policy holds, and several adapters on one base."""

import copy
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from sheeprlhf.agent import batches as batching_module
from sheeprlhf.agent.batches import packing_problem
from sheeprlhf.agent.policy import EMA, Policy, SharedReference, load_policy, reference_of
from sheeprlhf.agent.reward import AdapterValueModel, reward_model_of
from sheeprlhf.data.example import collate_packed, collate_padded
from sheeprlhf.engine.checkpoint import saved_tensors
from sheeprlhf.model.adapter import (
    add_lora,
    add_second_adapter,
    copy_adapter,
    load_score_adapter,
    lora_config,
    save_model,
)
from sheeprlhf.model.attention import placeholder_mask
from sheeprlhf.model.folder.architecture import packing_limit
from sheeprlhf.model.folder.load import load_causal_lm, load_tokenizer
from sheeprlhf.structure.model import AutoModelConfig, LORAConfig, ModelConfig
from sheeprlhf.utils.errors import ModelError
from tests.support.batches import random_examples
from tests.support.models import ARCHITECTURES, ModelFolder


def load(folder: Path, *, longest: int = 64, batching: str = "auto", **options: Any) -> Policy:
    cfg = ModelConfig(config_name="auto", repo_name=str(folder), **options)
    return load_policy(cfg, load_tokenizer(cfg), longest=longest, batching=batching)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_all_but_falcon_pack_in_every_number_format(architecture: str, dtype: str, model_folder: ModelFolder) -> None:
    policy = load(model_folder(architecture), dtype=dtype)
    problem = packing_problem(policy, policy.causal_lm(), 64)
    assert policy.packed == (not problem) == (architecture != "falcon"), problem
    if problem:
        assert "FalconForCausalLM" in problem
    assert not load(model_folder(architecture), batching="padded").packed
    assert all(module.training for module in policy.modules())


def test_a_window_that_an_attention_does_not_get_limits_packed_rows(model_folder: ModelFolder) -> None:
    for name in ("llama", "mistral"):
        model = load(model_folder(name)).causal_lm()
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
    assert not load(model_folder("gpt2")).packed
    with pytest.raises(ModelError, match=r"task\.batching=packed"):
        load(model_folder("gpt2"), batching="packed")


def test_the_check_consumes_no_random_number(model_folder: ModelFolder) -> None:
    policy = load(model_folder("gpt2"), disable_dropout=False)
    state = torch.get_rng_state()
    assert packing_problem(policy, policy.causal_lm(), 64) == ""
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "falcon"])
def test_final_is_what_transformers_loads(architecture: str, tmp_path: Path, model_folder: ModelFolder) -> None:
    policy = load(model_folder(architecture))
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
    policy = load(model_folder("llama"), finetune_mode="LORA", lora_cfg=LORAConfig(rank=2))
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
    policy = load(model_folder("llama"), finetune_mode=mode)
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
    policy = load(model_folder("llama"), dtype="bfloat16")
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
    policy, alpha = load(model_folder()), 30.0
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
