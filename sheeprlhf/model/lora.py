"""Low-rank adapters on a frozen language model, through PEFT: which layers get them, and which of them compute."""

import difflib
import re
import shlex
from collections.abc import Iterator, Sequence
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
    check_tensors,
    describe_shared,
    load_lora,
    peft_warnings_ignored,
    read_adapter_config,
    shared_targets,
)
from sheeprlhf.model.folder import HEAD
from sheeprlhf.model.load import base_of, trained_rows
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
    targets, linear = parse_targets(cfg.targets), _linear_names(model)
    _check_modules_to_save(model, cfg)
    if not isinstance(targets, str):
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        missing = [target for target in targets if not _matching(target, linear)]
        if missing:
            near = difflib.get_close_matches(missing[0], known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ModelError(
                f"model.lora_cfg.targets: no linear layer is named {', '.join(missing)}{hint} "
                f"This model has {', '.join(known)}; 'all-linear' takes all but the head."
            )
    rows = _rows_of_adapters(model)
    both = [] if isinstance(targets, str) else [name for name in rows for t in targets if _matching(t, [name])]
    if both:
        raise ModelError(
            f"model.lora_cfg.targets: {both[0]} can have no adapter, since model.resize_embeddings=true trains rows of "
            "it: leave it out, or give all-linear"
        )
    try:
        with peft_warnings_ignored():
            adapted = get_peft_model(model, lora_config(model, cfg, head=head))
    except ValueError as error:
        raise ModelError(f"model.lora_cfg: these adapters cannot be made: {error}") from error
    _check_layers(adapted, cfg)
    shared = shared_targets(adapted)
    if shared:
        names = {name.rsplit(".", 1)[-1] for name in shared}
        kept = [] if isinstance(targets, str) else [target for target in targets if target.split(".")[-1] not in names]
        fix = f"[{','.join(kept)}]" if kept else "all-linear"
        raise ModelError(
            f"model.lora_cfg.targets: {describe_shared(shared)}, so merging an adapter there would change both: "
            f"give {shlex.quote(f'model.lora_cfg.targets={fix}')}"
        )
    return adapted


def _linear_names(model: nn.Module) -> list[str]:
    """Names of the linear layers, with or without adapters."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return [name.removesuffix(".base_layer") for name in names if ".lora_" not in name]


def _matching(target: str, names: Sequence[str]) -> list[str]:
    """The names of modules that a target selects: by their last parts, or by a regular expression of the whole."""
    if is_pattern(target):
        return [name for name in names if re.fullmatch(target, name)]
    return [name for name in names if f".{name}".endswith(f".{target}")]


def _target_modules(model: nn.Module, cfg: LORAConfig) -> str | list[str]:
    """The targets as PEFT takes them: regular expressions become names, so that a saved adapter has none."""
    targets, names = parse_targets(cfg.targets), _linear_names(model)
    if isinstance(targets, str):  # PEFT takes it for all layers only
        return sorted({name.rsplit(".", 1)[-1] for name in names}) if cfg.layers_to_transform else targets
    return sorted(
        {name for target in targets for name in (_matching(target, names) if is_pattern(target) else [target])}
    )


def _check_modules_to_save(model: PreTrainedModel, cfg: LORAConfig) -> None:
    """Raises ModelError for a module that is missing, is adapted too, or shares its weights with another one."""
    modules = dict(model.named_modules())
    targets = parse_targets(cfg.targets)
    for wanted in cfg.modules_to_save:
        key = f"model.lora_cfg.modules_to_save: {wanted}"
        found = _matching(wanted, list(modules))
        if not found:
            near = difflib.get_close_matches(wanted, {name.rsplit(".", 1)[-1] for name in modules}, n=1)
            raise ModelError(f"{key} is not a module of this model{f'; did you mean {near[0]}?' if near else ''}")
        own = {id(weight) for name in found for weight in modules[name].parameters()}
        users = [name for name, module in modules.items() for w in module.parameters(recurse=False) if id(w) in own]
        others = [user for user in users if not any(user == name or user.startswith(f"{name}.") for name in found)]
        if others:
            raise ModelError(f"{key} shares its weight with {others[0]}, which would not be trained: leave it out")
        linear = [name for name in _linear_names(model) if any(f"{name}.".startswith(f"{one}.") for one in found)]
        head = model.get_output_embeddings()
        of_all = targets == "all-linear" and any(modules[name] is not head for name in linear)
        adapted = [] if isinstance(targets, str) else [name for t in targets for name in _matching(t, linear)]
        if of_all or adapted:
            raise ModelError(f"{key} is trained as a whole and is among model.lora_cfg.targets: give it in one of them")


def _check_layers(model: PeftModel, cfg: LORAConfig) -> None:
    """Raises ModelError for a number of model.lora_cfg.layers_to_transform that no adapter is in."""
    numbers = {
        int(part)
        for name, _ in model.named_parameters()
        if ".lora_" in name
        for part in name.split(".")
        if part.isdigit()
    }
    missing = sorted(set(cfg.layers_to_transform) - numbers)
    if missing:
        raise ModelError(
            f"model.lora_cfg.layers_to_transform: no target is in layer {missing[0]}: the model has the layers 0 to "
            f"{getattr(model.config, 'num_hidden_layers', 1) - 1}"
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
    rows = _rows_of_adapters(model, language_head=language_head)
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


def _rows_of_adapters(model: PreTrainedModel, *, language_head: bool = True) -> dict[str, list[int]]:
    """The modules of which rows train next to adapters, each with its rows; no rows stand for the whole module.

    A tied head follows the embedding. PEFT computes rows of a head without its bias, so a head with one trains whole.

    Raises:
        ModelError: the head is tied to the embedding and has a bias.
    """
    rows = trained_rows(model)
    if not rows:
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = {names[id(embedding)]: rows}
    if head is not None and language_head:
        has_bias = getattr(base_of(head), "bias", None) is not None
        if base_of(head).weight is not base_of(embedding).weight:
            found[names[id(head)]] = [] if has_bias else rows
        elif has_bias:
            raise ModelError(
                f"model.resize_embeddings=true: the head of {type(model).__name__} has a bias and the weights of the "
                "embedding, and PEFT cannot train rows of it: give model.finetune_mode=ALL"
            )
    return found


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
