"""Processes that end with the one they belong to, and signals to stop at any time."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sheeprlhf.data.prepare import Stream
from sheeprlhf.rollout.environment_pool import EnvironmentPool
from sheeprlhf.security.user_calls import FunctionCaller
from sheeprlhf.utils import processes
from sheeprlhf.utils import processes as child
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.processes import (
    STOP_SIGNALS,
    Terminated,
    ignored,
    interrupts_wait,
    just_interrupted,
    reliable_sigint,
)
from tests.unit.data.toy import byte_tokenizer, local, prepare

POOL = """
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

from sheeprlhf.utils.processes import BoundToThis, start_bound

if __name__ == "__main__":
    import slow_import

    bound = (start_bound, (BoundToThis(), slow_import.start)) if sys.argv[1] == "bound" else (slow_import.start, ())
    ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), *bound).submit(print).result()
"""
SLOW = """
import multiprocessing
import os
import time

if multiprocessing.current_process().name != "MainProcess":
    with open("pid.tmp", "w") as file:
        file.write(str(os.getpid()))
    os.rename("pid.tmp", "pid")
    time.sleep(60)


def start():
    pass
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel is asked in Linux's way")
@pytest.mark.parametrize("kind", ["bound", "loose"])
def test_a_process_of_a_pool_ends_with_its_parent_while_it_imports(kind: str, tmp_path: Path) -> None:
    """The loose one shows that this test can fail: it looks at its parent after its imports only."""
    (tmp_path / "slow_import.py").write_text(SLOW)
    (tmp_path / "pool.py").write_text(POOL)
    parent = subprocess.Popen([sys.executable, "pool.py", kind], cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    child = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + (10 if kind == "bound" else 1)
    while runs(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    lives = runs(child)
    if lives:
        os.kill(child, signal.SIGKILL)
    assert lives == (kind == "loose")


def runs(pid: int) -> bool:
    """Whether a process is there and not yet dead."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


PROGRAM = """
import atexit
import os
import signal
import sys
import time

from sheeprlhf import cli
from sheeprlhf.utils import processes

def stuck():
    processes._SECONDS_TO_END = 0.3
    print("in a kernel", flush=True)
    __import__("hashlib").pbkdf2_hmac("sha256", b"", b"", 10**9)

def own_error():
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape") from None

class Slow:
    def __del__(self):
        print("deleting", flush=True)
        time.sleep(60)

def deleting():
    Slow()
    time.sleep(60)

class Late:  # goes when sys is taken down, after all other modules
    def __init__(self):
        self.write, self.kill, self.pid = os.write, os.kill, os.getpid()

    def __del__(self):
        self.write(1, b"going\\n")
        self.kill(self.pid, 2)
        self.write(1, b"gone\\n")

def at_end():
    print("ending", flush=True)
    time.sleep(60)

def action(words):
    print("ready", flush=True)
    {
        "plain": lambda: time.sleep(60),
        "own error": own_error,
        "deleting": deleting,
        "stuck": stuck,
        "late": lambda: setattr(sys, "late", Late()),
        "end": lambda: atexit.register(at_end),
    }[words[0]]()
    return 3 if words[0] in ("end", "late") else 0

cli._dispatch = action
cli.run()
"""


@pytest.mark.parametrize(
    ("what", "last_line", "signum"),
    [
        ("plain", "ready", signal.SIGINT),
        ("own error", "ready", signal.SIGINT),
        ("deleting", "deleting", signal.SIGINT),
        ("end", "ending", signal.SIGINT),
        ("deleting", "deleting", signal.SIGHUP),
        ("stuck", "in a kernel", signal.SIGTERM),
    ],
)
def test_ctrl_c_at_any_time_is_no_error_and_no_traceback(what: str, last_line: str, signum: int) -> None:
    """While it works, where a library makes it an error of its own or Python drops it, and when Python is ending."""
    words = [sys.executable, "-c", PROGRAM, what]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != last_line:
            assert process.poll() is None
        time.sleep(0.2)  # what it printed, it printed before it sleeps
        process.send_signal(signum)
        _, printed = process.communicate(timeout=20)
    assert process.returncode == 128 + signum
    assert len(printed.splitlines()) == (what not in ("end", "stuck"))
    assert "Traceback" not in printed


def test_ctrl_c_at_the_very_end_changes_nothing() -> None:
    """When Python has given its signals back to the kernel: the exit code is what was decided."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, "late"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "ready\ngoing\ngone\n", "")


def test_an_error_long_after_ctrl_c_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with reliable_sigint():
        assert not just_interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert just_interrupted()
        now = time.monotonic()
        monkeypatch.setattr(processes.time, "monotonic", lambda: now + 2)
        assert not just_interrupted()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_must_not_be_cut_short_ends_before_ctrl_c_is_heard() -> None:
    done = []

    def interrupted_twice() -> None:
        with interrupts_wait():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            done.append("whole")
        done.append("never")

    with reliable_sigint():
        with pytest.raises(KeyboardInterrupt):
            interrupted_twice()
        with interrupts_wait():
            done.append("again")
    assert done == ["whole", "again"]
    with interrupts_wait(), pytest.raises(KeyboardInterrupt):  # where Python's own handler is
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("signum", sorted({*STOP_SIGNALS} - {signal.SIGINT}))
def test_a_signal_to_stop_raises_once(signum: int) -> None:
    """A launcher may send it again while what it ended cleans up; the exit code is that of a shell."""
    before = signal.getsignal(signum)
    with reliable_sigint():
        with pytest.raises(Terminated) as stopped:
            signal.raise_signal(signum)
        assert stopped.value.code == 128 + signum
        assert just_interrupted() == signum
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signum) == before
    try:
        signal.signal(signum, signal.SIG_IGN)
        with reliable_sigint():
            assert signal.getsignal(signum) == signal.SIG_IGN
    finally:
        signal.signal(signum, before)


def test_who_ignores_ctrl_c_goes_on_to() -> None:
    """As what a shell starts in the background does."""
    with ignored(signal.SIGINT), reliable_sigint():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


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


def test_a_call_while_a_command_runs_does_not_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nwhile [ ! -e {tmp_path}/called ]; do sleep 0.01; done; exit 7\n")
    program.chmod(0o700)
    monkeypatch.setattr(child.sys, "executable", str(program))
    monkeypatch.setattr(child, "_SECONDS_BETWEEN_CALLS", 0.01)

    def call() -> None:
        (tmp_path / "called").touch()
        raise OSError("a full disk")

    with child.children() as started:
        assert started.run([], while_it_runs=call) == 7


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


@pytest.mark.parametrize(
    ("option", "start"),
    [
        ("data.num_proc=2", lambda cfg: prepare(replace(cfg, num_proc=2), byte_tokenizer())),
        (
            "data.streaming=true",
            lambda cfg: Stream(
                replace(cfg, streaming=True), byte_tokenizer(), kind="sft", say=print, leads=True
            ).prepare_ahead(1),
        ),
        ("reward.num_workers=2", lambda _: list(FunctionCaller("len", len, None, 2, None).call_each([]))),
        ("rollout.environment=calculator", lambda _: EnvironmentPool("calculator", 1, 1.0).start()),
    ],
)
def test_a_script_that_its_processes_would_run_again_is_rejected(
    option: str, start: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that prepares data would wait for the folder that its processes have locked."""
    script, data = tmp_path / "script.py", tmp_path / "rows.jsonl"
    script.write_text("train(...)\n")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    data.write_text('{"prompt": "p", "response": "r"}\n' * 3)
    with pytest.raises(ConfigError) as error:
        start(local(tmp_path, train_file=str(data)))
    assert option in str(error.value) and str(script) in str(error.value)
