"""Folders that our caches keep: each appears whole or not at all, and one process at a time makes it."""

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sheeprlhf.utils.errors import ModelError, SheepError
from sheeprlhf.utils.files import fsync

MARKER = "MADE_BY_SHEEPRLHF"  # a folder without this file is not ours to delete


@contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a cached folder; the system frees it when a process dies, however it dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is preparing {folder.name}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def written_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place when the block ends well. Call it under `locked`."""
    sweep(folder)
    temporary = folder.with_name(f".{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        (temporary / MARKER).touch()
        yield temporary
        for path in [*temporary.iterdir(), temporary]:
            fsync(path)
        os.rename(temporary, folder)
        fsync(folder.parent)
    except BaseException:
        _remove(temporary)
        raise


@contextmanager
def writing_errors(what: str, advice: str) -> Iterator[None]:
    """Inside, an error of the disk becomes a ModelError with advice; safetensors has a class of its own for a full one.

    Args:
        what: what cannot be made, and where.
        advice: how to make room.
    """
    try:
        yield
    except SheepError:
        raise
    except Exception as error:
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise ModelError(f"{what}: {error}; {advice}") from error
        raise


def sweep(folder: Path) -> None:
    """Remove what killed preparations of `folder` left behind; the lock says that none is at work."""
    for left in folder.parent.glob(f".{folder.name}.tmp-*"):
        _remove(left)


def discard(folder: Path) -> None:
    """Remove a folder that we made, at once or not at all. Call it under `locked`.

    Raises:
        FileExistsError: it has no marker, so somebody else may have made it.
    """
    if not (folder / MARKER).is_file():
        raise FileExistsError(f"{folder} was not made by this program: it has no {MARKER}")
    aside = folder.with_name(f".{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    os.rename(folder, aside)
    _remove(aside)


def _remove(folder: Path) -> None:
    """Delete a folder that we made; one without our marker only if it is empty, as after a kill before the marker."""
    if (folder / MARKER).is_file():
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
