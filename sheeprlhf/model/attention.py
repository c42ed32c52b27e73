"""Attention over packed rows: each token sees its own prompt and response, and no padding is computed.

Letters: B=1 packed row, H query heads, G key heads, T packed positions, M keys of all sequences, D head width.

`register()` adds one attention function to transformers under `PACKED`. A model that uses it computes a packed row
when its forward gets `layout=`, and plain `sdpa` attention otherwise, so the same model trains packed, trains padded
and generates. A packed forward also gets `attention_mask=placeholder_mask(...)`: a 4-D mask passes through
transformers untouched, so no T x T mask is ever built.

`packing_limit` tells which models compute packed rows, from their code and configuration alone. Numbers decide too
(`agent/batches.py`), but two short examples show neither a window that is longer than they are nor, in half precision,
how much of one row reaches the next.

`SharedCache` keeps keys and values of rows that are being written: a prompt's once, for all of its responses, and each
response's own. Its letters: P prompts, K responses of each, B live responses, E query heads of a key head, W columns of
the longest prompt, N columns of a response.
"""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sheeprlhf.model.layers import switch_length
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


_WINDOWS = {  # kinds of layers that see a part of a long row, and the keys of a config that say how much
    "sliding_attention": (
        "sliding_window",
        "sliding_window_size",
        "sliding_windows",
        "attention_window_size",
        "attention_window",
        "local_attention",
        "window_size",
    ),
    "chunked_attention": ("attention_chunk_size",),
}
# Nats, or units of a score. Rounding alone makes 1e-4 of a log-probability of -24 in float32 (SmolLM2).
_TOLERANCE = {torch.bfloat16: 0.25, torch.float16: 0.05}
_TOLERANCE_FLOAT32 = 1e-3
_PACKABLE = ("full_attention", *_WINDOWS)


def uses_packed_attention(model: PreTrainedModel) -> bool:
    """True if the model's attention goes through `packed_attention` (falcon's, for example, does not)."""
    return bool(model.config._attn_implementation == PACKED)


def packing_limit(model: PreTrainedModel, longest: int) -> str:
    """The reason that a model's code or configuration excludes packed rows of up to `longest` tokens; empty if none.

    Args:
        model: a language model, or one with a score head.
        longest: tokens of the longest row.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    others = sorted(kinds - set(_PACKABLE))
    if others:
        return f"{name} has layers of {', '.join(others)}, in which packed rows would read each other"
    if is_recurrent(model):
        return f"{name} has recurrent or convolutional layers, in which packed rows would read each other"
    if not model._supports_sdpa:
        return f"{name} has eager attention alone"
    if not uses_packed_attention(model):
        return f"the attention of {name} cannot be replaced"
    switch = switch_length(model)
    if switch is not None and longest > switch:
        return f"{name} has other rotary embeddings beyond {switch} tokens, the data is up to {longest} long"
    window = min(_windows(config, kinds), default=longest)
    return f"{name} sees {window} tokens back, the data is up to {longest} long" if window < longest else ""


def tolerance(weight: Tensor) -> float:
    """Tolerance between two ways to compute one number, nats or units of a score.

    Args:
        weight: one of the model's; the number format is its own, or autocast's where that is on.
    """
    device, dtype = weight.device.type, weight.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return _TOLERANCE.get(dtype, _TOLERANCE_FLOAT32)


def is_recurrent(model: PreTrainedModel) -> bool:
    """True if a model has layers that carry a state from token to token besides attention's keys and values."""
    linear = "linear_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ())
    return linear or bool(getattr(model, "_is_stateful", False)) or any(map(_is_convolution, model.modules()))


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1


def _windows(config: Any, kinds: set[str]) -> Iterator[int]:
    """The tokens that each layer with a window sees; a config that does not list its layers has them everywhere."""
    if not getattr(config, "use_sliding_window", True):
        kinds = kinds & {"chunked_attention"} or {"full_attention"}
    for kind, keys in _WINDOWS.items():
        if not kinds or kind in kinds:
            for key in keys:
                yield from _numbers(getattr(config, key, None))


