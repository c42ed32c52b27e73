"""The few supported settings of an untrusted adapter configuration that PEFT has saved.

PEFT's own reader would import a library that the file names. Here a setting is known and of its type, or is off, or the
file is refused.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import LoraConfig

from sheeprlhf.security.model_folder import ADAPTER_CONFIG, ADAPTERS, read_json, tensors_of
from sheeprlhf.structure.model import LORAConfig, ModelConfig
from sheeprlhf.utils.errors import ModelError

_NAME = re.compile(r"[\w.-]{1,200}", re.ASCII)  # PEFT takes some names for patterns: none of these takes long
_MAX_NAMES = 10_000
_MAX_ROWS = 1_000_000
_OFF: tuple[Any, ...] = (False, "", [], {})
_HARMLESS = ("base_model_name_or_path", "revision", "peft_version", "inference_mode", "runtime_config")
_USUAL: dict[str, tuple[Any, ...]] = {  # what PEFT writes into every file
    "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
    "init_lora_weights": (True, "gaussian", "orthogonal"),  # pissa and olora change the base model
    "peft_type": ("LORA",),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1e6


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 65_536


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _are_names(value: Any) -> bool:
    if isinstance(value, str):
        return value == "all-linear"
    return isinstance(value, list) and len(value) <= _MAX_NAMES and all(map(_is_name, value))


def _are_numbers_by_name(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= _MAX_NAMES
        and all(map(_is_name, value))
        and all(map(_is_number, value.values()))
    )


def _are_layers(value: Any) -> bool:
    layers = value if isinstance(value, list) else [value]
    return len(layers) <= _MAX_NAMES and all(_is_number(layer) and isinstance(layer, int) for layer in layers)


def _are_rows(value: Any) -> bool:
    lists = list(value.values()) if isinstance(value, dict) else [value]
    names = list(value) if isinstance(value, dict) else []
    return (
        len(lists) <= _MAX_NAMES
        and all(map(_is_name, names))
        and all(isinstance(rows, list) and len(rows) <= _MAX_ROWS for rows in lists)
        and all(_is_number(row) and isinstance(row, int) for rows in lists for row in rows)
    )


_KNOWN = {
    "r": _is_rank,
    "lora_alpha": _is_number,
    "lora_dropout": lambda value: _is_number(value) and value < 1,
    "target_modules": _are_names,
    "exclude_modules": _are_names,
    "modules_to_save": _are_names,
    "trainable_token_indices": _are_rows,
    "task_type": lambda value: value in ("CAUSAL_LM", "SEQ_CLS"),
    "bias": lambda value: value in ("none", "all", "lora_only"),
    "fan_in_fan_out": lambda value: isinstance(value, bool),
    "use_rslora": lambda value: isinstance(value, bool),
    "use_dora": lambda value: isinstance(value, bool),
    "lora_bias": lambda value: isinstance(value, bool),
    "rank_pattern": lambda value: _are_numbers_by_name(value) and all(map(_is_rank, value.values())),
    "alpha_pattern": _are_numbers_by_name,
    "layers_to_transform": _are_layers,
    "layers_pattern": lambda value: _is_name(value) or _are_names(value),
}


def read_adapter_config(folder: Path) -> LoraConfig:
    """The adapters of a PEFT folder, for loading: its weights have been looked at too.

    Raises:
        ModelError: they are not LoRA, ask for something that is not ours, or the weights are not safetensors.
    """
    try:
        content = read_json(folder, ADAPTER_CONFIG)
        for problem in _problems(content):
            raise ModelError(f"{ADAPTER_CONFIG}: {problem}")
        tensors_of(folder, ADAPTERS)
    except ModelError as error:
        raise ModelError(f"{folder}: these adapters cannot be loaded: {error}") from error
    known = {key: content[key] for key in _KNOWN if content.get(key) is not None}
    return LoraConfig(**known, base_model_name_or_path=_base(content), inference_mode=True)


def _names_transformers(value: Any) -> bool:
    library = value.get("parent_library") if isinstance(value, dict) else None
    return isinstance(library, str) and re.fullmatch(r"transformers(\.\w{1,60}){0,4}", library, re.ASCII) is not None


def _base(content: dict[str, Any]) -> str | None:
    base = content.get("base_model_name_or_path")
    return base if isinstance(base, str) else None


def _problems(content: dict[str, Any]) -> Iterator[str]:
    if content.get("peft_type") != "LORA":
        yield f"peft_type is {str(content.get('peft_type'))[:40]!r}: only adapters of LORA are read"
    for key in ("r", "target_modules"):
        if content.get(key) is None:
            yield f"{key} is missing"
    for key, value in content.items():
        if value is None or key in _HARMLESS or value in _USUAL.get(key, ()):
            continue
        if key == "auto_mapping" and _names_transformers(value):  # PEFT writes it without a task_type; it is not read
            continue
        if key not in _KNOWN and value not in _OFF:
            yield f"{key[:60]} is not one of the settings that are read; only plain LoRA is: set it to null"
        if key in _KNOWN and not _KNOWN[key](value):
            yield f"{key}={str(value)[:60]} is not a value that it may have"


def conflicting_options(cfg: ModelConfig, config: LoraConfig) -> list[str]:
    """Options of `model.lora_cfg` that were given and that an adapter has otherwise, each with the adapter's value.

    Args:
        cfg: an option counts as given if its value is not the default of this model.
        config: of the adapter.
    """
    default, given = type(cfg)().lora_cfg or LORAConfig(), cfg.lora_cfg or LORAConfig()
    theirs: dict[str, Any] = {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "targets": config.target_modules,
        "layers_to_transform": config.layers_to_transform or [],
        "modules_to_save": config.modules_to_save or [],
        "init": "that of the file",
    }
    found = {key: _plain(getattr(given, key)) for key in theirs}
    changed = [key for key in theirs if found[key] != _plain(getattr(default, key))]
    return [
        f"model.lora_cfg.{key}={found[key]}: the adapter has {_plain(theirs[key])}"
        for key in changed
        if found[key] != _plain(theirs[key])
    ]


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, list | tuple | set) else value
