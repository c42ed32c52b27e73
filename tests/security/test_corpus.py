"""Nothing of a stranger's runs, starts a program, opens a socket or writes elsewhere; every bad file is refused."""

import shutil
from pathlib import Path

import pytest

from tests.security.corpus import KINDS, Tally, try_all
from tests.security.folders import assert_is, model_of
from tests.security.guard import Payload, pickled, watched


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
