"""Colours are for terminals, lines fit, and text that is only printed stays text."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sheeprlhf.cli import run
from sheeprlhf.command.screen import clean, entry, paragraph, print_error, table

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
    assert lines[0] == "sheeprlhf cannot go on:"
    assert all(line.startswith(("  - ", "    ")) for line in lines[1:])
    assert any(line.startswith("    ") for line in lines)


def test_an_error_in_a_file_is_plain_and_unbroken(capsys):
    message = "it failed: [red]x[/red]\n  - " + "word " * 60 + "\x1b[31mred"
    print_error(message)
    assert capsys.readouterr().err == message.replace("\x1b[31m", "") + "\n"


def test_meanings_stand_in_a_column(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    lines = entry("name", "word " * 20, width=10).plain.splitlines()
    assert lines[0].startswith("  name       word")
    assert all(line.startswith(" " * 13 + "word") for line in lines[1:])
    assert max(map(len, lines)) <= 60
    assert entry("a_much_longer_name", "meaning", width=10).plain == "  a_much_longer_name\n" + " " * 13 + "meaning"
    assert paragraph("a b", indent=2).plain == "  a b"


def test_a_table_is_aligned_by_what_the_screen_shows():
    assert table([["a", "1"], ["\u6f22\u5b57", "22"]], right={1}) == [["a   ", " 1"], ["\u6f22\u5b57", "22"]]


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


def test_an_encoding_without_the_letters_is_no_failure(tmp_path):
    folder = tmp_path / "\u6f22\u5b57"
    folder.mkdir()
    (folder / "run.json").write_text('{"started": 1, "status": "running"}')
    done = subprocess.run(
        [sys.executable, str(ROOT / "sheeprlhf.py"), "list", "runs", "."],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "\\u6f22\\u5b57" in done.stdout
