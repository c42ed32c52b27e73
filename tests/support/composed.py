"""What commands compute alike, computed once in a process of tests: compositions, and sizes of models."""

import copy
import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
from omegaconf import DictConfig

from sheeprlhf.config import compose
from sheeprlhf.config.compose import SAVED_CHOICE, Source

_compose = compose._compose_base
_compositions: dict[Any, DictConfig] = {}


def compose_once(source: Source, chosen: compose.Chosen, words: list[str]) -> DictConfig:
    """A copy of the composition of these groups; Hydra takes a third of a short command for it.

    Folders of the user's and choices of an earlier run may change, so they are always composed.
    """
    overrides = [override.input_line or "" for override in chosen.hydra]
    if source.extra is not None or any(word.endswith(f"={SAVED_CHOICE}") for word in words):
        return _compose(source, chosen, words)
    key = (source, *words, "", *overrides)
    if key not in _compositions:
        _compositions[key] = _compose(source, chosen, words)
    found = copy.deepcopy(_compositions[key])
    found.hydra.runtime.cwd = os.getcwd()
    return found


@functools.cache
def _measure_once() -> Callable[..., Any]:
    from sheeprlhf.model.memory import measure

    sizes: dict[str, Any] = {}

    def size_of(*arguments: Any, **named: Any) -> Any:
        key = repr((arguments, named))  # options with lists have no hash
        if key not in sizes:
            sizes[key] = measure(*arguments, **named)
        return sizes[key]

    return size_of


def measure_once(patch: pytest.MonkeyPatch) -> None:
    """Measure the size of a model once for all memory plans; its files must not change."""
    from sheeprlhf.task.scale_plan import step_plan

    size_of = _measure_once()
    patch.setattr("sheeprlhf.model.memory.measure", size_of)
    patch.setitem(step_plan.__kwdefaults__, "size_of", size_of)
