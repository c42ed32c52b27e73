"""The optimizer of a configuration, and its learning rate at every step."""

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from sheeprlhf.model.folder.file_parameters import drop_placeholders
from sheeprlhf.structure.run import AdamConfig, AdamW8bitConfig, AdamWConfig, OptimizerConfig, SGDConfig
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.lightning import Fabric, ModelParallelStrategy, _FabricModule


def set_up(
    fabric: Fabric, cfg: OptimizerConfig, module: nn.Module, lr: float
) -> tuple[_FabricModule, torch.optim.Optimizer]:
    """All ranks: the module and its optimizer as `fabric` runs them. Raises ConfigError if nothing trains."""
    if isinstance(fabric.strategy, ModelParallelStrategy):  # it puts other parameters in the place of the module's
        drop_placeholders(module)
        wrapped = fabric.setup_module(module)
        return wrapped, cast(
            torch.optim.Optimizer, fabric.setup_optimizers(build_optimizer(cfg, (module.parameters(), lr)))
        )
    return fabric.setup(module, build_optimizer(cfg, (module.parameters(), lr)))


def build_optimizer(cfg: OptimizerConfig, *learners: tuple[Iterable[nn.Parameter], float]) -> torch.optim.Optimizer:
    """One optimizer of the parameters of all learners that train, each learner with its peak learning rate.

    Only matrices decay, and only what has a gradient is stepped. Raises ConfigError if nothing of a learner trains.
    """
    groups = [group for parameters, lr in learners for group in _groups(cfg, parameters, lr)]
    lr = groups[0]["lr"]
    if isinstance(cfg, AdamW8bitConfig):
        import bitsandbytes  # optional, and slow to import

        return bitsandbytes.optim.AdamW8bit(groups, lr=lr, betas=tuple(cfg.betas), eps=cfg.eps)
    optimizer_class = getattr(torch.optim, cfg.torch_name)
    if isinstance(cfg, SGDConfig):
        return optimizer_class(groups, lr=lr, momentum=cfg.momentum, nesterov=cfg.nesterov)
    assert isinstance(cfg, AdamWConfig | AdamConfig)
    # torch has fused kernels for every float format on the two kinds of device that fabric.accelerator allows
    return optimizer_class(groups, lr=lr, betas=tuple(cfg.betas), eps=cfg.eps, fused=cfg.fused)


def _groups(cfg: OptimizerConfig, parameters: Iterable[nn.Parameter], lr: float) -> list[dict[str, Any]]:
    """The trainable ones: matrices, which decay, and the rest."""
    trainable = [p for p in parameters if p.requires_grad]
    if not trainable:
        raise ConfigError("no parameter of the model is trainable; check model.finetune_mode, model.freeze_transformer")
    kinds = (cfg.weight_decay, [p for p in trainable if p.ndim >= 2]), (0.0, [p for p in trainable if p.ndim < 2])
    parts = [(decay, part) for decay, kind in kinds for part in by_mesh(kind)]
    return [{"params": part, "weight_decay": decay, "lr": lr, "peak_lr": lr} for decay, part in parts]


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in lists that one kernel can take: those on a mesh of processes each, or all that are not sharded."""
    found: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return list(found.values())


def lr_factor(
    schedule: str, step: int, *, warmup: int, total: int, min_ratio: float, decay_ratio: float = 0.1
) -> float:
    """Factor of the peak learning rate at one optimizer step.

    With step s, W = `warmup`, T = `total`, m = `min_ratio`, and (s + 1) / W while s < W; afterwards:

        constant: 1
        linear:   m + (1 - m) * (1 - p),                     p = (s - W) / (T - W)
        cosine:   m + (1 - m) * (1 + cos(pi * p)) / 2,       p = (s - W) / (T - W)
        wsd:      m + (1 - m) * (1 - p),                     p = max(0, s - (T - D)) / D, D = ceil(decay_ratio * T)

    The last, warm-up, stable, decay, is of arXiv 2404.06395. D is T - W at most.

    Steps count from 0: step `warmup - 1` has the peak, and the fall would reach `min_ratio` at step `total`. Raises
    ConfigError for another schedule.
    """
    if step < warmup:
        return (step + 1) / warmup
    first = max(warmup, total - math.ceil(decay_ratio * total)) if schedule == "wsd" else warmup  # of the fall
    progress = min(1.0, max(0, step - first) / max(1, total - first))
    if schedule == "constant":
        return 1.0
    if schedule in ("linear", "wsd"):
        return min_ratio + (1 - min_ratio) * (1 - progress)
    if schedule == "cosine":
        return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    raise ConfigError(f"optim.schedule={schedule} is unknown; use cosine, linear, constant or wsd")


def follow_schedule(
    optimizer: torch.optim.Optimizer, cfg: OptimizerConfig, step: int, *, warmup: int, total: int
) -> float:
    """Give every parameter group its peak times `lr_factor`; return the learning rate of the first group."""
    factor = lr_factor(
        cfg.schedule, step, warmup=warmup, total=total, min_ratio=cfg.min_lr_ratio, decay_ratio=cfg.decay_ratio
    )
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]
    return float(optimizer.param_groups[0]["lr"])
