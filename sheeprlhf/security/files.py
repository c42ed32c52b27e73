"""Reading of untrusted files: plain files of bounded size; errors of a full disk."""

import errno
import os
import shutil
import stat
from pathlib import Path

from sheeprlhf.utils.errors import DiskFullError

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


def disk_full(error: OSError, folder: Path) -> DiskFullError | None:
    """The error to raise if writing below `folder` failed because its disk or a quota is full; None otherwise."""
    if error.errno not in _FULL:
        return None
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else folder
    free = shutil.disk_usage(path.parent if path.parent.is_dir() else folder).free
    return DiskFullError(
        f"cannot write {path}: {error.strerror}; {free:,} bytes are free there. Free space, then continue with "
        f"resume_from={folder}"
    )
