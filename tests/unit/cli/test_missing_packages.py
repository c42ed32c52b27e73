"""A reward whose package is not installed says which extra to install, at once."""

import sys
from pathlib import Path

import pytest

from sheeprlhf.cli import run

WORDS = ["train", "task=ppo", "reward=function", "reward.path=sentiment"]


def test_a_missing_package_is_one_line_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(WORDS)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "sheeprlhf cannot continue:",
        "  - reward.path=sentiment needs packages that are not installed (vaderSentiment): "
        'pip install "sheeprlhf[sentiment]"',
    ]
    assert list(tmp_path.iterdir()) == []
