"""Training mode, inputs and arguments of modules; state of random generators."""

import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode inside; each one's own training flag afterwards."""
    training = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, flag in training:
            submodule.training = flag


@contextmanager
def forward_of_zero(original: nn.Module) -> Iterator[None]:
    """Replace the module's forward by 0 * every trainable parameter, so that all gradient hooks of a wrapper fire."""
    own_forward = vars(original).get("forward")
    original.forward = lambda _: sum(p.sum() * 0 for p in original.parameters() if p.requires_grad)
    try:
        yield
    finally:
        del original.forward
        if own_forward is not None:
            original.forward = own_forward


def rng_state() -> dict[str, Tensor]:
    """The state of every generator, as tensors that restore it exactly."""
    _, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    words_of_numpy = [*numpy["state"]["key"].tolist(), numpy["state"]["pos"], numpy["has_gauss"]]
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor(words_of_numpy, dtype=torch.int64),
        "numpy_gauss": torch.tensor(numpy["gauss"], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Restore what `rng_state` returned. A CUDA state is left out where there is no CUDA device."""
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, state["numpy_gauss"].item()))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Whatever is drawn inside, the generators are as before afterwards."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def accepted(module: nn.Module, **inputs: Any) -> dict[str, Any]:
    """The arguments that a module's forward takes, by name or as any keyword."""
    parameters = inspect.signature(module.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return inputs
    return {name: value for name, value in inputs.items() if name in parameters}


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Record the inputs of a module during the block."""
    inputs: list[Tensor] = []
    with module.register_forward_pre_hook(lambda _, given: inputs.append(given[0])):
        yield inputs
