"""Full disks, odd names and places that cannot be written."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sheeprlhf.cli import run
from sheeprlhf.engine.manifest import verify_manifest
from tests.support.jobs import JobServer
from tests.support.runs import result_of, train, train_words, write_rows

ModelFolder = Callable[..., Path]
LIMIT = """
import resource, signal
import sheeprlhf.task.loop as loop
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
update, steps = loop.update, iter(range(1000))
def limited(*words, **options):
    if next(steps) == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))
    return update(*words, **options)
loop.update = limited
"""


def test_a_full_disk_leaves_the_last_checkpoint(server: JobServer, tmp_path: Path, model_folder: ModelFolder) -> None:
    """A file may not grow beyond 60,000 bytes from the sixth step on: the save at the next one fails."""
    data, model = write_rows(tmp_path / "rows.jsonl"), model_folder()
    run_dir = tmp_path / "run"
    words = train_words(model, data, run_dir, "task.max_num_steps=12")
    job = server.start(words, tmp_path / "log", LIMIT.format(size=60_000))
    assert job.wait() == 1, job.text()
    text = job.text()
    assert f"cannot write {run_dir / 'checkpoints' / 'step-8'}" in text
    assert "bytes are needed" in text and "are free" in text and "Traceback" not in text
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-4"]
    verify_manifest(run_dir / "checkpoints" / "step-4")
    assert server.start([*words, "resume=true"], tmp_path / "log").wait() == 0  # there is space again
    whole = train(model, data, tmp_path / "whole", "task.max_num_steps=12")
    assert result_of(run_dir, 12) == result_of(whole, 12)


def test_records_that_find_no_room_are_named(server: JobServer, tmp_path: Path, model_folder: ModelFolder) -> None:
    """The next save is far away: what is written at each step notices first."""
    run_dir = tmp_path / "run"
    never = ["task.save_interval=24", "task.eval_interval=24"]
    words = train_words(model_folder(), write_rows(tmp_path / "rows.jsonl"), run_dir, *never)
    job = server.start(words, tmp_path / "log", LIMIT.format(size=6000))
    assert job.wait() == 1, job.text()
    text = job.text()
    assert f"cannot write {run_dir}" in text and "bytes are free" in text and f"resume_from={run_dir}" in text
    assert "Traceback" not in text and not (run_dir / "error.log").exists()


@pytest.mark.parametrize("name", ["it's a=b, h\u00e9llo \u7f8a", "x" * 200])
def test_odd_names_of_run_directories(name: str, tmp_path: Path, model_folder: ModelFolder) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 12)
    quoted = "'" + name.replace("'", "\\'") + "'"
    words = train_words(model_folder(), data, tmp_path, "task.max_num_steps=1", "task.num_sample_prompts=0")
    words = [word for word in words if not word.startswith("hydra.run.dir")]
    run([*words, f"run_name={quoted}", f"root_dir='{tmp_path}/odd =,root'"])
    found = list((tmp_path / "odd =,root").rglob("run.json"))
    assert [path.parent.name for path in found] == [name]
    assert (found[0].parent / "final" / "model.safetensors").is_file()
    run(["eval", "task=perplexity", f"experiment_dir='{str(found[0].parent).replace(chr(39), chr(92) + chr(39))}'"])


@pytest.mark.parametrize("key", ["root_dir", "hydra.run.dir"])
def test_a_place_that_cannot_be_written_is_refused_before_the_model_loads(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model does not exist either: both are said at once, and nothing is looked for behind them."""
    file = tmp_path / "file"
    file.write_text("not a folder")
    places = [file, file / "below"]
    if os.geteuid() != 0:
        (tmp_path / "read-only").mkdir(mode=0o500)
        places.append(tmp_path / "read-only" / "below")
    for place in places:
        words = train_words(tmp_path / "no model", write_rows(tmp_path / "rows.jsonl", 12), tmp_path)
        words = [word for word in words if not word.startswith("hydra.run.dir")]
        with pytest.raises(SystemExit) as stopped:
            run([*words, f"{key}={place}"])
        assert stopped.value.code == 2
        message = capsys.readouterr().err
        assert f"{key}={place}" in message and "Traceback" not in message
        assert "no model" in message
