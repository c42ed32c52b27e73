"""A job of two processes: seeds, signals, and mistakes."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

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


@pytest.mark.slow
def test_processes_begin_alike_and_drop_differently(
    server: JobServer, tmp_path: Path, model_folder: ModelFolder
) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    words = train_words(model_folder(), data, tmp_path / "run", *LORA, "task.max_num_steps=1")
    job = server.start_ranks(words, tmp_path / "log", 2, RECORDING, RECORDS=str(tmp_path))
    assert job.wait(150) == 0, job.text()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["adapters"] == second["adapters"]
    assert 0.03 < sum(first["dropped"]) / len(first["dropped"]) < 0.2
    assert first["dropped"][:200] != second["dropped"][:200]


@pytest.mark.nightly  # one process saves on a signal in every run, and ranks agree on it in tests/unit/engine
def test_a_signal_saves_on_both(server: JobServer, tmp_path: Path, model_folder: ModelFolder) -> None:
    """A terminal that is closed, and a batch system, send it to all processes."""
    words = train_words(model_folder(), write_rows(tmp_path / "rows.jsonl"), tmp_path / "whole", *LORA)
    assert server.start_ranks(words, tmp_path / "whole.log", 2).wait(150) == 0
    words += [f"hydra.run.dir={tmp_path / 'run'}"]
    path = site(tmp_path / "site", RECORDING)
    job = ColdJob([*words, "fabric.devices=2"], tmp_path / "log", OMP_NUM_THREADS="1", PYTHONPATH=path)
    job.wait_for("step 8  val", 150)
    assert len(job.group()) == 2
    os.killpg(job.pid, signal.SIGHUP)
    assert job.wait(60) == 129
    assert "Traceback" not in job.text()
    job.assert_all_gone()
    resumed = server.start_ranks([*words, "resume=true"], tmp_path / "log", 2)
    assert resumed.wait(150) == 0, resumed.text()
    assert "going on after step" in resumed.text()
    assert result_of(tmp_path / "run") == result_of(tmp_path / "whole")


def test_a_mistake_ends_both(server: JobServer, tmp_path: Path, model_folder: ModelFolder) -> None:
    """Both processes find it, and neither waits for the other."""
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "a", "response": [3]}\n')
    job = server.start_ranks(train_words(model_folder(), data, tmp_path / "run"), tmp_path / "log", 2)
    assert [rank.wait(100) for rank in job.ranks] == [2, 2], job.texts()
    assert job.text().count("bad.jsonl line 1: column 'response'") == 1
    assert "Traceback" not in job.texts()
