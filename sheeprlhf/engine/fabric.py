"""From the fabric options to Lightning Fabric, and what ranks tell each other besides gradients."""

import inspect
import os
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch.nn.parallel import DistributedDataParallel

from sheeprlhf.config.processes import LIGHTNING_CLI, LIGHTNING_OPTIONS
from sheeprlhf.config.validate import parse_devices
from sheeprlhf.engine.ranks import JoiningDDP
from sheeprlhf.engine.shard import sharding_strategy
from sheeprlhf.structure.run import FabricConfig
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.launchers import Launched, launched, meeting_host, meeting_port
from sheeprlhf.utils.lightning import (
    ClusterEnvironment,
    DDPStrategy,
    Fabric,
    LightningEnvironment,
    MisconfigurationException,
    ModelParallelStrategy,
)

T = TypeVar("T")


class LaunchedEnvironment(ClusterEnvironment):
    """Tells Fabric about the processes that a launcher has started, as `utils.launchers` reads them."""

    creates_processes_externally = True

    def __init__(self, found: Launched) -> None:
        """Read only the meeting address from the environment."""
        self._found = found

    @staticmethod
    def detect() -> bool:
        """Never: it is passed to Fabric."""
        return False

    @property
    def main_address(self) -> str:
        """The machine of rank zero."""
        return meeting_host(self._found)

    @property
    def main_port(self) -> int:
        """A port of that machine."""
        return meeting_port(self._found)

    def world_size(self) -> int:
        """The number of all processes."""
        return self._found.size

    def global_rank(self) -> int:
        """The rank among all."""
        return self._found.rank

    def local_rank(self) -> int:
        """The rank among those of this machine."""
        return self._found.local_rank

    def node_rank(self) -> int:
        """The machine's number, where machines hold ranks in turn."""
        return self._found.rank // (self._found.local_size or self._found.size)

    def set_world_size(self, size: int) -> None:
        """Does nothing: the launcher has decided."""

    def set_global_rank(self, rank: int) -> None:
        """Does nothing: the launcher has decided."""


def make_fabric(cfg: FabricConfig) -> Fabric:
    """The Fabric that a validated configuration asks for; not launched yet.

    Raises:
        ConfigError: Fabric refuses the combination on this machine.
    """
    devices = parse_devices(cfg.devices)
    accelerator = cfg.accelerator
    if accelerator == "auto":  # Fabric's own "auto" would also take kinds of device that nothing here is tested on
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if devices == "auto":
        devices = torch.cuda.device_count() if accelerator == "cuda" else 1
    if accelerator == "cpu":
        # In bf16, oneDNN compiles kernels for every new shape, a packed row's length for one, and would keep 1,024 of
        # them, 0.7 MB each. Read by its first operation.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    num_nodes, found = cfg.num_nodes or 1, launched()
    num_processes = num_nodes * (len(devices) if isinstance(devices, list) else int(devices))
    timeout = timedelta(seconds=cfg.timeout)
    strategy: str | DDPStrategy | ModelParallelStrategy = cfg.strategy
    if cfg.strategy == "fsdp2":
        strategy = sharding_strategy(cfg, num_processes, timeout)
    elif cfg.strategy == "ddp" or (cfg.strategy == "auto" and num_processes > 1):
        # No buffers are broadcast: ours are constants, and ranks may run different numbers of forward passes.
        options: dict[str, Any] = {"gradient_as_bucket_view": True, "timeout": timeout}
        known = inspect.signature(DistributedDataParallel).parameters  # torch 2.13 renamed the option
        options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
        strategy = JoiningDDP(**options)
    os.environ.pop(LIGHTNING_CLI, None)  # with it Fabric would refuse to launch; our environment knows the processes
    for name in LIGHTNING_OPTIONS:  # checked to be the same, and Fabric would prefer them
        os.environ.pop(f"LT_{name.upper()}", None)
    try:
        return Fabric(
            accelerator=accelerator,
            strategy=strategy,
            devices=devices,
            num_nodes=num_nodes,
            plugins=[LightningEnvironment() if found is None else LaunchedEnvironment(found)],
            precision=cast(Any, cfg.precision),  # validated against the same names
        )
    except (MisconfigurationException, ImportError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"fabric.accelerator={cfg.accelerator} fabric.devices={cfg.devices} fabric.strategy={cfg.strategy} "
            f"fabric.precision={cfg.precision} does not work here: {error}"
        ) from error
