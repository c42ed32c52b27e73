"""Packed attention against a softmax over a mask that is written out, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import varlen
from torch.testing import assert_close

from sheeprlhf.data.example import Layout, collate_packed, layout_of
from sheeprlhf.model import attention
from sheeprlhf.model.attention import _varlen_attention, kernel_dtype, packed_attention
from sheeprlhf.utils.errors import ModelError
from tests.support.batches import random_examples

MODULE = nn.Module()


def who_sees_whom(layout: Layout) -> Tensor:
    """(T, T) bool from the definition, token by token: same row, not later, and the prompt or the same response."""
    tokens = []
    for segment, (prompt, responses) in enumerate(layout.segments):
        for part, length in enumerate((prompt, *responses)):
            tokens += [(segment, part)] * length
    return torch.tensor(
        [[i >= j and a[0] == b[0] and b[1] in (0, a[1]) for j, b in enumerate(tokens)] for i, a in enumerate(tokens)]
    )


def in_window(layout: Layout, window: int | None) -> Tensor:
    """(T, T) bool: the same within a distance, which is counted along a row."""
    numbers: list[int] = []
    for prompt, responses in layout.segments:
        numbers += [*range(prompt), *(prompt + n for length in responses for n in range(length))]
    places = torch.tensor(numbers)
    return who_sees_whom(layout) & (places[:, None] - places[None] < (window or len(numbers)))


def case(num_responses: int, groups: int, dtype: torch.dtype = torch.float64) -> tuple[Layout, list[Tensor]]:
    layout = collate_packed(random_examples(4, num_responses, seed=num_responses, longest=6)).layout
    assert layout is not None
    length = sum(prompt + sum(responses) for prompt, responses in layout.segments)
    torch.manual_seed(groups)
    return layout, [torch.randn(1, heads, length, 8, dtype=dtype, requires_grad=True) for heads in (4, groups, groups)]


def brute_force(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float, window: int | None = None
) -> Tensor:
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~in_window(layout, window), float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def with_gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return output, *torch.autograd.grad((output * weights).sum(), inputs)


@pytest.mark.parametrize("longest_dense", [512, 0], ids=["weights are kept", "torch's kernel"])
@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("num_responses", [1, 2, 3])
def test_values_and_gradients(
    num_responses: int, groups: int, scaling: float | None, longest_dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_LONGEST_DENSE", longest_dense)
    monkeypatch.setattr(attention, "_MEAN_DENSE", 0)
    monkeypatch.setattr(attention, "_BLOCK", 3)
    layout, inputs = case(num_responses, groups)
    output, nothing = packed_attention(MODULE, *inputs, None, scaling=scaling, layout=layout)
    assert nothing is None
    expected = brute_force(*inputs, layout, 8**-0.5 if scaling is None else scaling)
    assert_close(with_gradients(output, inputs), with_gradients(expected, inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("longest_dense", [512, 0], ids=["weights are kept", "torch's kernel"])
@pytest.mark.parametrize("num_responses", [1, 3])
def test_queries_of_the_tails(
    num_responses: int, longest_dense: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of all tokens, then queries of the tails: those rows of the whole result."""
    monkeypatch.setattr(attention, "_LONGEST_DENSE", longest_dense)
    monkeypatch.setattr(attention, "_MEAN_DENSE", 0)
    layout, inputs = case(num_responses, 2)
    layout = layout_of(layout.segments, layout.query_starts[1:].numpy() - 2)
    tails, options = attention.TailQueries(layout), {"sliding_window": window}
    with pytest.raises(attention.KeysStored):
        packed_attention(MODULE, *inputs, None, layout=tails, **options)
    nothing = torch.zeros(1, 2, len(layout.tail_index), 8, dtype=torch.float64)
    queries = inputs[0][:, :, layout.tail_index]
    output, _ = packed_attention(MODULE, queries, nothing, nothing, None, layout=tails, **options)
    expected = brute_force(*inputs, layout, 8**-0.5, window)[:, layout.tail_index]
    assert_close(with_gradients(output, inputs), with_gradients(expected, inputs), rtol=0, atol=1e-12)


def reference_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    scale: float | None,
    earlier: int = -1,
) -> Tensor:
    """What torch documents: one sequence after another, causal from the last key backwards."""
    outputs = []
    for number in range(len(query_starts) - 1):
        q = query[query_starts[number] : query_starts[number + 1]]
        k, v = (x[key_starts[number] : key_starts[number + 1]] for x in (key, value))
        mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        mask = mask if earlier < 0 else mask.triu(len(k) - len(q) - earlier)
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v))
    return torch.cat(outputs)


