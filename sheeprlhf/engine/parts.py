"""Files of sharded tensors: every rank writes its own rows of a safetensors file, and holds no whole tensor.

A file has the bytes that `save_file` writes of whole tensors, so any number of ranks reads it.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import transformers.modeling_utils
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from sheeprlhf.engine.manifest import write_folder
from sheeprlhf.engine.shard import Part, part_of, whole
from sheeprlhf.utils.errors import CheckpointError, ModelError, UnsafePathError
from sheeprlhf.utils.lightning import Fabric, RankGroup, gather_objects
from sheeprlhf.utils.output import create_file, open_file

_FORMATS = {  # in the order in which safetensors writes them
    **{torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16"},
    **{torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"},
}


def write_together(
    fabric: Fabric | RankGroup,
    target: Path,
    create: Callable[[Path], None],
    fill: Callable[[Path, bool], None],
    finish: Callable[[Path], None],
    *,
    num_bytes: int = 0,
) -> None:
    """All ranks: make folder `target` as `write_folder` does: it appears whole or not at all.

    Args:
        fabric: where it runs.
        target: the folder's place; its parent exists.
        create: on rank zero, first.
        fill: on every rank, with the temporary folder, and whether all ranks see it.
        finish: on rank zero, last.
        num_bytes: approximate size, for the message when the disk is full.

    Raises:
        CheckpointError: on all ranks; it could not be written, and nothing is left behind.
    """

    def share(folder: Path | None) -> None:
        folder = fabric.broadcast(folder)
        if folder is None:
            return
        try:
            fill(folder, all(gather_objects(fabric, folder.is_dir())))
            own = None
        except OSError as error:
            own = str(error)
        for problem in filter(None, gather_objects(fabric, own)):
            raise OSError(problem)

    problem, is_shared = None, False

    def writer(folder: Path) -> None:
        nonlocal is_shared
        create(folder)
        is_shared = True
        share(folder)
        finish(folder)

    try:
        if fabric.is_global_zero:
            write_folder(target, writer, num_bytes=num_bytes)
        else:
            share(None)
    except (CheckpointError, ModelError, UnsafePathError, OSError) as error:
        problem = str(error)
    if fabric.is_global_zero and not is_shared:
        share(None)
    problem = fabric.broadcast(problem)
    if problem is not None:
        raise CheckpointError(problem)


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int], int]:
    """The first bytes of a safetensors file, the place of each tensor in the file, and the file's size."""
    order = list(_FORMATS)
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    places, end = {}, 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
        places[name], end = end, end + tensor.nbytes
        format_name, shape = _FORMATS[tensor.dtype], list(tensor.shape)
        entries[name] = {"dtype": format_name, "shape": shape, "data_offsets": [places[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + place for name, place in places.items()}, start + end


def create_tensor_file(
    folder: Path, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Make a safetensors file with place for these tensors, whose numbers are not written yet."""
    header, _, size = _header(tensors, metadata)
    path = create_file(folder, name, header)
    os.truncate(path, size)


def write_rows(
    fabric: Fabric | RankGroup,
    path: Path,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Tensor | Part],
    *,
    metadata: Mapping[str, str] | None = None,
    seen: bool = True,
) -> None:
    """All ranks: write the rows that this rank holds into a file of `create_tensor_file`; other tensors on rank zero.

    Args:
        fabric: where it runs.
        path: the file.
        tensors: the file's tensors: number formats and shapes.
        values: their numbers: sharded tensors, the parts that this rank holds, or whole ones, equal on all ranks.
        metadata: as of `create_tensor_file`.
        seen: all ranks see the file; else rank zero gets one whole tensor after the other.

    Raises:
        OSError: this rank could not write; it has taken part in everything.
    """
    _, places, _ = _header(tensors, metadata)
    problem: OSError | None = None
    with ExitStack() as stack:
        file = stack.enter_context(open(open_file(path, os.O_RDWR), "r+b")) if seen or fabric.is_global_zero else None
        for name, place in places.items():
            part = _part_to_write(fabric, values.get(name), seen=seen)
            if file is None or part is None or problem is not None:
                continue
            try:
                for start, run in _runs(part, tensors[name]):
                    file.seek(place + start)
                    file.write(run)
            except OSError as error:
                problem = error
        if file is not None and problem is None:
            file.flush()
            os.fsync(file.fileno())
    if problem is not None:
        raise problem


def _part_to_write(fabric: Fabric | RankGroup, value: Tensor | Part | None, *, seen: bool) -> Part | None:
    """All ranks: what this rank writes of a tensor; None if nothing. Arguments as of `write_rows`."""
    if seen and isinstance(value, DTensor):
        value = part_of(value) or value
    if isinstance(value, Tensor):
        value = Part((), whole(value), fabric.is_global_zero)
    return value if value is not None and value.owns else None


def _runs(part: Part, target: Tensor) -> Iterator[tuple[int, memoryview]]:
    """Bytes of a part that are next to each other in the target's bytes, each with their place there."""
    if not part.local.numel():
        return
    first, column = ([cut.start for cut in part.place] + [0, 0])[:2]
    row = target.nbytes // target.shape[0] if target.ndim else target.nbytes
    column = column * row // target.shape[1] if column else 0
    numbers = part.local.detach().to(device="cpu", dtype=target.dtype).contiguous()
    has_whole_rows = numbers.shape[1:] == target.shape[1:]
    runs = numbers.reshape(1 if has_whole_rows else len(numbers), -1).view(torch.uint8).numpy()
    for index, run in enumerate(runs):
        yield (first + index) * row + column, run.data


@contextmanager
def without_contents(module: nn.Module) -> Iterator[None]:
    """Replace sharded parameters by tensors without content within the block."""
    made: dict[Tensor, nn.Parameter] = {}
    places = []
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                places.append((part, name, parameter))
                if parameter not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                    made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    try:
        for part, name, parameter in places:
            setattr(part, name, made[parameter])
        yield
    finally:
        for part, name, parameter in places:
            setattr(part, name, parameter)


class _SavedFile(NamedTuple):
    """A file that `save_pretrained` writes: its tensors by name, without content, and the parameters that they are."""

    metadata: dict[str, str]
    tensors: dict[str, Tensor]
    parameters: dict[str, str]


def keeps_parameters(model: PreTrainedModel) -> bool:
    """All ranks: True if `save_pretrained` writes the model's parameters as they are, under whatever names."""
    with without_contents(model):
        places = {p.untyped_storage()._cdata: p.shape for p in model.parameters() if p.is_meta}
        saved = revert_weight_conversion(model, model.state_dict()).values()
        return all(places.get(t.untyped_storage()._cdata) == t.shape for t in saved if t.is_meta)


def write_model(fabric: Fabric, target: Path, module: nn.Module, save: Callable[[Path], None]) -> None:
    """All ranks: write a folder whose `save` calls `save_pretrained` of a sharded model, one tensor after the other.

    Args:
        fabric: where it runs.
        target: the folder's place.
        module: contains the model, of which `keeps_parameters` is true.
        save: writes everything else of the folder too; called on rank zero.

    Raises:
        CheckpointError: on all ranks; it could not be written.
    """
    files: dict[str, _SavedFile] = {}
    plain: dict[str, Tensor] = {}  # buffers

    def record(tensors: dict[str, Tensor], path: str, metadata: dict[str, str]) -> None:
        names = {p.untyped_storage()._cdata: name for name, p in module.named_parameters() if p.is_meta}
        parameters = {key: names[t.untyped_storage()._cdata] for key, t in tensors.items() if t.is_meta}
        plain.update({key: t for key, t in tensors.items() if not t.is_meta})
        file = _SavedFile(metadata, {key: t.to("meta") for key, t in tensors.items()}, parameters)
        create_tensor_file(Path(path).parent, Path(path).name, file.tensors, metadata)
        files[Path(path).name] = file

    def create(folder: Path) -> None:
        with without_contents(module), patch.object(transformers.modeling_utils, "safe_save_file", record):
            save(folder)

    def fill(folder: Path, seen: bool) -> None:
        found = fabric.broadcast(files)
        weights = dict(module.named_parameters())
        for name, file in found.items():
            values = plain | {key: weights[parameter] for key, parameter in file.parameters.items()}
            write_rows(fabric, folder / name, file.tensors, values, metadata=file.metadata, seen=seen)

    write_together(fabric, target, create, fill, lambda _: None)
