"""Adapters on a frozen language model, by PEFT: checks of options and folders, making, loading, merging, saving.

PEFT's own reader would import a library that the file names. Here a setting is known and of its type, or is off, or the
file is refused.
"""

import difflib
import math
import re
import shlex
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

import torch
from peft import (
    LoraConfig,
    LoraModel,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sheeprlhf.config.validate import is_pattern, parse_targets
from sheeprlhf.model.folder.account import HEAD
from sheeprlhf.model.folder.architecture import decoder_blocks, has_other_parts, num_positions_of
from sheeprlhf.model.folder.embedding_rows import base_of, trained_rows
from sheeprlhf.model.folder.quantize import dequantize, quantization_of
from sheeprlhf.model.folder.weights import saved_dtype
from sheeprlhf.model.locate import locate_adapter
from sheeprlhf.security.json_records import Range, type_problems
from sheeprlhf.security.model_folder import ADAPTER_CONFIG, ADAPTERS, read_json, tensors_of
from sheeprlhf.security.pickled_weights import adapter_folder
from sheeprlhf.structure.model import LORAConfig, ModelConfig
from sheeprlhf.utils.errors import ModelError, Notify, first_of
from sheeprlhf.utils.modes import eval_mode

POLICY = "default"  # PEFT's name for the first adapter of a model: that of the policy
CRITIC, REWARD, REFERENCE = "critic", "reward", "reference"  # further ones on the same base
# Of 1 + the largest output. Merging adds W + BA first instead of Wx + BAx: sums in another order, and rounded weights.
_MERGE_TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02}
_FLOAT32_MERGE_TOLERANCE = 1e-4
_NUM_ROWS, _ROW_TOKENS = 4, 24
_SHOWN = 4  # tensors in a message
_NAME = re.compile(r"[\w.-]{1,200}", re.ASCII)  # PEFT takes some names for patterns: none of these takes long
_ANYWHERE = r".*\."  # begins the names of experts in the patterns that PEFT writes
_MAX_NAMES = 10_000
_WITHOUT_OUT_PROJ = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")  # types of which PEFT rejects it
_OTHER_LINEAR = ("Router", "GroupedLinear")  # ends of classes that compute something else (Llama 4, DeepSeek V4)
_OFF: tuple[Any, ...] = (False, "", [], {})
_HARMLESS = ("base_model_name_or_path", "revision", "peft_version", "inference_mode", "runtime_config")
_USUAL: dict[str, tuple[Any, ...]] = {  # what PEFT writes into every file
    "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
    "init_lora_weights": (True, "gaussian", "orthogonal"),  # pissa and olora change the base model
    "peft_type": ("LORA",),
}


_Rank = Annotated[int, Range(1, 65_536)]
_Index = Annotated[int, Range(0, 1e6)]
_Number = Annotated[float, Range(0, 1e6)]
_Names = list[str] | Literal["all-linear"]
_KNOWN: dict[str, Any] = {  # the type of each setting; all texts in it are names
    "r": _Rank,
    "lora_alpha": _Number,
    "lora_dropout": Annotated[float, Range(0, math.nextafter(1, 0))],
    **dict.fromkeys(("target_modules", "exclude_modules", "modules_to_save"), _Names),
    "target_parameters": list[str],
    "trainable_token_indices": list[_Index] | dict[str, list[_Index]],
    "task_type": Literal["CAUSAL_LM", "SEQ_CLS"],
    "bias": Literal["none", "all", "lora_only"],
    **dict.fromkeys(("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias"), bool),
    "rank_pattern": dict[str, _Rank],
    "alpha_pattern": dict[str, _Number],
    "layers_to_transform": _Index | list[_Index],
    "layers_pattern": str | list[str],
}


def _is_allowed(key: str, value: Any) -> bool:
    if any(type_problems(value, _KNOWN[key])):
        return False
    names = [name.removeprefix(_ANYWHERE) for name in _texts(value)]
    return len(names) <= _MAX_NAMES and all(map(_NAME.fullmatch, names))


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value, also keys of an object."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value:
            yield from _texts(part)


