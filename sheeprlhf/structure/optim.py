"""Optimizers and the schedule of their learning rate."""

from dataclasses import dataclass
from typing import ClassVar, Optional

from sheeprlhf.structure.option import Config, option


@dataclass(unsafe_hash=True)
class OptimizerConfig(Config):
    """Options of every optimizer."""

    torch_name: ClassVar[str] = ""  # class in torch.optim

    config_name: str = option("???", "Name of this choice.")
    lr: Optional[float] = option(None, "Peak learning rate; null: model.lr or model.lora_cfg.lr.", minimum=0.0)
    weight_decay: float = option(0.0, "Weight decay of matrices (biases and norms have none).", minimum=0.0)
    schedule: str = option(
        "cosine",
        "Shape of the learning rate after the warm-up; wsd is constant and then falls linearly.",
        choices=("cosine", "linear", "constant", "wsd"),
    )
    decay_ratio: float = option(0.1, "Share of the steps in which wsd falls, rounded up.", minimum=0.0, maximum=1.0)
    min_lr_ratio: float = option(0.0, "Last learning rate as a share of the peak.", minimum=0.0, maximum=1.0)


@dataclass(unsafe_hash=True)
class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov and Hutter, 2019), fused."""

    torch_name: ClassVar[str] = "AdamW"

    config_name: str = "adamw"
    betas: tuple[float, float] = option((0.9, 0.999), "Decay of the two moment averages.")
    eps: float = option(1e-8, "Added to the denominator.", above=0.0)
    fused: bool = option(True, "Use torch's fused kernel.")


@dataclass(unsafe_hash=True)
class AdamConfig(OptimizerConfig):
    """Adam (Kingma and Ba, 2015), fused."""

    torch_name: ClassVar[str] = "Adam"

    config_name: str = "adam"
    betas: tuple[float, float] = option((0.9, 0.999), "Decay of the two moment averages.")
    eps: float = option(1e-8, "Added to the denominator.", above=0.0)
    fused: bool = option(True, "Use torch's fused kernel.")


@dataclass(unsafe_hash=True)
class AdamW8bitConfig(OptimizerConfig):
    """AdamW with moments of 8 bits (Dettmers et al., 2022), by bitsandbytes; tensors below 4,096 numbers have 32."""

    torch_name: ClassVar[str] = "AdamW8bit"  # class in bitsandbytes.optim

    config_name: str = option("adamw_8bit", "Name of this choice.")
    betas: tuple[float, float] = option((0.9, 0.999), "Decay of the two moment averages.")
    eps: float = option(1e-8, "Added to the denominator.", above=0.0)


@dataclass(unsafe_hash=True)
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent."""

    torch_name: ClassVar[str] = "SGD"

    config_name: str = "sgd"
    lr: Optional[float] = option(1e-2, "Peak learning rate.", minimum=0.0)
    momentum: float = option(0.0, "Momentum.", minimum=0.0, maximum=1.0)
    nesterov: bool = option(False, "Nesterov's momentum; needs momentum above 0.")
