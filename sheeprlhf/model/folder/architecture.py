"""Properties of a model's architecture by its code and configuration: packed rows, recurrence, rotary frequencies.

Rotary embeddings may have frequencies that depend on the length of a row ("longrope": Phi-3). Rows up to the length of
the original pretraining have one set of frequencies, longer ones another. transformers chooses by the longest row of a
batch; `use_frequencies_of_rows` gives each row those that it has alone. Packed rows that share a prompt, and rows that
grow past that length on a cache of keys, cannot have them. "dynamic" embeddings change beyond
`max_position_embeddings` tokens, which no row may have.

`packing_limit` tells which models compute packed rows. Numbers decide too (`agent/batches.py`), but two short examples
show neither a window that is longer than they are nor, in half precision, how much of one row reaches the next.
"""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from sheeprlhf.model.attention import PACKED, PACKED_EAGER
from sheeprlhf.utils.errors import Notify

_KIND = "longrope"


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
_PACKABLE = ("full_attention", *_WINDOWS)


def uses_packed_attention(model: PreTrainedModel) -> bool:
    """True if the model's attention goes through `packed_attention` (falcon's, for example, does not)."""
    return model.config._attn_implementation in (PACKED, PACKED_EAGER)


def packing_limit(model: PreTrainedModel, longest: int) -> str:
    """The reason that a model's code or configuration excludes packed rows of up to `longest` tokens; empty if none.

    Args:
        model: a language model, or one with a score head.
        longest: tokens of the longest row.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    layers = unpackable_layers(model)
    if layers:
        return layers
    if not uses_packed_attention(model):
        if model._can_set_attn_implementation():
            return f"model.attn_implementation={config._attn_implementation} computes padded batches"
        return f"the attention of {name} cannot be replaced"
    switch = switch_length(model)
    if switch is not None and longest > switch:
        return f"{name} has other rotary embeddings beyond {switch} tokens, the data is up to {longest} long"
    computed = ("sliding_attention",) if _passes_window(model) else ()
    window = min(_windows(config, _layer_kinds(config), computed), default=longest)
    return f"{name} sees {window} tokens back, the data is up to {longest} long" if window < longest else ""


def unpackable_layers(model: PreTrainedModel) -> str:
    """The reason that a model's layers exclude packed rows of any length; empty if none.

    Their code may compute something else with `packed_attention`: DeepSeek V3.2 would not choose keys.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    others = sorted(_layer_kinds(config) - set(_PACKABLE))
    if others:
        return f"{name} has layers of {', '.join(others)}, in which packed rows would read each other"
    if is_recurrent(model):
        return f"{name} has recurrent or convolutional layers, in which packed rows would read each other"
    if getattr(config, "attn_temperature_tuning", False):  # Llama 4 scales queries by the place in the whole row
        return f"{name} scales its attention by the places of tokens in a whole batch"
    return ""


def _layer_kinds(config: Any) -> set[str]:
    return set(getattr(config, "layer_types", None) or ())


def _passes_window(model: PreTrainedModel) -> bool:
    """True if every attention of the decoder tells `packed_attention` its window, by the source of its code."""
    sources = set()
    for kind in {type(module) for module in model.get_decoder().modules()}:  # a part for images has no window
        try:
            sources.add(inspect.getsource(kind.forward))
        except (OSError, TypeError):  # no source: unknown
            return False
    return all("sliding_window=" in source for source in sources if "attention_interface(" in source)


def has_other_parts(model: PreTrainedModel) -> bool:
    """True if a model has parts besides its decoder and head, for images or sound, which text does not pass through."""
    return model.config.get_text_config() is not model.config and model.get_decoder() is not model


def num_positions_of(config: Any) -> int | None:
    """Tokens of the longest row that a model can read, by its configuration; None if that sets no limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a language model, also of one with other parts, or of a module around it; empty if it has none."""
    inner = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)
    decoder: Any = model if inner is None else inner.get_decoder() or inner
    return list(next((part for part in decoder.modules() if isinstance(part, nn.ModuleList)), ()))


