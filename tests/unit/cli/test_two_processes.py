"""Several processes: the other ranks start with this job's words, share its directory and its seeds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sheeprlhf.cli import run
from sheeprlhf.structure.task import SFTConfig
from tests.support.runs import exit_code

ROOT = Path(__file__).parents[3]
STUB = """
import json, os, random, signal, sys
from pathlib import Path

def train(fabric, config, run_dir):
    record = dict(rank=fabric.global_rank, world=fabric.world_size, dir=str(run_dir), seed=config.seed,
                  name=config.run_name, drawn=random.random(), argv=sys.argv[1:])
    Path(os.environ["RECORDS"], f"{run_dir.name}-{fabric.global_rank}.json").write_text(json.dumps(record))
    fabric.barrier()
    if config.seed == 98 and fabric.global_rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
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


def prepare(tmp_path):
    """The environment of a command whose task is the stub."""
    (tmp_path / "site").mkdir(exist_ok=True)
    (tmp_path / "site" / "stub_task.py").write_text(STUB)
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    (tmp_path / "records").mkdir(exist_ok=True)
    return {**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", "RECORDS": str(tmp_path / "records")}


def recorded(tmp_path):
    return [json.loads(path.read_text()) for path in sorted((tmp_path / "records").iterdir())]


def start(tmp_path, way, *words):
    environment = prepare(tmp_path)
    command = [sys.executable, *STARTS[way]]
    if way == "console":  # the file that pip writes for the console script
        script = tmp_path / "sheeprlhf-script"
        script.write_text(STARTS["console"][1])
        command = [sys.executable, str(script)]
    done = subprocess.run(
        [*command, "train", "task=sft", *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return done, recorded(tmp_path)


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=pytest.mark.slow if way == "script" else pytest.mark.nightly) for way in STARTS],
)
def test_two_processes_share_directory_and_seed_and_end_together(way, tmp_path):
    """After the records, the second process is killed (seed 98) or both fail (99); tests/distributed has good ends."""
    seed = 98 if way == "script" else 99
    done, records = start(tmp_path, way, "fabric.devices=2", f"seed={seed}", "run_name='a b=c,d'")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert ("1 of 2 ranks missing" if seed == 98 else "ValueError: boom") in done.stderr
    assert [(record["rank"], record["world"], record["seed"]) for record in records] == [(0, 2, seed), (1, 2, seed)]
    assert records[0]["dir"] == records[1]["dir"]
    assert records[0]["drawn"] == records[1]["drawn"]
    assert records[0]["argv"] == records[1]["argv"]
    left = list((tmp_path / "logs").rglob("run.json"))
    assert len(left) == (seed == 99)  # with an error.log beside it; nothing had begun where a process was killed
    assert done.stdout.count("run directory") == 1


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.nightly) for way in ("script", "module")])
def test_a_sweep_runs_each_job_on_two_processes(way, tmp_path):
    done, records = start(tmp_path, way, "-m", "fabric.devices=2", "seed=5,6")
    assert done.returncode == 0, done.stderr
    seen = sorted((record["name"], record["rank"], record["world"], record["seed"]) for record in records)
    assert seen == [("default_0", 0, 2, 5), ("default_0", 1, 2, 5), ("default_1", 0, 2, 6), ("default_1", 1, 2, 6)]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
VARIABLES = {  # of a launcher, by rank; SLURM's are all that tests of others set
    "srun": "SLURM_NTASKS=2 SLURM_PROCID={} SLURM_LOCALID={}",
    "mpirun": "OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK={} OMPI_COMM_WORLD_LOCAL_RANK={} "
    "OMPI_COMM_WORLD_LOCAL_SIZE=2",
}
FORKED = f"""
import sys, types
stub = sys.modules["stub_task"] = types.ModuleType("stub_task")
exec({STUB!r}, vars(stub))
{SITE}
"""


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param("torchrun", marks=pytest.mark.nightly),
        pytest.param("srun", marks=pytest.mark.slow),
        pytest.param("mpirun", marks=pytest.mark.nightly),
    ],
)
def test_processes_of_a_launcher_train_together(launcher, server, tmp_path):
    words, environment = ["train", "task=sft", "run_name=it"], prepare(tmp_path)
    if launcher == "torchrun":
        command = [*TORCHRUN, str(ROOT / "sheeprlhf.py"), *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, timeout=300)
        codes, output = [done.returncode], done.stdout
    else:
        more = [dict(word.split("=") for word in VARIABLES[launcher].format(rank, rank).split()) for rank in (0, 1)]
        records = environment["RECORDS"]
        jobs = [server.start(words, tmp_path / f"log.{n}", FORKED, RECORDS=records, **more[n]) for n in (0, 1)]
        codes, output = [job.wait(300) for job in jobs], "".join(job.text() for job in jobs)
    assert set(codes) == {0}, output
    records = recorded(tmp_path)
    assert [(record["rank"], record["world"]) for record in records] == [(0, 2), (1, 2)]
    assert records[0]["dir"] == records[1]["dir"]
    assert [path.parent for path in tmp_path.rglob("run.json")] == [Path(records[0]["dir"])]
    assert {path.name for path in tmp_path.iterdir()} - {"log.0", "log.1"} == {"site", "records", "logs"}
    assert output.count("run directory:") == 1


@pytest.mark.nightly
def test_a_run_that_is_finished_ends_on_all_ranks(tmp_path, monkeypatch, server):
    """Rank one must not wait for the first, which has nothing to do."""
    words = ["task=sft", f"hydra.run.dir={tmp_path}/it"]
    monkeypatch.setattr(SFTConfig, "entry_point", "stub_task:train")
    monkeypatch.setitem(sys.modules, "stub_task", SimpleNamespace(train=lambda fabric, config, run_dir: None))
    run(["train", *words])
    info = json.loads((tmp_path / "it" / "run.json").read_text())
    (tmp_path / "it" / "run.json").write_text(json.dumps(info | {"status": "finished"}))
    job = server.start_ranks(["train", *words, "resume=true"], tmp_path / "log", 2)
    assert job.wait() == 0, job.texts()
    assert [rank.poll() for rank in job.ranks] == [0, 0]
    assert "starting at step" not in job.texts()


REJECTED = (
    "train task=sft fabric.devices=1 hydra.run.dir=it",
    "train -m task=sft seed=1,2",
    "pipeline experiment=quickstart",
)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("line", REJECTED)
def test_what_does_not_fit_the_launcher_is_rejected_by_all_ranks_and_reported_by_one(
    line, rank, tmp_path, monkeypatch, capsys
):
    for word in VARIABLES["mpirun"].format(rank, rank).split():
        monkeypatch.setenv(*word.split("="))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sheeprlhf.cli._SECONDS_FOR_RANK_ZERO", 0)
    assert exit_code(line) == 2
    assert ("fabric.devices=2" in capsys.readouterr().err) == (rank == 0)
    assert not list(tmp_path.iterdir())


def test_commands_of_one_process_run_on_the_first_alone(tmp_path, monkeypatch, capsys):
    for word in VARIABLES["srun"].format(1, 1).split():
        monkeypatch.setenv(*word.split("="))
    run(["list", "runs", str(tmp_path / "nowhere")])
    run(["inspect", "task=sft", f"output_dir={tmp_path}"])
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("does nothing") == 2
    assert not list(tmp_path.iterdir())