def new_varlen(
    q: Any, k: Any, v: Any, qs: Any, ks: Any, max_q: Any, max_k: Any, *, scale: Any, window_size: Any
) -> Any:
    assert window_size[1] == 0 and max_q == int(qs.diff().max()) and max_k == int(ks.diff().max())
    return reference_varlen(q, k, v, qs, ks, scale, window_size[0])


def old_varlen(q: Any, k: Any, v: Any, qs: Any, ks: Any, max_q: Any, max_k: Any, *, scale: Any, is_causal: Any) -> Any:
    assert is_causal and max_q == int(qs.diff().max()) and max_k == int(ks.diff().max())
    return reference_varlen(q, k, v, qs, ks, scale)


@pytest.mark.parametrize(("kernel", "window"), [(new_varlen, None), (new_varlen, 3), (old_varlen, None)])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("num_responses", [1, 3])
def test_what_the_gpu_kernel_is_given(
    num_responses: int, groups: int, kernel: Callable[..., Tensor], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel needs CUDA; its definition in its place shows that its arguments are right."""
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    layout, inputs = case(num_responses, groups)
    output = _varlen_attention(*inputs, 0.5, layout, window)
    expected = brute_force(*inputs, layout, 0.5, window)
    assert_close(with_gradients(output, inputs), with_gradients(expected, inputs), rtol=0, atol=1e-12)


def test_an_attention_bias_is_refused() -> None:
    layout, inputs = case(2, 4)
    packed_attention(MODULE, *inputs, None, layout=layout, position_bias=None)
    with pytest.raises(ModelError, match=r"position_bias.*task\.batching=padded"):
        packed_attention(MODULE, *inputs, None, layout=layout, position_bias=30.0)


@pytest.mark.parametrize(("window", "softcap", "sinks"), [(3, None, 0), (None, 1.5, 0), (None, None, 4), (3, 1.5, 4)])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("num_responses", [1, 3])
def test_windows_soft_caps_and_sinks(
    num_responses: int, groups: int, window: int | None, softcap: float | None, sinks: int
) -> None:
    """Against the definitions of Gemma 2 and gpt-oss over a mask that is written out."""
    layout, inputs = case(num_responses, groups)
    sinks_H = torch.linspace(-1, 2, sinks, dtype=torch.float64, requires_grad=True) if sinks else None
    options = {"sliding_window": window, "softcap": softcap, "s_aux": sinks_H}
    output, _ = packed_attention(MODULE, *inputs, None, layout=layout, **options)
    query, key, value = (x.repeat_interleave(4 // x.shape[1], dim=1) for x in inputs)
    scores = query @ key.transpose(2, 3) * 8**-0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = scores.exp() * in_window(layout, window)
    total = weights.sum(-1, keepdim=True) + (0 if sinks_H is None else sinks_H.exp().view(1, -1, 1, 1))
    expected = ((weights / total) @ value).transpose(1, 2)
    wanted = [*inputs, *([] if sinks_H is None else [sinks_H])]
    assert_close(with_gradients(output, wanted), with_gradients(expected, wanted), rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_responses", [1, 3])
def test_a_cpu_computes_half_precision_in_float32(num_responses: int) -> None:
    """Of bf16 inputs, and of the mixture that autocast makes of them: float32 queries and keys, bf16 values."""
    layout, inputs = case(num_responses, 2, torch.float32)
    query, key, value = (x.detach() for x in inputs)
    exact = packed_attention(MODULE, query, key, value.bfloat16().float(), None, layout=layout)[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = packed_attention(MODULE, query, key, value.bfloat16(), None, layout=layout)[0]
    assert_close(mixed, exact, rtol=0, atol=0)
    half = [x.bfloat16() for x in (query, key, value)]
    expected = packed_attention(MODULE, *(x.float() for x in half), None, layout=layout)[0].bfloat16()
    assert_close(packed_attention(MODULE, *half, None, layout=layout)[0], expected, rtol=0, atol=0)


def test_a_gpu_computes_in_autocasts_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """There queries come in float32 too, and the kernel for rows of any length needs half precision."""
    assert kernel_dtype("cuda", torch.float32) == torch.float32
    assert kernel_dtype("cuda", torch.bfloat16) == torch.bfloat16
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda device: True)
    assert kernel_dtype("cuda", torch.float32) == torch.bfloat16
    assert kernel_dtype("cpu", torch.float32) == torch.float32


def test_dropout_is_applied_to_packed_rows() -> None:
    layout, inputs = case(2, 4, torch.float32)
    torch.manual_seed(0)
    outputs = [packed_attention(MODULE, *inputs, None, dropout=0.3, layout=layout)[0] for _ in range(2)]
    assert not torch.equal(*outputs)
