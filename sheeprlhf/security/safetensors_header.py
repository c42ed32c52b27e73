"""Header of an untrusted safetensors file, read with limits before a library opens the file.

Imports no torch.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from sheeprlhf.utils.output import open_file

MAX_HEADER = 10_000_000  # bytes; of 100,000 tensors it has about as many
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}
_NAME = re.compile(r"[\w./-]{1,512}", re.ASCII)
_SIZED = re.compile(r"(?:BOOL|(?:BF|F|I|U)(?P<bits>8|16|32|64))(?:_E\d+M\d+(?:FNUZ)?)?")


class TensorFacts(NamedTuple):
    """A tensor's number format, such as "F32", and its shape, as the header gives them."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorFacts]:
    """The tensors that a safetensors file declares, by name; none of their bytes is read.

    Args:
        path: a plain file (see `real_file`).

    Raises:
        ValueError: it is no such file, its header is larger than `MAX_HEADER`, or the tensors are not what follows it.
        OSError: it cannot be read.
    """
    with open(open_file(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        start = file.read(1)
        if start != b"{" or length > size - 8:
            raise ValueError("it is not a safetensors file")
        if length > MAX_HEADER:
            raise ValueError(f"its header has {length} bytes, more than {MAX_HEADER}")
        text = start + file.read(length - 1)
    try:
        entries = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    entries.pop("__metadata__", None)
    tensors, places = {}, []
    for name, entry in entries.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"a tensor is named {name[:80]!r}")
        tensors[name], place = _checked(name, entry)
        places.append(place)
    end = 0
    for first, last in sorted(places):
        if first != end:
            raise ValueError("its tensors overlap or leave gaps")
        end = last
    if 8 + length + end != size:
        raise ValueError(f"it declares {8 + length + end} bytes and has {size}")
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("its header has a key twice")
    return entries


def _checked(name: str, entry: Any) -> tuple[TensorFacts, tuple[int, int]]:
    """Check an entry; return the tensor's format and shape, and the offsets of its first byte and its end."""
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, first, last]
        sized = _SIZED.fullmatch(dtype)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"its tensor {name} is not described as one") from error
    if not all(isinstance(number, int) and 0 <= number < 1 << 62 for number in numbers) or len(shape) > 16:
        raise ValueError(f"its tensor {name} has an odd shape or place")
    if sized is None and dtype not in _BITS:
        raise ValueError(f"its tensor {name} has the unknown number format {str(dtype)[:20]!r}")
    bits = _BITS[dtype] if sized is None else int(sized["bits"] or 8)
    if math.prod(shape) * bits != (last - first) * 8:
        raise ValueError(f"its tensor {name} declares a shape that its bytes do not have")
    return TensorFacts(dtype, tuple(shape)), (first, last)
