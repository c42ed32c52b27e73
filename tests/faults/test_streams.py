"""Standard streams that are closed, full or ASCII: every command prints one message and no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.past_runs import make_past_run

ROOT = Path(__file__).parents[2]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of a shell in which `$S` is the program."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONUTF8", "PYTHONIOENCODING")}
    env |= {"S": f"{sys.executable} {ROOT / 'sheeprlhf.py'}", **environment}
    done = subprocess.run(["bash", "-c", line], capture_output=True, env=env, check=False, timeout=300)
    assert b"Traceback" not in done.stderr + done.stdout and b"Exception ignored" not in done.stderr, done.stderr
    return done


PRINTING = ["list tasks", "show lr", "--help", "list runs $R"]
MORE = [
    "doctor model=tiny data=docstrings",
    "inspect model=tiny data=docstrings",
    "train --help",
    "report $R --to $R/r.html",
]


@pytest.mark.parametrize(
    "command",
    [*PRINTING[:2], *(pytest.param(command, marks=pytest.mark.nightly) for command in [*PRINTING[2:], *MORE])],
)
@pytest.mark.parametrize("output", ["> /dev/full", ">&-"])
def test_output_that_cannot_be_written_is_an_error(command: str, output: str, tmp_path: Path) -> None:
    done = shell(f"$S {command} {output}", R=str(make_past_run(tmp_path / "run")))
    assert done.returncode == 1
    assert done.stderr.count(b"standard output cannot be written") == 1


def test_closed_streams() -> None:
    whole = shell("$S list tasks")
    assert shell("$S list tasks <&- 2>&-").stdout == whole.stdout and whole.returncode == 0
    asked = shell("$S chat tiny <&-")
    assert asked.returncode == 2 and asked.stdout == b"" and b"standard input is closed" in asked.stderr
    silent = shell("$S list nothing 2>&- >&-")
    assert silent.returncode == 2 and silent.stderr == silent.stdout == b""


@pytest.mark.parametrize("environment", [ASCII, pytest.param({"PYTHONIOENCODING": "ascii"}, marks=pytest.mark.nightly)])
def test_other_letters_are_printed_where_only_ascii_can_be(environment: dict[str, str], tmp_path: Path) -> None:
    folder = make_past_run(tmp_path / "läufe", model="größe")
    for command in ("list runs $R", "report $R --to $R/seite-ü.html"):
        done = shell(f"$S {command}", R=str(folder), **environment)
        assert done.returncode == 0 and b"l" in done.stdout and done.stdout.isascii(), done.stderr
    assert "größe" in (folder / "seite-ü.html").read_text(encoding="utf-8")
    wrong = shell("$S list 'größe'", **environment)
    assert wrong.returncode == 2 and wrong.stderr
