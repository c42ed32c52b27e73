"""What this machine has, asked without importing torch."""

import ctypes
import importlib.metadata
import os


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
    """Why `fabric.accelerator=cuda` cannot work here with these devices; None if it can."""
    count = cuda_device_count()
    if count == 0:
        return "fabric.accelerator=cuda: this machine has no usable CUDA device; give fabric=cpu"
    if "+cpu" in importlib.metadata.version("torch"):
        return "fabric.accelerator=cuda: the installed torch is a CPU build; install a CUDA build, or give fabric=cpu"
    asked = devices if isinstance(devices, int) else max(devices) + 1 if isinstance(devices, list) else 1
    if asked > count:
        return f"fabric.devices needs {asked} CUDA device(s), this machine has {count}; give fabric.devices={count}"
    return None
