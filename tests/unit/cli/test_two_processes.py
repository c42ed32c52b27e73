"""Several processes: the other ranks start with this job's words, share its directory and its seeds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
STUB = """
import json, os, random, sys
from pathlib import Path

def train(fabric, config, run_dir):
    record = dict(rank=fabric.global_rank, world=fabric.world_size, dir=str(run_dir), seed=config.seed,
                  name=config.run_name, drawn=random.random(), argv=sys.argv[1:])
    Path(os.environ["RECORDS"], f"{run_dir.name}-{fabric.global_rank}.json").write_text(json.dumps(record))
    fabric.barrier()
    if config.seed == 99:
        raise ValueError("boom")
"""
SITE = "from sheeprlhf.structure.task import SFTConfig\nSFTConfig.entry_point = 'stub_task:train'\n"
STARTS = {
    "script": [str(ROOT / "sheeprlhf.py")],
    "module": ["-m", "sheeprlhf"],
    "console": ["-c", "import sys; from sheeprlhf.cli import run; sys.exit(run())"],
}


def start(tmp_path, how, *words):
    (tmp_path / "site").mkdir(exist_ok=True)
    (tmp_path / "site" / "stub_task.py").write_text(STUB)
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    records = tmp_path / "records"
    records.mkdir(exist_ok=True)
    command = [sys.executable, *STARTS[how]]
    if how == "console":  # the file that pip writes for the console script
        script = tmp_path / "sheeprlhf-script"
        script.write_text(STARTS["console"][1])
        command = [sys.executable, str(script)]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", "RECORDS": str(records)}
    done = subprocess.run(
        [*command, "train", "task=sft", *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done, [json.loads(path.read_text()) for path in sorted(records.iterdir())]


@pytest.mark.slow
@pytest.mark.parametrize("how", STARTS)
def test_two_processes_share_directory_and_seed(how, tmp_path):
    done, records = start(tmp_path, how, "fabric.devices=2", "seed=5", "run_name='a b=c,d'")
    assert done.returncode == 0, done.stderr
    assert [(record["rank"], record["world"], record["seed"]) for record in records] == [(0, 2, 5), (1, 2, 5)]
    assert records[0]["dir"] == records[1]["dir"]
    assert records[0]["drawn"] == records[1]["drawn"]
    assert records[0]["argv"] == records[1]["argv"]
    assert len(list((tmp_path / "logs").rglob("run.json"))) == 1
    assert done.stdout.count("run directory") == 1


@pytest.mark.parametrize(
    "how", [pytest.param("script", marks=pytest.mark.slow), pytest.param("module", marks=pytest.mark.nightly)]
)
def test_a_sweep_runs_each_job_on_two_processes(how, tmp_path):
    done, records = start(tmp_path, how, "-m", "fabric.devices=2", "seed=5,6")
    assert done.returncode == 0, done.stderr
    seen = sorted((record["name"], record["rank"], record["world"], record["seed"]) for record in records)
    assert seen == [("default_0", 0, 2, 5), ("default_0", 1, 2, 5), ("default_1", 0, 2, 6), ("default_1", 1, 2, 6)]


@pytest.mark.slow
def test_an_error_on_all_processes_ends_all_of_them(tmp_path):
    done, _ = start(tmp_path, "module", "fabric.devices=2", "seed=99")
    assert done.returncode != 0
    assert "ValueError: boom" in done.stderr
    assert "Traceback" not in done.stderr
