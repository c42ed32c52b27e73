"""Attention over packed rows: each token sees its own prompt and response, and no padding is computed.

Letters: B=1 packed row, H query heads, G key heads, T packed positions, M keys of all sequences, D head width.

`register()` adds one attention function to transformers under `PACKED`. A model that uses it computes a packed row
when its forward gets `layout=`, and plain `sdpa` attention otherwise, so the same model trains packed, trains padded
and generates. A packed forward also gets `attention_mask=placeholder_mask(...)`: a 4-D mask passes through
transformers untouched, so no T x T mask is ever built.

Layers with sliding windows, soft caps of the scores (Gemma 2) and attention sinks (gpt-oss) are computed too, soft caps
and sinks without a fused kernel. Without a layout, a model that has only eager attention keeps it (`PACKED_EAGER`).
"""

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from sheeprlhf.utils.errors import ModelError
from sheeprlhf.utils.modes import accepted

PACKED = "sheeprlhf_packed"
PACKED_EAGER = "sheeprlhf_packed_eager"  # of models that have no sdpa attention
_HALF = (torch.bfloat16, torch.float16)
# A CPU keeps the attention's weights of sequences of so many tokens on average, and so many at most; queries at a time
_MEAN_DENSE, _LONGEST_DENSE, _BLOCK = 192, 512, 96
_UNSUPPORTED = ("position_bias",)  # extras of some models' attention that change the result


class KeysStored(Exception):
    """Ends a pass through a block after its keys and values, as nothing behind them is read."""


class TailQueries:
    """A layout whose keys are those of all tokens of a packed row, and whose queries are those of the tails only.

    Attention gets it in two passes, `last_block_at_tails`: the first stores keys and values, the second reads them.
    """

    def __init__(self, layout: Any) -> None:
        self.tails: Sequence[int] = layout.tails
        self.layout = layout._replace(query_starts=layout.tail_starts, max_query=max(layout.tails))
        self._stored: tuple[Tensor, Tensor] | None = None

    def keys_and_values(self, key_BGTD: Tensor, value_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return those of the first pass; the first pass stores its own and raises KeysStored."""
        if self._stored is None:
            self._stored = key_BGTD, value_BGTD
            raise KeysStored
        return self._stored


class Variant(NamedTuple):
    """Differences of a layer's attention from plain causal attention."""

    window: int | None = None  # tokens that a token sees, itself included; None is all
    softcap: float | None = None  # scores become softcap * tanh(score / softcap); None leaves them
    # a score for each head that takes part in the softmax and has no value; None for none
    sinks_H: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """True for plain causal attention."""
        return self.window is None and self.softcap is None and self.sinks_H is None

    def limited(self, num_keys: int) -> "Variant":
        """The same without a window that so many keys do not reach."""
        return self._replace(window=None) if self.window is not None and self.window >= num_keys else self

    def softmax(self, scores_BHTM: Tensor, mask: Tensor) -> Tensor:
        """(B, H, T, M) weights of the keys, float32 or wider.

        Args:
            scores_BHTM: scaled scores.
            mask: 0 where a key is seen, -inf elsewhere.
        """
        scores_BHTM = scores_BHTM.to(torch.promote_types(scores_BHTM.dtype, torch.float32))
        if self.softcap is not None:
            scores_BHTM = self.softcap * torch.tanh(scores_BHTM / self.softcap)
        scores_BHTM = scores_BHTM + mask
        if self.sinks_H is None:
            return scores_BHTM.softmax(dim=-1)
        sinks_BHT1 = self.sinks_H.to(scores_BHTM.dtype).view(1, -1, 1, 1).expand(*scores_BHTM.shape[:3], 1)
        return torch.cat([scores_BHTM, sinks_BHT1], dim=-1).softmax(dim=-1)[..., :-1]


def register() -> None:
    """Make both implementations known to transformers (again is harmless)."""
    for name, mask in ((PACKED, sdpa_mask), (PACKED_EAGER, eager_mask)):
        AttentionInterface.register(name, packed_attention)
        AttentionMaskInterface.register(name, mask)


def use_packed_attention(model: PreTrainedModel) -> None:
    """Give the model `packed_attention` if its code permits that."""
    if model._can_set_attn_implementation():
        model.set_attn_implementation(PACKED if model._supports_sdpa else PACKED_EAGER)


def placeholder_mask(input_ids_BT: Tensor) -> Tensor:
    """A (1, 1, 1, 1) mask that stops transformers from building its own; `packed_attention` ignores it."""
    return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=input_ids_BT.device)


