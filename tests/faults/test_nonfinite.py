"""A loss or gradient that is not finite ends the run before it reaches a weight or a checkpoint."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sheeprlhf.engine.manifest import verify_manifest
from tests.support.jobs import ColdJob, site
from tests.support.runs import digests, result_of, train, train_words, write_rows

ModelFolder = Callable[..., Path]
SAVES = ["task.save_interval=2", "task.keep_checkpoints=99"]
NAN_FOR_ROW = """
import sheeprlhf.task.train.sft as sft
loss = sft.sft_loss
def broken(policy, batch, **options):
    output = loss(policy, batch, **options)
    return output._replace(total=output.total * float("nan")) if ROW in batch.row_ids else output
sft.sft_loss = broken
"""


def test_a_learning_rate_that_blows_up(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    words = ["optim=sgd", "optim.lr=1e20", "task.gradient_clip_val=null", *SAVES, "task.save_interval=1"]
    with pytest.raises(SystemExit) as stopped:
        train(model_folder(), data, tmp_path / "run", *words)
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    rows = [int(row) for row in re.findall(r"\d+", re.findall(r"rank 0: rows \[(.*?)\]", message)[0])]
    assert rows and set(rows) <= set(range(48))
    assert "lower optim.lr" in message and "Traceback" not in message
    checkpoints = list((tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints
    for checkpoint in checkpoints:
        verify_manifest(checkpoint)
        assert all(t.isfinite().all() for t in load_file(checkpoint / "model.safetensors").values())
    assert not (tmp_path / "run" / "final").exists()


def test_one_bad_row_is_named_and_the_run_can_go_on(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sheeprlhf.task.train.sft as sft

    data, model = write_rows(tmp_path / "rows.jsonl"), model_folder()
    whole = train(model, data, tmp_path / "whole", *SAVES)
    bad_row = 40
    original, seen = sft.sft_loss, []

    def broken(policy, batch, **options):  # type: ignore[no-untyped-def]
        output = original(policy, batch, **options)
        seen.extend(batch.row_ids)
        if bad_row not in batch.row_ids or seen.count(bad_row) < 2:
            return output
        return output._replace(total=output.total * float("nan"))

    with monkeypatch.context() as patch:
        patch.setattr(sft, "sft_loss", broken)
        with pytest.raises(SystemExit) as stopped:
            train(model, data, tmp_path / "run", *SAVES)
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    rows = re.findall(r"rank 0: rows \[(.*?)\]", message)[0].split(", ")
    assert str(bad_row) in rows and len(rows) <= 3  # the micro-batch's, not the step's
    last = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name[5:]))
    assert digests(last).items() >= {
        (name, digest) for name, digest in digests(whole / "checkpoints" / last.name).items() if "safetensors" in name
    }
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "running"
    train(model, data, tmp_path / "run", *SAVES, "resume=true")
    assert result_of(tmp_path / "run") == result_of(whole)


@pytest.mark.slow
def test_one_process_stops_both(tmp_path: Path, model_folder: ModelFolder) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    path = site(tmp_path / "site", NAN_FOR_ROW.replace("ROW", "40"))
    words = train_words(model_folder(), data, tmp_path / "run", *SAVES, "fabric.devices=2")
    job = ColdJob(words, tmp_path / "log", PYTHONPATH=path, OMP_NUM_THREADS="1")
    code = job.wait(120)
    text = job.text()
    assert code == 1, text
    assert re.search(r"rank [01]: rows \[.*\b40\b", text) and "Traceback" not in text
    assert len(re.findall(r"rank [01]: rows", text)) == 1  # that rank's rows alone, said once
    job.assert_all_gone()
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        verify_manifest(checkpoint)
