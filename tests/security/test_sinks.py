"""What a model writes is shown, not obeyed: by a terminal, by TensorBoard, by a table's program."""

import csv
import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from sheeprlhf.apps.terminal import clean, print_error
from sheeprlhf.engine.metrics import MetricWriter
from sheeprlhf.security.redaction import csv_cell
from tests.security.corpus import KINDS, Tally, try_all
from tests.security.folders import assert_is, model_of
from tests.security.guard import Payload, pickled, watched

MARKUP = [
    "<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "![x](http://host/pixel.png)",
    "</pre><img src=http://host/x onerror=alert(1)>",
    "\x1b[2J\x1b]0;title\x07\x1b]8;;http://host\x07link\x1b]8;;\x07",
    "\x9b31m\x90q\x9c",
    "\u202egnp.exe",
    "\r\nForged: line\x08\x08",
]


def test_terminals(capsys) -> None:
    for text in MARKUP:
        print_error(f"sheeprlhf: {text}")
        for shown in (capsys.readouterr().err, clean(text)):
            assert not any(ord(letter) < 32 and letter != "\n" for letter in shown), repr(shown)
            assert not any(letter in shown for letter in "\x7f\x90\x9b\x9c\u202e"), repr(shown)


def test_tensorboard_and_the_file_beside_it(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path)
    for number, text in enumerate(MARKUP):
        writer.log_text(f"samples/{number}", text, 1)
    writer.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    for number, _ in enumerate(MARKUP):
        [event] = events.Tensors(f"samples/{number}/text_summary")
        shown = markdown_to_safe_html(event.tensor_proto.string_val[0])
        for tag in ("<script", "<a ", "<img", 'javascript:alert(1)"', "\x1b", "\x9b", "\u202e"):
            assert tag not in shown, shown
    text = (tmp_path / "samples" / "step-1.txt").read_text()
    assert not any(letter in text for letter in "\x1b\x07\x08\r\x9b\x90\u202e")


@pytest.mark.parametrize(
    "name", ["=cmd|'/c calc'!A1", "+1+1", "-2+3", "@SUM(A1)", "\t=1", " =1", 'a,b"c', "plain/name"]
)
def test_formulas(name: str, tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path)
    writer.log({name: -0.5}, 1)
    writer.close()
    with (tmp_path / "metrics.csv").open(newline="") as file:
        [_, row] = csv.reader(file)
    assert row[0] == "1" and row[1] == csv_cell(name) and row[2] == "-0.5"
    assert row[1].lstrip()[0] not in "=+-@"
    assert name.strip() in row[1]


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow if kind.startswith("configuration files") else ()) for kind in KINDS],
)
def test_every_file_of_the_corpus_is_refused_and_runs_nothing(kind: str, tmp_path: Path) -> None:
    tally = try_all(kind, tmp_path)
    assert tally.tried >= 18
    assert tally == Tally(tally.tried, [], [], [], [], [], tally.seconds, tally.memory)
    print(f"{kind}: {tally.tried} tried, {tally.seconds:.1f} s, {tally.memory >> 20} MB")


def test_the_watch_sees_what_happens(tmp_path: Path) -> None:
    """That the zeros above mean something."""
    import pickle
    import socket
    import subprocess
    import sys

    with watched(tmp_path / "sentinels") as watch:
        pickle.loads(pickled(tmp_path / "sentinels" / "a", 0))
        pickle.loads(pickle.dumps(Payload(tmp_path / "sentinels" / "b")))
        subprocess.run([sys.executable, "-c", ""], check=True)
        with socket.socket() as one, pytest.raises(OSError, match="refused"):
            one.connect(("127.0.0.1", 9))
    assert watch.code_run() == ["a", "b"]
    assert len(watch.programs) == 1 and len(watch.sockets) == 1


def test_what_is_spoilt_was_good(model_folder, tmp_path: Path) -> None:
    """The folders of the corpus are this one with one change."""
    shutil.copytree(model_folder(), tmp_path / "model")
    assert_is(model_of(tmp_path / "model"), model_folder())
