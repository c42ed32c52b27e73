"""Small files that may be a stranger's, or half written: plain files of bounded size, and nothing that blocks."""

import os
import stat
from pathlib import Path


def read_small(path: Path, limit: int) -> bytes:
    """The content of a plain file.

    Raises:
        OSError: it is missing, not a plain file (a pipe would never end), or larger than `limit` bytes.
    """
    content = read_tail(path, limit + 1)
    if len(content) > limit:
        raise OSError(f"{path} has more than {limit} bytes")
    return content


def read_tail(path: Path, num_bytes: int) -> bytes:
    """The last bytes of a plain file; all of it, if it is shorter.

    Raises:
        OSError: it is missing or not a plain file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is not a plain file")
        file.seek(max(0, status.st_size - num_bytes))
        return file.read(num_bytes)