def packed_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: Any = None,
    store_keys: Callable[[int, Tensor, Tensor], None] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention as `layout` says; without a layout, transformers' own sdpa attention.

    Args:
        module: the attention module, as transformers passes it.
        query_BHTD: queries.
        key_BGTD: keys; G divides H (grouped queries).
        value_BGTD: values.
        attention_mask: used only without a layout.
        dropout: probability of dropping an attention weight.
        scaling: factor of the scores; None is D ** -0.5.
        layout: a `sheeprlhf.data.example.Layout`; None; or an object whose `attend` computes the attention itself, as
            the sampler's cache does for one token of each row that it holds.
        store_keys: called with the number of the layer, and the keys and values of a packed row.
        **kwargs: other arguments of the model's attention.

    Returns:
        ((B, T, H, D) output, None).

    Raises:
        ModelError: the model's attention does something that packed rows do not support.
    """
    if layout is None:
        plain = sdpa_attention_forward
        if cast(Any, module.config)._attn_implementation == PACKED_EAGER:
            plain = sys.modules[type(module).__module__].eager_attention_forward
        output, _ = plain(
            module, query_BHTD, key_BGTD, value_BGTD, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    if attention_mask is not None and attention_mask.numel() != 1:  # Doge
        raise ModelError(f"{type(module).__name__} makes a mask of its own, which packed attention does not read")
    query_lengths = None
    if isinstance(layout, TailQueries):
        key_BGTD, value_BGTD = layout.keys_and_values(key_BGTD, value_BGTD)
        query_lengths, layout = layout.tails, layout.layout
    if store_keys is not None:
        store_keys(cast(int, module.layer_idx), key_BGTD, value_BGTD)
    variant = Variant(kwargs.get("sliding_window"), kwargs.get("softcap"), kwargs.get("s_aux")).limited(layout.max_key)
    extra = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if extra:
        raise ModelError(f"packed attention does not support {', '.join(extra)}; set task.batching=padded")
    device = query_BHTD.device.type
    if hasattr(layout, "attend"):
        with torch.autocast(device, enabled=False):
            layer = cast(int, module.layer_idx)
            return layout.attend(layer, query_BHTD, key_BGTD, value_BGTD, scaling, variant), None
    dtype = kernel_dtype(device, query_BHTD.dtype)
    query, key, value = (x.to(dtype) for x in (query_BHTD, key_BGTD, value_BGTD))
    if device == "cuda" and dtype in _HALF and dropout == 0.0 and variant._replace(window=None).is_plain:
        return _varlen_attention(query, key, value, scaling, layout, variant.window), None
    with torch.autocast(device, enabled=False):  # it would cast float32 inputs back
        output = _loop_attention(query, key, value, dropout, scaling, layout, variant, query_lengths)
        return output.to(query_BHTD.dtype), None


def kernel_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """The number format that attention computes in: autocast's, where it is on, since queries may come in float32.

    On a CPU float32 for half precision, whose kernels in torch are up to 4 times slower on rows of 40 to 400 tokens.
    """
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return torch.float32 if device == "cpu" and dtype in _HALF else dtype


def _loop_attention(
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    dropout: float,
    scaling: float | None,
    layout: Any,
    variant: Variant,
    query_lengths: Sequence[int] | None = None,
) -> Tensor:
    """One dense call per attention sequence: causal for a prompt with its first response, masked for the others.

    `query_lengths` are those of the last queries of each sequence, if there are not those of all tokens.
    """
    lengths = [n for prompt, responses in layout.segments for n in (prompt + responses[0], *responses[1:])]
    grouped = query_BHTD.shape[1] != key_BGTD.shape[1]
    dense = _MEAN_DENSE * len(lengths) <= layout.num_tokens and layout.max_key <= _LONGEST_DENSE
    if dense and not grouped and query_BHTD.device.type == "cpu" and variant.is_plain and dropout == 0.0:
        query, key, value = (x[0] for x in (query_BHTD, key_BGTD, value_BGTD))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _DenseAttention.apply(query, key, value, scale, _sequences(layout, query_lengths or lengths))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(1, T, H, D): the queries are those of the last T keys."""
        own = variant.limited(key.shape[2])
        mask = None
        if query.shape[2] != key.shape[2] or not own.is_plain:
            mask = _causal_mask(query.shape[2], key.shape[2], own.window, key.device)
        if own.softcap is not None or own.sinks_H is not None:
            assert mask is not None
            return _manual_attention(query, key, value, mask, dropout, scaling, own).transpose(1, 2)
        output_BHTD = F.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
        return output_BHTD.transpose(1, 2)

    # Split, never sliced: the gradient of every slice would be a tensor of the whole row, mostly zeros.
    parts_of = (query_BHTD, query_lengths or lengths), (key_BGTD, lengths), (value_BGTD, lengths)
    sequences = zip(*(x.split(list(parts), dim=2) for x, parts in parts_of), strict=True)
    outputs = []
    for prompt_length, response_lengths in layout.segments:
        query, key, value = next(sequences)
        outputs.append(attend(query, key, value))
        prompt = [x[:, :, :prompt_length] for x in (key, value)]
        for _ in response_lengths[1:]:
            query, *response = next(sequences)
            key, value = (torch.cat(parts, dim=2) for parts in zip(prompt, response, strict=True))
            outputs.append(attend(query, key, value))
    return torch.cat(outputs, dim=1)


