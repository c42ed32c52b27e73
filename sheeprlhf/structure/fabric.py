"""Devices of a run: the arguments of Lightning Fabric."""

from dataclasses import dataclass
from typing import Optional

from sheeprlhf.structure.option import Config, option

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true")
STRATEGIES = ("auto", "ddp", "fsdp2")


@dataclass(unsafe_hash=True)
class FabricConfig(Config):
    """On the CPU, one process."""

    config_name: str = option("cpu", "Name of this choice.")
    accelerator: str = option("cpu", "Kind of device.", choices=("cpu", "cuda", "auto"))
    devices: Optional[str] = option(
        None,
        "Number of devices (processes) on each machine, or 'auto' for all that are there; null is what the launcher "
        "(torchrun, srun, mpirun) has started, else 1.",
    )
    num_nodes: Optional[int] = option(None, "Number of machines; null: that of the launcher, else 1.", minimum=1)
    strategy: str = option("auto", "Work of several devices; fsdp2 cuts the weights up too.", choices=STRATEGIES)
    replicas: int = option(
        1,
        "Groups of devices that each hold all weights, cut up within the group; fsdp2. As many as machines keep the "
        "gathering inside a machine.",
        minimum=1,
    )
    tensor_parallel: int = option(
        1,
        "Devices that compute the same rows together, each with a part of the heads and of the MLP of every block; "
        "fsdp2.",
        minimum=1,
    )
    offload: str = option("none", "Place of sharded tensors between passes; fsdp2.", choices=("none", "cpu"))
    timeout: int = option(
        1800,
        "Longest wait of a process for the others, at the start and in each collective; then the run ends.",
        unit="seconds",
        minimum=1,
    )
    precision: str = option("32-true", "Number format: weights stay float32 under the mixed ones.", choices=PRECISIONS)


@dataclass(unsafe_hash=True)
class AutoCudaConfig(FabricConfig):
    """On one CUDA device, in bf16-mixed precision."""

    config_name: str = "auto_cuda"
    accelerator: str = "cuda"
    precision: str = "bf16-mixed"


@dataclass(unsafe_hash=True)
class AutoConfig(FabricConfig):
    """On a CUDA device if there is one, else on the CPU."""

    config_name: str = "auto"
    accelerator: str = "auto"
