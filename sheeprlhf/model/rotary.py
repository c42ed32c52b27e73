"""Rotary embeddings whose frequencies depend on the length of a row ("longrope": Phi-3 and its kin).

Rows up to the length of the original pretraining have one set of frequencies, longer ones another. transformers chooses
by the longest row of a batch; here each row of a batch has those that it has alone. Two kinds of batches cannot have
them: packed rows that share a prompt, and rows that grow past that length on a cache of keys. "dynamic" embeddings
change beyond `max_position_embeddings` tokens, which no row may have.

Letters: B rows, T positions.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from torch import Tensor, nn

_KIND = "longrope"


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
