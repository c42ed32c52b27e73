"""Which process of how many this is, from the variables of launchers alone."""

import os
from pathlib import Path

import pytest

from sheeprlhf.config.processes import with_launched_processes
from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.structure.run import EvalConfig, FabricConfig
from sheeprlhf.utils import memory as machine
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.launchers import (
    LauncherError,
    check_alone,
    child_environment,
    global_rank,
    is_one_of_several,
    is_rank_zero,
    launched,
    meeting_host,
    meeting_port,
    stale_note,
)
from sheeprlhf.utils.memory import available_memory

MEET = "MASTER_ADDR=10.0.0.1 MASTER_PORT=29500"
TORCHRUN = "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 GROUP_RANK=1 GROUP_WORLD_SIZE=2"
SRUN = "SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=4 SLURM_NNODES=2 SLURM_NODEID=1 SLURM_JOB_ID=71"
STEP = "SLURM_STEP_NUM_TASKS=4 SLURM_STEP_NUM_NODES=2 SLURM_STEP_NODELIST=gpu[07-08] SLURM_STEP_ID=0"
OPEN_MPI = (
    "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2 "
    "OMPI_COMM_WORLD_NODE_RANK=1 PMIX_RANK=3 PMIX_NAMESPACE=prte-host-7@1"
)
MPICH = "PMI_RANK=3 PMI_SIZE=4 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2"
JSRUN = "JSM_NAMESPACE_RANK=3 JSM_NAMESPACE_SIZE=4 JSM_NAMESPACE_LOCAL_RANK=1 JSM_NAMESPACE_LOCAL_SIZE=2"
ALONE = "SUBMITIT_LOCAL_GLOBALID=0 SUBMITIT_LOCAL_NTASKS=1 SUBMITIT_LOCAL_LOCALID=0"


def environment(monkeypatch, *texts):
    """Only these variables of launchers."""
    for name in list(os.environ):
        if any(
            part in name for part in ("RANK", "WORLD_SIZE", "MASTER_", "SLURM_", "PMI", "LOCAL", "TORCHELASTIC", "LT_")
        ):
            monkeypatch.delenv(name)
    for word in " ".join(texts).split():
        monkeypatch.setenv(*word.split("=", 1))


def numbers(devices=None, num_nodes=None, **options):
    """What becomes of `fabric.devices` and `fabric.num_nodes`."""
    config = EvalConfig(fabric=FabricConfig(devices=devices, num_nodes=num_nodes))
    fabric = with_launched_processes(config, **options).fabric
    return fabric.devices, fabric.num_nodes


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("torchrun", TORCHRUN),
        ("torchrun", f"{TORCHRUN} SLURM_PROCID=1 SLURM_LOCALID=0 SLURM_NTASKS=2 SLURM_NNODES=2"),  # srun torchrun
        ("srun", SRUN),
        ("srun", f"{SRUN} {STEP}"),
        ("srun", f"{SRUN} {STEP} WORLD_SIZE=4 RANK=3"),  # as scripts set them for torch
        ("srun", f"{SRUN} PMI_RANK=3 PMI_SIZE=4"),  # srun --mpi=pmi2
        ("srun", f"{SRUN} SLURM_JOB_NAME=interactive"),  # srun inside of a shell's allocation
        ("mpirun", OPEN_MPI),
        ("mpirun", f"{OPEN_MPI} SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=4 SLURM_NNODES=2"),  # in a batch script
        ("mpiexec", MPICH),
        ("jsrun", JSRUN),
    ],
)
def test_the_fourth_process_of_two_machines_with_two_each(monkeypatch, name, variables):
    environment(monkeypatch, variables, MEET)
    found = launched()
    assert (found.launcher, found.rank, found.size, found.local_rank, found.local_size) == (name, 3, 4, 1, 2)
    assert numbers() == ("2", 2)
    assert numbers("2", 2) == ("2", 2)
    assert numbers("auto") == ("2", 2)
    assert numbers("0,1") == ("0,1", 2)
    assert (global_rank(), is_rank_zero(), is_one_of_several()) == (3, False, True)
    for given in (("1", None), ("4", 1), ("0,1,2", None), (None, 1), (None, 4)):
        with pytest.raises(LauncherError) as refused:
            numbers(*given)
        key = "fabric.num_nodes=" if given[0] is None else f"fabric.devices={given[0]}"
        assert refused.value.problems[0].startswith(key)
    with pytest.raises(LauncherError, match=r"fabric\.devices=2"):
        check_alone("pipeline")


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1", "2"),
        ("SLURM_PROCID=1 SLURM_LOCALID=1 SLURM_NTASKS=2", "2"),
        ("SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=2", "2"),  # perhaps a batch script without srun
        ("SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=8 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=1", "2"),
        ("SUBMITIT_LOCAL_GLOBALID=1 SUBMITIT_LOCAL_NTASKS=2 SUBMITIT_LOCAL_LOCALID=1", "2"),
        ("LOCAL_RANK=1 WORLD_SIZE=2", "2"),  # Lightning's
        ("LOCAL_RANK=0 WORLD_SIZE=2 NODE_RANK=0", "2"),
    ],
)
def test_processes_of_one_machine(monkeypatch, variables, devices):
    environment(monkeypatch, variables, MEET)
    assert numbers() == (devices, 1)
    assert is_one_of_several()
    with pytest.raises(ConfigError, match="1"):
        numbers("1")