def _sequences(layout: Any, query_lengths: Sequence[int]) -> list[tuple[slice, slice, slice]]:
    """Of each attention sequence the packed places of its queries, of the prompt before it and of its own keys."""
    found: list[tuple[slice, slice, slice]] = []
    start, query = 0, 0
    for prompt_length, responses in layout.segments:
        shared = slice(start, start + prompt_length)
        for number, response in enumerate(responses):
            length = query_lengths[len(found)]
            end = start + response + (0 if number else prompt_length)
            prompt = shared if number else slice(0, 0)  # the first one's own keys begin with the prompt
            found.append((slice(query, query + length), prompt, slice(start, end)))
            start, query = end, query + length
    return found


class _DenseAttention(torch.autograd.Function):
    """Plain attention of packed sequences, in blocks of queries; the weights are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        query_HTD: Tensor,
        key_HTD: Tensor,
        value_HTD: Tensor,
        scale: float,
        sequences: list[tuple[slice, slice, slice]],
    ) -> Tensor:
        output_THD = query_HTD.new_empty(query_HTD.shape[1], query_HTD.shape[0], query_HTD.shape[2])
        kept = []
        for queries, *places in sequences:
            key, value = (_joined(x, *places) for x in (key_HTD, value_HTD))
            for rows, seen in _blocks(queries, key.shape[1]):
                mask = _later_keys(rows.stop - rows.start, seen, key.dtype)
                scores = torch.baddbmm(mask, query_HTD[:, rows], key[:, :seen].mT, alpha=scale)
                kept.append(scores.softmax(dim=-1))
                output_THD[rows] = torch.bmm(kept[-1], value[:, :seen]).transpose(0, 1)
        ctx.save_for_backward(query_HTD, key_HTD, value_HTD, *kept)
        ctx.scale, ctx.sequences = scale, sequences
        return output_THD[None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query_HTD, key_HTD, value_HTD, *kept = ctx.saved_tensors
        weights, grad_HTD = iter(kept), grads[0][0].transpose(0, 1)
        grad_query, grad_key, grad_value = (
            x.new_zeros(x.shape[1], x.shape[0], x.shape[2]).transpose(0, 1) for x in (query_HTD, key_HTD, value_HTD)
        )
        for queries, prompt, own in ctx.sequences:
            key, value = (_joined(x, prompt, own) for x in (key_HTD, value_HTD))
            num_prompt = prompt.stop - prompt.start
            for rows, seen in _blocks(queries, key.shape[1]):
                p, grad = next(weights), grad_HTD[:, rows]
                slope = torch._softmax_backward_data(torch.bmm(grad, value[:, :seen].mT), p, -1, p.dtype)
                grad_query[:, rows] = torch.bmm(slope, key[:, :seen])
                last = own.start + seen - num_prompt
                for total, part in (
                    (grad_key, torch.bmm(slope.mT, query_HTD[:, rows])),
                    (grad_value, torch.bmm(p.mT, grad)),
                ):
                    total[:, own.start : last] += part[:, num_prompt:]
                    if num_prompt:
                        total[:, prompt] += part[:, :num_prompt]
        return grad_query.mul_(ctx.scale), grad_key.mul_(ctx.scale), grad_value, None, None


@lru_cache(maxsize=32)
def _later_keys(num_queries: int, num_keys: int, dtype: torch.dtype) -> Tensor:
    """(T, M) minus infinity for the keys behind a query, 0 for others; the queries are those of the last T keys."""
    return torch.full((num_queries, num_keys), -math.inf, dtype=dtype).triu_(num_keys - num_queries + 1)


def _joined(x_HTD: Tensor, prompt: slice, own: slice) -> Tensor:
    """The numbers of a sequence's keys."""
    return x_HTD[:, own] if prompt.stop == prompt.start else torch.cat([x_HTD[:, prompt], x_HTD[:, own]], dim=1)