def read_adapter_config(folder: Path) -> LoraConfig:
    """The adapters of a PEFT folder, for loading: its weights have been looked at too.

    Raises ModelError if they are not LoRA, ask for something that is not ours, or the weights are not safetensors.
    """
    with adapter_errors(folder):
        content = read_json(folder, ADAPTER_CONFIG)
        for problem in _problems(content):
            raise ModelError(f"{ADAPTER_CONFIG}: {problem}")
        tensors_of(folder, ADAPTERS)
    known = {key: content[key] for key in _KNOWN if content.get(key) is not None}
    return LoraConfig(**known, base_model_name_or_path=_base(content), inference_mode=True)


@contextmanager
def adapter_errors(folder: Path) -> Iterator[None]:
    """Turn the errors of loading a folder's adapters within the block into `ModelError`s that name it."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, IndexError, SafetensorError) as error:
        raise ModelError(f"{folder}: these adapters cannot be loaded: {error}") from error


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
        if key in _KNOWN and not _is_allowed(key, value):
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


class Merged(NamedTuple):
    """A model with its adapters merged into its weights."""

    model: PreTrainedModel  # all of its weights train; it is no longer what any folder holds
    outputs: list[Tensor]  # its logits or scores on the rows that it was compared on
    difference: float  # the largest difference of an output before and after


def load_lora(model: PreTrainedModel, folder: Path, say: Notify = lambda _: None, *, trains: bool = False) -> PeftModel:
    """Put the adapters of a PEFT folder on the model.

    Args:
        model: the model that they were trained on.
        folder: has them as safetensors, or as a pickle, which is converted.
        say: prints a line for the user.
        trains: the adapters train; else they are frozen.

    Raises:
        ModelError: the folder holds no adapters that fit the model.
    """
    folder = adapter_folder(folder, say)
    config = read_adapter_config(folder)
    config.base_model_name_or_path = model.name_or_path or config.base_model_name_or_path
    if config.task_type is None and not hasattr(model, HEAD):
        config.task_type = TaskType.CAUSAL_LM
    with adapter_errors(folder), peft_warnings_ignored():
        adapted = PeftModel.from_pretrained(model, folder, config=config, is_trainable=trains)
        check_tensors(adapted, POLICY, tensors_of(folder, ADAPTERS))
    return adapted


def check_tensors(model: PeftModel, name: str, tensors: Mapping[str, Any]) -> None:
    """Account for every tensor of an adapter: PEFT leaves those that are missing as they were initialised.

    Args:
        model: with the adapter.
        name: of the adapter.
        tensors: what its file has: anything with a shape, by name.

    Raises:
        ValueError: naming tensors of the adapter that are missing, of another shape or without a place in the model.
    """
    with peft_warnings_ignored():
        expected: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    found = {
        "missing": expected.keys() - tensors.keys(),
        "without a place in the model": {key for key in tensors.keys() - expected.keys() if "lora_" in key},
        "of another shape": {
            key for key in expected.keys() & tensors.keys() if tuple(expected[key].shape) != tuple(tensors[key].shape)
        },
    }
    problems = [f"{first_of(sorted(keys), _SHOWN)} {what}" for what, keys in found.items() if keys]
    if problems:
        raise ValueError("; ".join(problems))


def check_adapters(model: PreTrainedModel, folder: Path, say: Notify) -> None:
    """Account for the tensors of a PEFT folder by the header of its file.

    Args:
        model: the model that they were trained on; tensors without content do.
        folder: as in `load_lora`.
        say: prints a line for the user.

    Raises:
        ModelError: the folder holds no adapters that fit the model.
    """
    converted = adapter_folder(folder, say)
    config = read_adapter_config(converted)
    with adapter_errors(folder), peft_warnings_ignored():
        check_tensors(get_peft_model(model, config), POLICY, tensors_of(converted, ADAPTERS))


def shared_targets(model: PeftModel) -> dict[str, list[str]]:
    """The layers with adapters whose weights other modules use too, each with the names of those modules.

    A language head that is tied to the input embedding is one: merging adapters into it changes both.
    """
    base = model.get_base_model()
    users: dict[int, list[str]] = defaultdict(list)
    for name, module in base.named_modules():
        for weight in module.parameters(recurse=False):
            users[id(weight)].append(name)
    shared = {}
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer):
            layer: nn.Module = module.get_base_layer()
            used = [user for weight in layer.parameters(recurse=False) for user in users[id(weight)]]
            others = [user for user in used if user != name and not user.startswith(f"{name}.")]
            if others:
                shared[name] = others
    return shared


def _describe_shared(shared: dict[str, list[str]]) -> str:
    return ", ".join(f"{name} shares its weight with {' and '.join(users)}" for name, users in shared.items())


def merge_lora(model: PeftModel, rows: Sequence[Sequence[int]] | None = None) -> Merged:
    """Merge the adapters into the weights, and verify that the model's outputs are unchanged.

    Quantised weights are dequantised first: merged into them, adapters would be rounded to their few bits.

    Args:
        model: the model with its adapters, which is used up.
        rows: token ids of the rows that logits or scores are compared on; a few of the whole vocabulary by default.

    Raises:
        ModelError: the merged model computes something else.
    """
    if quantization_of(model.get_base_model()):
        model = _on_dequantized_base(model)
    base = cast(PreTrainedModel, model.get_base_model())
    rows = probe_rows(base) if rows is None else rows
    before, shared = compute_outputs(base, rows), shared_targets(model)
    with peft_warnings_ignored():
        merged = cast(PreTrainedModel, model.merge_and_unload())
    merged.requires_grad_(True)
    merged.name_or_path = merged.config._name_or_path = ""
    after = compute_outputs(merged, rows)
    difference = max_difference(before, after)
    what = "with its adapters merged the model computes something else"
    share = _MERGE_TOLERANCE.get(next(merged.parameters()).dtype, _FLOAT32_MERGE_TOLERANCE)
    if shared:  # no rounding: one of the two modules got an update that was not trained for it
        what = f"{what}, since {_describe_shared(shared)} (train again with other model.lora_cfg.targets)"
        share = _FLOAT32_MERGE_TOLERANCE
    check_difference(difference, after, share, what)
    return Merged(merged, after, difference)


def _on_dequantized_base(model: PeftModel) -> PeftModel:
    """Move the policy's adapter to usual linear layers with the weights that the quantised ones stand for."""
    weights: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=POLICY, save_embedding_layers=False)
    base, config = cast(PreTrainedModel, cast(Any, model).unload()), model.peft_config[POLICY]
    dequantize(base)
    with peft_warnings_ignored():
        adapted = cast(PeftModel, get_peft_model(base, config))
        set_peft_model_state_dict(adapted, weights)
    return adapted