def _numbers(value: object) -> Iterable[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return (number for number in values if isinstance(number, int) and not isinstance(number, bool) and number > 0)


def accepted(module: nn.Module, **inputs: Any) -> dict[str, Any]:
    """The arguments that a module's forward takes, by name or as any keyword."""
    parameters = inspect.signature(module.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return inputs
    return {name: value for name, value in inputs.items() if name in parameters}


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


class SharedCache(Cache):
    """KV cache that transformers' models fill during generation; also computes the attention, for `packed_attention`.

    It takes the keys and values of packed prompts first, in one forward pass or several; after `share`, one token of
    every live response at a time.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._parts: dict[int, list[list[Tensor]]] = {}  # before `share`: a layer's keys and values, (1, G, T, D)
        self._prompts: dict[int, list[Tensor]] = {}  # a layer's keys and values: (P, G, W, D)
        self._responses: dict[int, list[Tensor]] = {}  # a layer's keys and values: (rows, G, N, D)
        self._num_responses = 0  # K; 0 before `share`
        self._num_columns = 0  # tokens that each live response has in the cache

    @property
    def max_key(self) -> int:
        """Tokens that the longest row sees, the one that is being written included."""
        return self._mask_P11W.shape[-1] + self._num_columns + 1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest row; transformers asks, and gets its positions from us."""
        return self.max_key - 1 if self._num_responses else 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Keep what a layer has computed, and return it."""
        new = [key_states, value_states]
        if self._num_responses == 0:
            self._parts.setdefault(layer_idx, []).append(new)
            return new
        for stored_RGND, new_BG1D in zip(self._responses[layer_idx], new, strict=True):
            stored_RGND[: len(new_BG1D), :, self._num_columns] = new_BG1D[:, :, 0]
        return new

    def share(self, lengths: list[int], num_responses: int, num_new: int, dtype: torch.dtype) -> None:
        """Cut the packed prompts apart and make room for what their responses add.

        Args:
            lengths: tokens of each prompt.
            num_responses: responses of each, K.
            num_new: most tokens that a response adds, N.
            dtype: number format that attention computes in.
        """
        lengths_P = torch.tensor(lengths)
        column_PW = torch.arange(max(lengths)).expand(len(lengths), -1)
        empty_PW = column_PW >= lengths_P[:, None]
        # An empty column gets another token's numbers, which are finite; the mask takes it out.
        source_PW = torch.where(empty_PW, 0, column_PW + (lengths_P.cumsum(0) - lengths_P)[:, None])
        rows = len(lengths) * num_responses
        for layer, parts in self._parts.items():
            packed = [torch.cat(of_parts, dim=2) for of_parts in zip(*parts, strict=True)]
            source = source_PW.to(packed[0].device)
            shared = [x[0].to(dtype)[:, source].transpose(0, 1).contiguous() for x in packed]
            self._prompts[layer] = shared
            self._responses[layer] = [x.new_empty(rows, x.shape[1], num_new, x.shape[3]) for x in shared]
            parts.clear()
        self._mask_P11W = torch.where(empty_PW, -torch.inf, 0.0)[:, None, None].to(source.device, dtype)
        self._num_responses = num_responses
        self._place(np.arange(rows))

    def attend(self, layer: int, query_BH1D: Tensor, scaling: float | None) -> Tensor:
        """Attention of the newest token of each live response: to its prompt, and to the response up to itself.

        Args:
            layer: number of the layer.
            query_BH1D: queries.
            scaling: factor of the scores; None is D ** -0.5.

        Returns:
            (B, 1, H, D), in the query's number format.
        """
        keys_PGWD, values_PGWD = self._prompts[layer]
        rows, columns = len(query_BH1D), self._num_columns + 1
        keys_BGND, values_BGND = (x[:rows, :, :columns] for x in self._responses[layer])
        scale = query_BH1D.shape[-1] ** -0.5 if scaling is None else scaling
        query_BGED = (query_BH1D * scale).to(keys_PGWD.dtype).unflatten(1, (keys_PGWD.shape[1], -1))[:, :, :, 0]

        scores_BGEW = self._by_response(self._by_prompt(query_BGED) @ keys_PGWD.mT + self._mask_P11W)
        scores = torch.cat([scores_BGEW, query_BGED @ keys_BGND.mT], dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(values_PGWD.dtype)
        weights_BGEW, weights_BGEN = weights.split([keys_PGWD.shape[2], columns], dim=-1)
        output_BGED = self._by_response(self._by_prompt(weights_BGEW) @ values_PGWD) + weights_BGEN @ values_BGND
        return output_BGED.flatten(1, 2)[:, None].to(query_BH1D.dtype)

    def next_token(self) -> None:
        """Every layer has taken a token of each live response."""
        self._num_columns += 1

    def keep(self, order_B: np.ndarray) -> None:
        """Go on with fewer responses: the i-th is now what the `order_B[i]`-th was."""
        self._move(self._responses, order_B, self._num_columns)
        slots_B = self._slots_B[order_B]
        prompts_B, numbers_B = np.divmod(slots_B, self._num_responses)
        ended_P = np.bincount(prompts_B, minlength=len(self._mask_P11W)) == 0
        if ended_P.any():
            order_P = compact(ended_P)
            self._move(self._prompts, order_P, self._mask_P11W.shape[-1])
            self._prompts = {layer: [x[: len(order_P)] for x in pair] for layer, pair in self._prompts.items()}
            self._mask_P11W = self._mask_P11W[torch.from_numpy(order_P)]
            place_P = np.zeros(len(ended_P), dtype=np.int64)
            place_P[order_P] = np.arange(len(order_P))
            slots_B = place_P[prompts_B] * self._num_responses + numbers_B
        self._place(slots_B)

    def _place(self, slots_B: np.ndarray) -> None:
        """Say of each live response which prompt it follows: its slot is prompt * K + a number below K of its own."""
        self._slots_B = slots_B
        self._slot_index_B = torch.from_numpy(slots_B).to(self._mask_P11W.device)

    def _move(self, store: dict[int, list[Tensor]], order: np.ndarray, columns: int) -> None:
        """Copy those rows that change their place."""
        [targets] = np.nonzero(order != np.arange(len(order)))
        if len(targets):
            for tensor in (x for pair in store.values() for x in pair):
                tensor[targets, :, :columns] = tensor[order[targets], :, :columns]

    def _by_prompt(self, x_BGEX: Tensor) -> Tensor:
        """(P, G, K * E, X): the responses' rows beside each other; zero where a response has ended."""
        prompts, responses = len(self._mask_P11W), self._num_responses
        x_SGEX = x_BGEX.new_zeros(prompts * responses, *x_BGEX.shape[1:]).index_copy_(0, self._slot_index_B, x_BGEX)
        return x_SGEX.unflatten(0, (prompts, responses)).transpose(1, 2).flatten(2, 3)

    def _by_response(self, x_PGMX: Tensor) -> Tensor:
        """(B, G, E, X): the inverse of `_by_prompt`."""
        x_PGKEX = x_PGMX.unflatten(2, (self._num_responses, -1))
        return x_PGKEX.transpose(1, 2).flatten(0, 1).index_select(0, self._slot_index_B)


def compact(ended: np.ndarray) -> np.ndarray:
    """New order of the rows: the last live rows take the places of those that ended, all others stay."""
    [live] = np.nonzero(~ended)
    order = np.arange(len(live))
    order[ended[: len(live)]] = live[live >= len(live)]
    return order
