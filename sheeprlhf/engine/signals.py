"""Signals to stop or to save: recorded by a handler, acted on at the end of an optimizer step by all ranks together."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import torch

from sheeprlhf.utils.lightning import Fabric
from sheeprlhf.utils.processes import SAVE_SIGNAL, STOP_SIGNALS, handled, handles_interrupts, note_stop, watched_signals

_SIGNALS = (*STOP_SIGNALS, SAVE_SIGNAL)  # the order in which they count when several came


class SignalFlags:
    """Signals that this process received since the run began.

    Args:
        exits: a second Ctrl-C ends the process; else, in a notebook for example, it raises KeyboardInterrupt.
    """

    def __init__(self, *, exits: bool = True) -> None:
        self._pending: set[int] = set()
        self._interrupts, self._exits = 0, exits

    def note(self, signum: int, frame: FrameType | None = None) -> None:
        """Record a signal; a signal handler."""
        if signum == signal.SIGINT and signum in self._pending and not self._exits:
            raise KeyboardInterrupt
        self._pending.add(signum)

    def agreed(self, fabric: Fabric) -> int | None:
        """All ranks: the signal to act on, the same on every rank; a save request is returned once, a stop always."""
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
        """The stop signal that this process received; 0 if there was none."""
        return next((int(signum) for signum in STOP_SIGNALS if signum in self._pending), 0)

    def exit_at_second_interrupt(self, signum: int) -> None:
        """Watch signals from a thread: the main thread may be where no handler runs."""
        self._interrupts += signum == signal.SIGINT
        if self._interrupts > 1 and self._exits:
            os._exit(128 + signal.SIGINT)
        if signum == signal.SIGINT:
            with suppress(OSError):  # the terminal may be gone
                os.write(2, b"\nstopping after this step; press Ctrl-C again to exit at once without saving\n")


@contextmanager
def noted_signals(is_rank_zero: bool) -> Iterator[SignalFlags]:
    """Record signals instead of ending the process; the old handlers are restored afterwards.

    A second Ctrl-C ends the process at once with exit status 130, and raises KeyboardInterrupt outside of the command
    line. Ranks above zero ignore Ctrl-C, which a terminal sends to all of them, and follow rank zero. SIGHUP stays
    ignored under nohup. Nothing changes in other threads than the main one: Python allows no handlers there.
    """
    flags = SignalFlags(exits=handles_interrupts())
    recorded = [signum for signum in _SIGNALS if is_rank_zero or signum != signal.SIGINT]
    ignored = [] if is_rank_zero else [signal.SIGINT]
    try:
        with (
            handled(recorded, flags.note),
            handled(ignored, signal.SIG_IGN),
            watched_signals(flags.exit_at_second_interrupt),
        ):
            yield flags
    finally:
        if flags.stop_pending():
            note_stop(flags.stop_pending())
