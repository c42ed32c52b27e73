"""Commands of this program in processes of their own, which signals reach through this one."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import sheeprlhf
from sheeprlhf.utils.processes import die_with_parent

_PASSED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Children:
    """Starts commands one after the other; made by `children`.

    Attributes:
        stopped_by: the first signal to stop that has come, None if none has.
    """

    def __init__(self) -> None:
        """No command runs yet."""
        self.stopped_by: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, words: list[str]) -> int:
        """Run a command to its end; it prints where this process prints, and is killed if this process dies.

        It has a session of its own, so that a terminal's Ctrl-C does not reach it twice.

        Args:
            words: verb, flags and options.

        Returns:
            Its exit code; 128 + n if signal n killed it.
        """
        package = Path(sheeprlhf.__file__).resolve().parent.parent
        path = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
        sys.stdout.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED)  # none is lost or passed twice while it starts
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "sheeprlhf", *words],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
                preexec_fn=_begin,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED)
        code = self._process.wait()
        self._process = None
        return 128 - code if code < 0 else code

    def pass_on(self, signum: int, frame: FrameType | None = None) -> None:
        """A signal handler."""
        if signum != signal.SIGUSR1 and self.stopped_by is None:
            self.stopped_by = signum
        if self._process is not None:
            self._process.send_signal(signum)


def _begin() -> None:
    """In the new process, before the command: where nothing can be saved yet, or ever, SIGUSR1 does nothing."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED)
    die_with_parent()


@contextmanager
def children() -> Iterator[Children]:
    """Inside, Ctrl-C, SIGTERM and SIGUSR1 are for the command that runs, each as often as it comes."""
    started = Children()
    handlers = {signum: signal.signal(signum, started.pass_on) for signum in _PASSED}
    try:
        yield started
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