def _blocks(queries: slice, num_keys: int) -> Iterator[tuple[slice, int]]:
    """Blocks of queries, which are those of the last keys, and the number of keys that each sees."""
    number = queries.stop - queries.start
    size = -(-number // max(1, round(number / _BLOCK)))
    for first in range(queries.start, queries.stop, size):
        last = min(first + size, queries.stop)
        yield slice(first, last), num_keys - queries.stop + last


def most_kept_keys(longest: int) -> int:
    """Keys whose weights `_DenseAttention` keeps for a token, on average, if sequences have up to `longest` tokens."""
    longest = min(longest, _LONGEST_DENSE)
    if longest < _MEAN_DENSE:
        return 0
    return sum((rows.stop - rows.start) * seen for rows, seen in _blocks(slice(0, longest), longest)) // longest


def _causal_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """(T, M) bool, True where a query sees a key; the queries are those of the last T keys."""
    diagonal = num_keys - num_queries
    mask_TM = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(diagonal)
    return mask_TM if window is None else mask_TM.triu(diagonal - window + 1)


def _manual_attention(
    query_BHTD: Tensor,
    key_BGMD: Tensor,
    value_BGMD: Tensor,
    mask_TM: Tensor,
    dropout: float,
    scaling: float | None,
    variant: Variant,
) -> Tensor:
    """(1, H, T, D): attention with a soft cap or sinks, which torch's kernel does not support."""
    repeats = query_BHTD.shape[1] // key_BGMD.shape[1]
    key_BHMD, value_BHMD = (x.repeat_interleave(repeats, dim=1) for x in (key_BGMD, value_BGMD))
    scores_BHTM = query_BHTD @ key_BHMD.mT * (query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling)
    added_TM = torch.zeros_like(mask_TM, dtype=scores_BHTM.dtype).masked_fill(~mask_TM, -math.inf)
    weights_BHTM = variant.softmax(scores_BHTM, added_TM).to(value_BHMD.dtype)
    return F.dropout(weights_BHTM, dropout) @ value_BHMD


def _varlen_attention(
    query_BHTD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, scaling: float | None, layout: Any, window: int | None
) -> Tensor:
    """Variable-length flash attention (CUDA, half precision); causal, aligned to each sequence's last key."""
    from torch.nn.attention import varlen  # imported here: torch builds without CUDA may lack it

    query_THD, key_MGD, value_MGD = (x[0].transpose(0, 1) for x in (query_BHTD, key_BGTD, value_BGTD))
    if layout.key_index is not None:
        key_MGD, value_MGD = key_MGD[layout.key_index], value_MGD[layout.key_index]
    repeats = query_THD.shape[1] // key_MGD.shape[1]
    if repeats > 1:
        key_MGD, value_MGD = (x.repeat_interleave(repeats, dim=1) for x in (key_MGD, value_MGD))
    names = varlen.varlen_attn.__code__.co_varnames
    causal: dict[str, Any] = {"is_causal": True}
    if "window_size" in names:
        causal = {"window_size": (-1 if window is None else window - 1, 0)}
    elif window is not None:
        raise ModelError("this version of torch computes no windows in packed rows: set task.batching=padded")
    output_THD: Any = varlen.varlen_attn(
        query_THD.contiguous(),
        key_MGD.contiguous(),
        value_MGD.contiguous(),
        layout.query_starts,
        layout.key_starts,
        layout.max_query,
        layout.max_key,
        scale=scaling,
        **causal,
    )
    return output_THD[None]


# Nats, or units of a score. Rounding alone makes 1e-4 of a log-probability of -24 in float32 (SmolLM2).
_TOLERANCE = {torch.bfloat16: 0.25, torch.float16: 0.05}
_TOLERANCE_FLOAT32 = 1e-3


def tolerance(weight: Tensor) -> float:
    """Tolerance between two ways to compute one number, nats or units of a score.

    Args:
        weight: one of the model's; the number format is its own, or autocast's where that is on.
    """
    device, dtype = weight.device.type, weight.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return _TOLERANCE.get(dtype, _TOLERANCE_FLOAT32)


def no_router_logits(model: PreTrainedModel) -> dict[str, bool]:
    """Arguments of a forward pass that make a mixture of experts skip its router's loss.

    With a cache, transformers would compare a mask of all tokens with the logits of the new ones, and fail.
    """
    name = "output_router_logits"
    asked = getattr(model.config.get_text_config(), name, False) and name in inspect.signature(model.forward).parameters
    return {name: False} if asked else {}


def logits_at(model: PreTrainedModel, keep_BT: Tensor, **inputs: Any) -> Tensor:
    """(R, V) logits at the kept positions, row after row, without a cache.

    Args:
        model: a language model.
        keep_BT: (B, T) bool.
        **inputs: `input_ids`, `attention_mask` and `position_ids`, (B, T). The last is left out where the model counts
            positions itself, which gives the same for rows padded on the right.
    """
    output = cast(Any, model)(
        **accepted(model, **inputs, logits_to_keep=keep_BT, use_cache=False), **no_router_logits(model)
    )
    logits: Tensor = output.logits
    return logits[keep_BT] if logits.shape[:2] == keep_BT.shape and logits.dim() == 3 else logits.flatten(0, -2)
