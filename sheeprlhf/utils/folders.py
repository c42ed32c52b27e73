"""Folders of ours: each appears whole or not at all, and only one that carries our marker is ever deleted."""

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sheeprlhf.utils.errors import ModelError, Notify, SheepError
from sheeprlhf.utils.output import create_file, fsync, has_locks, lock, make_folders, make_private, open_lock_file

MARKER = "MADE_BY_SHEEPRLHF"  # a folder without this file is not ours to delete
_SCRATCH = re.compile(r".+\.[0-9a-f]{8}\.tmp\.(\d{1,9})")


@contextmanager
def locked(folder: Path, say: Notify) -> Iterator[None]:
    """Hold the lock of a cached folder; the system frees it when a process dies, however it dies."""
    make_folders(folder.parent)
    path = _lock_file(folder)
    descriptor = open_lock_file(path.parent, path.name)
    try:
        try:
            lock(descriptor, path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is preparing {folder.name}; waiting for it")
            lock(descriptor, path, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def written_folder(folder: Path) -> Iterator[Path]:
    """Make a new folder next to `folder` that replaces it when the block ends without error. Call it under `locked`."""
    sweep(folder)
    temporary = folder.with_name(f".{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        make_private(temporary)
        create_file(temporary, MARKER)
        yield temporary
        for path in [*temporary.iterdir(), temporary]:
            make_private(path)
            fsync(path)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not has_marker(folder):  # another process made it meanwhile, where there are no locks
                raise
            remove_marked(temporary)
        fsync(folder.parent)
    except BaseException:
        remove_marked(temporary)
        raise


@contextmanager
def writing_errors(what: str, advice: str) -> Iterator[None]:
    """Turn an error of the disk into a ModelError with advice; safetensors has its own class for a full disk."""
    try:
        yield
    except SheepError:
        raise
    except Exception as error:
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise ModelError(f"{what}: {error}; {advice}") from error
        raise


def sweep(folder: Path) -> None:
    """Remove what killed preparations of `folder` left behind; the lock says that none is at work.

    Where the file system has no locks, it stays: it may be of a process that is at work.
    """
    for left in folder.parent.glob(f".{folder.name}.tmp-*"):
        if has_locks(_lock_file(folder)):
            remove_marked(left)


def discard(folder: Path) -> None:
    """Remove a folder that we made, at once or not at all. Call it under `locked`.

    Raises:
        FileExistsError: it has no marker, so somebody else may have made it.
    """
    if not has_marker(folder):
        raise FileExistsError(f"{folder} was not made by this program: it has no {MARKER}")
    aside = folder.with_name(f".{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    os.rename(folder, aside)
    remove_marked(aside)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Make a marked temporary folder next to `target`, which is removed with its content when the block ends."""
    scratch = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.tmp.{os.getpid()}")
    scratch.mkdir()
    try:
        make_private(scratch)
        create_file(scratch, MARKER)
        yield scratch
    finally:
        remove_marked(scratch)


def sweep_scratch(folder: Path, prefix: str = "") -> None:
    """Remove the scratch folders with this prefix that killed processes left; those of living processes stay."""
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _SCRATCH.fullmatch(path.name)
        if match and path.name.startswith(prefix) and (int(match[1]) == os.getpid() or not _is_alive(int(match[1]))):
            remove_marked(path)


def is_scratch(folder: Path) -> bool:
    """True if a folder is, or is in, an unfinished temporary folder of a running or killed process."""
    return any(_SCRATCH.fullmatch(path.name) and has_marker(path) for path in (folder, folder.parent))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def has_marker(folder: Path) -> bool:
    """True if a folder has this program's marker; neither the folder nor the marker may be a link."""
    return not folder.is_symlink() and not (folder / MARKER).is_symlink() and (folder / MARKER).is_file()


def remove_marked(folder: Path) -> None:
    """Delete a folder of ours, as far as the system allows; one without our marker only if it is empty.

    The marker goes last: a process killed in between leaves a folder that still carries it.
    """
    with suppress(OSError):
        if has_marker(folder):
            for path in folder.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != MARKER:
                    path.unlink()
            (folder / MARKER).unlink()
        folder.rmdir()  # as after a kill before the marker
