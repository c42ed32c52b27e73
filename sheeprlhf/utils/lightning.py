"""Lightning Fabric without the rest of Lightning, which nothing here uses.

``lightning/__init__.py`` imports PyTorch Lightning, that imports torchmetrics, and that matplotlib: two of the four
seconds before a run begins, and 40 MB. So Fabric is imported under a parent package whose own file has not run,
and while torchmetrics, whose version is all that Fabric wants to know, counts as absent.
"""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar, cast

import torch

__all__ = [
    "ChildProcessObserver",
    "ClusterEnvironment",
    "DDPStrategy",
    "Fabric",
    "LightningEnvironment",
    "MisconfigurationException",
    "ModelParallelStrategy",
    "RankGroup",
    "SingleDeviceStrategy",
    "_FabricModule",
    "gather_objects",
    "is_wrapped",
    "move_data_to_device",
]


@contextmanager
def _fabric_alone() -> Iterator[None]:
    if "lightning" in sys.modules:  # imported whole before us, by a test or a program of the user's
        yield
        return
    parent = importlib.util.module_from_spec(cast(ModuleSpec, importlib.util.find_spec("lightning")))
    parent.__dict__["__version__"] = importlib.metadata.version("lightning")
    sys.modules["lightning"] = parent
    absent = "torchmetrics" not in sys.modules
    if absent:
        sys.modules["torchmetrics"] = cast(ModuleType, None)  # Python fails an import of such a module
    try:
        yield
    finally:
        del sys.modules["lightning"]  # later imports get the whole package, with this same Fabric
        if absent:
            del sys.modules["torchmetrics"]


with _fabric_alone():
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment
    from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
    from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver as ChildProcessObserver
    from lightning.fabric.utilities import move_data_to_device
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.fabric.wrappers import _FabricModule, is_wrapped

T = TypeVar("T")


class RankGroup:
    """All ranks again, in a process group of their own: for collectives of another thread than the main one."""

    def __init__(self, fabric: Fabric) -> None:
        """All ranks: make the group, which communicates through the host."""
        self.world_size, self.is_global_zero = fabric.world_size, fabric.is_global_zero
        self.group: Any = None
        if self.world_size > 1:
            timeout = getattr(fabric.strategy, "_timeout", None)
            self.group = torch.distributed.new_group(backend="gloo", timeout=timeout)

    def broadcast(self, item: T) -> T:
        """All ranks: rank zero's small object."""
        items = [item]
        if self.world_size > 1:
            torch.distributed.broadcast_object_list(items, group=self.group)
        return items[0]


def gather_objects(fabric: Fabric | RankGroup, item: T) -> list[T]:
    """All ranks: every rank's small object, in rank order."""
    if fabric.world_size == 1:
        return [item]
    items: list[T | None] = [None] * fabric.world_size
    torch.distributed.all_gather_object(items, item, group=fabric.group if isinstance(fabric, RankGroup) else None)
    return [gathered for gathered in items if gathered is not None]
