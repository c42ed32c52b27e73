"""Low-rank adapters on a frozen language model, through PEFT: which layers get them, and which of them compute."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import (
    LoraConfig,
    LoraModel,
    PeftModel,
    get_peft_model,
    set_peft_model_state_dict,
)
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sheeprlhf.config.validate import is_pattern, parse_targets
from sheeprlhf.model.adapter import (
    adapter_errors,
    check_adapted,
    check_targets,
    check_tensors,
    linear_names,
    load_lora,
    matching_names,
    peft_warnings_ignored,
    read_adapter_config,
    rows_of_adapters,
)
from sheeprlhf.model.folder import HEAD
from sheeprlhf.model.locate import locate_adapter
from sheeprlhf.security.model_folder import ADAPTERS
from sheeprlhf.security.pickled_weights import adapter_folder
from sheeprlhf.structure.model import LORAConfig, ModelConfig
from sheeprlhf.utils.errors import ModelError, Notify

CRITIC, REWARD, REFERENCE = "critic", "reward", "reference"  # further ones on the same base


def with_adapter(model: PreTrainedModel, cfg: ModelConfig, say: Notify = lambda _: None) -> PeftModel:
    """The language model with adapters that train: new ones, or those of `model.adapter`.

    Raises:
        ModelError: they do not fit the model.
    """
    if cfg.adapter is None:
        assert cfg.lora_cfg is not None
        return add_lora(model, cfg.lora_cfg)
    folder = locate_adapter(cfg.adapter)
    if model.device.type != "meta":
        return load_lora(model, folder, say, trains=True)
    config = read_adapter_config(adapter_folder(folder, say))
    config.inference_mode = False
    with peft_warnings_ignored():
        return cast(PeftModel, get_peft_model(model, config))


def add_lora(model: PreTrainedModel, cfg: LORAConfig, *, head: str | None = None) -> PeftModel:
    """Freeze the model and add trainable adapters (float32) to the target modules.

    Args:
        model: a causal language model, or a classification model.
        cfg: the adapters.
        head: name of a module that trains as a whole and is saved with the adapters: a classification model's head.

    Raises:
        ModelError: a target names no module of the model, or one whose weight another module uses too.
    """
    check_targets(model, cfg)
    try:
        with peft_warnings_ignored():
            adapted = get_peft_model(model, lora_config(model, cfg, head=head))
    except ValueError as error:
        raise ModelError(f"model.lora_cfg: these adapters cannot be made: {error}") from error
    check_adapted(adapted, cfg)
    return adapted


def _target_modules(model: nn.Module, cfg: LORAConfig) -> str | list[str]:
    """The targets as PEFT takes them: regular expressions become names, so that a saved adapter has none."""
    targets, names = parse_targets(cfg.targets), linear_names(model)
    if isinstance(targets, str):  # PEFT takes it for all layers only
        return sorted({name.rsplit(".", 1)[-1] for name in names}) if cfg.layers_to_transform else targets
    return sorted(
        {name for target in targets for name in (matching_names(target, names) if is_pattern(target) else [target])}
    )


def lora_config(
    model: PreTrainedModel, cfg: LORAConfig, *, head: str | None = None, language_head: bool = True
) -> LoraConfig:
    """PEFT's configuration of the adapters; arguments as of `add_lora`.

    Args:
        model: the model.
        cfg: the adapters.
        head: as of `add_lora`.
        language_head: the language head is used, and rows of it train where those of the embedding do.
    """
    rows = rows_of_adapters(model, language_head=language_head)
    whole = [name for name, numbers in rows.items() if not numbers] + ([] if head is None else [head])
    if language_head:  # a critic's adapter leaves modules that the policy trains as they were
        whole = [*cfg.modules_to_save, *whole]
    copies = any(isinstance(module, ModulesToSaveWrapper) for module in model.modules())
    return LoraConfig(
        task_type="CAUSAL_LM" if head is None else "SEQ_CLS",
        modules_to_save=whole or None,
        trainable_token_indices=cast(Any, {name: numbers for name, numbers in rows.items() if numbers} or None),
        r=cfg.rank,
        lora_alpha=cast(Any, cfg.alpha),  # PEFT says int, and takes any number
        lora_dropout=cfg.dropout,
        use_rslora=cfg.use_rslora,
        use_dora=cfg.use_dora,
        init_lora_weights=True if cfg.init == "default" else cast(Any, cfg.init),
        layers_to_transform=list(cfg.layers_to_transform) or None,
        target_modules=_target_modules(model, cfg),
        exclude_modules=r"(.*\.)?(original_module|modules_to_save)(\..*)?" if copies else None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )


@contextmanager
def adapter_in_use(model: PeftModel, name: str) -> Iterator[None]:
    """Activate one adapter: only it computes, and only its weights can get gradients.

    Backward passes belong inside too: gradient checkpointing computes the forward pass again, with what is in use then.
    Afterwards everything is as it was before, also after an error.
    """
    before = list(model.active_adapters)
    with _flags_kept(model):
        trains = [weight for key, weight in model.named_parameters() if _belongs_to(key, name) and weight.requires_grad]
        cast(LoraModel, model.base_model).set_adapter(name)
        model.requires_grad_(False)
        for weight in trains:
            weight.requires_grad_(True)
        try:
            yield
        finally:
            cast(LoraModel, model.base_model).set_adapter(before)


def _belongs_to(key: str, name: str) -> bool:
    """True if a parameter's key belongs to the adapter with this name."""
    return f".{name}." in f"{key}."


