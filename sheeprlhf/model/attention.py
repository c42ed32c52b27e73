"""Attention over packed rows: each token sees its own prompt and response, and no padding is computed.

Letters: B=1 packed row, H query heads, G key heads, T packed positions, M keys of all sequences, D head width.

`register()` adds one attention function to transformers under `PACKED`. A model that uses it computes a packed row
when its forward gets `layout=`, and plain `sdpa` attention otherwise, so the same model trains packed, trains padded
and generates. A packed forward also gets `attention_mask=placeholder_mask(...)`: a 4-D mask passes through
transformers untouched, so no T x T mask is ever built.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sheeprlhf.model.cache import SharedCache
from sheeprlhf.utils.errors import ModelError

PACKED = "sheeprlhf_packed"
_HALF = (torch.bfloat16, torch.float16)
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # extras of some models' attention that change the result


def register() -> None:
    """Make `attn_implementation=PACKED` known to transformers (again is harmless)."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)


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
        layout: a `sheeprlhf.utils.layout.Layout`; a `SharedCache` for one token of each row that it holds; or None.
        **kwargs: other arguments of the model's attention.

    Returns:
        ((B, T, H, D) output, None).

    Raises:
        ModelError: the model's attention does something that packed rows do not support.
    """
    if layout is None:
        return sdpa_attention_forward(
            module, query_BHTD, key_BGTD, value_BGTD, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    extra = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    window = kwargs.get("sliding_window")
    if window is not None and layout.max_key > window:
        extra.append(f"sliding_window={window}")
    if extra:
        raise ModelError(f"packed attention does not support {', '.join(extra)}; set task.batching=padded")
    device = query_BHTD.device.type
    if isinstance(layout, SharedCache):
        with torch.autocast(device, enabled=False):
            return layout.attend(cast(int, module.layer_idx), query_BHTD, scaling), None
    dtype = kernel_dtype(device, query_BHTD.dtype)
    query, key, value = (x.to(dtype) for x in (query_BHTD, key_BGTD, value_BGTD))
    if device == "cuda" and dtype in _HALF and dropout == 0.0:
        return _varlen_attention(query, key, value, scaling, layout), None
    with torch.autocast(device, enabled=False):  # it would cast float32 inputs back
        return _loop_attention(query, key, value, dropout, scaling, layout).to(query_BHTD.dtype), None


def kernel_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """The number format that attention computes in: autocast's, where it is on, since queries may come in float32.

    On a CPU float32 for half precision, whose kernels in torch are up to 4 times slower on rows of 40 to 400 tokens.
    """
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return torch.float32 if device == "cpu" and dtype in _HALF else dtype


def _loop_attention(
    query_BHTD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, dropout: float, scaling: float | None, layout: Any
) -> Tensor:
    """One dense call per attention sequence: causal for a prompt with its first response, masked for the others."""
    grouped = query_BHTD.shape[1] != key_BGTD.shape[1]

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output_BHTD = F.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
        return output_BHTD.transpose(1, 2)

    lengths = [n for prompt, responses in layout.segments for n in (prompt + responses[0], *responses[1:])]
    # Split, never sliced: the gradient of every slice would be a tensor of the whole row, mostly zeros.
    sequences = zip(*(x.split(lengths, dim=2) for x in (query_BHTD, key_BGTD, value_BGTD)), strict=True)
    outputs = []
    for prompt_length, response_lengths in layout.segments:
        query, key, value = next(sequences)
        outputs.append(attend(query, key, value, None))
        prompt = [x[:, :, :prompt_length] for x in (key, value)]
        for length in response_lengths[1:]:
            query, *response = next(sequences)
            key, value = (torch.cat(parts, dim=2) for parts in zip(prompt, response, strict=True))
            mask = torch.ones(length, prompt_length + length, dtype=torch.bool, device=key.device).tril(prompt_length)
            outputs.append(attend(query, key, value, mask))
    return torch.cat(outputs, dim=1)


def _varlen_attention(
    query_BHTD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, scaling: float | None, layout: Any
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
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
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
