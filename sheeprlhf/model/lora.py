"""Low-rank adapters on a frozen language model, through PEFT."""

import difflib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sheeprlhf.structure.model import LORAConfig
from sheeprlhf.structure.validate import parse_targets
from sheeprlhf.utils.errors import ModelError


def load_lora(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the adapters of a PEFT folder on the model, frozen.

    Raises:
        ModelError: the folder holds no adapters that fit the model.
    """
    try:
        with _peft_warnings_ignored():
            return PeftModel.from_pretrained(model, folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{folder}: these adapters cannot be loaded: {error}") from error


def add_lora(model: PreTrainedModel, cfg: LORAConfig, *, head: str | None = None) -> PeftModel:
    """Freeze the model and put trainable adapters (float32) beside the target modules.

    Args:
        model: a causal language model, or a classification model.
        cfg: the adapters.
        head: name of a module that trains as a whole and is saved with the adapters: a classification model's head.

    Raises:
        ModelError: a target names no module of the model.
    """
    targets = parse_targets(cfg.targets)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    if not isinstance(targets, str):
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        missing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in linear)]
        if missing:
            near = difflib.get_close_matches(missing[0], known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ModelError(
                f"model.lora_cfg.targets: no linear layer is named {', '.join(missing)}{hint} "
                f"This model has {', '.join(known)}; 'all-linear' takes all but the head."
            )
    config = LoraConfig(
        task_type="CAUSAL_LM" if head is None else "SEQ_CLS",
        modules_to_save=None if head is None else [head],
        r=cfg.rank,
        lora_alpha=cfg.alpha,  # type: ignore[arg-type]
        lora_dropout=cfg.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear.values()),
    )
    with _peft_warnings_ignored():
        return get_peft_model(model, config)


def merge_lora(model: PeftModel) -> PreTrainedModel:
    """The model with its adapters in its weights, all of which train; it is no longer what any folder holds."""
    merged = cast(PreTrainedModel, model.merge_and_unload())
    merged.requires_grad_(True)
    merged.name_or_path = merged.config._name_or_path = ""
    return merged


def save_model(model: PreTrainedModel | PeftModel, folder: Path) -> bool:
    """Write what `from_pretrained` loads: a whole model, or adapters if what they sit in is in a folder of its own.

    Adapters are the same bytes from every process: PEFT holds names in sets. Adapters on weights that are in no folder
    are merged into them, and the model is used up.

    Returns:
        Whether the folder holds adapters.
    """
    if isinstance(model, PeftModel) and not model.get_base_model().name_or_path:
        model = merge_lora(model)
    if not isinstance(model, PeftModel):
        model.save_pretrained(str(folder))
        return False
    for config in model.peft_config.values():
        if isinstance(config, LoraConfig):
            for field in ("target_modules", "modules_to_save"):
                names = getattr(config, field)
                setattr(config, field, sorted(names) if isinstance(names, set) else names)
    model.save_pretrained(str(folder))
    return True


@contextmanager
def _peft_warnings_ignored() -> Iterator[None]:
    """PEFT warns that it corrects fan_in_fan_out per layer, which is right, and uses an old name of transformers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        yield
