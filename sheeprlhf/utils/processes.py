"""Processes that belong to another."""

import ctypes
import os
import signal
import sys


def die_with_parent() -> None:
    """This process is killed when its parent dies, even by kill -9 (Linux; elsewhere nothing).

    Call it early. Ranks above zero need it: a killed rank zero would leave them waiting in a collective.
    """
    if not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request
        os.kill(os.getpid(), signal.SIGKILL)
