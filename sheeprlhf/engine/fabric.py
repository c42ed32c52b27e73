"""From the fabric options to Lightning Fabric, and what ranks tell each other besides gradients."""

import inspect
import os
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sheeprlhf.engine.shard import sharding_strategy
from sheeprlhf.structure.fabric import FabricConfig
from sheeprlhf.structure.validate import parse_devices
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.lightning import DDPStrategy, Fabric, MisconfigurationException, ModelParallelStrategy

T = TypeVar("T")


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
    num_processes = cfg.num_nodes * (len(devices) if isinstance(devices, list) else int(devices))
    strategy: str | DDPStrategy | ModelParallelStrategy = cfg.strategy
    if cfg.strategy == "fsdp2":
        strategy = sharding_strategy(num_processes)
    elif cfg.strategy == "ddp" or (cfg.strategy == "auto" and num_processes > 1):
        # No buffers are broadcast: ours are constants, and ranks may run different numbers of forward passes.
        options: dict[str, Any] = {"gradient_as_bucket_view": True}
        known = inspect.signature(DistributedDataParallel).parameters  # torch 2.13 renamed the option
        options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
        strategy = DDPStrategy(**options)
    try:
        return Fabric(
            accelerator=accelerator,
            strategy=strategy,
            devices=devices,
            num_nodes=cfg.num_nodes,
            precision=cast(Any, cfg.precision),  # validated against the same names
        )
    except (MisconfigurationException, ImportError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"fabric.accelerator={cfg.accelerator} fabric.devices={cfg.devices} fabric.strategy={cfg.strategy} "
            f"fabric.precision={cfg.precision} does not work here: {error}"
        ) from error


def place(fabric: Fabric, module: nn.Module) -> None:
    """All ranks: a module that is only read goes onto the device, in the precision asked for, and nothing is wrapped.

    Wrapped for several processes, it would get buckets for gradients, and adapters that are all frozen are refused.
    """
    fabric.strategy.precision.convert_module(module).to(fabric.device)


def gather_objects(fabric: Fabric, item: T) -> list[T]:
    """All ranks: every rank's small object, in rank order."""
    if fabric.world_size == 1:
        return [item]
    items: list[T | None] = [None] * fabric.world_size
    torch.distributed.all_gather_object(items, item)
    return [gathered for gathered in items if gathered is not None]