@pytest.mark.parametrize(
    ("variables", "noted"),
    [
        ("", None),
        (ALONE, None),
        ("SLURM_JOB_ID=5 SLURM_NTASKS=4 SLURM_NNODES=2", "SLURM_NTASKS=4"),  # salloc
        ("SLURM_JOB_NAME=bash SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=4", "SLURM_NTASKS=4"),  # srun --pty bash
        ("SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_JOB_ID=5", None),  # sbatch without --ntasks
        ("SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 SLURM_JOB_ID=5", None),
        ("WORLD_SIZE=4", "WORLD_SIZE=4"),
        ("PMIX_RANK=0", None),
        ("PMI_RANK=0 PMI_SIZE=1", None),
        (f"{MEET} NODE_RANK=0", None),
    ],
)
def test_a_process_that_no_launcher_has_started(monkeypatch, variables, noted):
    environment(monkeypatch, variables)
    assert launched() is None
    assert numbers() == ("1", 1)
    assert numbers("2") == ("2", 1)  # it starts the other one
    assert is_rank_zero() and not is_one_of_several()
    assert (stale_note(False) or "").startswith(noted or "") and (stale_note(False) is None) == (noted is None)
    assert stale_note(True) is None
    assert child_environment() == dict(os.environ)
    check_alone("pipeline")


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ("RANK=1", "RANK=1"),
        ("RANK=0", "RANK=0"),
        ("RANK=1 WORLD_SIZE=2", "LOCAL_RANK"),
        ("RANK=2 WORLD_SIZE=2 LOCAL_RANK=0", "RANK=2"),
        ("RANK=x WORLD_SIZE=2 LOCAL_RANK=0", "RANK=x"),
        ("RANK=-1 WORLD_SIZE=2 LOCAL_RANK=0", "RANK=-1"),
        ("LOCAL_RANK=1", "LOCAL_RANK=1"),
        ("NODE_RANK=1", "NODE_RANK=1"),
        ("SLURM_PROCID=1", "SLURM_PROCID=1"),
        ("PMIX_RANK=1", "PMIX_RANK=1"),
        ("OMPI_COMM_WORLD_RANK=1", "OMPI_COMM_WORLD_RANK=1"),
        (f"{SRUN} RANK=0", "RANK=0"),
        (f"{SRUN} SLURM_TASKS_PER_NODE=3,1", "SLURM_NTASKS=4"),
        (f"{OPEN_MPI}", "MASTER_ADDR"),
        ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=0", "fabric.num_nodes"),
        ("LOCAL_RANK=1 WORLD_SIZE=2", "MASTER_PORT"),
    ],
)
def test_variables_that_are_incomplete_or_contradictory(monkeypatch, variables, named):
    environment(monkeypatch, variables)
    with pytest.raises(ConfigError, match=named):
        numbers()


@pytest.mark.parametrize(
    ("variables", "given", "expected"),
    [
        ("NODE_RANK=1", ("2", 2), ("2", 2)),
        ("NODE_RANK=1 WORLD_SIZE=4", ("2", None), ("2", 2)),
        ("NODE_RANK=1 LOCAL_RANK=0 WORLD_SIZE=4", (None, 2), ("2", 2)),
        ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=0", (None, 2), ("1", 2)),
    ],
)
def test_machines_that_variables_distinguish(monkeypatch, variables, given, expected):
    environment(monkeypatch, variables, MEET)
    assert numbers(*given) == expected
    assert not is_rank_zero()


def test_several_machines_need_numbers_and_a_place_to_meet(monkeypatch):
    environment(monkeypatch)
    with pytest.raises(ConfigError, match="NODE_RANK"):
        numbers("2", 2)
    environment(monkeypatch, "NODE_RANK=0")
    with pytest.raises(ConfigError, match="MASTER_PORT"):
        numbers("2", 2)


