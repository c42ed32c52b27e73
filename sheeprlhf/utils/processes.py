"""Processes that belong to another, and what a signal does to them."""

import ctypes
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SECONDS_TO_PASS_ON = 1.0
_SECONDS_TO_COME_AGAIN = 0.02  # after what was called is left


def die_with_parent(parent: int | None = None) -> None:
    """This process is killed when its parent dies, even by kill -9 (Linux; elsewhere nothing).

    Call it early. Ranks above zero need it: a killed rank zero would leave them waiting in a collective.

    Args:
        parent: who started this process, if it is known: it may have died before this call.
    """
    if not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    parent = os.getppid() if parent is None else parent
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request
        os.kill(os.getpid(), signal.SIGKILL)


class BoundToThis:
    """Sent to a process that is being spawned, it calls `die_with_parent` there as soon as it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        """What reads it: unpickling calls the function, and gives its None."""
        return die_with_parent, (os.getpid(),)


def start_bound(_: BoundToThis | None, start: Callable[..., None], *args: Any) -> None:
    """The initializer of a pool whose processes end with this one even while they import what `start` needs.

    A spawned process reads this function, whose module imports next to nothing, then its arguments in their order.
    """
    start(*args)


class Interrupts:
    """A handler of Ctrl-C, which raises KeyboardInterrupt and knows when; once the program is leaving, it ends at once.

    Attributes:
        leaving: what there was to do is done, or given up. A KeyboardInterrupt would only disturb Python's end.
        waits: none is raised now; see `interrupts_wait`.
        came: one waits to be raised.
    """

    def __init__(self) -> None:
        """None so far."""
        self.leaving = self.waits = self.came = False
        self._last = -math.inf

    def __call__(self, signum: int, frame: FrameType | None = None) -> None:
        """Called by Python between two instructions of the main thread."""
        if self.leaving:
            os._exit(128 + signum)
        self.came = self.waits
        if self.waits:
            return
        self._last = time.monotonic()
        raise KeyboardInterrupt

    def just_came(self) -> bool:
        """Whether there was one a moment ago."""
        return time.monotonic() - self._last < _SECONDS_TO_PASS_ON


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Inside, Ctrl-C waits until the block ends: it takes moments, and a library would break if it were cut short."""
    handler = signal.getsignal(signal.SIGINT)
    if not isinstance(handler, Interrupts):
        yield
        return
    handler.waits = True
    try:
        yield
    finally:
        handler.waits = False
        if handler.came:
            handler(signal.SIGINT)


def ignore_interrupts() -> None:
    """Ctrl-C does nothing any more: at its very end Python gives handlers back to the kernel, which would kill it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def just_interrupted() -> bool:
    """Whether an error of now may be a library's way to pass a KeyboardInterrupt on: some make it one of their own."""
    handler = signal.getsignal(signal.SIGINT)
    return isinstance(handler, Interrupts) and handler.just_came()


@contextmanager
def heard_interrupts() -> Iterator[Interrupts]:
    """Inside, Ctrl-C is heard as Python's own handler would, if that one is there: who ignores it goes on to.

    And it is heard for sure: Python prints and drops a KeyboardInterrupt that it raises while it calls a `__del__` or a
    weak reference's callback; here it comes again. Off the main thread nothing changes: Python allows no handlers
    there.
    """
    interrupts = Interrupts()
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupts
        return
    signal.signal(signal.SIGINT, interrupts)
    hook, main = sys.unraisablehook, threading.get_ident()

    def heard(of: "sys.UnraisableHookArgs") -> None:
        if issubclass(of.exc_type, KeyboardInterrupt):
            threading.Timer(_SECONDS_TO_COME_AGAIN, signal.pthread_kill, (main, signal.SIGINT)).start()
        else:
            hook(of)

    sys.unraisablehook = heard
    try:
        yield interrupts
    finally:
        sys.unraisablehook = hook
        if not interrupts.leaving:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def ignored(signum: int) -> Iterator[None]:
    """Inside, a signal does nothing, in the processes started there neither, unless one asks for it.

    Off the main thread nothing changes: Python allows no handlers there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signum, before)
