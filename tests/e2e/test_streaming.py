"""Training on files that are prepared one by one: a resumed run is the uninterrupted one, bit for bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sheeprlhf.data.stream import Stream
from tests.support.runs import figures, rejected, result_of, train, train_words, write_rows

# Steps of 6 rows: files of 2, 2 and 3 steps. 11 steps end in the second pass.
ROWS = (12, 10, 14)


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(Stream, "prepare_ahead", lambda self, number: None)  # `prepare` does it: no further process
    (tmp_path / "rows").mkdir()
    for number, rows in enumerate(ROWS):
        write_rows(tmp_path / "rows" / f"{number}.jsonl", rows, seed=number)
    return [
        f"data.train_file={tmp_path / 'rows'}",
        "data.streaming=true",
        f"data.cache_dir={tmp_path / 'cache'}",
        "task.epochs=1",
        "task.max_num_steps=11",
        "task.save_interval=1",
        "task.keep_checkpoints=20",
    ]


def test_a_resumed_stream_is_the_uninterrupted_one(
    words: list[str], tmp_path: Path, model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = write_rows(tmp_path / "val.jsonl", 6, seed=9)
    whole = train(model_folder(), held_out, tmp_path / "whole", *words)
    assert figures(whole)["train/epoch"] == pytest.approx(
        [*(k / 6 for k in range(1, 5)), 7 / 9, 8 / 9, 1, *(1 + k / 6 for k in range(1, 5))]
    )
    folders = [path for path in (tmp_path / "cache" / "data").iterdir() if not path.name.startswith(".")]
    assert len(folders) == 2  # the first and the newest
    expected = result_of(whole, 11)
    for step in (4, 5):  # the last of a file, and one inside of the next
        shutil.rmtree(tmp_path / "cache")
        cut = tmp_path / f"cut-{step}"
        shutil.copytree(whole, cut)
        for later in range(step + 1, 12):
            shutil.rmtree(cut / "checkpoints" / f"step-{later}")
        shutil.rmtree(cut / "final")
        info = json.loads((cut / "run.json").read_text())
        (cut / "run.json").write_text(json.dumps(info | {"status": "running"}))
        train(model_folder(), held_out, cut, *words, "resume=true")
        assert result_of(cut, 11) == expected
        assert figures(cut)["train/loss"] == figures(whole)["train/loss"]
    changed = tmp_path / "rows" / "1.jsonl"  # of the same size
    changed.write_text(changed.read_text().replace("a", "b"))
    shutil.rmtree(cut / "final")
    for later in range(4, 12):
        shutil.rmtree(cut / "checkpoints" / f"step-{later}")
    (cut / "run.json").write_text(json.dumps(info | {"status": "running"}))
    line = train_words(model_folder(), held_out, cut, *words, "resume=true")
    assert "file 2 of the training rows" in rejected(line, capsys)