@contextmanager
def adapters_off(model: PeftModel) -> Iterator[None]:
    """Compute without adapters; the previous state is restored afterwards, also after an error."""
    with _flags_kept(model), model.disable_adapter():
        yield


@contextmanager
def _flags_kept(model: PeftModel) -> Iterator[None]:
    """PEFT decides anew what trains whenever adapters are switched: afterwards it is what it was before.

    By name, since fsdp2 may replace the parameters in the block.
    """
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    try:
        yield
    finally:
        for name, weight in model.named_parameters():
            weight.requires_grad_(flags.get(name, weight.requires_grad))


def add_second_adapter(model: PeftModel, name: str, config: LoraConfig, *, trains: bool) -> None:
    """One more adapter on a model that has one; what trained before still does."""
    with _flags_kept(model), peft_warnings_ignored():
        model.add_adapter(name, config)
    for key, weight in model.named_parameters():
        if _belongs_to(key, name):
            weight.requires_grad_(trains)


def copy_adapter(model: PeftModel, source: str, target: str) -> None:
    """Give one adapter the weights of another of the same shape."""
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for key, weight in weights.items():
            if _belongs_to(key, target):
                weight.copy_(weights[f"{key}.".replace(f".{target}.", f".{source}.")[:-1]])


def load_score_adapter(model: PeftModel, folder: Path, name: str, say: Notify = lambda _: None) -> Tensor:
    """Add the adapters of a reward model's PEFT folder to the others, frozen.

    Args:
        model: of the architecture and weights that they were trained on.
        folder: what `save_model` wrote, or its pickled twin.
        name: of the new adapter.
        say: prints a line for the user.

    Returns:
        (1, C) weights of the score head.

    Raises:
        ModelError: the folder holds no adapters that fit the model.
    """
    folder = adapter_folder(folder, say)
    config = read_adapter_config(folder)
    with adapter_errors(folder):
        others = [name for name in config.modules_to_save or () if name != HEAD]
        config.modules_to_save, config.task_type = others or None, "CAUSAL_LM"
        weights = load_file(folder / ADAPTERS)
        [head] = [key for key in weights if key.endswith(f".{HEAD}.weight")]
        score = weights.pop(head)
        add_second_adapter(model, name, config, trains=False)
        result: Any = set_peft_model_state_dict(model, weights, adapter_name=name)
        if result.unexpected_keys:
            raise ValueError(f"{result.unexpected_keys[0]} has no place in the model")
        check_tensors(model, name, weights)
    for key, weight in model.named_parameters():
        if _belongs_to(key, name):
            weight.requires_grad_(False)
    return score
