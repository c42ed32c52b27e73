"""Write below a folder without following symbolic links. Every module of the package writes through these functions.

The folder itself is chosen by the user and may be a link. Below it no component may be one: the folder may be an
untrusted run, and its links could lead to any file of the user. Files and folders are created for this user alone.
"""

import os
import stat
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePath
from typing import TextIO

from sheeprlhf.utils.errors import UnsafePathError
from sheeprlhf.utils.filesystem import fsync, make_private, open_file, replace

_MAX_SHOWN = 5


def safe_path(folder: Path, name: str) -> Path:
    """Return `folder/name` after a check of every component below `folder`.

    Raises:
        UnsafePathError: a component is a symbolic link, or `name` leads out of the folder.
    """
    parts = PurePath(name).parts
    if PurePath(name).is_absolute() or ".." in parts:
        raise UnsafePathError(
            f"{name} leads out of {folder}: nothing is written there; give a name inside of the folder"
        )
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise UnsafePathError(_link_problem(path))
    return path


def link_problems(folder: Path, files: Iterable[str], folders: Iterable[str] = ()) -> list[str]:
    """Describe the symbolic links among files and folders of these names in `folder`, and directly in the folders."""
    paths = [folder / name for name in folders]
    links = [path for path in (*(folder / name for name in files), *paths) if path.is_symlink()]
    for path in paths:
        if path.is_dir() and path not in links:
            with os.scandir(path) as entries:
                links += sorted(path / entry.name for entry in entries if entry.is_symlink())
    more = f" (and {len(links) - _MAX_SHOWN} more links)" if len(links) > _MAX_SHOWN else ""
    return [_link_problem(path) + (more if path is links[0] else "") for path in links[:_MAX_SHOWN]]


def _link_problem(path: Path) -> str:
    return (
        f"{path} is a symbolic link: inside of a run nothing is written or deleted through links; remove the link, or "
        "move the file or folder that it leads to into its place"
    )


def make_folders(folder: Path) -> None:
    """Create a folder and the missing ones above it, for this user alone; one that exists stays as it is."""
    for path in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        try:
            path.mkdir()
        except FileExistsError:  # another process was faster, or a link leads nowhere
            if not path.is_dir():
                raise
        else:
            make_private(path)


def make_folder(folder: Path, name: str) -> Path:
    """Create `folder/name` unless it exists.

    Raises:
        UnsafePathError: as `safe_path`.
        OSError: it cannot be created.
    """
    path = safe_path(folder, name)
    make_folders(path)
    return path


def create_file(folder: Path, name: str, content: bytes = b"") -> Path:
    """Create a file that does not exist yet, in a folder that does.

    Raises:
        UnsafePathError: as `safe_path`.
        OSError: it cannot be written, or exists; the error names the file, and no part of it is left behind.
    """
    path = safe_path(folder, name)
    with open(open_file(path, os.O_WRONLY | os.O_EXCL | os.O_CREAT), "wb") as file:
        try:
            make_private(path)
            file.write(content)
            file.flush()
        except BaseException as error:
            path.unlink()
            if isinstance(error, OSError) and error.errno is not None:
                error.filename = error.filename or str(path)  # only opening a file names it
            raise
    return path


def write_file(folder: Path, name: str, content: bytes) -> Path:
    """Write a file on the disk: all of the content, or what was there before. Missing folders are created.

    Raises:
        UnsafePathError: as `safe_path`, or it exists and is not a plain file.
        OSError: it cannot be written; nothing is left behind.
    """
    path = safe_path(folder, name)
    _check_plain(path)
    make_folders(path.parent)
    temporary = create_file(path.parent, f".{path.name}.{uuid.uuid4().hex[:8]}", content)
    try:
        fsync(temporary)
        replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    fsync(path.parent)
    return path


def open_append(folder: Path, name: str) -> TextIO:
    """Open a text file to append to; it is created if missing, in a folder that exists. Other characters become '?'.

    Raises:
        UnsafePathError: as `safe_path`, or it is not a plain file.
        OSError: it cannot be opened.
    """
    path = safe_path(folder, name)
    descriptor = _open_plain(path, os.O_WRONLY | os.O_APPEND)
    return open(descriptor, "a", newline="", encoding="utf-8", errors="replace")


def open_lock_file(folder: Path, name: str) -> int:
    """Open a lock file to read and write, created if missing; returns a descriptor. Raises as `open_append`."""
    return _open_plain(safe_path(folder, name), os.O_RDWR)


def _open_plain(path: Path, flags: int) -> int:
    is_new = not os.path.lexists(path)
    _check_plain(path)
    descriptor = open_file(path, flags | os.O_NONBLOCK | os.O_CREAT)
    if is_new:
        make_private(path)
    return descriptor


def _check_plain(path: Path) -> None:
    """Raises UnsafePathError if the path exists and is not a plain file: a pipe would wait forever."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise UnsafePathError(f"{path} is not a plain file: it is not written to; remove it")
