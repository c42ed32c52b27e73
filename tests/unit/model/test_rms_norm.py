"""The RMS norm against its formula in float64, against transformers' own, and where it is put."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sheeprlhf.model import rms_norm as norm_module
from sheeprlhf.model.folder.load import load_causal_lm
from sheeprlhf.model.rms_norm import RMSNorm, replace_rms_norms
from sheeprlhf.structure.model import ModelConfig
from tests.support.models import VOCAB, ModelFolder


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, nn.Parameter]:
    torch.manual_seed(0)
    return (torch.randn(2, 5, 6, dtype=dtype) * 3).requires_grad_(), nn.Parameter(torch.randn(6, dtype=dtype))


def with_gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return output, *torch.autograd.grad((output * weights).sum(), inputs)


@pytest.mark.parametrize("chunk", [1 << 18, 12, 1])
def test_values_and_gradients(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the rows fill several chunks, the last one less than full."""
    monkeypatch.setattr(norm_module, "_CHUNK", chunk)
    hidden, weight = case()
    expected = weight * hidden / (hidden.pow(2).mean(-1, keepdim=True) + 0.3).sqrt()
    found = RMSNorm(weight, 0.3)(hidden)
    assert found._base is None  # of a view, FSDP warns
    assert_close(with_gradients(found, hidden, weight), with_gradients(expected, hidden, weight), rtol=0, atol=1e-12)


def test_off_the_cpu_it_is_torchs_own() -> None:
    """What a GPU computes, computed here."""
    hidden, weight = case(torch.float32)
    expected = with_gradients(RMSNorm(weight, 0.3)(hidden), hidden, weight)
    found = with_gradients(RMSNorm(weight, 0.3).forward_fused(hidden), hidden, weight)
    assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixed", [True, False])
def test_linear_layers_behind_it_get_what_transformers_gives_them(mixed: bool, dtype: torch.dtype) -> None:
    hidden, weight = case(torch.float32)
    theirs, linear = LlamaRMSNorm(6, eps=0.3), nn.Linear(6, 4).to(torch.float32 if mixed else dtype)
    theirs.weight.data.copy_(weight)
    theirs = theirs if mixed else theirs.to(dtype)
    ours = RMSNorm(theirs.weight, 0.3)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        found, expected = ours(hidden.to(dtype)), theirs(hidden.to(dtype))
        assert found.dtype == (torch.bfloat16 if mixed and dtype == torch.float32 else expected.dtype)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2  # theirs rounds to bf16 twice
        assert_close(linear(found), linear(expected), rtol=tolerance, atol=tolerance)


def test_frozen_gains_get_no_gradient() -> None:
    hidden, weight = case()
    RMSNorm(weight.requires_grad_(False), 1e-6)(hidden).sum().backward()
    assert weight.grad is None and hidden.grad is not None


def test_only_equal_norms_are_replaced(model_folder: ModelFolder) -> None:
    cfg = ModelConfig(config_name="auto", repo_name=str(model_folder("llama")))
    model = load_causal_lm(cfg, vocabulary=VOCAB, longest=8)
    assert sum(isinstance(module, RMSNorm) for module in model.modules()) == 5  # two a layer and the last
    assert not any(isinstance(module, LlamaRMSNorm) for module in model.modules())
    other = nn.ModuleDict({"gemma": GemmaRMSNorm(6), "llama": LlamaRMSNorm(6)})
    other["gemma"].variance_epsilon = 1e-6  # as if it went by the same name
    names, weight = list(other.state_dict()), other["llama"].weight
    replace_rms_norms(other)
    assert type(other["gemma"]) is GemmaRMSNorm and type(other["llama"]) is RMSNorm
    assert list(other.state_dict()) == names and other["llama"].weight is weight