def test_the_only_process_of_a_launcher(monkeypatch):
    environment(monkeypatch, "RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 TORCHELASTIC_RUN_ID=x", MEET)
    assert numbers() == ("1", 1)
    with pytest.raises(LauncherError, match=r"fabric\.devices=2"):
        numbers("2")
    assert numbers("2", alone=True) == ("2", 1)  # a sweep's job starts them in a process of its own ...
    assert not {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "MASTER_PORT"} & set(child_environment())  # ... with these


def test_a_process_that_fabric_has_started_is_asked_nothing(monkeypatch):
    environment(monkeypatch, "SHEEPRLHF_LAUNCHER=1 LOCAL_RANK=1 NODE_RANK=0 WORLD_SIZE=2 SLURM_NTASKS=4", MEET)
    monkeypatch.setenv("SHEEPRLHF_LAUNCHER", "1")
    assert launched() is None
    assert numbers("2") == ("2", 1)
    assert global_rank() == 1
    assert stale_note(False) is None


def test_processes_of_one_job_meet_at_one_place_and_those_of_another_elsewhere(monkeypatch):
    def place(*variables):
        environment(monkeypatch, *variables)
        return meeting_host(launched()), meeting_port(launched())

    first = place(SRUN, STEP)
    assert first[0] == "gpu07" and 15000 <= first[1] < 25000
    assert place(SRUN.replace("PROCID=3", "PROCID=0"), STEP) == first
    assert place(SRUN.replace("JOB_ID=71", "JOB_ID=72"), STEP)[1] != first[1]
    assert place(SRUN, STEP, MEET) == ("10.0.0.1", 29500)
    assert place(SRUN, "SLURM_JOB_NODELIST=a1,b2")[0] == "a1"
    assert place("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1")[0] == "127.0.0.1"


def test_lightnings_own_options_do_not_replace_ours(monkeypatch):
    environment(monkeypatch, "LT_DEVICES=2 LT_PRECISION=bf16-true")
    with pytest.raises(ConfigError) as refused:
        numbers("1")
    assert [problem.partition("=")[0] for problem in refused.value.problems] == ["LT_DEVICES", "LT_PRECISION"]
    environment(monkeypatch, "LT_DEVICES=2 LT_PRECISION=32-true")
    assert numbers("2") == ("2", 1)


def test_fabric_run_counts_as_torchrun(monkeypatch):
    by_cli = f"{TORCHRUN} {MEET} LT_CLI_USED=1 LT_DEVICES=auto LT_NUM_NODES=1"  # with torchrun's own --nnodes
    environment(monkeypatch, by_cli)
    assert numbers() == ("2", 2)
    environment(monkeypatch, by_cli, "LT_PRECISION=bf16-mixed")
    with pytest.raises(LauncherError) as refused:
        numbers()
    [problem] = refused.value.problems
    assert problem.startswith("--precision=bf16-mixed")
    environment(monkeypatch, "LT_CLI_USED=1 LT_ACCELERATOR=cpu LT_DEVICES=1")
    fabric = make_fabric(FabricConfig(accelerator="cpu", devices="1"))
    fabric.launch()
    assert fabric.world_size == 1


GB = 10**9


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"/proc/meminfo": 9 * GB}, 9 * GB),
        ({"/proc/meminfo": 9 * GB, "memory.max": 4 * GB, "memory.current": 3 * GB, "memory.stat": 2 * GB}, 3 * GB),
        ({"/proc/meminfo": 2 * GB, "memory.max": 4 * GB, "memory.current": 1 * GB}, 2 * GB),
        ({"/proc/meminfo": 9 * GB, "memory.limit_in_bytes": 4 * GB, "memory.usage_in_bytes": 5 * GB}, 0),
        ({"/proc/meminfo": 9 * GB, "memory.current": 3 * GB}, 9 * GB),  # memory.max says "max"
        ({}, None),
    ],
)
def test_the_tightest_limit_counts(
    files: dict[str, int], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def field(path: str, name: str = "", unit: int = 1) -> int | None:
        return files.get(path if path.startswith("/proc") else Path(path).name)

    monkeypatch.setattr(machine, "_field", field)
    assert available_memory() == expected


def test_numbers_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:  7 kB\nMemAvailable:    5 kB\nHugePages: many\n")
    assert machine._field(str(file), "MemAvailable:", 1024) == 5 * 1024
    assert machine._field(str(file), "HugePages:") is None and machine._field(str(file), "Swap:") is None
    (tmp_path / "max").write_text("max\n")
    assert machine._field(str(tmp_path / "max")) is None and machine._field(str(tmp_path / "none")) is None
    (tmp_path / "now").write_text("123\n")
    assert machine._field(str(tmp_path / "now")) == 123
