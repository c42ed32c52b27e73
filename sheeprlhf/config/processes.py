"""Numbers of devices and machines: those that were given, and those that a launcher has started processes for."""

import dataclasses
import math
import os

from sheeprlhf.config.validate import is_plan, parse_devices
from sheeprlhf.structure.run import EvalConfig, FabricConfig, RootConfig, TrainConfig
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.launchers import (
    NODE_LISTS,
    OWN_LAUNCHER,
    Launched,
    LauncherError,
    first_set,
    launched,
    node_rank,
    number_or,
)

LIGHTNING_CLI = "LT_CLI_USED"  # "1" in the processes that `fabric run` starts through torchrun
LIGHTNING_OPTIONS = ("accelerator", "strategy", "devices", "num_nodes", "precision")


def with_launched_processes(config: RootConfig, *, alone: bool = False) -> RootConfig:
    """The configuration with the launcher's numbers, or its own (`alone`, if it is one). Raises ConfigError."""
    if not isinstance(config, TrainConfig | EvalConfig) or is_plan(config):
        return config
    found, fabric = launched(), config.fabric
    if found is not None and alone and found.size == 1:
        devices, num_nodes = fabric.devices or "1", fabric.num_nodes or 1
    elif found is None:
        devices, num_nodes = _own_numbers(fabric)
    else:
        devices, num_nodes = _launched_numbers(fabric, found)
    fabric = dataclasses.replace(fabric, devices=devices, num_nodes=num_nodes)
    if problems := [problem for name in LIGHTNING_OPTIONS if (problem := _lightning_problem(name, fabric))]:
        raise LauncherError(*problems)
    settled = dataclasses.replace(config, fabric=fabric)
    settled.lock()
    return settled


def _lightning_problem(name: str, fabric: FabricConfig) -> str | None:
    """A message about an option of Lightning's environment that differs from ours; None if it is the same or unset."""
    variable = f"LT_{name.upper()}"
    value = os.environ.get(variable)
    if value in (None, str(getattr(fabric, name))):
        return None
    if os.environ.get(LIGHTNING_CLI) != "1":
        return f"{variable}={value} in the environment is an option of Lightning's: unset it, and give fabric.{name}"
    if name in ("devices", "num_nodes"):  # of which torchrun's variables, which are set too, tell the result
        return None
    own = f"fabric.{name}={getattr(fabric, name)}"
    return f"--{name}={value} of fabric run is not {own}: give fabric.{name}={value} instead"


def _count(fabric: FabricConfig) -> int | None:
    """The number of devices that was given for each machine; None if it is left open."""
    if fabric.devices is None:
        return None
    devices = parse_devices(fabric.devices)
    return len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) else None


def num_processes(fabric: FabricConfig) -> int:
    """The processes that a configuration asks for; `fabric.devices=auto` counts as one on each machine."""
    return (fabric.num_nodes or 1) * (_count(fabric) or 1)


def rows_of_rank(config: TrainConfig) -> int:
    """Most rows of an optimizer step that one process computes; a group of responses is one row."""
    rows = config.task.mini_batch_size // getattr(config.task, "num_generations", 1)
    return math.ceil(rows * config.fabric.tensor_parallel / num_processes(config.fabric))


def rows_of_pass(config: TrainConfig, row: int) -> int:
    """Most rows of `row` tokens in a forward pass of an optimizer step, at least one; groups as `rows_of_rank`."""
    most = config.task.micro_batch_size // getattr(config.task, "num_generations", 1)
    return max(1, min(most, rows_of_rank(config), config.task.token_budget // row))


def _launched_numbers(fabric: FabricConfig, found: Launched) -> tuple[str, int]:
    given = _count(fabric)
    local_size = found.local_size or max(1, found.size // (fabric.num_nodes or 1))
    num_nodes = found.size // local_size
    problems = []
    if given not in (None, local_size) or local_size * num_nodes != found.size:
        problems.append(
            f"fabric.devices={fabric.devices}: {found.launcher} has started {found.size} processes ({found.setting}), "
            f"{local_size} on each machine; give fabric.devices={local_size}, or leave fabric.devices out"
        )
    if fabric.num_nodes not in (None, num_nodes):
        problems.append(
            f"fabric.num_nodes={fabric.num_nodes}: {found.launcher} has started {found.size} processes "
            f"({found.setting}) on {num_nodes} machine{'s' if num_nodes > 1 else ''}; "
            f"give fabric.num_nodes={num_nodes}, or leave fabric.num_nodes out"
        )
    if problems:
        raise LauncherError(*problems)
    if num_nodes == 1 and found.rank != found.local_rank:
        raise LauncherError(
            f"{found.launcher}: process {found.rank} is number {found.local_rank} of its machine, so the processes "
            f"({found.setting}) are on several: give fabric.num_nodes=<number of machines>"
        )
    if num_nodes > 1 and not (found.launcher == "srun" and first_set(os.environ, NODE_LISTS)):
        _check_meeting_point(found.launcher)
    devices = fabric.devices if given is not None and fabric.devices is not None else str(local_size)
    return devices, num_nodes


def _own_numbers(fabric: FabricConfig) -> tuple[str, int]:
    """The numbers without a launcher that tells them: Fabric starts the processes, or Lightning's variables are set."""
    given, num_nodes = _count(fabric), fabric.num_nodes
    size = number_or("WORLD_SIZE", 0) if {"LOCAL_RANK", "NODE_RANK"} & set(os.environ) else 0
    if size and fabric.devices is None:
        given = max(1, size // (num_nodes or 1))
    if size and num_nodes is None and "LOCAL_RANK" not in os.environ:
        num_nodes = max(1, size // (given or 1))
    devices, num_nodes = fabric.devices or str(given or 1), num_nodes or 1
    if OWN_LAUNCHER in os.environ:
        return devices, num_nodes
    number, local, node = given or (None if devices == "auto" else 1), number_or("LOCAL_RANK", 0), node_rank()
    problems = []
    differs = size and number and size != number * num_nodes
    if differs:
        problems.append(
            f"fabric.devices={devices} and fabric.num_nodes={num_nodes} do not make the processes of "
            f"WORLD_SIZE={size} in the environment: give fabric.devices={max(1, size // num_nodes)}, or unset it"
        )
    if number and local >= number:
        advice = "give fabric.devices, the number of processes on each machine, or unset LOCAL_RANK"
        problems.append(f"LOCAL_RANK={local} is in the environment, and fabric.devices={devices}: {advice}")
    if node >= num_nodes:
        advice = "give fabric.num_nodes, the number of machines, or unset NODE_RANK"
        problems.append(f"NODE_RANK={node} is in the environment, and fabric.num_nodes={num_nodes}: {advice}")
    if num_nodes > 1 and "NODE_RANK" not in os.environ and "GROUP_RANK" not in os.environ:
        problems.append(
            f"fabric.num_nodes={num_nodes} needs a launcher (torchrun, srun), or NODE_RANK, MASTER_ADDR and "
            "MASTER_PORT in the environment of each machine"
        )
    if problems:
        raise LauncherError(*problems) if differs else ConfigError(*problems)
    if num_nodes > 1 or ("LOCAL_RANK" in os.environ and number != 1):
        _check_meeting_point("nobody")
    return devices, num_nodes


def _check_meeting_point(launcher: str) -> None:
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        sets = "no launcher" if launcher == "nobody" else f"{launcher} does not"
        raise ConfigError(
            f"{' and '.join(missing)} missing in the environment: {sets} set where processes meet; set MASTER_ADDR to "
            "the first machine's address and MASTER_PORT to a free port there, the same for all processes"
        )
