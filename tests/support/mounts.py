"""Small and read-only file systems, where this user may mount some."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A new file system of `size` bytes in memory at `folder`; where none can be mounted, the test is skipped."""
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def resize(folder: Path, size: int) -> None:
    """Make a small disk larger."""
    _mount("-o", f"remount,size={size}", str(folder))


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """Inside, nothing can be written below `folder`, by root neither."""
    _mount("--bind", str(folder), str(folder))
    try:
        _mount("-o", "remount,ro,bind", str(folder))
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _mount(*words: str) -> None:
    if shutil.which("mount") is None:
        pytest.skip("there is no `mount` here")
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")


def fill(folder: Path) -> Path:
    """A file that takes all the space of a small disk."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return path
