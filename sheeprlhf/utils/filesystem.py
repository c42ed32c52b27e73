"""Locks, fsync, permissions and renames where a file system may lack them: go on with one warning about each.

Lustre without `flock`, NFS, CIFS, vfat and FUSE lack some of them. Every module of the package asks through these
functions.
"""

import errno
import fcntl
import os
import stat
import sys
import uuid
from contextlib import suppress
from functools import cache
from pathlib import Path

from sheeprlhf.utils.launchers import is_rank_zero

_LACKING = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_NO_FSYNC = (*_LACKING, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR)
_NO_RENAME_OVER = (*_LACKING, errno.EEXIST, errno.EPERM, errno.EACCES)
_NO_LOCKS = "locks: two processes can work there at once; start only one on a run, and prepare data once"
_NO_FSYNC_TEXT = "fsync: what was written can be lost when the machine fails, not when a process is killed"
_NO_MODES = "permissions: other users may read what is written there; give a private place, or mount it with a umask"
_NO_REPLACE = "renames over a file: a file can be missing after a kill in the middle of its replacement"


@cache
def _warn(lacking: str, folder: str) -> None:
    """Once in a process for each folder's file system and guarantee."""
    if is_rank_zero():
        print(f"warning: the file system of {folder} lacks {lacking}", file=sys.stderr)


def _warn_of(path: Path, lacking: str) -> None:
    with suppress(OSError):
        while not os.path.ismount(path := path.absolute()) and path != path.parent:
            path = path.parent
    _warn(lacking, str(path))


def open_file(path: Path, flags: int, mode: int = 0o600) -> int:
    """A descriptor of a file that is not a symbolic link; no child process inherits it.

    Raises:
        OSError: it is a link, or cannot be opened.
    """
    flags |= os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_NOFOLLOW, mode)
    except OSError as error:
        if error.errno not in _LACKING or path.is_symlink():
            raise
    return os.open(path, flags, mode)


def lock(descriptor: int, path: Path, operation: int) -> bool:
    """Take a lock of `fcntl.flock`; False if the file system has none.

    Args:
        descriptor: an open file.
        path: the file.
        operation: LOCK_EX or LOCK_SH, with LOCK_NB if another holder is an error.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        raise
    except OSError:
        _warn_of(path.parent, _NO_LOCKS)
        return False
    return True


def has_locks(path: Path) -> bool:
    """True if the file system of this lock file supports locks, or if the file does not exist."""
    try:
        descriptor = open_file(path, os.O_RDWR)
    except OSError as error:
        return error.errno == errno.ENOENT
    try:
        return lock(descriptor, path, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def fsync(path: Path) -> None:
    """Bring a file's or folder's bytes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
        _warn_of(path, _NO_FSYNC_TEXT)
    finally:
        os.close(descriptor)


def make_private(path: Path) -> None:
    """Give a file or folder of ours to its owner alone, whatever the umask."""
    mode = 0o700 if path.is_dir() else 0o600
    if stat.S_IMODE(path.stat().st_mode) == mode:
        return
    try:
        path.chmod(mode)
    except OSError as error:
        if error.errno not in (*_LACKING, errno.EPERM, errno.EACCES):
            raise
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        _warn_of(path, _NO_MODES)


def replace(source: Path, target: Path) -> None:
    """Rename a file to a name that may exist, at once where the file system can.

    Raises:
        OSError: it cannot be renamed; both files are as they were.
    """
    try:
        os.replace(source, target)
        return
    except OSError as error:
        if error.errno not in _NO_RENAME_OVER or not target.is_file():
            raise
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    os.rename(target, aside)
    try:
        os.rename(source, target)
    except OSError:
        os.rename(aside, target)
        raise
    aside.unlink()
    _warn_of(target.parent, _NO_REPLACE)
