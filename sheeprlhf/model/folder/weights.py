"""Weights of a model: their files, the check that they fill the model, and how they are read.

They are read whole, or quantised (`quantize`), or left in their files until they are sharded (`file_parameters`).
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from sheeprlhf.model.folder.account import HEAD, SCORE_BIAS, Account, account_for, account_from_headers
from sheeprlhf.model.folder.architecture import num_positions_of
from sheeprlhf.model.folder.file_parameters import Source, keep_in_files, placeholders
from sheeprlhf.model.folder.quantize import quantization_options, use_quantized_layers
from sheeprlhf.model.locate import locate
from sheeprlhf.security.model_folder import (
    TensorFacts,
    check_model,
    check_sizes,
    check_tokenizer,
    download_weights,
    folder_of,
    pickled_files,
    read_json,
    safetensors_files,
    tensors_of,
    weights_of,
)
from sheeprlhf.security.pickled_weights import converted_folder
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.utils.errors import ModelError, Notify
from sheeprlhf.utils.home import EMBEDDED, PICKLED, WEIGHTS_FILES

_HALF = {"F16": "float16", "BF16": "bfloat16"}  # number formats in the headers
_CLASSES = ("ForSequenceClassification", "ForCausalLM", "LMHeadModel", "Model")  # what may have a score head
LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError)
_SAVED_DTYPE = "sheeprlhf_saved_dtype"  # attribute of a backbone


class ModelFiles(NamedTuple):
    """Arguments of `from_pretrained` for a model."""

    source: str  # a folder or a hub id
    options: dict[str, Any]  # keyword arguments of every call
    folder: Path  # where the files are
    tensors: dict[str, TensorFacts]  # those of the weights, by name; empty if they are not read
    origin: str  # the folder or hub id that the model is known by, also if `source` is a converted copy


def find_files(cfg: ModelConfig) -> ModelFiles:
    """The files of a model on this machine, without its weights; nothing has been looked at.

    Raises ModelError if it cannot be found.
    """
    found, library = locate(cfg), cfg.library_cfg
    options = {"trust_remote_code": library.trust_remote_code, "revision": library.revision}
    try:
        folder = folder_of(found.source, library.revision, local_only=found.local_only)
    except OSError as error:
        raise unloadable(cfg, error) from error
    return ModelFiles(found.source, options | {"local_files_only": found.local_only}, folder, {}, found.source)


def find_weights(cfg: ModelConfig, say: Notify) -> ModelFiles:
    """The files of a model, looked at, with its weights as safetensors unless they are to be random.

    Raises ModelError if it cannot be found, has no weights, or a library should not be given them.
    """
    files = find_files(cfg)
    embedded = str(cfg.repo_name).startswith(EMBEDDED)
    if not embedded:
        check_model(files.folder)
    if cfg.random_init:
        return files
    on_hub, local_only = files.source != str(files.folder), files.options["local_files_only"]
    try:
        if on_hub and not local_only:
            download_weights(files.source, files.folder)
    except OSError as error:
        raise unloadable(cfg, error) from error
    if pickled_files(files.folder):
        converted = converted_folder(files.folder, str(cfg.repo_name), say)
        options = files.options | {"revision": None, "local_files_only": True}
        files = ModelFiles(str(converted), options, converted, {}, files.origin)
    tensors = weights_of(files.folder)
    if not tensors:
        where = "the hub's cache has no weights of it: connect and `fetch` it" if on_hub else "give one that has them"
        raise ModelError(
            f"model.repo_name={cfg.repo_name} has no weights, neither {WEIGHTS_FILES[0]} nor {PICKLED}; {where}"
        )
    if not embedded:
        check_sizes(files.folder, read_json(files.folder, "config.json"), tensors)
    return files._replace(tensors=tensors)


def unloadable(cfg: ModelConfig, error: Exception, what: str = "the model") -> ModelError:
    """The error for the user that a model, or its tokenizer, cannot be loaded."""
    return ModelError(f"model.repo_name={cfg.repo_name}: {what} cannot be loaded: {first_line(error)}")


def num_positions(cfg: ModelConfig) -> int | None:
    """Tokens of the longest sequence that a model can read, by its configuration; None if that sets no limit.

    Raises ModelError if its configuration cannot be read.
    """
    return num_positions_of(from_checked_files(AutoConfig, cfg, find_files(cfg)))


def from_checked_files(auto: Any, cfg: ModelConfig, files: ModelFiles, what: str = "the model") -> Any:
    """Load a tokenizer or a configuration by a class of transformers, after checks of its files. Raises ModelError."""
    if not str(cfg.repo_name).startswith(EMBEDDED):
        check_tokenizer(files.folder)
    try:
        return auto.from_pretrained(files.source, **files.options)
    except LOADING_ERRORS as error:
        raise unloadable(cfg, error, what) from error


def check_weights(
    cfg: ModelConfig, *, auto: Any = AutoModelForCausalLM, new_head: bool = False, say: Notify = lambda _: None
) -> str:
    """Account for the weights of a model by the headers of its files, before anything is loaded.

    Args:
        cfg: the model's configuration.
        auto: transformers' class for the kind of model.
        new_head: the task replaces the language head, which need not be there.
        say: prints a line for the user: pickled weights are converted.

    Returns:
        A line about tensors that will not be read; empty if all are.

    Raises:
        ModelError: loading it would fail, or leave a parameter with random numbers.
    """
    if cfg.random_init:
        return ""
    files = find_weights(cfg, say)
    trusted = cfg.library_cfg.trust_remote_code
    config = read_config(cfg, files, auto)
    if new_head and not trusted and type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise ModelError(
            f"model.repo_name={cfg.repo_name}: transformers has no {config.model_type} model with a score head, so it "
            "cannot become a reward model: give a model of another architecture"
        )
    model_class = _class_of(cfg, config, auto)
    try:
        account = account_from_headers(model_class, config, files.tensors, new_head=new_head)
    except Exception as error:
        if not trusted:
            raise
        say(  # loading accounts for them again
            f"model.repo_name={cfg.repo_name}: its own code does not take tensors without content "
            f"({type(error).__name__}: {first_line(error)}), so its weights are accounted for when they are loaded"
        )
        return ""
    _check_account(cfg, account)
    return account.note()


def _check_account(cfg: ModelConfig, account: Account) -> None:
    """Raises ModelError for weights that do not fill the model."""
    problem = account.problem()
    if problem:
        raise ModelError(f"model.repo_name={cfg.repo_name}: {problem}")


def read_config(cfg: ModelConfig, files: ModelFiles, auto: Any) -> Any:
    """The model's config.json as transformers reads it; that of a reward model has one label.

    Of a model of text and images it is the part of the text, where transformers loads that part alone.
    """
    try:
        config = AutoConfig.from_pretrained(files.source, **files.options)
    except LOADING_ERRORS as error:
        raise unloadable(cfg, error) from error
    if auto is AutoModelForSequenceClassification:
        _check_single_label(cfg, files, config)
    model_class = auto._model_mapping.get(type(config), None)
    text_class = config.sub_configs.get("text_config")
    if text_class is not None and getattr(model_class, "config_class", None) is text_class:
        config = config.get_text_config()
    if auto is AutoModelForCausalLM:
        _check_causal(cfg, config)
    return config


def _check_causal(cfg: ModelConfig, config: Any) -> None:
    """Raises ModelError for a model that is an encoder or has one, or of which transformers has no language model."""
    given = f"model.repo_name={cfg.repo_name}: its type in config.json is {config.model_type}"
    if type(config) not in AutoModelForCausalLM._model_mapping and not getattr(config, "auto_map", None):
        raise ModelError(
            f"{given}, of which transformers has no causal language model (AutoModelForCausalLM): give a model of text "
            "alone, or of another architecture"
        )
    is_encoder = type(config) in AutoModelForMaskedLM._model_mapping or config.model_type in ("cpmant", "xlnet")
    if is_encoder or getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{given}, whose tokens see those behind them, or an encoder does: give a causal language model, which is "
            "a decoder alone"
        )


def _class_of(cfg: ModelConfig, config: Any, auto: Any) -> type[PreTrainedModel]:
    """The class that transformers takes for a configuration; that of a reward model has its head where ours looks.

    Raises ModelError if there is none, or it is an encoder or has another head.
    """
    try:
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=cfg.library_cfg.trust_remote_code)
    except LOADING_ERRORS as error:
        raise unloadable(cfg, error) from error
    if auto is AutoModelForSequenceClassification and not isinstance(getattr(model, HEAD, None), nn.Linear):
        raise ModelError(
            f"model.repo_name={cfg.repo_name}: {type(model).__name__} is not a decoder with a linear layer {HEAD} "
            "(encoders are not supported): give a reward model that was made from a causal language model"
        )
    return type(model)


def _check_single_label(cfg: ModelConfig, files: ModelFiles, config: Any) -> None:
    """Give the configuration the one label that its head has, where it states no number.

    Raises ModelError if it has several labels, or scores by code of its own.
    """
    given, stated = f"model.repo_name={cfg.repo_name}", read_json(files.folder, "config.json")
    names = [name for name in stated.get("architectures") or () if isinstance(name, str)]
    usual = any(name.endswith(_CLASSES) and hasattr(transformers, name) for name in names) or not names
    auto_map = stated.get("auto_map")
    own_code = isinstance(auto_map, dict) and AutoModelForSequenceClassification.__name__ in auto_map
    if not cfg.library_cfg.trust_remote_code and (own_code or not usual):
        raise ModelError(
            f"{given}: its scores are computed by {', '.join(names)[:80] or 'code of its own'}, and code of a model is "
            "not run: give a reward model that transformers' AutoModelForSequenceClassification computes"
        )
    head = files.tensors.get(f"{HEAD}.weight")
    rows = None if head is None or len(head.shape) != 2 else head.shape[0]
    if not any(key in stated for key in ("num_labels", "_num_labels", "id2label", "label2id")) or rows is None:
        config.num_labels = rows or 1
    bias = files.tensors.get(SCORE_BIAS)
    if bias is not None and math.prod(bias.shape) != 1:
        raise ModelError(f"{given}: {SCORE_BIAS} has the shape {bias.shape}, and a reward model has one score")
    if rows == 1 and config.num_labels != 1:
        raise ModelError(
            f"{given}: its config.json states {config.num_labels} labels, and {HEAD}.weight has one row: leave "
            "num_labels, id2label and label2id out of config.json if it is a reward model"
        )
    if config.num_labels != 1:
        raise ModelError(
            f"{given}: it is a classifier with {config.num_labels} labels, and a reward model has one: give a model "
            f"whose {HEAD}.weight has one row"
        )


def read_model(
    cfg: ModelConfig, files: ModelFiles, config: Any, auto: Any, say: Notify, *, new_head: bool, in_files: bool
) -> PreTrainedModel:
    """The model with random weights, or with those of its files; arguments as of `load_causal_lm`.

    Raises ModelError if it cannot be loaded, or a parameter is not in its files.
    """
    dtype = getattr(torch, cfg.dtype)
    try:
        if cfg.random_init:
            return auto.from_config(config, dtype=dtype, trust_remote_code=cfg.library_cfg.trust_remote_code)
        if auto is AutoModelForSequenceClassification:
            _class_of(cfg, config, auto)  # it has to have the head
        loaded = _load_in_files(cfg, files, config, auto, say) if in_files else None
        model, info = loaded or auto.from_pretrained(
            files.source,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **files.options,
            **quantization_options(cfg),
        )
    except ModelError:  # a ValueError too, and complete as it is
        raise
    except LOADING_ERRORS as error:
        raise unloadable(cfg, error) from error
    except RuntimeError:
        if files.tensors:  # of those that the model joins into one, some may not fit the others
            model_class = _class_of(cfg, config, auto)
            _check_account(cfg, account_from_headers(model_class, config, files.tensors, new_head=new_head))
        raise
    use_quantized_layers(model, cfg)
    account = account_for(model, info, new_head=new_head)
    _check_account(cfg, account)
    _tell_of_weights(cfg, files, account, say, is_policy=auto is AutoModelForCausalLM)
    model.name_or_path = model.config._name_or_path = files.origin  # what adapters are saved for
    _set_saved_dtype(model, cfg, files)
    return cast(PreTrainedModel, model)


def _load_in_files(
    cfg: ModelConfig, files: ModelFiles, config: Any, auto: Any, say: Notify
) -> tuple[PreTrainedModel, dict[str, Any]] | None:
    """The model with its weights in their files, and transformers' loading info.

    None if the weights are needed before they are sharded: they are changed or computed from several tensors, or
    initialise adapters.
    """
    is_merged = cfg.adapter is not None and cfg.finetune_mode != "LORA"
    reads_base = cfg.finetune_mode == "LORA" and cfg.lora_cfg is not None and cfg.lora_cfg.use_dora
    if cfg.resize_embeddings or cfg.library_cfg.trust_remote_code or is_merged or reads_base:
        say("model: every rank loads all weights before they are sharded, since its options read or change them")
        return None
    names = [(file, name) for file in safetensors_files(files.folder) for name in tensors_of(files.folder, file)]
    sources = {name: Source(files.folder / file, name) for file, name in names if name in files.tensors}
    stand_ins = placeholders(sources.values(), getattr(torch, cfg.dtype))
    loader: Any = _class_of(cfg, config, auto)  # its annotation knows no second result
    try:
        model, info = loader.from_pretrained(
            None,
            config=config,
            state_dict=stand_ins,
            dtype=getattr(torch, cfg.dtype),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except RuntimeError:  # tensors that the model joins do not fit each other: loading them says which
        return None
    new = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    if computed := set(keep_in_files(model, stand_ins, sources)) - new:
        say(f"model: every rank loads all weights before they are sharded: {min(computed)} is computed from them")
        return None
    if model.can_generate():
        options = dict.fromkeys(("from_auto_class", "from_pipeline", "cache_dir", "proxies", "token"))
        options |= {"force_download": False, "subfolder": ""} | files.options
        model.adjust_generation_fn(None, pretrained_model_name_or_path=files.source, **options)
    return model, info


def _tell_of_weights(cfg: ModelConfig, files: ModelFiles, account: Account, say: Notify, *, is_policy: bool) -> None:
    """Print what is in the files and not in the model, and that the weights are changed to another number format."""
    note = account.note()
    if note:
        say(f"model.repo_name={cfg.repo_name}: {note}")
    of_files = _half_of(files) if cfg.quantization is None else None
    if is_policy and of_files and cfg.dtype == "float32" and not str(cfg.repo_name).startswith(EMBEDDED):
        say(
            f"model.repo_name={cfg.repo_name}: its weights are {of_files} and are loaded as float32, which takes twice "
            f"the memory; model.dtype={of_files} keeps their number format"
        )


def _half_of(files: ModelFiles) -> str | None:
    """The half precision format that most of the weights in the files have; None for another format."""
    sizes: Counter[str] = Counter()
    for facts in files.tensors.values():
        sizes[facts.dtype] += math.prod(facts.shape)
    return _HALF.get(max(sizes, key=lambda name: sizes[name]))


def _set_saved_dtype(model: PreTrainedModel, cfg: ModelConfig, files: ModelFiles) -> None:
    """Note the number format for `final/` on the backbone, which a score head is put on too."""
    is_kept = cfg.dtype == "float32" and not str(cfg.repo_name).startswith(EMBEDDED)
    wanted = cfg.save_dtype or (_half_of(files) if is_kept else None) or cfg.dtype
    setattr(model.base_model, _SAVED_DTYPE, None if wanted == cfg.dtype else getattr(torch, wanted))


def saved_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """The number format that the model's weights are saved in; None is that which they have."""
    return getattr(model.base_model, _SAVED_DTYPE, None)


def read_score_bias(cfg: ModelConfig) -> float:
    """The bias of a reward model's head that transformers' class leaves out; 0 if the files have none.

    Raises ModelError if the files cannot be found or read.
    """
    if cfg.random_init:
        return 0.0
    files = find_weights(cfg, lambda _: None)
    for name in safetensors_files(files.folder) if SCORE_BIAS in files.tensors else ():
        if SCORE_BIAS in tensors_of(files.folder, name):
            with safe_open(files.folder / name, framework="pt") as file:
                return float(file.get_tensor(SCORE_BIAS))
    return 0.0


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
