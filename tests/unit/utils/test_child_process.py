"""Commands in processes of their own, which signals reach through this one."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sheeprlhf.utils import processes as child
from sheeprlhf.utils.processes import STOP_SIGNALS

SAVES = """#!/bin/sh
trap 'sleep 0.3; touch {folder}/saved; exit 9' TERM INT HUP QUIT XCPU USR2
touch {folder}/ready
while true; do sleep 0.05; done
"""


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_a_signal_to_stop_is_for_the_command_and_its_save_is_awaited(
    signum: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program"
    program.write_text(SAVES.format(folder=tmp_path))
    program.chmod(0o700)
    monkeypatch.setattr(child.sys, "executable", str(program))

    def send() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signum)

    threading.Thread(target=send, daemon=True).start()
    with child.children() as started:
        assert started.run([]) == 9
        assert (tmp_path / "saved").exists()
        assert started.stopped_by == signum
        assert started.run([]) == 128 + signum  # nothing is started any more
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_a_signal_that_another_thread_takes_while_the_command_starts_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main thread blocks signals then; a second thread does not, and the handler runs before the start is over."""
    program = tmp_path / "program"
    program.write_text(SAVES.format(folder=tmp_path))
    program.chmod(0o700)
    monkeypatch.setattr(child.sys, "executable", str(program))
    popen = child.subprocess.Popen

    def start(*args: Any, **kwargs: Any) -> Any:
        process = popen(*args, **kwargs)
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        started.forward_signal(signal.SIGTERM)
        return process

    monkeypatch.setattr(child.subprocess, "Popen", start)
    with child.children() as started:
        assert started.run([]) == 9
        assert started.stopped_by == signal.SIGTERM
