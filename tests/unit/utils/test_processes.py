"""Processes that end with the one they belong to."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
