"""Weights that stay in their files until they are sharded; then each rank reads its rows.

A loaded parameter is a `FileParameter`: it has the shape, number format and place of a weight, and placeholder numbers.
So the code between loading and sharding (adapters, heads, the check of packed batches) runs as on real weights.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn

_NUM_PLACEHOLDERS = 1 << 20  # numbers that all placeholders share, at least
_STD = 0.02


class Source(NamedTuple):
    """The safetensors file that holds a weight, and the name of the tensor in it."""

    path: Path
    name: str

    def read(self, index: tuple[slice, ...] = ()) -> Tensor:
        """Read a part of the tensor, by default all."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_slice(self.name)[index] if index else file.get_tensor(self.name)


class FileParameter(nn.Parameter):
    """A parameter whose numbers are in a file; a copy of it is one too."""

    source: Source

    @classmethod
    def of(cls, data: Tensor, source: Source, *, requires_grad: bool) -> Self:
        """Make one with these placeholder numbers."""
        parameter = cls(data, requires_grad)
        parameter.source = source
        return parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> "FileParameter":
        """Share the placeholder numbers."""
        return memo.setdefault(id(self), self.of(self.data, self.source, requires_grad=self.requires_grad))


def content(tensor: Tensor) -> Tensor:
    """The whole weight of a parameter, read if it is in a file."""
    return tensor.source.read().to(tensor.dtype) if isinstance(tensor, FileParameter) else tensor.detach()


def placeholders(sources: Iterable[Source], dtype: torch.dtype) -> dict[str, Tensor]:
    """Stand-ins for the tensors of files by name, views of one small buffer, each at an address of its own.

    Matrices have random numbers, vectors ones, so that a forward pass computes numbers of the usual size. Tensors that
    are no floats are read.
    """
    shapes, found = {}, {}
    for source in sources:
        with safe_open(source.path, framework="pt") as file:
            rows = file.get_slice(source.name)
            shapes[source.name] = tuple(rows.get_shape())
            if not rows.get_dtype().startswith(("F", "BF")):
                found[source.name] = file.get_tensor(source.name)
    sizes = [shape[0] + math.prod(shape[1:]) for shape in shapes.values() if shape]
    numbers = torch.empty(max([_NUM_PLACEHOLDERS, *sizes]) + len(shapes), dtype=dtype)
    numbers.normal_(std=_STD, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(len(shapes) + 1, dtype=dtype)
    for index, (name, shape) in enumerate(shapes.items()):
        if name in found:
            continue
        if len(shape) < 2:
            found[name] = ones[index].expand(shape)
            continue
        row = math.prod(shape[1:])
        step = max(1, (len(numbers) - len(shapes) - row) // max(1, shape[0]))
        inner = torch.empty(shape[1:], device="meta").stride()
        found[name] = numbers.as_strided(shape, (step, *inner), index)
    return found


def keep_in_files(model: nn.Module, stand_ins: Mapping[str, Tensor], sources: Mapping[str, Source]) -> list[str]:
    """Make `FileParameter`s of the parameters that `from_pretrained` filled with `placeholders`; read buffers.

    Returns:
        The names of parameters that are no placeholder: new ones, and those that the model computes from its files.
    """
    origins = {tensor.data_ptr(): name for name, tensor in stand_ins.items() if tensor.numel()}
    made: dict[Tensor, FileParameter] = {}
    others = []
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and buffer.data_ptr() in origins:
                module._buffers[name] = sources[origins[buffer.data_ptr()]].read().to(buffer.dtype)
        for name, parameter in module.named_parameters(recurse=False):
            origin = origins.get(parameter.data_ptr())
            if origin is None or parameter.shape != stand_ins[origin].shape:
                others.append(f"{path}.{name}".removeprefix("."))
                continue
            if parameter not in made:
                made[parameter] = FileParameter.of(
                    parameter.data, sources[origin], requires_grad=parameter.requires_grad
                )
            setattr(module, name, made[parameter])
    return others


def drop_placeholders(module: nn.Module) -> dict[str, Source]:
    """Move the module's `FileParameter`s to the meta device, shared ones stay shared; return their files by name."""
    made: dict[Tensor, FileParameter] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if not isinstance(parameter, FileParameter) or parameter.is_meta:
                continue
            if parameter not in made:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                made[parameter] = FileParameter.of(empty, parameter.source, requires_grad=parameter.requires_grad)
            setattr(part, name, made[parameter])
    return {name: p.source for name, p in module.named_parameters() if isinstance(p, FileParameter)}


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of all weights, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(content(tensor).cpu().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
