"""Weights of a model: their files, the check that they fill the model, and how they are read.

They are read whole, or quantised, or left in their files until they are sharded, and then each rank reads its rows.
New tokens get new rows.

Account: the tensors of the files are compared with the parameters of the model, by transformers' own mapping: first by
the headers alone, before data is prepared, and again by the report of `from_pretrained`.

Quantised: linear layers keep 4 or 8 bits of each weight, by bitsandbytes; adapters train on them (QLoRA).

- nf4 (Dettmers et al., 2023, arXiv 2305.14314): 4 bits of each weight, and a float32 scale for every 64 weights.
- int8 (Dettmers et al., 2022, arXiv 2208.07339): 8 bits of each weight, and a float32 scale for every output.

Both compute with the dequantised weights in the number format of their input, in training and in evaluation.
Activations are not quantised, so that a row has the same result in every batch. The language head, a score head and
the embedding stay as they are.

In files: a loaded parameter is a `FileParameter`: it has the shape, number format and place of a weight, and
placeholder numbers. So the code between loading and sharding (adapters, heads, the check of packed batches) runs as on
real weights.
"""

import hashlib
import json
import math
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Self, cast

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

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
from sheeprlhf.utils.chat_templates import own_templates
from sheeprlhf.utils.errors import ModelError, Notify, first_of
from sheeprlhf.utils.home import EMBEDDED, PICKLED, WEIGHTS_FILES
from sheeprlhf.utils.vocabulary import new_ids

RESIZED = "resized_model"  # a folder, in messages
_HALF = {"F16": "float16", "BF16": "bfloat16"}  # number formats in the headers
_CLASSES = ("ForSequenceClassification", "ForCausalLM", "LMHeadModel", "Model")  # what may have a score head
LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError)
_TRAINED_ROWS = "sheeprlhf_trained_rows"  # attribute of an input embedding: rows that train next to adapters
_SAVED_DTYPE = "sheeprlhf_saved_dtype"  # attribute of a backbone
HEAD = "score"  # name of the score head in every decoder's classification model
SCORE_BIAS = "score.bias"  # transformers' decoders have none; it is added to every score
_HEAD_NAME = re.compile(
    r"(?:^|[._])(?:\w*head\d*|scores?|classifier|regression\w*|reward\w*|value|summary|embed_out|logits_proj)(?:[._]|$)"
)
_LANGUAGE_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.")
_SHOWN, _NAME_LENGTH = 4, 80
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_BLOCK = 64  # weights that share a scale in nf4
_FLAGS = {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}  # attributes by which PEFT chooses its layers
_NUM_PLACEHOLDERS = 1 << 20  # numbers that all placeholders share, at least
_STD = 0.02


class Account(NamedTuple):
    """Tensors of the files compared with the parameters of a model."""

    model: str  # name of the model's class
    missing: list[str]  # parameters without a tensor, those of heads that the task makes left out
    # tensors of layers that the model has, and that have no place in them: `q_proj.bias`, a third layer
    misplaced: list[str]
    unread: list[str]  # the other tensors without a place
    # parameters with another shape in the files: name, shape in the files, shape in the model
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    torn: list[str]  # tensors of a group that the model joins into one, such as experts, whose other tensors are there

    def heads(self) -> list[str]:
        """The unread tensors that look like a head."""
        return [name for name in self.unread if _HEAD_NAME.search(name)]

    def problem(self) -> str:
        """The reason that the loaded model would differ from the saved one, and the fix; empty if there is none."""
        if not (self.missing or self.misplaced or self.mismatched or self.torn):
            return ""
        shapes = [f"{name} {_shape(files)} instead of {_shape(own)}" for name, files, own in self.mismatched]
        parts = [
            _part("missing", [*self.missing, *self.torn]),
            _part("of another shape", shapes),
            _part("without a place in a layer that the model has", self.misplaced),
            _part("there instead", self.heads() or self.unread) if self.missing else _part("not read", self.heads()),
        ]
        return f"its weights do not fit {self.model}: {'; '.join(filter(None, parts))}. {self._remedy()}"

    def _remedy(self) -> str:
        pairs = ((name, key) for name in self.unread for key in self.missing[:8] if name.endswith(f".{key}"))
        prefix = next((name.removesuffix(key) for name, key in pairs), "")
        if prefix:
            return f"In the files their names begin with {prefix[:_NAME_LENGTH]}: save them without it"
        if f"{HEAD}.weight" in self.missing:
            others = [name for name in self.heads() or self.unread if not _LANGUAGE_HEAD.search(name)]
            if others:
                return (
                    f"The head of a reward model is {HEAD}.weight: if {others[0][:_NAME_LENGTH]} is all of its head "
                    f"and of shape (1, hidden size), save it as {HEAD}.weight; else choose another model"
                )
            if any(map(_LANGUAGE_HEAD.search, self.unread)):
                return "This is a language model, not a reward model: train it as one with task=rm, or choose another"
            return "It was saved without its head: save it again with it, or train a reward model with task=rm"
        if all(map(_LANGUAGE_HEAD.search, self.missing)) and not (self.misplaced or self.mismatched or self.torn):
            if self.heads():
                return "This is not a language model but one with another head: choose the model that it was made of"
            return (
                "It was saved without its head: save it again as a causal language model; if its head shares the input "
                "embeddings, set tie_word_embeddings to true in its config.json"
            )
        if self.mismatched or self.misplaced:
            return "Its config.json is that of another model, or the files are: get both from one place"
        return "The files are incomplete: save or download the model again"

    def note(self) -> str:
        """One line about tensors that are not read and change nothing; empty if there are none."""
        return _part("not read", self.unread) and f"{_part('not read', self.unread)}: {self.model} has no such tensor"