def is_recurrent(model: PreTrainedModel) -> bool:
    """True if a model has layers that carry a state from token to token besides attention's keys and values."""
    linear = "linear_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ())
    return linear or bool(getattr(model, "_is_stateful", False)) or any(map(_is_convolution, model.modules()))


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1


def _windows(config: Any, kinds: set[str], computed: Sequence[str]) -> Iterator[int]:
    """The tokens that each layer with a window sees, of kinds of windows that are not computed in packed rows.

    A config that does not list its layers has windows everywhere.
    """
    if not getattr(config, "use_sliding_window", True):
        kinds = kinds & {"chunked_attention"} or {"full_attention"}
    for kind, keys in _WINDOWS.items():
        if kind not in computed and (not kinds or kind in kinds):
            for key in keys:
                yield from _numbers(getattr(config, key, None))


def _numbers(value: object) -> Iterable[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return (number for number in values if isinstance(number, int) and not isinstance(number, bool) and number > 0)


def use_frequencies_of_rows(model: nn.Module) -> None:
    """Give each row of a batch its own frequencies, in every module of the model that chooses by the longest."""
    for module in model.modules():
        if any(True for _ in _switch_lengths(module)):
            module.__class__ = _by_row(type(module))  # type: ignore[arg-type]


def switch_length(model: nn.Module) -> int | None:
    """Tokens beyond which a row has other frequencies; None for a model whose frequencies are the same for all rows."""
    return min((length for module in model.modules() for length in _switch_lengths(module)), default=None)


def outgrows_cache(model: nn.Module, lengths: Iterable[int], num_new: int) -> bool:
    """True if a growing row would get other frequencies than those with which its cached keys were computed.

    Args:
        model: a language model.
        lengths: of the prompts, in tokens.
        num_new: most new tokens of each.
    """
    switch = switch_length(model)
    return switch is not None and any(length <= switch < length + num_new for length in lengths)


def _switch_lengths(module: nn.Module) -> Iterator[int]:
    """Of one module; of several kinds of layers, each with a length of its own."""
    kinds, config = getattr(module, "rope_type", None), getattr(module, "config", None)
    parameters = getattr(config, "rope_parameters", None)
    if kinds == _KIND and isinstance(parameters, dict):
        yield int(parameters["original_max_position_embeddings"])
    elif isinstance(kinds, dict) and isinstance(parameters, dict):
        for layer_type, kind in kinds.items():
            if kind == _KIND:
                yield int(parameters[layer_type]["original_max_position_embeddings"])


@cache
def _by_row(original: type[nn.Module]) -> type[nn.Module]:
    """A class of rotary embeddings that computes short and long rows of a batch apart."""

    class ByRow(original):  # type: ignore[valid-type, misc]
        def forward(self, x: Tensor, position_ids: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
            if len(position_ids) == 1 or position_ids.device.type == "meta":
                return super().forward(x, position_ids, *more, **named)
            is_long_B = position_ids.amax(dim=-1) + 1 > min(_switch_lengths(self))
            found: list[Tensor] = []
            for rows_B in (is_long_B, ~is_long_B):
                if not rows_B.any():
                    continue
                part = super().forward(x, position_ids[rows_B], *more, **named)
                found = found or [one.new_empty(*position_ids.shape, one.shape[-1]) for one in part]
                for whole_BTC, one in zip(found, part, strict=True):
                    whole_BTC[rows_B] = one
            return found[0], found[1]

    ByRow.__name__ = original.__name__
    return ByRow


def configured_router_loss(model: PreTrainedModel, left_out_by: str = "", say: Notify = lambda _: None) -> float:
    """The coefficient of the router's loss that a model's configuration asks for, else 0.

    A line says that the task `left_out_by` trains without it.
    """
    config = model.config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", None) or 0.0
    if not coefficient or not getattr(config, "output_router_logits", False):
        return 0.0
    if left_out_by:
        asked = f"output_router_logits, router_aux_loss_coef={coefficient:g}"
        say(f"the model's config asks for the router's loss ({asked}): task={left_out_by} trains without it")
    return float(coefficient)
