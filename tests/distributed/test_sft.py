"""A job of two processes: seeds, the end of one process and what is resumed then, signals, and mistakes."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.jobs import ColdJob, JobServer, site
from tests.support.runs import result_of, train_words, write_rows

ModelFolder = Callable[..., Path]
LORA = ["model.finetune_mode=LORA", "model.lora_cfg.rank=4", "model.lora_cfg.dropout=0.1"]
RECORDING = """
import hashlib, json, os, time
from pathlib import Path
import torch
import sheeprlhf.task.loop as loop
update, done = loop.update, []
def recording(fabric, module, *rest, **options):
    time.sleep(0.05)
    if not done and "RECORDS" in os.environ:
        dropped = []
        dropout = next(m for m in module.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0)
        hook = dropout.register_forward_hook(lambda m, i, o: dropped.extend((o == 0).flatten()[:200].tolist()))
        adapters = b"".join(p.detach().numpy().tobytes() for p in module.parameters() if p.requires_grad)
        record = dict(adapters=hashlib.sha256(adapters).hexdigest(), dropped=dropped)
    result = update(fabric, module, *rest, **options)
    if not done and "RECORDS" in os.environ:
        hook.remove()
        Path(os.environ["RECORDS"], f"{fabric.global_rank}.json").write_text(json.dumps(record))
    done.append(True)
    return result
loop.update = recording
"""


class Whole(NamedTuple):
    """The command but for its directory, its run that nothing disturbed, and where its processes left records."""

    words: list[str]
    dir: Path
    records: Path
    path: str


@pytest.fixture(scope="module")
def whole(server: JobServer, tmp_path_factory: pytest.TempPathFactory, model_folder: ModelFolder) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    words = train_words(model_folder(), write_rows(folder / "rows.jsonl"), folder / "run", *LORA)
    job = server.start_ranks(words, folder / "log", 2, RECORDING, RECORDS=str(folder))
    assert job.wait(150) == 0, job.text()
    words = [word for word in words if not word.startswith("hydra.run.dir")]
    return Whole(words, folder / "run", folder, site(folder / "site", RECORDING))


@pytest.mark.slow
def test_processes_begin_alike_and_drop_differently(whole: Whole) -> None:
    first, second = (json.loads((whole.records / f"{rank}.json").read_text()) for rank in range(2))
    assert first["adapters"] == second["adapters"]
    assert 0.03 < sum(first["dropped"]) / len(first["dropped"]) < 0.2
    assert first["dropped"][:200] != second["dropped"][:200]


def in_training(whole: Whole, tmp_path: Path) -> ColdJob:
    """A job that has just validated at step 8; its checkpoint of step 4 is there."""
    words = [*whole.words, f"hydra.run.dir={tmp_path / 'run'}"]
    job = ColdJob([*words, "fabric.devices=2"], tmp_path / "log", OMP_NUM_THREADS="1", PYTHONPATH=whole.path)
    job.wait_for("step 8  val", 150)
    assert len(job.group()) == 2
    return job


def assert_resumed_like(whole: Whole, server: JobServer, tmp_path: Path) -> None:
    words = [*whole.words, f"hydra.run.dir={tmp_path / 'run'}", "resume=true"]
    job = server.start_ranks(words, tmp_path / "log", 2)
    assert job.wait(150) == 0, job.text()
    assert "going on after step" in job.text() and "not bit for bit" not in job.text()
    assert result_of(tmp_path / "run") == result_of(whole.dir)


@pytest.mark.slow
def test_a_killed_process_ends_the_job(whole: Whole, server: JobServer, tmp_path: Path) -> None:
    job = in_training(whole, tmp_path)
    os.kill(next(pid for pid in job.group() if pid != job.pid), signal.SIGKILL)
    assert job.wait(60) != 0
    job.assert_all_gone()
    assert_resumed_like(whole, server, tmp_path)


@pytest.mark.nightly  # one process saves on a signal in every run, and ranks agree on it in tests/unit/engine
def test_a_signal_saves_on_both(whole: Whole, server: JobServer, tmp_path: Path) -> None:
    """A terminal that is closed, and a batch system, send it to all processes."""
    job = in_training(whole, tmp_path)
    os.killpg(job.pid, signal.SIGHUP)
    assert job.wait(60) == 129
    assert "the state is saved" in job.text() and "Traceback" not in job.text()
    job.assert_all_gone()
    assert_resumed_like(whole, server, tmp_path)


def test_a_mistake_is_reported_once(tmp_path: Path, model_folder: ModelFolder) -> None:
    """Both processes find it; neither waits for the other, and the first one ends the second."""
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "a", "response": [3]}\n')
    words = [*train_words(model_folder(), data, tmp_path / "run"), "fabric.devices=2"]
    job = ColdJob(words, tmp_path / "log", OMP_NUM_THREADS="1")
    assert job.wait(100) == 2, job.text()
    assert job.text().count("bad.jsonl line 1: column 'response'") == 1
    assert "Traceback" not in job.text()
    job.assert_all_gone()