def account_for(model: PreTrainedModel, info: Mapping[str, Any], *, new_head: bool = False) -> Account:
    """Compare what transformers has loaded with what it was given.

    Args:
        model: loaded.
        info: of `from_pretrained(output_loading_info=True)`; tied parameters are left out there already.
        new_head: the task replaces the language head, which needs no tensor.
    """
    owned = {_pattern(name.rpartition(".")[0]) for name, _ in model.named_parameters(remove_duplicate=False)}
    expected = {_pattern(name) for name in model.state_dict()}
    unexpected = sorted(info["unexpected_keys"], key=_by_number)
    misplaced = [
        name
        for name in unexpected
        if _pattern(name) in expected or (_pattern(name.rpartition(".")[0]) in owned and not _is_read_bias(model, name))
    ]
    head = model.get_output_embeddings() if new_head else None
    of_new_head = tuple(f"{name}." for name, module in model.named_modules() if head is not None and module is head)
    missing = [name for name in info["missing_keys"] if not name.startswith(of_new_head)]
    mismatched = [
        (name, tuple(files), tuple(own))
        for name, files, own in info["mismatched_keys"]
        if not name.startswith(of_new_head)
    ]
    return Account(
        model=type(model).__name__,
        missing=sorted(missing, key=_by_number),
        misplaced=[name for name in misplaced if not name.startswith(of_new_head)],
        unread=[name for name in unexpected if name not in misplaced and not _is_read_bias(model, name)],
        mismatched=sorted(mismatched, key=lambda entry: _by_number(entry[0])),
        torn=[],
    )


def account_from_headers(
    model_class: type[PreTrainedModel], config: Any, tensors: Mapping[str, TensorFacts], *, new_head: bool = False
) -> Account:
    """Account for the weights from the headers of the files only: transformers maps tensors with shapes and no content.

    Args:
        model_class: what is going to be loaded.
        config: its configuration.
        tensors: what the files declare.
        new_head: as in `account_for`.
    """
    empty = {name: torch.empty(facts.shape, device="meta") for name, facts in tensors.items()}
    loader: Any = model_class  # its annotation knows no second result
    try:
        model, info = loader.from_pretrained(
            None,
            config=config,
            state_dict=empty,
            dtype=torch.float32,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except RuntimeError:  # tensors that the model joins do not fit each other
        torn = torn_groups(tensors) or ["a tensor of a group that the model joins into one"]
        return Account(model_class.__name__, [], [], [], [], torn)
    found = account_for(model, info, new_head=new_head)
    return found if not found.mismatched else found._replace(torn=torn_groups(tensors))


def torn_groups(names: Iterable[str]) -> list[str]:
    """Names that a numbered group lacks, where other groups of the same form have them: one expert of a layer."""
    numbers: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        found = list(_NUMBER.finditer(name))
        if len(found) > 1:
            last = found[-1]
            group = f"{name[: last.start()]}*{name[last.end() :]}"
            numbers[_pattern(name)][group].add(int(last.group()))
    siblings: dict[str, dict[str, set[int]]] = defaultdict(dict)  # gate, up and down of the same experts
    for groups in numbers.values():
        for group, present in groups.items():
            siblings[group.partition("*")[0]][group] = present
    lacking = []
    for groups in (*numbers.values(), *siblings.values()):
        whole = set().union(*groups.values())
        for group, present in groups.items():
            lacking += [group.replace("*", str(number)) for number in whole - present]
    return sorted(set(lacking), key=_by_number)


def _is_read_bias(model: PreTrainedModel, name: str) -> bool:
    """A single score's bias is read: the reward model adds it."""
    head = getattr(model, HEAD, None)
    return name == SCORE_BIAS and isinstance(head, nn.Linear) and head.bias is None and head.out_features == 1


def _pattern(name: str) -> str:
    return _NUMBER.sub("*", name)


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _shape(sizes: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, sizes))})"


