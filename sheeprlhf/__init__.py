"""SheepRLHF: fine-tune and align language models on Lightning Fabric, simply and provably.

The names below are the public Python API. Importing the package loads no torch; the first use of a name does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "collate",
    "evaluate",
    "load_policy",
    "load_reward_model",
    "load_tokenizer",
    "losses",
    "prepare_data",
    "sample",
    "train",
]

if TYPE_CHECKING:
    from sheeprlhf import loss as losses
    from sheeprlhf.api.jobs import evaluate, train
    from sheeprlhf.api.loops import collate, load_policy, load_reward_model, load_tokenizer, prepare_data, sample


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'sheeprlhf' has no attribute {name!r}")
    if name == "losses":
        return import_module("sheeprlhf.loss")
    module = "jobs" if name in ("train", "evaluate") else "loops"
    return getattr(import_module(f"sheeprlhf.api.{module}"), name)


def __dir__() -> list[str]:
    """List the public names too."""
    return sorted({*globals(), *__all__})
