"""The lock of a run directory: one process works there, anyone may look whether one does. Imports no torch."""

import fcntl
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from sheeprlhf.utils.errors import ConfigError, RunInUseError
from sheeprlhf.utils.filesystem import lock, open_file
from sheeprlhf.utils.output import open_lock_file

LOCK_FILE = ".lock"
_WAITS = (0.01, 0.02, 0.04, 0.08)  # seconds; who only looks needs microseconds


def is_locked(run_dir: Path) -> bool:
    """True if another process holds the run directory's lock, as far as this user may know.

    The look takes a lock for some microseconds, shared with others that look; `RunLock` waits for it.
    """
    try:
        descriptor = open_file(run_dir / LOCK_FILE, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        lock(descriptor, run_dir / LOCK_FILE, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _lock_for_good(descriptor: int, path: Path) -> None:
    """Take the lock alone, if need be after those that only look."""
    for seconds in _WAITS:
        try:
            lock(descriptor, path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(seconds)
    lock(descriptor, path, fcntl.LOCK_EX | fcntl.LOCK_NB)


class RunLock:
    """Rank zero only: hold the run directory for this process while the `with` block runs.

    The kernel frees the lock however the process dies, so no stale lock exists.
    """

    def __init__(self, run_dir: Path) -> None:
        """Prepare the lock without taking it."""
        self._path = run_dir / LOCK_FILE
        self._descriptor: int | None = None

    def __enter__(self) -> "RunLock":
        """Take the lock.

        Raises:
            RunInUseError: another process holds it; the message names that process.
        """
        try:
            descriptor = open_lock_file(self._path.parent, self._path.name)
        except OSError as error:
            raise ConfigError(f"cannot lock the run directory {self._path.parent}: {error.strerror}") from error
        try:
            _lock_for_good(descriptor, self._path)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise RunInUseError(
                f"{self._path.parent} is in use by {holder}; wait for it, or start another run without resume"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._descriptor = descriptor
        # A forked worker that outlives us must not keep the lock.
        os.register_at_fork(after_in_child=self._close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Free the lock."""
        self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