def _part(what: str, names: list[str]) -> str:
    """Names of a kind, the first ones in full."""
    if not names:
        return ""
    shown = [name if len(name) <= _NAME_LENGTH else f"{name[:_NAME_LENGTH]}..." for name in names]
    return f"{first_of(shown, _SHOWN)} {'is' if len(names) == 1 else 'are'} {what}"


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
    return getattr(from_checked_files(AutoConfig, cfg, find_files(cfg)), "max_position_embeddings", None)


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
    """The model's config.json as transformers reads it; that of a reward model has one label."""
    try:
        config = AutoConfig.from_pretrained(files.source, **files.options)
    except LOADING_ERRORS as error:
        raise unloadable(cfg, error) from error
    if auto is AutoModelForSequenceClassification:
        _check_single_label(cfg, files, config)
    return config


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
            **_quantization_options(cfg),
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
    _use_quantized_layers(model, cfg)
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


@cache
def _layers() -> dict[str, type[nn.Linear]]:
    """The linear layer of each format; bitsandbytes is optional, and slow to import."""
    import bitsandbytes as bnb
    from bitsandbytes.autograd._functions import MatMul8bitFp

    class NF4Linear(bnb.nn.Linear4bit):
        """Replaces a forward pass that, in evaluations on some CPUs, makes the weights unusable for training."""

        def forward(self, x: Tensor) -> Tensor:
            x = _as_computed(x)
            weight: Any = self.weight
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return bnb.matmul_4bit(x, weight, bias=bias, quant_state=weight.quant_state)

    class Int8Linear(bnb.nn.Linear8bitLt):
        """Replaces a forward pass that quantises the activations too: always on GPUs, and in evaluations on CPUs."""

        def forward(self, x: Tensor) -> Tensor:
            x = _as_computed(x)
            weight: Any = self.weight
            weight.SCB = weight.SCB.to(x.device)  # torch moves the weight alone
            bias = None if self.bias is None else self.bias.to(x.dtype)
            state = SimpleNamespace(CB=weight.data, SCB=weight.SCB, has_fp16_weights=False)
            return cast(Tensor, MatMul8bitFp.apply(x, weight, None, bias, state))

    return {"nf4": NF4Linear, "int8": Int8Linear}


def _as_computed(x: Tensor) -> Tensor:
    """In the number format that torch's own linear layer would compute in."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _quantization_options(cfg: ModelConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise each weight as it is read; none without `model.quantization`."""
    if cfg.quantization is None:
        return {}
    config = BitsAndBytesConfig(
        load_in_4bit=cfg.quantization == "nf4", load_in_8bit=cfg.quantization == "int8", bnb_4bit_quant_type="nf4"
    )
    return {"quantization_config": config, "device_map": {"": "cpu"}}


def _use_quantized_layers(model: PreTrainedModel, cfg: ModelConfig) -> None:
    """Give a model that was loaded with `_quantization_options` the layers of this module, and no traces of loading."""
    if cfg.quantization is None:
        return
    own = _layers()[cfg.quantization]
    for module in model.modules():
        if isinstance(module, cast(type, own.__base__)):
            module.__class__ = own
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.clone()  # a part of a mapped file keeps the whole file in memory
    del model.config.quantization_config
    plain: Any = model
    plain.hf_quantizer, plain.is_quantized = None, False
    _mark(model, cfg.quantization)


