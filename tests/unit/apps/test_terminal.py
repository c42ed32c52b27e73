"""Colours are for terminals, lines fit, and text that is only printed stays text."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sheeprlhf.apps.terminal import clean, print_error
from sheeprlhf.cli import run

ROOT = Path(__file__).parents[3]
WRONG = ["train", "task=sft", "optim.lr=abc", "model=optt"]


class Terminal(io.StringIO):
    """A file that says it is one."""

    def isatty(self) -> bool:
        return True


def on_a_terminal(words: list[str], monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """What the command prints on a terminal of 60 columns."""
    terminal = Terminal()
    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
        for name, value in {"TERM": "xterm-256color", "COLUMNS": "60", **environment}.items():
            patch.setenv(name, value)
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", terminal)
        run(words)
    return terminal.getvalue()


@pytest.mark.parametrize("words", [["--help"], WRONG, ["show", "lora_cfg"], ["list", "models"]])
def test_colours_on_a_terminal_unless_they_are_not_wanted(words, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in on_a_terminal(words, monkeypatch)
    assert "\x1b[3" not in on_a_terminal(words, monkeypatch, NO_COLOR="1")
    assert "\x1b" not in on_a_terminal(words, monkeypatch, TERM="dumb")


def test_a_long_error_is_wrapped_on_a_terminal_under_its_beginning(monkeypatch):
    lines = re.sub(r"\x1b\[[0-9;]*m", "", on_a_terminal(WRONG, monkeypatch)).splitlines()
    assert max(map(len, lines)) <= 60
    assert lines[0] == "sheeprlhf cannot continue:"
    assert all(line.startswith(("  - ", "    ")) for line in lines[1:])
    assert any(line.startswith("    ") for line in lines)


def test_an_error_in_a_file_is_plain_and_unbroken(capsys):
    message = "it failed: [red]x[/red]\n  - " + "word " * 60 + "\x1b[31mred"
    print_error(message)
    assert capsys.readouterr().err == message.replace("\x1b[31m", "") + "\n"


def test_text_of_a_file_is_cleaned_and_cut():
    assert clean("a\n b\x1b[2J\tc") == "a b c"
    assert clean("hf_abcdefghijklmnopqrstuvwxyzABCDEFGH") == "<redacted>"
    assert clean("x" * 100, 10) == "xxxxxxx..."
    assert clean("\u6f22" * 100, 10) == "\u6f22" * 3 + " ..."
    assert clean("\ud800") == "?"


def test_a_reader_who_leaves_early_is_no_failure():
    command = f"{sys.executable} sheeprlhf.py show train eval sft opt | head -c 10; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
