"""Processes that belong to another, and a signal that is none of their business."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


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