def save_model(model: PreTrainedModel | PeftModel, folder: Path) -> bool:
    """Write what `from_pretrained` loads: a whole model, or adapters if what they sit in is in a folder of its own.

    Adapters are the same bytes from every process: PEFT holds names in sets. Adapters on weights that are in no folder
    are merged into them, and the model is used up.

    Returns:
        Whether the folder holds adapters.

    Raises:
        ModelError: with its adapters merged, the model computes something else.
    """
    if isinstance(model, PeftModel) and not model.get_base_model().name_or_path:
        model = merge_lora(model).model
    if not isinstance(model, PeftModel):
        with _in_saved_dtype(model):
            model.save_pretrained(str(folder))
        return False
    for config in model.peft_config.values():
        if isinstance(config, LoraConfig):
            for field in ("target_modules", "modules_to_save"):
                names = getattr(config, field)
                setattr(config, field, sorted(names) if isinstance(names, set) else names)
    # The rows of new tokens are among the adapters; "auto" would write the whole resized embedding too.
    embeddings: Any = False if trained_rows(model) else "auto"
    model.save_pretrained(str(folder), selected_adapters=[POLICY], save_embedding_layers=embeddings)
    return True


@contextmanager
def _in_saved_dtype(model: PreTrainedModel) -> Iterator[None]:
    """Give the weights the number format of `saved_dtype` within the block."""
    dtype = saved_dtype(model)
    weights = [] if dtype is None else [(weight, weight.data) for weight in model.parameters()]
    try:
        for weight, data in weights:
            weight.data = data.to(dtype)
        yield
    finally:
        for weight, data in weights:
            weight.data = data


