"""Signals to stop or to save: noted when they come, acted on at the end of an optimizer step by all ranks together."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import torch

from sheeprlhf.utils.lightning import Fabric
from sheeprlhf.utils.processes import SAVE_SIGNAL, STOP_SIGNALS, handled, note_stop, watched_signals

_SIGNALS = (*STOP_SIGNALS, SAVE_SIGNAL)  # the order in which they count when several came


class SignalFlags:
    """Signals that came to this process since the run began."""

    def __init__(self) -> None:
        """None so far."""
        self._pending: set[int] = set()
        self._interrupts = 0

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

    def stop_pending(self) -> int:
        """The signal to stop that came to this process; 0 if none did."""
        return next((int(signum) for signum in STOP_SIGNALS if signum in self._pending), 0)

    def exit_at_second_interrupt(self, signum: int) -> None:
        """Called from a thread for each signal: the main thread may be where no handler runs."""
        self._interrupts += signum == signal.SIGINT
        if self._interrupts > 1:
            os._exit(128 + signal.SIGINT)
        if signum == signal.SIGINT:
            with suppress(OSError):  # the terminal may be gone
                os.write(2, b"\nstopping after this step; press Ctrl-C again to exit at once without saving\n")


@contextmanager
def noted_signals(is_rank_zero: bool) -> Iterator[SignalFlags]:
    """Inside, signals are noted instead of ending the process; the old handlers are back afterwards.

    A second Ctrl-C ends the process at once with exit status 130. Ranks above zero ignore Ctrl-C, which a terminal
    sends to all of them, and follow rank zero. SIGHUP stays ignored under nohup. Off the main thread nothing changes:
    Python allows no handlers there.
    """
    flags = SignalFlags()
    heard = [signum for signum in _SIGNALS if is_rank_zero or signum != signal.SIGINT]
    unheard = [] if is_rank_zero else [signal.SIGINT]
    try:
        with (
            handled(heard, flags.note),
            handled(unheard, signal.SIG_IGN),
            watched_signals(flags.exit_at_second_interrupt),
        ):
            yield flags
    finally:
        if flags.stop_pending():
            note_stop(flags.stop_pending())
