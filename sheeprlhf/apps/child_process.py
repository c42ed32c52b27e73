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
from sheeprlhf.utils.launchers import OUTPUT_FILE, child_environment
from sheeprlhf.utils.processes import SAVE_SIGNAL, STOP_SIGNALS, die_with_parent, handled, watched_signals

_FORWARDED_SIGNALS = (*STOP_SIGNALS, SAVE_SIGNAL)


class Children:
    """Starts commands one after the other; made by `children`.

    Attributes:
        stopped_by: the first signal to stop that has come, None if none has.
    """

    def __init__(self) -> None:
        """No command runs yet."""
        self.stopped_by: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._unsent: list[int] = []  # signals that came while no command ran

    def run(self, words: list[str], output: Path | None = None) -> int:
        """Run a command to its end; it prints where this process prints, and is killed if this process dies.

        It has a session of its own, so that a terminal's Ctrl-C does not reach it twice.

        Args:
            words: verb, flags and options.
            output: a file that gets the path of the job's run directory or result.

        Returns:
            Its exit code; 128 + n if signal n killed it, or stopped this process before it.
        """
        package = Path(sheeprlhf.__file__).resolve().parent.parent
        path = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
        sys.stdout.flush()
        self._unsent.clear()
        signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED_SIGNALS)  # the command inherits no handler of this process
        try:
            if self.stopped_by is not None:
                return 128 + self.stopped_by
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "sheeprlhf", *words],
                stdin=subprocess.DEVNULL,
                env={**child_environment(), "PYTHONPATH": path, OUTPUT_FILE: "" if output is None else str(output)},
                start_new_session=True,
                preexec_fn=_prepare_child,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED_SIGNALS)
        while self._unsent:  # another thread took the signal while the command started
            self._process.send_signal(self._unsent.pop(0))
        code = self._process.wait()
        self._process = None
        return 128 - code if code < 0 else code

    def forward_signal(self, signum: int, frame: FrameType | None = None) -> None:
        """A signal handler."""
        if signum != SAVE_SIGNAL and self.stopped_by is None:
            self.stopped_by = signum
        if self._process is None:
            self._unsent.append(signum)
        else:
            self._process.send_signal(signum)


def _prepare_child() -> None:
    """In the new process, before the command: where nothing can be saved yet, or ever, SIGUSR1 does nothing."""
    signal.signal(SAVE_SIGNAL, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED_SIGNALS)
    die_with_parent()


@contextmanager
def children() -> Iterator[Children]:
    """Forward signals to stop or to save to the running command, each as often as it arrives.

    This process waits for it, however long its save takes.
    """
    started = Children()
    with watched_signals(lambda _: None), handled(_FORWARDED_SIGNALS, started.forward_signal):
        yield started
