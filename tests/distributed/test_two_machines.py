"""A run on two machines, which are two network namespaces here: what is told when they share no disk, or no network."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.jobs import ColdJob
from tests.support.machines import two_machines
from tests.support.runs import train_words, write_rows

ModelFolder = Callable[..., Path]
TIMEOUT = 20  # seconds; the machine that tests run on may be busy


@pytest.mark.nightly  # test_sft.py has an end of one of two processes, tests/unit/engine/test_ranks.py what is reported
def test_a_cut_link_ends_both_and_names_the_missing(tmp_path: Path, model_folder: ModelFolder) -> None:
    """The second machine has run directories of its own, so the first one says what that means."""
    runs = tmp_path / "runs"
    runs.mkdir()
    words = train_words(model_folder(), write_rows(tmp_path / "rows.jsonl"), runs / "run")
    words += ["fabric.num_nodes=2", "fabric.devices=1", f"fabric.timeout={TIMEOUT}"]
    words += ["task.epochs=2000", "task.eval_interval=1000000", "task.save_interval=1000000"]
    with two_machines() as machines:
        jobs = [
            ColdJob(
                words,
                tmp_path / f"log-{node}",
                before=machines.words(node, runs if node else None),
                **machines.environment(node, tmp_path / f"cache-{node}"),
            )
            for node in range(2)
        ]
        jobs[0].wait_for("loss")
        machines.cut()
        began = time.monotonic()
        codes = [job.wait(TIMEOUT + 60) for job in jobs]
        seconds = time.monotonic() - began
        for job in jobs:
            job.assert_all_gone()
    texts = [job.text() for job in jobs]
    assert codes == [1, 1], texts
    assert seconds < TIMEOUT + 30
    assert "1 of 2 ranks missing: rank 1" in texts[0] and "1 of 2 ranks missing: rank 0" in texts[1]
    assert "node 1" in texts[0]
    assert not any("Traceback" in text for text in texts)
