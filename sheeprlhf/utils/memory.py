"""Memory: readable sizes, a process's peak, glibc's settings, out-of-memory errors with a phase. Imports no torch."""

import ctypes
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator
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
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
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


def set_malloc(*, sharded: bool) -> None:
    """Set which freed memory glibc gives back to the system; settings in the environment have priority.

    Blocks of up to 32 MB stay in the process for later tensors: else an optimizer step gives back and clears 15 to
    45 MB. With `sharded`, blocks from 1 MB on go back: gathered weights and whole gradients are used once in a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt and "GLIBC_TUNABLES" not in os.environ and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(_M_MMAP_THRESHOLD, (1 if sharded else 32) << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 20 if sharded else -1)


def missing_modules(names: Iterable[str]) -> list[str]:
    """Those top-level modules that are not installed; none is imported."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def cuda_device_count() -> int:
    """CUDA devices that this process may use, from the driver itself; 0 without a driver."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return 0
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def cuda_problem(devices: int | str | list[int] | None) -> str | None:
    """The reason that `fabric.accelerator=cuda` cannot work with these devices; None if it can."""
    count = cuda_device_count()
    if count == 0:
        return "fabric.accelerator=cuda: this machine has no usable CUDA device; give fabric=cpu"
    if "+cpu" in importlib.metadata.version("torch"):
        return "fabric.accelerator=cuda: the installed torch is a CPU build; install a CUDA build, or give fabric=cpu"
    asked = devices if isinstance(devices, int) else max(devices) + 1 if isinstance(devices, list) else 1
    if asked > count:
        return f"fabric.devices needs {asked} CUDA device(s), this machine has {count}; give fabric.devices={count}"
    return None


def available_memory() -> int | None:
    """Bytes of main memory available to a new process, within its container's limit; None if unknown."""
    room = [_field("/proc/meminfo", "MemAvailable:", 1024)]
    for limit, used, statistics, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):  # of the second and the first version of control groups
        folder = "/sys/fs/cgroup"
        most, now = _field(f"{folder}/{limit}"), _field(f"{folder}/{used}")
        if most is not None and now is not None:
            room.append(max(0, most - now + (_field(f"{folder}/{statistics}", cache) or 0)))
    return min((value for value in room if value is not None), default=None)


def _field(path: str, name: str = "", unit: int = 1) -> int | None:
    """A number of a file: the one behind `name` at the start of a line, or the first; None if there is none."""
    try:
        with open(path, encoding="ascii") as file:
            words = next((line.removeprefix(name).split() for line in file if line.startswith(name)), [])
    except OSError:
        return None
    return int(words[0]) * unit if words and words[0].isdigit() else None
