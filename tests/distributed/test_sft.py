"""Supervised fine-tuning and perplexity on two processes, by the real command, against one process."""

import csv
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from sheeprlhf.cli import run
from tests.support.jobs import ColdJob, JobServer, site
from tests.support.runs import result_of, train, train_words, write_rows

ModelFolder = Callable[..., Path]
TWO = "fabric.devices=2"
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


def start(words: list[str], log: Path, **environment: str) -> ColdJob:
    return ColdJob([*words, TWO], log, OMP_NUM_THREADS="1", **environment)


def series(run_dir: Path, tag: str) -> torch.Tensor:
    with (run_dir / "metrics.csv").open() as file:
        return torch.tensor([float(row["value"]) for row in csv.DictReader(file) if row["tag"] == tag]).double()


def assert_equal_runs(two: Path, one: Path, num_steps: int) -> None:
    for tag in ("train/loss", "train/grad_norm", "val/nll"):
        ours, expected = series(two, tag), series(one, tag)
        assert len(expected) == num_steps or tag == "val/nll"
        assert_close(ours, expected, rtol=0, atol=1e-5)
        assert abs(float((ours - expected).mean())) <= 1e-6, tag  # no drift to one side
    assert series(two, "train/items").tolist() == series(one, "train/items").tolist()
    ours, expected = (load_file(folder / "final" / "model.safetensors") for folder in (two, one))
    assert_close(ours, expected, rtol=0, atol=1e-5)


def both(server: JobServer, tmp_path: Path, model: Path, *extra: str) -> tuple[Path, Path]:
    """Two epochs of 49 rows: each ends in a step of a single row, so that one process has none."""
    data = write_rows(tmp_path / "rows.jsonl", 49)
    words = ["task.epochs=2", *extra]
    job = server.start_ranks(train_words(model, data, tmp_path / "two", *words), tmp_path / "log", 2)
    train(model, data, tmp_path / "one", *words)
    assert job.wait(150) == 0, job.text()
    return tmp_path / "two", tmp_path / "one"


def perplexity(run_dir: Path) -> dict[str, float]:
    return json.loads((run_dir / "eval" / "perplexity-test-final.json").read_text())


@pytest.mark.slow
def test_two_processes_equal_one(server: JobServer, tmp_path: Path, model_folder: ModelFolder) -> None:
    two, one = both(server, tmp_path, model_folder(), "task.micro_batch_size=1")
    assert_equal_runs(two, one, 18)
    job = server.start_ranks(["eval", "task=perplexity", f"experiment_dir={one}"], tmp_path / "eval", 2)
    assert job.wait(150) == 0, job.text()
    ours = perplexity(one)
    run(["eval", "task=perplexity", f"experiment_dir={one}"])
    expected = perplexity(one)
    assert ours["tokens"] == expected["tokens"] and ours["rows"] == expected["rows"] == 49
    assert abs(ours["nll"] - expected["nll"]) <= 1e-6


class Whole(NamedTuple):
    """The command but for its directory, its run that nothing disturbed, and where its processes left records."""

    words: list[str]
    dir: Path
    records: Path
    path: str


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model_folder: ModelFolder) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    words = train_words(model_folder(), write_rows(folder / "rows.jsonl"), folder / "run", *LORA)
    path = site(folder / "site", RECORDING)
    job = start(words, folder / "log", RECORDS=str(folder), PYTHONPATH=path, SHEEPRLHF_CACHE=str(folder / "cache"))
    assert job.wait(150) == 0, job.text()
    return Whole([word for word in words if not word.startswith("hydra.run.dir")], folder / "run", folder, path)


@pytest.mark.slow
def test_processes_begin_alike_and_drop_differently(whole: Whole) -> None:
    first, second = (json.loads((whole.records / f"{rank}.json").read_text()) for rank in range(2))
    assert first["adapters"] == second["adapters"]
    assert 0.03 < sum(first["dropped"]) / len(first["dropped"]) < 0.2
    assert first["dropped"][:200] != second["dropped"][:200]


def in_training(whole: Whole, tmp_path: Path) -> ColdJob:
    """A job that has just validated at step 8; its checkpoint of step 4 is there."""
    words = [*whole.words, f"hydra.run.dir={tmp_path / 'run'}"]
    job = start(words, tmp_path / "log", PYTHONPATH=whole.path)
    job.wait_for("step 8  val", 150)
    assert len(job.group()) == 2
    return job


def assert_resumed_like(whole: Whole, tmp_path: Path) -> None:
    words = [*whole.words, f"hydra.run.dir={tmp_path / 'run'}", "resume=true"]
    job = start(words, tmp_path / "log")
    assert job.wait(150) == 0, job.text()
    assert "going on after step" in job.text() and "not bit for bit" not in job.text()
    assert result_of(tmp_path / "run") == result_of(whole.dir)


@pytest.mark.slow
def test_a_killed_process_ends_the_job(whole: Whole, tmp_path: Path) -> None:
    job = in_training(whole, tmp_path)
    os.kill(next(pid for pid in job.group() if pid != job.pid), signal.SIGKILL)
    assert job.wait(60) != 0
    job.assert_all_gone()
    assert_resumed_like(whole, tmp_path)


@pytest.mark.nightly  # one process saves on a signal in every run, and ranks agree on it in tests/unit/engine
def test_a_signal_saves_on_both(whole: Whole, tmp_path: Path) -> None:
    """A terminal that is closed, and a batch system, send it to all processes."""
    job = in_training(whole, tmp_path)
    os.killpg(job.pid, signal.SIGHUP)
    assert job.wait(60) == 129
    assert "the state is saved" in job.text() and "Traceback" not in job.text()
    job.assert_all_gone()
    assert_resumed_like(whole, tmp_path)


@pytest.mark.slow
def test_a_mistake_is_told_once(tmp_path: Path, model_folder: ModelFolder) -> None:
    """Both processes find it; neither waits for the other."""
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "a", "response": [3]}\n')
    job = start(train_words(model_folder(), data, tmp_path / "run"), tmp_path / "log")
    assert job.wait(100) == 2, job.text()
    assert job.text().count("bad.jsonl line 1: column 'response'") == 1
    assert "Traceback" not in job.text()
    job.assert_all_gone()
