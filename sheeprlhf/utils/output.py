"""Write below a folder without following symbolic links. Every module of the package writes through these functions.

The folder itself is chosen by the user and may be a link. Below it no component may be one: the folder may be an
untrusted run, and its links could lead to any file of the user. Files and folders are created for this user only.

Lustre without `flock`, NFS, CIFS, vfat and FUSE lack locks, fsync, permissions or renames over a file: the functions
below `_LACKING` continue with one warning about each. A folder of several files appears whole or not at all, and only
one that carries our marker is ever deleted.
"""

import errno
import fcntl
import os
import re
import shutil
import stat
import sys
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path, PurePath
from typing import TextIO

from sheeprlhf.utils.errors import DiskFullError, ModelError, Notify, SheepError, UnsafePathError
from sheeprlhf.utils.launchers import is_rank_zero

_MAX_SHOWN = 5
_MARK_BYTES = 4096


def safe_path(folder: Path, name: str) -> Path:
    """Return `folder/name`. Raises UnsafePathError if it leads out, or a component below `folder` is a link."""
    parts = PurePath(name).parts
    if PurePath(name).is_absolute() or ".." in parts:
        raise UnsafePathError(f"{name} leads out of {folder}: give a name inside of the folder")
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
    advice = "remove the link, or move the file or folder that it leads to into its place"
    return f"{path} is a symbolic link: inside of a run nothing is written or deleted through links; {advice}"


def make_folders(folder: Path) -> None:
    """Create a folder and the missing ones above it, for this user only; one that exists stays as it is."""
    for path in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        try:
            path.mkdir()
        except FileExistsError:  # another process was faster, or a link leads nowhere
            if not path.is_dir():
                raise
        else:
            make_private(path)


def make_folder(folder: Path, name: str) -> Path:
    """Create `folder/name` unless it exists. Raises UnsafePathError as `safe_path`, OSError if that fails."""
    path = safe_path(folder, name)
    make_folders(path)
    return path


def create_file(folder: Path, name: str, content: bytes = b"") -> Path:
    """Create a new file in a folder that exists, whole or not at all. Raises UnsafePathError and OSError."""
    path = safe_path(folder, name)
    descriptor = open_file(path, os.O_WRONLY | os.O_EXCL | os.O_CREAT)
    try:
        with open(descriptor, "wb") as file:
            make_private(path)
            file.write(content)
    except BaseException as error:
        path.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = error.filename or str(path)  # only opening a file names it
        raise
    return path


def write_file(folder: Path, name: str, content: bytes) -> Path:
    """Write a file on the disk, whole or not at all, and missing folders. Raises UnsafePathError and OSError."""
    path = safe_path(folder, name)
    _check_plain(path)
    make_folders(path.parent)
    try:
        temporary = create_file(path.parent, f".{path.name}.{uuid.uuid4().hex[:8]}", content)
    except OSError as error:
        error.filename = str(path)
        raise
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
    """Open a plain text file to append to, created if missing. Raises UnsafePathError and OSError."""
    path = safe_path(folder, name)
    descriptor = _open_plain(path, os.O_WRONLY | os.O_APPEND)
    return open(descriptor, "a", newline="", encoding="utf-8", errors="replace")


def is_own_file(path: Path, *marks: bytes) -> bool:
    """True for a plain file that has one of our marks at its beginning, so that it may be replaced."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            beginning = file.read(_MARK_BYTES)
    except OSError:
        return False
    return any(mark in beginning for mark in marks)


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


def open_file(path: Path, flags: int) -> int:
    """A descriptor that no child inherits. Raises OSError if the file is a symbolic link, or cannot be opened."""
    flags |= os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        if error.errno not in _LACKING or path.is_symlink():
            raise
    return os.open(path, flags, 0o600)


def lock(descriptor: int, path: Path, operation: int) -> bool:
    """Take a lock of `fcntl.flock`; False if the file system has none. Raises BlockingIOError with LOCK_NB."""
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
    """Give a file or folder of ours to its owner only, whatever the umask."""
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
    """Rename a file to a name that may exist. Raises OSError if that fails; both files are as they were then."""
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
    """Turn an error of the disk into a ModelError with advice."""
    try:
        yield
    except SheepError:
        raise
    except Exception as error:
        if is_disk_error(error):
            raise ModelError(f"{what}: {error}; {advice}") from error
        raise


def is_disk_error(error: BaseException) -> bool:
    """True if writing failed: safetensors and tokenizers, written in Rust, raise no OSError for a full disk."""
    of_tokenizers = type(error) is Exception and "(os error " in str(error)
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError" or of_tokenizers


def sweep(folder: Path) -> None:
    """Remove what killed preparations of `folder` left, under its lock; it stays where there are no locks."""
    for left in folder.parent.glob(f".{folder.name}.tmp-*"):
        if has_locks(_lock_file(folder)):
            remove_marked(left)


def discard(folder: Path) -> None:
    """Remove a marked folder, at once or not at all, under `locked`. Raises FileExistsError without a marker."""
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
    with suppress(PermissionError, OverflowError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
    return True


def has_marker(folder: Path) -> bool:
    """True if a folder has this program's marker; neither the folder nor the marker may be a link."""
    return not folder.is_symlink() and not (folder / MARKER).is_symlink() and (folder / MARKER).is_file()


def remove_marked(folder: Path) -> None:
    """Delete a folder of ours as far as possible, the marker last; one without marker only if it is empty."""
    with suppress(OSError):
        if has_marker(folder):
            for path in folder.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != MARKER:
                    path.unlink()
            (folder / MARKER).unlink()
        folder.rmdir()  # as after a kill before the marker


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def read_small(path: Path, limit: int) -> bytes:
    """The content of a plain file of at most `limit` bytes. Raises OSError for others; a pipe would never end."""
    content = read_tail(path, limit + 1)
    if len(content) > limit:
        raise OSError(f"{path} has more than {limit} bytes")
    return content


def read_tail(path: Path, num_bytes: int) -> bytes:
    """The last bytes of a plain file, or all of it if it is shorter. Raises OSError if there is no plain file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is not a plain file")
        file.seek(max(0, status.st_size - num_bytes))
        return file.read(num_bytes)


def real_path(path: Path, root: Path) -> Path:
    """The target of `path`, inside `root` or the blobs of its snapshot. Raises OSError if missing or elsewhere."""
    home = root.resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    try:
        real = path.resolve(strict=True)
    except RuntimeError as error:  # links in a circle
        raise OSError(str(error)) from error
    if not any(real.is_relative_to(place) for place in homes):
        raise OSError(f"{path} is a link that leads out of its folder: put the file itself there")
    return real


def real_file(path: Path, root: Path) -> Path:
    """`real_path` of a plain file. Raises OSError as it does, and if the file is not plain (a pipe would never end)."""
    real = real_path(path, root)
    if not stat.S_ISREG(os.lstat(real).st_mode):
        raise OSError(f"{path} is not a plain file")
    return real


def disk_full(error: OSError, run_dir: Path | None = None) -> DiskFullError | None:
    """The error to raise if writing, for a run or another command, failed on a full disk or quota; None otherwise."""
    if error.errno not in _FULL:
        return None
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else run_dir or Path()
    free = shutil.disk_usage(path.parent if path.parent.is_dir() else run_dir or Path()).free
    again = "give the command again" if run_dir is None else f"continue with resume_from={run_dir}"
    advice = f"{free:,} bytes are free there. Free space, then {again}"
    return DiskFullError(f"cannot write {path}: {error.strerror}; {advice}")
