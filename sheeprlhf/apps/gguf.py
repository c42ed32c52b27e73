"""Read a GGUF file (version 3): its facts, and its tensors as float32.

Only the number formats of the model that `fetch` brings. A count or an offset that leads outside the file raises
ValueError.
"""

import math
import struct
from typing import Any, NamedTuple

import numpy as np

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_BLOCK = 32  # numbers that share a scale
_F32, _Q4_1, _Q8_0 = 0, 3, 8
_UNITS = {
    _F32: np.dtype("<f4"),
    _Q4_1: np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("halves", "u1", _BLOCK // 2)]),
    _Q8_0: np.dtype([("scale", "<f2"), ("numbers", "i1", _BLOCK)]),
}


class _Place(NamedTuple):
    """A tensor's shape, rows first, its number format, and where it begins in the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class Gguf:
    """An opened file.

    Attributes:
        facts: the metadata by key: numbers, texts and lists of them.
        tensors: the place of every tensor by name.
    """

    def __init__(self, content: bytes) -> None:
        """Read the header.

        Raises:
            ValueError: it is no whole GGUF file of version 3.
        """
        self._content = content
        self._position = 0
        try:
            if content[:4] != b"GGUF" or struct.unpack_from("<I", content, 4) != (3,):
                raise ValueError("not a GGUF file of version 3")
            self._position = 8
            num_tensors, num_facts = self._numbers("Q", 2)
            self.facts: dict[str, Any] = {self._text(): self._value() for _ in range(num_facts)}
            self.tensors = {self._text(): self._place() for _ in range(num_tensors)}
        except (struct.error, OverflowError, UnicodeDecodeError, KeyError) as error:
            raise ValueError(f"its header is damaged: {error}") from error
        alignment = self.facts.get("general.alignment", 32)
        self._data = -(-self._position // alignment) * alignment

    def _numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        form = f"<{count}{code}"
        found = struct.unpack_from(form, self._content, self._position)
        self._position += struct.calcsize(form)
        return found

    def _text(self) -> str:
        (length,) = self._numbers("Q")
        (raw,) = self._numbers("s", length)
        return raw.decode()

    def _value(self) -> Any:
        (kind,) = self._numbers("I")
        if kind == _TEXT:
            return self._text()
        if kind != _ARRAY:
            return self._numbers(_SCALARS[kind])[0]
        (inner,) = self._numbers("I")
        (count,) = self._numbers("Q")
        return [self._text() for _ in range(count)] if inner == _TEXT else list(self._numbers(_SCALARS[inner], count))

    def _place(self) -> _Place:
        (num_dimensions,) = self._numbers("I")
        fastest_first = self._numbers("Q", num_dimensions)
        (kind,) = self._numbers("I")
        (offset,) = self._numbers("Q")
        return _Place(fastest_first[::-1], kind, offset)

    def tensor(self, name: str) -> np.ndarray:
        """A tensor as float32.

        Raises:
            ValueError: the file ends before it, or its number format is another one.
        """
        shape, kind, offset = self.tensors[name]
        if kind not in _UNITS:
            raise ValueError(f"tensor {name} has number format {kind}, which is not read here")
        unit = _UNITS[kind]
        count, start = math.prod(shape) // (1 if kind == _F32 else _BLOCK), self._data + offset
        if start + count * unit.itemsize > len(self._content):
            raise ValueError(f"the file ends before its tensor {name}")
        blocks = np.frombuffer(self._content, unit, count, start)
        if kind == _F32:
            return blocks.reshape(shape)
        scales = blocks["scale"].astype(np.float32)[:, None]
        if kind == _Q8_0:
            return (blocks["numbers"] * scales).reshape(shape)
        low, high = blocks["halves"] & 15, blocks["halves"] >> 4
        numbers = np.concatenate([low, high], axis=1) * scales
        numbers += blocks["minimum"].astype(np.float32)[:, None]
        return numbers.reshape(shape)
