"""Runs that log to real trackers: Weights & Biases offline, MLflow in a local database, trackio in its own."""

import importlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sheeprlhf.engine.step import update
from tests.support.models import ModelFolder
from tests.support.runs import result_of, train, write_rows

Points = dict[tuple[str, int], list[float]]
SECRET = "a-secret-word-of-mine"


def mlflow_points(folder: Path, run_id: str) -> tuple[Points, str]:
    from mlflow import MlflowClient

    client = MlflowClient()
    run = client.get_run(run_id)
    assert run.data.params["task.config_name"] == "sft"
    points: Points = {}
    for tag in run.data.metrics:
        for metric in client.get_metric_history(run_id, tag):
            points.setdefault((tag, metric.step), []).append(metric.value)
    assert len(client.list_artifacts(run_id, "samples")) >= 1
    experiment = client.get_experiment(run.info.experiment_id).name
    assert len(client.search_runs([run.info.experiment_id])) == 1
    return points, experiment


def trackio_points(folder: Path, run_id: str) -> tuple[Points, str]:
    from trackio.sqlite_storage import SQLiteStorage

    assert SQLiteStorage.get_runs("mine") == [run_id]
    points: Points = {}
    for row in SQLiteStorage.get_logs("mine", run_id):
        for tag, value in row.items():
            if isinstance(value, float):
                points.setdefault((tag, row["step"]), []).append(value)
    return points, "mine"


def log_records(content: bytes) -> Iterator[bytes]:
    """Records of a file in LevelDB's log format, whose blocks of 32 kB count the 7 bytes before `content`."""
    at, record = 0, b""
    while at < len(content):
        if (left := -(at + 7) % 32768) and left < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, last
            yield record
            record = b""


def wandb_points(folder: Path, run_id: str) -> tuple[Points, str]:
    from wandb.proto.wandb_internal_pb2 import Record

    points: Points = {}
    projects = set()
    files = sorted(folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(files) == 2  # of two processes, one run when they are synchronised
    for path in files:
        for data in log_records(path.read_bytes()[7:]):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                projects.add(record.run.project)
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            for tag, value in items.items():
                if not tag.startswith(("_", "samples")):
                    points.setdefault((tag, int(items["_step"])), []).append(float(value))
    [project] = projects
    return points, project


READERS = {"mlflow": mlflow_points, "trackio": trackio_points, "wandb": wandb_points}


@pytest.mark.nightly
@pytest.mark.parametrize("name", READERS)
def test_a_resumed_run_continues_the_trackers_run(
    name: str, tmp_path: Path, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each point once, the same weights as without a tracker, and no secret in what it writes."""
    pytest.importorskip(name)
    if name == "trackio":
        for module in ("trackio.utils", "trackio.sqlite_storage", "trackio"):  # the folder is read when it is imported
            monkeypatch.setattr(importlib.import_module(module), "TRACKIO_DIR", tmp_path / "store" / "trackio")
    (tmp_path / "store").mkdir()
    monkeypatch.chdir(tmp_path / "store")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}")
    monkeypatch.setenv("MY_API_KEY", SECRET)
    data = write_rows(tmp_path / "rows.jsonl")
    short = ["task.max_num_steps=6", "task.eval_interval=3", "task.save_interval=2", "task.keep_checkpoints=9"]
    log = [f"log=[{name}]", "log_project=mine", f"run_name={SECRET}"]
    plain = train(model_folder(), data, tmp_path / "plain", *short)
    calls = []

    def dies_at_step_6(*args: Any, **options: Any) -> dict[str, float]:
        calls.append(0)
        if len(calls) == 6:
            raise RuntimeError
        return update(*args, **options)

    monkeypatch.setattr("sheeprlhf.task.loop.update", dies_at_step_6)
    with pytest.raises(SystemExit):
        train(model_folder(), data, tmp_path / "run", *short, *log)
    run_id = json.loads((tmp_path / "run" / "run.json").read_text())["trackers"][name]
    run_dir = train(model_folder(), data, tmp_path / "run", *short, *log, "resume=true")  # from step 4
    assert result_of(run_dir, 6) == result_of(plain, 6)
    assert json.loads((run_dir / "run.json").read_text())["trackers"] == {name: run_id}
    assert not list(run_dir.glob("events.out.tfevents.*"))
    points, project = READERS[name](tmp_path / "store", run_id)
    assert project == "mine"
    assert {len(values) for values in points.values()} == {1}
    expected: Points = {}
    for line in (run_dir / "metrics.csv").read_text().splitlines()[1:]:
        step, tag, value, _ = line.split(",")
        expected[tag, int(step)] = [float(value)]
    assert points.keys() == expected.keys()
    for key in (key for key in points if key[0].startswith("val/") or key[0] == "train/loss"):
        assert points[key] == pytest.approx(expected[key], rel=1e-6)
    written = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert written
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []
