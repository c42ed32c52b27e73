"""Processes that a launcher has started: torchrun, srun, mpirun and others, read from their environment variables.

Every question about ranks that is asked before torch is imported is answered here; `engine.fabric` hands the same
answer to Lightning Fabric, whose own detection is not used.
"""

import os
import re
import sys
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from sheeprlhf.utils.errors import ConfigError

OWN_LAUNCHER = "SHEEPRLHF_LAUNCHER"  # the process id of the rank that started this one through Fabric
OUTPUT_FILE = "SHEEPRLHF_OUTPUT_FILE"  # a file that gets the path of the job's run directory or result
_SHELLS = ("bash", "interactive")  # names of SLURM jobs that are a user's shell
NODE_LISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
_LIGHTNING = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")


class LauncherError(ConfigError):
    """The command does not fit the processes that a launcher has started: the same on every rank, so one reports it."""


class _Variables(NamedTuple):
    """Environment variables of one launcher; where there are several for a number, the first that is set counts."""

    launcher: str
    rank: str
    size: tuple[str, ...]
    local_rank: str
    local_size: tuple[str, ...]
    num_nodes: tuple[str, ...] = ()
    job: tuple[str, ...] = ()


_TORCH = _Variables(
    "torchrun", "RANK", ("WORLD_SIZE",), "LOCAL_RANK", ("LOCAL_WORLD_SIZE",), ("GROUP_WORLD_SIZE",)
)  # and programs that set the variables of torch.distributed
_SRUN = _Variables(
    "srun",
    "SLURM_PROCID",
    ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
    "SLURM_LOCALID",
    (),
    ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"),
    ("SLURM_JOB_ID", "SLURM_STEP_ID"),
)


