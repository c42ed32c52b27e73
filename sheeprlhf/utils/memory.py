"""Memory: readable sizes, a process's peak, and out-of-memory errors that name the phase. Imports no torch."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from sheeprlhf.utils.errors import OutOfMemory

Phase = Literal[
    "loading the model",
    "forward pass",
    "backward pass",
    "optimizer step",
    "evaluation",
    "generation",
    "the rest of the run",
]
_SAID = re.compile(r"out of memory|can.?t allocate memory|not enough memory|_ALLOC_FAILED", re.IGNORECASE)
_AMOUNT = re.compile(r"allocate (?P<number>[\d.]+) ?(?P<unit>[KMGTPE]iB|bytes)")


@contextmanager
def phase(name: Phase) -> Iterator[None]:
    """A block, or as a decorator a function, whose lack of memory is an OutOfMemory of this name."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not _is_out_of_memory(error):
            raise
        raise OutOfMemory(name, _amount(str(error))) from error


def _is_out_of_memory(error: Exception) -> bool:
    """CUDA has a class of its own, which torch's CPU allocator does not use."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _SAID.search(str(error)) is not None


def _amount(message: str) -> str:
    """Number of bytes in an allocator's error message."""
    found = _AMOUNT.search(message)
    if not found:
        return ""
    number = float(found["number"])
    size = f"{number / 2**30:.2f} GiB" if found["unit"] == "bytes" else f"{found['number']} {found['unit']}"
    return f"{size} more were asked for"


def size_text(num_bytes: float) -> str:
    """A size for people: "1.4 GB", "23 MB"."""
    for unit, name in ((1e12, "TB"), (1e9, "GB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.0f} kB"


def peak_memory() -> int | None:
    """Bytes of main memory that this process has had at most so far; None where the system does not tell."""
    with suppress(OSError):
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(found[1]) << 10 if found else None
    return None
