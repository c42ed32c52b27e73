"""Losses on a device that does not exist: misplaced tensors, and waits of the host for the device, show without a GPU.

Tensors of the device have a shape, a number format and no content: an operation on tensors of two devices is an error,
and so is reading a value (`.item()`, `if tensor:`, a boolean index). Copies between the devices are recorded. A build
of torch without CUDA cannot imitate CUDA itself, but a device that torch leaves to others. Padded batches are left out:
in them transformers picks the places that are predicted by a mask, for which the host waits once.

`main` needs a process of its own: torch fixes its list of devices at the first backward pass.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

from tests.support.losses import LOSSES, loss_case

DEVICE = "absent"


class _Hook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False  # torch does not choose the device by itself


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class Copies(TorchDispatchMode):
    """Names of the operations whose inputs and outputs are on different devices."""

    def __init__(self) -> None:
        super().__init__()
        self.between_devices: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {
            x.device.type for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor) and x.dim()
        }
        if len(devices) > 1:
            self.between_devices.append(str(func))
        return result


def to_device(module: nn.Module) -> None:
    made: dict[torch.Tensor, Any] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    made.setdefault(tensor, torch.empty_like(tensor, device=DEVICE, requires_grad=tensor.requires_grad))
                    tensors[name] = made[tensor]


def problems_of(name: str, folder: Path) -> list[str]:
    """Run a loss and its backward pass on the device."""
    loss_fn, module, content = loss_case(name, folder)
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_device(module)
        content = tree_map_only(torch.Tensor, partial(torch.empty_like, device=DEVICE), content)
        with Copies() as copies:
            try:
                output = loss_fn(module, content)
                output.total.backward()
            except (RuntimeError, NotImplementedError) as error:
                return [f"{type(error).__name__}: {str(error)[:200]}"]
    misplaced = [key for key, value in output.metrics.items() if value.device.type != DEVICE]
    return copies.between_devices + misplaced + ([] if output.total.device.type == DEVICE else ["total"])


def main() -> None:
    """Print the problems of each loss as JSON."""
    _setup_privateuseone_for_python_backend(rename=DEVICE, hook=_Hook(), backend_module=_Module())
    with tempfile.TemporaryDirectory() as temporary:
        found = {name: problems_of(name, Path(temporary)) for name in LOSSES}
    json.dump(found, sys.stdout)