def _of_prefix(launcher: str, prefix: str, job: tuple[str, ...] = ()) -> _Variables:
    """The variables of a launcher whose names differ in their end only."""
    rank, size, local_rank, local_size = (f"{prefix}_{end}" for end in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    return _Variables(launcher, rank, (size,), local_rank, (local_size,), job=job)


_LAUNCHERS = (  # those that run inside of others' allocations come first
    _TORCH,
    _of_prefix("mpirun", "OMPI_COMM_WORLD", ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")),
    _of_prefix("mpirun", "MV2_COMM_WORLD"),
    _Variables("mpiexec", "PMI_RANK", ("PMI_SIZE",), "MPI_LOCALRANKID", ("MPI_LOCALNRANKS",), job=("PMI_JOBID",)),
    _of_prefix("jsrun", "JSM_NAMESPACE", ("LSB_JOBID",)),
    _SRUN,
    _Variables(
        "submitit",
        "SUBMITIT_LOCAL_GLOBALID",
        ("SUBMITIT_LOCAL_NTASKS",),
        "SUBMITIT_LOCAL_LOCALID",
        ("SUBMITIT_LOCAL_NTASKS",),
        job=("SUBMITIT_LOCAL_JOB_ID",),
    ),
)
_PMIX = "PMIX_RANK"  # comes without the number of processes


class Launched(NamedTuple):
    """Position of this process among those that a launcher has started."""

    launcher: str  # its name
    rank: int  # of this process among all
    size: int  # number of all processes
    local_rank: int  # of this process among those of its machine
    local_size: int | None  # number of processes on each machine; None if no variable tells
    setting: str  # the environment variable that gave `size`, with its value
    job: str  # an identifier of the job, from which its processes derive a common port
    sure: bool = True  # false where SLURM's variables could also be those of a batch script that does not use srun


def launched() -> Launched | None:
    """The launcher of this process; None without one, or by Fabric. Raises ConfigError for contradictions."""
    env = os.environ
    if OWN_LAUNCHER in env and "LOCAL_RANK" in env:
        return None
    for variables in _LAUNCHERS:
        if variables is _SRUN and _not_of_srun(env):
            continue
        if variables.local_rank in env and variables.rank in env and first_set(env, variables.size):
            found = _read(variables, env)
            if variables.launcher == "submitit" and found.size == 1:
                continue  # a job alone: it may start processes
            if env.get(_TORCH.rank, str(found.rank)) != str(found.rank):
                raise ConfigError(
                    f"{_TORCH.rank}={env[_TORCH.rank]} and {variables.rank}={found.rank} in the environment contradict "
                    f"each other: unset {_TORCH.rank}"
                )
            return found
    _check_complete(env)
    return None


def first_set(env: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    """The first of these variables that is set."""
    return next((name for name in names if name in env), None)


def _not_of_srun(env: Mapping[str, str]) -> bool:
    """True if srun did not set SLURM's variables: in a shell inside an allocation, or in a script with one task."""
    if env.get("SLURM_PROCID", "0") != "0":
        return False  # only srun starts such a process
    in_step = "SLURM_STEP_NUM_TASKS" in env
    if env.get("SLURM_JOB_NAME") in _SHELLS and (not in_step or "SLURM_PTY_PORT" in env):
        return True
    return not in_step and ("SLURM_PROCID" not in env or env.get("SLURM_NTASKS", "1") == "1")


def _number(env: Mapping[str, str], name: str, least: int) -> int:
    text = env[name].strip()
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) < least:
        raise ConfigError(f"{name}={env[name]} in the environment is not a number of {least} or more: unset {name}")
    return int(text)


def _read(variables: _Variables, env: Mapping[str, str]) -> Launched:
    size_name = first_set(env, variables.size) or ""
    rank, size = _number(env, variables.rank, 0), _number(env, size_name, 1)
    local_rank = _number(env, variables.local_rank, 0)
    if rank >= size:
        raise ConfigError(
            f"{variables.rank}={rank} and {size_name}={size} in the environment contradict each other: unset both, or "
            f"start all processes by {variables.launcher}"
        )
    local_size = None
    if name := first_set(env, variables.local_size):
        local_size = _number(env, name, 1)
    elif name := first_set(env, variables.num_nodes):
        num_nodes = _number(env, name, 1)
        local_size = size // num_nodes if size % num_nodes == 0 else 0
    elif size == 1:
        local_size = 1
    if variables is _SRUN:  # the numbers of processes on each machine, such as "2(x3),1"
        tasks = "SLURM_STEP_TASKS_PER_NODE" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_TASKS_PER_NODE"
        if len(set(map(int, re.findall(r"(?:^|,)(\d+)", env.get(tasks, ""))))) > 1:
            local_size = 0
    if local_size == 0 or (local_size is not None and (size % local_size or local_rank >= local_size)):
        raise LauncherError(
            f"{variables.launcher} started {size_name}={size} processes, not the same number on every machine "
            f"({variables.local_rank}={local_rank}): start as many on each"
        )
    job = "-".join(env[name] for name in variables.job if name in env) or f"session {os.getsid(0)}"
    sure = variables is not _SRUN or "SLURM_STEP_NUM_TASKS" in env or rank > 0
    return Launched(variables.launcher, rank, size, local_rank, local_size, f"{size_name}={size}", job, sure)


def _check_complete(env: Mapping[str, str]) -> None:
    """Raises ConfigError for a rank without the variables that belong to it."""
    for variables in _LAUNCHERS:
        wanted = (variables.rank, variables.size[-1], variables.local_rank)
        if variables.rank not in env or (variables is _SRUN and _not_of_srun(env)):
            continue
        if any(env.get(name) == "1" for name in variables.size):
            continue
        missing = [name for name in wanted if name not in env]
        if missing:
            raise ConfigError(
                f"{variables.rank}={env[variables.rank]} is set in the environment without {' and '.join(missing)}: "
                f"unset {variables.rank}, or start the processes by {variables.launcher}, which sets all of them"
            )
    if _PMIX in env and env[_PMIX] != "0":
        advice = f"start them by mpirun, srun or torchrun, or unset {_PMIX}"
        raise ConfigError(f"{_PMIX}={env[_PMIX]} is set in the environment without the number of processes: {advice}")


def number_or(name: str, default: int) -> int:
    """A number of the environment, or the default. Raises ConfigError if it is no number."""
    return _number(os.environ, name, 0) if name in os.environ else default


def node_rank() -> int:
    """The number of this machine by Lightning's variable; 0 without it."""
    return number_or("NODE_RANK", 0)


def global_rank() -> int:
    """The rank of this process as far as the environment tells, else 0; of Fabric's, others than 0 may be inexact."""
    try:
        found = launched()
        return found.rank if found is not None else number_or("LOCAL_RANK", 0) or node_rank()
    except ConfigError:
        return 0


def local_rank() -> int:
    """The rank of this process among those of its machine, as far as the environment tells."""
    try:
        found = launched()
        return found.local_rank if found is not None else number_or("LOCAL_RANK", 0)
    except ConfigError:
        return 0


def is_rank_zero() -> bool:
    """True if this process has global rank zero, the only rank that writes."""
    return global_rank() == 0


def leave_to_rank_zero() -> bool:
    """True for ranks above zero, which print that they do nothing: for commands of one process."""
    if is_rank_zero():
        return False
    print(f"process {global_rank()} does nothing: the first one runs this command", file=sys.stderr)
    return True


def is_one_of_several() -> bool:
    """True if the environment announces other processes of this job. Raises ConfigError as `launched`."""
    found = launched()
    if found is not None:
        return found.size > 1
    if "LOCAL_RANK" not in os.environ and "NODE_RANK" not in os.environ:
        return False
    return global_rank() > 0 or number_or("WORLD_SIZE", 1) > 1


def check_alone(what: str) -> None:
    """Raise LauncherError where a launcher has started several processes: `what` starts those of its parts."""
    if not is_one_of_several():
        return
    found = launched()
    name = found.launcher if found is not None else "a launcher"
    given = found.setting if found is not None else "LOCAL_RANK, NODE_RANK"
    number = found.local_size or found.size if found is not None else 2
    once = "by srun --ntasks=1" if name == "srun" else f"without {name}"
    raise LauncherError(
        f"{what} starts the processes of its trainings itself, and {name} has started several ({given}): start it "
        f"once, {once}, with fabric.devices={number}"
    )


def stale_note(given: bool) -> str | None:
    """A sentence about variables of a launcher that did not start this process; None if a number is `given`."""
    env = os.environ
    if OWN_LAUNCHER in env or launched() is not None or given:
        return None
    for name, launcher in (("SLURM_STEP_NUM_TASKS", "srun"), ("SLURM_NTASKS", "srun"), ("WORLD_SIZE", "a launcher")):
        if name == "WORLD_SIZE" and {"LOCAL_RANK", "NODE_RANK"} & set(env):
            continue
        if env.get(name, "1") not in ("0", "1"):
            advice = "it runs alone; start it by srun or torchrun, or give fabric.devices"
            return f"{name}={env[name]} is set, but {launcher} has not started this process: {advice}"
    return None


def child_environment() -> dict[str, str]:
    """The environment for a command that starts its own processes: without variables of a launcher for one."""
    found = launched()
    if found is None or found.size > 1:
        return dict(os.environ)
    names = {OWN_LAUNCHER, _PMIX, "GROUP_RANK", *_LIGHTNING, "MASTER_ADDR", "MASTER_PORT"}
    for variables in _LAUNCHERS:
        names |= {variables.rank, *variables.size, variables.local_rank, *variables.local_size}
    names |= {name for name in os.environ if name.startswith("TORCHELASTIC_")}
    return {name: value for name, value in os.environ.items() if name not in names}


def meeting_port(found: Launched) -> int:
    """The port at which processes meet: that of the environment, else one that follows from the job."""
    if "MASTER_PORT" in os.environ:
        return _number(os.environ, "MASTER_PORT", 1)
    return 15000 + zlib.crc32(f"{os.getuid()}-{found.job}".encode()) % 10000  # below those that systems hand out


def meeting_host(found: Launched) -> str:
    """The machine at which processes meet: that of the environment, else the first of a SLURM job, else this one."""
    name = first_set(os.environ, NODE_LISTS)
    if "MASTER_ADDR" in os.environ or found.launcher != "srun" or found.size == found.local_size or name is None:
        return os.environ.get("MASTER_ADDR", "127.0.0.1")
    nodes = os.environ[name]
    return re.split(r"[ ,]", re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes))[0]  # "gpu[07-09,12],big1" is gpu07