@contextmanager
def peft_warnings_ignored() -> Iterator[None]:
    """Hide PEFT's warnings of fan_in_fan_out, which it corrects, of an old name, and of tied weights, checked here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error here
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match")  # patterns that PEFT itself adds
        warnings.filterwarnings("ignore", message=".*(tie_word_embeddings|no longer tied)")
        yield


def probe_rows(model: PreTrainedModel) -> list[list[int]]:
    """Token ids of a few rows spread over the vocabulary, the same on every call, for a model without data at hand."""
    vocabulary: int = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    length = min(_ROW_TOKENS, num_positions_of(model.config) or _ROW_TOKENS)
    return [
        [(3 + 7919 * row + 104_729 * position) % vocabulary for position in range(length)] for row in range(_NUM_ROWS)
    ]


@torch.no_grad()
def compute_outputs(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Float32 outputs of each row in eval mode: (T, V) of a language model, (1,) of a reward model."""
    with eval_mode(model):
        return [model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float() for ids in rows]


def max_difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest absolute difference between the outputs of two models on the same rows."""
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def max_output(outputs: Sequence[Tensor]) -> float:
    """The largest absolute output."""
    return max(float(row.abs().max()) for row in outputs)


def check_difference(difference: float, outputs: Sequence[Tensor], share: float, what: str) -> None:
    """Compare a difference of outputs with what rounding explains.

    Args:
        difference: between the outputs of two models.
        outputs: of one of them.
        share: of 1 + the largest output, the most that is accepted.
        what: begins the message.

    Raises:
        ModelError: the difference is larger, or not a number.
    """
    limit = share * (1 + max_output(outputs))
    if not difference <= limit:
        raise ModelError(
            f"{what}: its outputs differ by {difference:.3g}, and {limit:.3g} is the most that rounding explains"
        )


def check_targets(model: PreTrainedModel, cfg: LORAConfig) -> None:
    """Check the names of `model.lora_cfg` against the modules of a model.

    Raises ModelError if a target names no module of the model, or one that trains already.
    """
    targets, linear = parse_targets(cfg.targets), linear_names(model)
    listed = () if isinstance(targets, str) else targets
    _check_modules_to_save(model, cfg)
    if missing := [target for target in listed if not matching_names(target, linear)]:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        near = difflib.get_close_matches(missing[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ModelError(
            f"model.lora_cfg.targets: no linear layer is named {', '.join(missing)}{hint} "
            f"This model has {', '.join(known)}; 'all-linear' takes all but the head."
        )
    if both := [name for name in rows_of_adapters(model) for t in listed if matching_names(t, [name])]:
        raise ModelError(
            f"model.lora_cfg.targets: {both[0]} can have no adapter, since model.resize_embeddings=true trains rows of "
            "it: leave it out, or give all-linear"
        )


def check_adapted(model: PeftModel, cfg: LORAConfig) -> None:
    """Check new adapters.

    Raises ModelError if no target is in a layer of `layers_to_transform`, or another module uses a target's weight too.
    """
    adapted = [name.split(".") for name, _ in model.named_parameters() if ".lora_" in name]
    missing = sorted(set(cfg.layers_to_transform) - {int(part) for name in adapted for part in name if part.isdigit()})
    if missing:
        raise ModelError(
            f"model.lora_cfg.layers_to_transform: no target is in layer {missing[0]}: the model has the layers 0 to "
            f"{len(decoder_blocks(model)) - 1}"
        )
    targets, shared = parse_targets(cfg.targets), shared_targets(model)
    if shared:
        names = {name.rsplit(".", 1)[-1] for name in shared}
        kept = [] if isinstance(targets, str) else [target for target in targets if target.split(".")[-1] not in names]
        fix = f"[{','.join(kept)}]" if kept else "all-linear"
        raise ModelError(
            f"model.lora_cfg.targets: {_describe_shared(shared)}, so merging an adapter there would change both: "
            f"give {shlex.quote(f'model.lora_cfg.targets={fix}')}"
        )


def linear_names(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that can have adapters, with or without them; those that text passes through."""
    parts = (model.get_decoder(), model.get_output_embeddings()) if has_other_parts(model) else (model,)
    passed = {module for part in parts if part is not None for module in part.modules()}
    left_out = "out_proj" if model.config.model_type in _WITHOUT_OUT_PROJ else None
    return [
        name
        for name, layer in _linear_layers(model).items()
        if layer in passed and name.rpartition(".")[2] != left_out and not type(layer).__name__.endswith(_OTHER_LINEAR)
    ]


