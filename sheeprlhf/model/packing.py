"""Rules that decide which models compute packed rows, from the model's code and configuration alone.

Numbers decide too (`agent/batching.py`), but two short examples show neither a window that is longer than they are nor,
in half precision, how much of one row reaches the next.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sheeprlhf.model.load import uses_packed_attention
from sheeprlhf.model.rotary import switch_length

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