def _mark(model: PreTrainedModel, scheme: str | None) -> None:
    for name, flag in _FLAGS.items():
        setattr(model, flag, name == scheme)


def quantization_of(model: nn.Module) -> str | None:
    """The format of the linear layers of a model; None if they are as usual."""
    return next((name for name, flag in _FLAGS.items() if getattr(model, flag, False)), None)


def keep_quantization(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Mark a model whose layers are those of another one."""
    _mark(model, quantization_of(other))


def quantize(model: PreTrainedModel, scheme: str | None) -> None:
    """Quantise the linear layers of a model in memory, where they are not quantised yet."""
    if scheme is None or quantization_of(model) == scheme:
        return
    import bitsandbytes as bnb

    for name, layer in [*_replaced(model)]:
        weight = layer.weight.data.T.contiguous() if isinstance(layer, Conv1D) else layer.weight.data
        with torch.device("meta"):
            new: Any = _layers()[scheme](weight.shape[1], weight.shape[0], bias=False)
        if scheme == "nf4":
            options = {"quant_type": "nf4", "compress_statistics": False, "module": new}
            new.weight = bnb.nn.Params4bit(weight, requires_grad=False, **options)
        else:
            new.weight = bnb.nn.Int8Params(weight, requires_grad=False)
        new.weight = new.weight.to(weight.device)
        new.bias, new.source_cls = layer.bias, type(layer)
        model.set_submodule(name, new.train(layer.training))
    _mark(model, scheme)


def dequantize(model: PreTrainedModel) -> None:
    """Replace the quantised layers of a model without adapters by usual ones, with the weights that they stand for."""
    import bitsandbytes as bnb

    scheme, dtype = quantization_of(model), cast(Tensor, model.get_input_embeddings().weight).dtype
    for name, layer in [*model.named_modules()] if scheme else ():
        if not isinstance(layer, _layers()[cast(str, scheme)]):
            continue
        weight: Any = layer.weight
        if scheme == "nf4":
            state = weight.quant_state
            options = {"blocksize": state.blocksize, "quant_type": "nf4", "shape": state.shape, "dtype": dtype}
            full = torch.ops.bitsandbytes.dequantize_4bit.default(weight.data.view(-1, 1), state.absmax, **options)
        else:
            full = bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB).to(dtype)
        with torch.device("meta"):
            of_gpt2 = cast(Any, layer).source_cls is Conv1D
            new: Any = Conv1D(*full.shape) if of_gpt2 else nn.Linear(full.shape[1], full.shape[0], bias=False)
        new.weight = nn.Parameter(full.T.contiguous() if of_gpt2 else full, requires_grad=False)
        new.bias = layer.bias
        model.set_submodule(name, new.train(layer.training))
    _mark(model, None)


def _replaced(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """The layers that are quantised, by name: those that transformers chooses."""
    kept = get_keys_to_not_convert(model)
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, Conv1D) and ".lora_" not in name and should_convert_module(name, kept):
            yield name, module


def check_quantizable(model: PreTrainedModel, cfg: ModelConfig) -> None:
    """Reject a model that cannot be quantised; tensors without content do.

    Raises ModelError if weights would stay as they are, or a module that is quantised is to be trained as a whole.
    """
    given = f"model.quantization={cfg.quantization}"
    experts = next((name for name, weight in model.named_parameters() if "experts" in name and weight.ndim == 3), None)
    if experts is not None:
        raise ModelError(
            f"{given}: {type(model).__name__} joins the weights of its experts in one tensor, {experts}, which "
            "bitsandbytes does not quantise: remove the option, or give another model"
        )
    names = [name for name, _ in _replaced(model)]
    whole = [] if cfg.lora_cfg is None or cfg.finetune_mode != "LORA" else cfg.lora_cfg.modules_to_save
    for wanted in whole:
        if any(f".{wanted}." in f".{name}." for name in names):
            raise ModelError(
                f"{given}: model.lora_cfg.modules_to_save={wanted} is quantised and cannot be trained as a whole: "
                "leave it out, and give it an adapter"
            )


def quantized_savings(model: PreTrainedModel, scheme: str | None) -> int:
    """Bytes by which quantisation would shrink the weights of a model, with or without adapters."""
    saved = 0
    for _, layer in _replaced(model) if scheme else ():
        weight, outputs = layer.weight, layer.nf if isinstance(layer, Conv1D) else layer.out_features
        count = weight.numel()
        saved += weight.nbytes - (count // 2 + 4 * -(-count // _BLOCK) if scheme == "nf4" else count + 4 * outputs)
    return saved


class Source(NamedTuple):
    """The safetensors file that holds a weight, and the name of the tensor in it."""

    path: Path
    name: str

    def read(self, index: tuple[slice, ...] = ()) -> Tensor:
        """Read a part of the tensor, by default all."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_slice(self.name)[index] if index else file.get_tensor(self.name)


class FileParameter(nn.Parameter):
    """A parameter whose numbers are in a file; a copy of it is one too."""

    source: Source

    @classmethod
    def of(cls, data: Tensor, source: Source, *, requires_grad: bool) -> Self:
        """Make one with these placeholder numbers."""
        parameter = cls(data, requires_grad)
        parameter.source = source
        return parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> "FileParameter":
        """Share the placeholder numbers."""
        return memo.setdefault(id(self), self.of(self.data, self.source, requires_grad=self.requires_grad))


def content(tensor: Tensor) -> Tensor:
    """The whole weight of a parameter, read if it is in a file."""
    return tensor.source.read().to(tensor.dtype) if isinstance(tensor, FileParameter) else tensor.detach()


def placeholders(sources: Iterable[Source], dtype: torch.dtype) -> dict[str, Tensor]:
    """Stand-ins for the tensors of files by name, views of one small buffer, each at an address of its own.

    Matrices have random numbers, vectors ones, so that a forward pass computes numbers of the usual size. Tensors that
    are no floats are read.
    """
    shapes, found = {}, {}
    for source in sources:
        with safe_open(source.path, framework="pt") as file:
            rows = file.get_slice(source.name)
            shapes[source.name] = tuple(rows.get_shape())
            if not rows.get_dtype().startswith(("F", "BF")):
                found[source.name] = file.get_tensor(source.name)
    sizes = [shape[0] + math.prod(shape[1:]) for shape in shapes.values() if shape]
    numbers = torch.empty(max([_NUM_PLACEHOLDERS, *sizes]) + len(shapes), dtype=dtype)
    numbers.normal_(std=_STD, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(len(shapes) + 1, dtype=dtype)
    for index, (name, shape) in enumerate(shapes.items()):
        if name in found:
            continue
        if len(shape) < 2:
            found[name] = ones[index].expand(shape)
            continue
        row = math.prod(shape[1:])
        step = max(1, (len(numbers) - len(shapes) - row) // max(1, shape[0]))
        inner = torch.empty(shape[1:], device="meta").stride()
        found[name] = numbers.as_strided(shape, (step, *inner), index)
    return found


def keep_in_files(model: nn.Module, stand_ins: Mapping[str, Tensor], sources: Mapping[str, Source]) -> list[str]:
    """Make `FileParameter`s of the parameters that `from_pretrained` filled with `placeholders`; read buffers.

    Returns:
        The names of parameters that are no placeholder: new ones, and those that the model computes from its files.
    """
    origins = {tensor.data_ptr(): name for name, tensor in stand_ins.items() if tensor.numel()}
    made: dict[Tensor, FileParameter] = {}
    others = []
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and buffer.data_ptr() in origins:
                module._buffers[name] = sources[origins[buffer.data_ptr()]].read().to(buffer.dtype)
        for name, parameter in module.named_parameters(recurse=False):
            origin = origins.get(parameter.data_ptr())
            if origin is None or parameter.shape != stand_ins[origin].shape:
                others.append(f"{path}.{name}".removeprefix("."))
                continue
            if parameter not in made:
                made[parameter] = FileParameter.of(
                    parameter.data, sources[origin], requires_grad=parameter.requires_grad
                )
            setattr(module, name, made[parameter])
    return others


def drop_placeholders(module: nn.Module) -> dict[str, Source]:
    """Move the module's `FileParameter`s to the meta device, shared ones stay shared; return their files by name."""
    made: dict[Tensor, FileParameter] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if not isinstance(parameter, FileParameter) or parameter.is_meta:
                continue
            if parameter not in made:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                made[parameter] = FileParameter.of(empty, parameter.source, requires_grad=parameter.requires_grad)
            setattr(part, name, made[parameter])
    return {name: p.source for name, p in module.named_parameters() if isinstance(p, FileParameter)}


def check_vocabulary(cfg: ModelConfig, needed: int) -> None:
    """Compare a reward model's configuration with the tokenizer of its folder, before anything is loaded.

    Args:
        cfg: the model's configuration.
        needed: rows that the tokenizer's ids need.

    Raises:
        ModelError: the model has no row for the largest id of the tokenizer.
    """
    files = find_files(cfg)
    config = AutoConfig.from_pretrained(files.source, **files.options)
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if isinstance(rows, int) and needed > rows and not cfg.resize_embeddings:
        raise too_few_rows(cfg, needed, rows, AutoModelForSequenceClassification)


def too_few_rows(cfg: ModelConfig, needed: int, rows: int, auto: Any) -> ModelError:
    """The error that a model has no row for each id of its tokenizer, with the option or the command that adds them."""
    fact = (
        f"model.repo_name={cfg.repo_name}: its tokenizer has ids up to {needed - 1}, and the model's embedding has "
        f"{rows} rows"
    )
    if auto is AutoModelForCausalLM:
        return ModelError(
            f"{fact}: model.resize_embeddings=true adds a row for each and trains them, also next to adapters"
        )
    name = json.dumps(str(cfg.repo_name))
    script = (
        f"from transformers import {auto.__name__} as M, AutoTokenizer as T; "
        f"m, t = M.from_pretrained({name}), T.from_pretrained({name}); "
        "m.resize_token_embeddings(max(t.get_vocab().values()) + 1); "
        f'm.save_pretrained("{RESIZED}"); t.save_pretrained("{RESIZED}")'
    )
    command = shlex.join(["python", "-c", script])
    return ModelError(f"{fact}; make a folder with a row for each, `{command}`, and give model.repo_name={RESIZED}")


def add_rows(model: PreTrainedModel, tokenizer: Any, cfg: ModelConfig, num_rows: int) -> None:
    """Extend the embedding and the language head, and note the rows that train next to adapters.

    A new row is the mean of the other rows. The rows that train are the new ones, those of `model.extra_vocabulary`,
    and those of tokens that were added to the tokenizer together with tokens that the model has no row for.

    Args:
        model: a causal language model, or a classification model.
        tokenizer: `load_tokenizer` returned it for the model's own folder.
        cfg: the model's configuration.
        num_rows: rows that the tokenizer's ids need.
    """
    present = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    new = {*(number for number in new_ids(tokenizer) if number < present), *range(present, num_rows)}
    if num_rows > present:
        model.resize_token_embeddings(num_rows, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for weight in () if module is None else (module.weight, getattr(module, "bias", None)):
            if isinstance(weight, Tensor) and new and not weight.is_meta:
                _fill_with_mean(weight, sorted(new))
    added = _last_added(tokenizer) if num_rows > present else []
    trained = {*new, *added, *tokenizer.convert_tokens_to_ids(list(cfg.extra_vocabulary))}
    setattr(model.get_input_embeddings(), _TRAINED_ROWS, sorted(trained))


@torch.no_grad()
def _fill_with_mean(weight: Tensor, rows: list[int]) -> None:
    total = weight.sum(dim=0, dtype=torch.float32) - weight[rows].sum(dim=0, dtype=torch.float32)
    weight[rows] = (total / (weight.shape[0] - len(rows))).to(weight.dtype)


def _last_added(tokenizer: Any) -> list[int]:
    """Ids at the end of the vocabulary, of added tokens that have no role and are not in the tokenizer's chat template.

    A model may have spare rows, so that some of the tokens that somebody has added have rows, which are untrained.
    """
    templates = "".join(map(str, own_templates(tokenizer).values()))
    known = set(tokenizer.all_special_ids)
    found: list[int] = []
    for number, token in sorted(tokenizer.added_tokens_decoder.items(), reverse=True):
        if number in known or token.content in templates or (found and number != found[-1] - 1):
            break
        found.append(int(number))
    return found


def trained_rows(model: nn.Module) -> list[int]:
    """The rows of the embedding and of the language head that train next to adapters; empty if there are none."""
    return list(getattr(base_of(cast(Any, model).get_input_embeddings()), _TRAINED_ROWS, ()))


def base_of(module: Any) -> Any:
    """The module that PEFT has wrapped, or the module itself."""
    return getattr(module, "original_module", module)


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of all weights, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(content(tensor).cpu().contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
