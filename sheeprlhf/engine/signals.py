"""Ctrl-C, SIGTERM and SIGUSR1: noted when they come, acted on at the end of an optimizer step by all ranks together."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from sheeprlhf.utils.lightning import Fabric

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAVE_SIGNAL = signal.SIGUSR1  # save now and go on
_SIGNALS = (*STOP_SIGNALS, SAVE_SIGNAL)  # the order in which they count when several came


class SignalFlags:
    """Which signals came to this process since the run began."""

    def __init__(self) -> None:
        """None so far."""
        self._pending: set[int] = set()

    def note(self, signum: int, frame: FrameType | None = None) -> None:
        """A signal handler."""
        self._pending.add(signum)

    def agreed(self, fabric: Fabric) -> int | None:
        """All ranks: the signal to act on, the same on every rank; a save request is told once, a stop stays."""
        came = [int(signum in self._pending) for signum in _SIGNALS]
        if fabric.world_size > 1:
            counts = torch.tensor(came, device=fabric.device)
            fabric.all_reduce(counts, reduce_op="sum")
            came = counts.tolist()
        signum = next((int(signum) for signum, count in zip(_SIGNALS, came, strict=True) if count), None)
        if signum == SAVE_SIGNAL:
            self._pending.discard(SAVE_SIGNAL)
        return signum


@contextmanager
def noted_signals(is_rank_zero: bool) -> Iterator[SignalFlags]:
    """Inside, signals are noted instead of ending the process; the old handlers are back afterwards.

    A second Ctrl-C ends the process at once with exit status 130. Ranks above zero ignore Ctrl-C, which a terminal
    sends to all of them, and follow rank zero. Off the main thread nothing changes: Python allows no handlers there.
    """
    flags = SignalFlags()
    if threading.current_thread() is not threading.main_thread():
        yield flags
        return
    old_handlers = {signum: signal.signal(signum, flags.note) for signum in _SIGNALS}
    if not is_rank_zero:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    old_descriptor = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=_exit_at_second_interrupt, args=(read_end,), name="interrupts", daemon=True).start()
    try:
        yield flags
    finally:
        signal.set_wakeup_fd(old_descriptor)
        os.close(write_end)  # ends the thread
        for signum, handler in old_handlers.items():
            signal.signal(signum, handler)


def _exit_at_second_interrupt(read_end: int) -> None:
    """Watch from a thread: the main thread may be inside a kernel or a collective, where no handler runs."""
    interrupts = 0
    while number := os.read(read_end, 1):
        if number[0] == signal.SIGINT:
            interrupts += 1
            if interrupts == 1:
                os.write(2, b"\nstopping after this step; press Ctrl-C again to exit at once without saving\n")
            else:
                os._exit(128 + signal.SIGINT)
    os.close(read_end)
