"""A reward whose package is not installed says which extra to install, at once."""

import subprocess
import sys
from pathlib import Path

import pytest

from sheeprlhf.cli import run
from tests.unit.cli.test_imports import cpu_seconds

ROOT = Path(__file__).parents[3]
WORDS = ["train", "task=ppo", "reward=function", "reward.path=sentiment"]
PROGRAM = """
import sys
from sheeprlhf.cli import run
sys.modules |= {"vaderSentiment": None}  # not importable, nor found
try:
    run(sys.argv[1:])
except SystemExit as stop:
    print("code", stop.code)
print("heavy", [name for name in ("torch", "transformers", "datasets", "numpy") if name in sys.modules])
"""


def test_a_missing_package_is_one_line_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(WORDS)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "sheeprlhf cannot go on:",
        "  - reward.path=sentiment needs packages that are not installed (vaderSentiment): "
        'pip install "sheeprlhf[sentiment]"',
    ]
    assert list(tmp_path.iterdir()) == []


def test_it_is_said_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    start = cpu_seconds()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *WORDS],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        check=False,
    )
    assert cpu_seconds() - start < 3  # about 0.5 s
    assert "code 2" in done.stdout and "heavy []" in done.stdout, done.stdout + done.stderr
    assert "(vaderSentiment)" in done.stderr