def _linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """All linear layers, with or without adapters."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    return {name.removesuffix(".base_layer"): layer for name, layer in layers.items() if ".lora_" not in name}


def matching_names(target: str, names: Sequence[str]) -> list[str]:
    """The names of modules that a target selects: by their last parts, or by a regular expression of the whole."""
    if is_pattern(target):
        return [name for name in names if re.fullmatch(target, name)]
    return [name for name in names if f".{name}".endswith(f".{target}")]


def _check_modules_to_save(model: PreTrainedModel, cfg: LORAConfig) -> None:
    """Raises ModelError for a module that is missing, is adapted too, or shares its weights with another one."""
    modules = dict(model.named_modules())
    targets = parse_targets(cfg.targets)
    for wanted in cfg.modules_to_save:
        key = f"model.lora_cfg.modules_to_save: {wanted}"
        found = matching_names(wanted, list(modules))
        if not found:
            near = difflib.get_close_matches(wanted, {name.rsplit(".", 1)[-1] for name in modules}, n=1)
            raise ModelError(f"{key} is not a module of this model{f'; did you mean {near[0]}?' if near else ''}")
        own = {id(weight) for name in found for weight in modules[name].parameters()}
        users = [name for name, module in modules.items() for w in module.parameters(recurse=False) if id(w) in own]
        others = [user for user in users if not any(user == name or user.startswith(f"{name}.") for name in found)]
        if others:
            raise ModelError(f"{key} shares its weight with {others[0]}, which would not be trained: leave it out")
        linear = [name for name in linear_names(model) if any(f"{name}.".startswith(f"{one}.") for one in found)]
        head = model.get_output_embeddings()
        of_all = targets == "all-linear" and any(modules[name] is not head for name in linear)
        adapted = [] if isinstance(targets, str) else [name for t in targets for name in matching_names(t, linear)]
        if of_all or adapted:
            raise ModelError(f"{key} is trained as a whole and is among model.lora_cfg.targets: give it in one of them")


def rows_of_adapters(model: PreTrainedModel, *, language_head: bool = True) -> dict[str, list[int]]:
    """The modules of which rows train next to adapters, each with its rows; no rows stand for the whole module.

    A tied head follows the embedding. PEFT computes rows of a head without its bias, so a head with one trains whole.
    Raises ModelError if the head is tied to the embedding and has a bias.
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


def with_adapter(model: PreTrainedModel, cfg: ModelConfig, say: Notify = lambda _: None) -> PeftModel:
    """The language model with adapters that train: new ones, or those of `model.adapter`.

    Raises ModelError if they do not fit the model.
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


def _target_modules(model: PreTrainedModel, cfg: LORAConfig) -> str | list[str]:
    """The targets as PEFT takes them: regular expressions become names, so that a saved adapter has none."""
    targets, names = parse_targets(cfg.targets), linear_names(model)
    if len(names) < len(_linear_layers(model)):  # the others may have the same names: PEFT gets whole names
        heads = (model.get_output_embeddings(), getattr(model, HEAD, None))
        layers = set(map(str, cfg.layers_to_transform))
        if isinstance(targets, str):
            names = [name for name in names if model.get_submodule(name) not in heads]
        else:
            names = [name for name in names if any(matching_names(target, [name]) for target in targets)]
        return [name for name in names if not layers or layers & set(name.split("."))]
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
