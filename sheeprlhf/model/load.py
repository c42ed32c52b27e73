"""Load tokenizers and causal language models: a hub name, a local folder, or the embedded model, by the same code."""

import json
import math
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sheeprlhf.config.option_checks import nearest
from sheeprlhf.config.path_checks import is_template_file
from sheeprlhf.config.prompt_format import read_prompt_form
from sheeprlhf.model.attention import register, use_packed_attention
from sheeprlhf.model.file_weights import Source, keep_in_files, placeholders
from sheeprlhf.model.layers import replace_rms_norms, use_frequencies_of_rows
from sheeprlhf.model.locate import locate
from sheeprlhf.model.new_tokens import add_rows
from sheeprlhf.model.quantize import loading_options, use_own_layers
from sheeprlhf.security.chat_templates import check_templates
from sheeprlhf.security.files import read_small
from sheeprlhf.security.model_folder import (
    MAX_TEMPLATE,
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
from sheeprlhf.utils.chat_templates import FOLDER, OPTION, SUFFIX, built_in_templates, own_templates, template_names
from sheeprlhf.utils.end_tokens import set_configured_end_ids
from sheeprlhf.utils.errors import ModelError, Notify
from sheeprlhf.utils.home import EMBEDDED, PICKLED, WEIGHTS_FILES, expand_home
from sheeprlhf.utils.vocabulary import add_special_tokens, num_rows_needed, template_tokens

RESIZED = "resized_model"  # a folder, in messages
_HALF = {"F16": "float16", "BF16": "bfloat16"}  # number formats in the headers
_CLASSES = ("ForSequenceClassification", "ForCausalLM", "LMHeadModel", "Model")  # what may have a score head
_LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError)
_END_ID_FILES = ("generation_config.json", "config.json")
_SAVED_DTYPE = "sheeprlhf_saved_dtype"  # attribute of a backbone
_DROPOUT_KEY = re.compile(r"(drop|_pdrop$)")


SCORE = "score"
SCORE_BIAS = "score.bias"  # transformers' decoders have none; it is added to every score
_HEAD_NAME = re.compile(
    r"(?:^|[._])(?:\w*head\d*|scores?|classifier|regression\w*|reward\w*|value|summary|embed_out|logits_proj)(?:[._]|$)"
)
_LANGUAGE_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_SHOWN, _NAME_LENGTH = 4, 80


class Account(NamedTuple):
    """Tensors of the files compared with the parameters of a model.

    Attributes:
        model: name of the model's class.
        missing: parameters without a tensor, those of heads that the task makes left out.
        misplaced: tensors of layers that the model has, and that have no place in them: `q_proj.bias`, a third layer.
        unread: the other tensors without a place.
        mismatched: parameters with another shape in the files: name, shape in the files, shape in the model.
        torn: tensors of a group that the model joins into one, such as experts, whose other tensors are there.
    """

    model: str
    missing: list[str]
    misplaced: list[str]
    unread: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    torn: list[str]

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
        if f"{SCORE}.weight" in self.missing:
            others = [name for name in self.heads() or self.unread if not _LANGUAGE_HEAD.search(name)]
            if others:
                return (
                    f"The head of a reward model is {SCORE}.weight: if {others[0][:_NAME_LENGTH]} is all of its head "
                    f"and of shape (1, hidden size), save it as {SCORE}.weight; else choose another model"
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
    lacking = []
    for groups in numbers.values():
        whole = set().union(*groups.values())
        for group, present in groups.items():
            lacking += [group.replace("*", str(number)) for number in whole - present]
    for group_of_layer in _siblings(numbers):
        whole = set().union(*group_of_layer.values())
        for group, present in group_of_layer.items():
            lacking += [group.replace("*", str(number)) for number in whole - present]
    return sorted(set(lacking), key=_by_number)


def _siblings(numbers: Mapping[str, Mapping[str, set[int]]]) -> Iterable[dict[str, set[int]]]:
    """Groups that differ in what follows the number only: gate, up and down of the same experts."""
    found: dict[str, dict[str, set[int]]] = defaultdict(dict)
    for groups in numbers.values():
        for group, present in groups.items():
            found[group.partition("*")[0]][group] = present
    return found.values()


def _is_read_bias(model: PreTrainedModel, name: str) -> bool:
    """A single score's bias is read: the reward model adds it."""
    head = getattr(model, SCORE, None)
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
    shown = [name if len(name) <= _NAME_LENGTH else f"{name[:_NAME_LENGTH]}..." for name in names[:_SHOWN]]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(shown)}{more} {'is' if len(names) == 1 else 'are'} {what}"


class _Files(NamedTuple):
    """Arguments of `from_pretrained` for a model.

    Attributes:
        source: a folder or a hub id.
        options: keyword arguments of every call.
        folder: where the files are.
        tensors: those of the weights, by name; empty if they are not read.
        origin: the folder or hub id that the model is known by, also if `source` is a converted copy.
    """

    source: str
    options: dict[str, Any]
    folder: Path
    tensors: dict[str, TensorFacts]
    origin: str


def _files(cfg: ModelConfig) -> _Files:
    """The files of a model on this machine, without its weights; nothing has been looked at.

    Raises:
        ModelError: it cannot be found.
    """
    found, library = locate(cfg), cfg.library_cfg
    options = {"trust_remote_code": library.trust_remote_code, "revision": library.revision}
    try:
        folder = folder_of(found.source, library.revision, local_only=found.local_only)
    except OSError as error:
        raise _unloadable(cfg, error) from error
    return _Files(found.source, options | {"local_files_only": found.local_only}, folder, {}, found.source)


def _files_with_weights(cfg: ModelConfig, say: Notify) -> _Files:
    """The files of a model, looked at, with its weights as safetensors unless they are to be random.

    Raises:
        ModelError: it cannot be found, has no weights, or a library should not be given them.
    """
    files = _files(cfg)
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
        raise _unloadable(cfg, error) from error
    if pickled_files(files.folder):
        converted = converted_folder(files.folder, str(cfg.repo_name), say)
        options = files.options | {"revision": None, "local_files_only": True}
        files = _Files(str(converted), options, converted, {}, files.origin)
    tensors = weights_of(files.folder)
    if not tensors:
        where = "the hub's cache has no weights of it: connect and `fetch` it" if on_hub else "give one that has them"
        raise ModelError(
            f"model.repo_name={cfg.repo_name} has no weights, neither {WEIGHTS_FILES[0]} nor {PICKLED}; {where}"
        )
    if not embedded:
        check_sizes(files.folder, read_json(files.folder, "config.json"), tensors)
    return files._replace(tensors=tensors)


def _unloadable(cfg: ModelConfig, error: Exception) -> ModelError:
    return ModelError(f"model.repo_name={cfg.repo_name}: the model cannot be loaded: {_first_line(error)}")


def load_tokenizer(cfg: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ModelError: it cannot be read, has no EOS token, or the chat template is unknown or must not be used.
    """
    files = _files(cfg)
    if not str(cfg.repo_name).startswith(EMBEDDED):
        check_tokenizer(files.folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(files.source, **files.options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"model.repo_name={cfg.repo_name}: its tokenizer cannot be loaded: {_first_line(error)}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model.repo_name={cfg.repo_name}: its tokenizer has no EOS token, so no response could end")
    choose_template(tokenizer, cfg.chat_template)
    whose = f"repo_name={cfg.repo_name}" if cfg.chat_template is None else f"chat_template={cfg.chat_template}"
    check_templates(tokenizer, f"model.{whose}")
    of_template = [] if cfg.chat_template is None else template_tokens(tokenizer)
    add_special_tokens(tokenizer, [*cfg.extra_vocabulary, *of_template], missing=not cfg.resize_embeddings)
    configs = [read_json(files.folder, name) for name in _END_ID_FILES if (files.folder / name).is_file()]
    set_configured_end_ids(tokenizer, configs)
    if cfg.chat_template is None:
        read_prompt_form(files.folder, tokenizer)
    return tokenizer


def num_positions(cfg: ModelConfig) -> int | None:
    """Tokens of the longest sequence that a model can read, by its configuration; None if that sets no limit.

    Raises:
        ModelError: its configuration cannot be read.
    """
    files = _files(cfg)
    if not str(cfg.repo_name).startswith(EMBEDDED):
        check_tokenizer(files.folder)
    try:
        config = AutoConfig.from_pretrained(files.source, **files.options)
    except _LOADING_ERRORS as error:
        raise _unloadable(cfg, error) from error
    return getattr(config, "max_position_embeddings", None)


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
    files = _files_with_weights(cfg, say)
    trusted = cfg.library_cfg.trust_remote_code
    config = _read_config(cfg, files, auto)
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
            f"({type(error).__name__}: {_first_line(error)}), so its weights are accounted for when they are loaded"
        )
        return ""
    _check_account(cfg, account)
    return account.note()


def _check_account(cfg: ModelConfig, account: Account) -> None:
    """Raises ModelError for weights that do not fill the model."""
    problem = account.problem()
    if problem:
        raise ModelError(f"model.repo_name={cfg.repo_name}: {problem}")


def _resize_command(name: str, auto: Any) -> str:
    """A command that saves a model with a row for each id of its tokenizer."""
    quoted = json.dumps(name)
    script = (
        f"from transformers import {auto.__name__} as M, AutoTokenizer as T; "
        f"m, t = M.from_pretrained({quoted}), T.from_pretrained({quoted}); "
        "m.resize_token_embeddings(max(t.get_vocab().values()) + 1); "
        f'm.save_pretrained("{RESIZED}"); t.save_pretrained("{RESIZED}")'
    )
    return shlex.join(["python", "-c", script])


def _read_config(cfg: ModelConfig, files: _Files, auto: Any) -> Any:
    """The model's config.json as transformers reads it; that of a reward model has one label."""
    try:
        config = AutoConfig.from_pretrained(files.source, **files.options)
    except _LOADING_ERRORS as error:
        raise _unloadable(cfg, error) from error
    if auto is AutoModelForSequenceClassification:
        _check_single_label(cfg, files, config)
    return config


def _class_of(cfg: ModelConfig, config: Any, auto: Any) -> type[PreTrainedModel]:
    """The class that transformers takes for a configuration; that of a reward model has its head where ours looks.

    Raises:
        ModelError: there is none, or it is an encoder or has another head.
    """
    try:
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=cfg.library_cfg.trust_remote_code)
    except _LOADING_ERRORS as error:
        raise _unloadable(cfg, error) from error
    if auto is AutoModelForSequenceClassification and not isinstance(getattr(model, SCORE, None), nn.Linear):
        raise ModelError(
            f"model.repo_name={cfg.repo_name}: {type(model).__name__} is not a decoder with a linear layer {SCORE} "
            "(encoders are not supported): give a reward model that was made from a causal language model"
        )
    return type(model)


def _check_single_label(cfg: ModelConfig, files: _Files, config: Any) -> None:
    """Give the configuration the one label that its head has, where it states no number.

    Raises:
        ModelError: it has several labels, or scores by code of its own.
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
    head = files.tensors.get(f"{SCORE}.weight")
    rows = None if head is None or len(head.shape) != 2 else head.shape[0]
    if not any(key in stated for key in ("num_labels", "_num_labels", "id2label", "label2id")) or rows is None:
        config.num_labels = rows or 1
    bias = files.tensors.get(SCORE_BIAS)
    if bias is not None and math.prod(bias.shape) != 1:
        raise ModelError(f"{given}: {SCORE_BIAS} has the shape {bias.shape}, and a reward model has one score")
    if rows == 1 and config.num_labels != 1:
        raise ModelError(
            f"{given}: its config.json states {config.num_labels} labels, and {SCORE}.weight has one row: leave "
            "num_labels, id2label and label2id out of config.json if it is a reward model"
        )
    if config.num_labels != 1:
        raise ModelError(
            f"{given}: it is a classifier with {config.num_labels} labels, and a reward model has one: give a model "
            f"whose {SCORE}.weight has one row"
        )


def load_causal_lm(
    cfg: ModelConfig,
    *,
    vocabulary: int,
    longest: int,
    auto: Any = AutoModelForCausalLM,
    new_head: bool = False,
    in_files: bool = False,
    say: Notify = lambda _: None,
) -> PreTrainedModel:
    """The language model in `cfg.dtype`, in training mode, with packed attention where its code allows.

    Args:
        cfg: the model's configuration.
        vocabulary: rows that the tokenizer's ids need, checked against the model's.
        longest: tokens of the longest sequence, checked against the model's positions.
        auto: transformers' class for the kind of model: the same with another head.
        new_head: the task replaces the language head, which need not be in the files.
        in_files: weights stay in their files (`FileParameter`) where the configuration and the model allow it.
        say: prints a line for the user: tensors that are not read, another number format than that of the files.

    Raises:
        ModelError: it cannot be loaded, a parameter is not in its files, or it is too small for the tokenizer or the
            sequences.
    """
    register()
    files = _files_with_weights(cfg, say)
    dtype = getattr(torch, cfg.dtype)
    config = _read_config(cfg, files, auto)
    _check_positions(config, cfg, longest)
    if cfg.disable_dropout:
        _zero_dropout(config)
    config.use_cache = False
    config._attn_implementation = cfg.attn_implementation  # null: sdpa, or eager for a model without
    try:
        if cfg.random_init:
            trust = files.options["trust_remote_code"]
            model = auto.from_config(config, dtype=dtype, trust_remote_code=trust)
        else:
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
                **loading_options(cfg),
            )
            use_own_layers(model, cfg)
            account = account_for(model, info, new_head=new_head)
            _check_account(cfg, account)
            _tell_of_weights(cfg, files, account, say, is_policy=auto is AutoModelForCausalLM)
            model.name_or_path = model.config._name_or_path = files.origin  # what adapters are saved for
            _set_saved_dtype(model, cfg, files)
    except ModelError:  # a ValueError too, and complete as it is
        raise
    except _LOADING_ERRORS as error:
        raise _unloadable(cfg, error) from error
    except RuntimeError:
        if files.tensors:  # of those that the model joins into one, some may not fit the others
            model_class = _class_of(cfg, config, auto)
            _check_account(cfg, account_from_headers(model_class, config, files.tensors, new_head=new_head))
        raise
    if cfg.resize_embeddings:
        own_tokenizer = load_tokenizer(cfg)
        add_rows(model, own_tokenizer, cfg, max(vocabulary, num_rows_needed(own_tokenizer)))
    rows = model.get_input_embeddings().weight.shape[0]
    if vocabulary > rows:
        raise ModelError(_too_few_rows(cfg, vocabulary, rows, auto))
    replace_rms_norms(model)
    use_frequencies_of_rows(model)
    if cfg.attn_implementation is None:
        use_packed_attention(model)
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if cfg.freeze_transformer:
        _train_head_alone(model, cfg)
    if cfg.embedding_dim_name is not None:
        _check_width(model, cfg)
    return model.train()


def _load_in_files(
    cfg: ModelConfig, files: _Files, config: Any, auto: Any, say: Notify
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


def check_vocabulary(cfg: ModelConfig) -> None:
    """Compare a reward model's configuration with the tokenizer of its folder, before anything is loaded.

    Raises:
        ModelError: the model has no row for the largest id of the tokenizer.
    """
    if cfg.resize_embeddings:
        return
    needed = num_rows_needed(load_tokenizer(cfg))
    config = AutoConfig.from_pretrained(_files(cfg).source, **_files(cfg).options)
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if isinstance(rows, int) and needed > rows:
        raise ModelError(_too_few_rows(cfg, needed, rows, AutoModelForSequenceClassification))


def _too_few_rows(cfg: ModelConfig, needed: int, rows: int, auto: Any) -> str:
    fact = (
        f"model.repo_name={cfg.repo_name}: its tokenizer has ids up to {needed - 1}, and the model's embedding has "
        f"{rows} rows"
    )
    if auto is AutoModelForCausalLM:
        return f"{fact}: model.resize_embeddings=true adds a row for each and trains them, also next to adapters"
    command = _resize_command(str(cfg.repo_name), auto)
    return f"{fact}; make a folder with a row for each, `{command}`, and give model.repo_name={RESIZED}"


def _tell_of_weights(cfg: ModelConfig, files: _Files, account: Account, say: Notify, *, is_policy: bool) -> None:
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


def _half_of(files: _Files) -> str | None:
    """The half precision format that most of the weights in the files have; None for another format."""
    sizes: Counter[str] = Counter()
    for facts in files.tensors.values():
        sizes[facts.dtype] += math.prod(facts.shape)
    return _HALF.get(max(sizes, key=lambda name: sizes[name]))


def _set_saved_dtype(model: PreTrainedModel, cfg: ModelConfig, files: _Files) -> None:
    """Note the number format for `final/` on the backbone, which a score head is put on too."""
    is_kept = cfg.dtype == "float32" and not str(cfg.repo_name).startswith(EMBEDDED)
    wanted = cfg.save_dtype or (_half_of(files) if is_kept else None) or cfg.dtype
    setattr(model.base_model, _SAVED_DTYPE, None if wanted == cfg.dtype else getattr(torch, wanted))


def saved_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """The number format that the model's weights are saved in; None is that which they have."""
    return getattr(model.base_model, _SAVED_DTYPE, None)


def read_score_bias(cfg: ModelConfig) -> float:
    """The bias of a reward model's head that transformers' class leaves out; 0 if the files have none.

    Raises:
        ModelError: the files cannot be found or read.
    """
    if cfg.random_init:
        return 0.0
    files = _files_with_weights(cfg, lambda _: None)
    for name in safetensors_files(files.folder) if SCORE_BIAS in files.tensors else ():
        if SCORE_BIAS in tensors_of(files.folder, name):
            with safe_open(files.folder / name, framework="pt") as file:
                return float(file.get_tensor(SCORE_BIAS))
    return 0.0


def _check_positions(config: Any, cfg: ModelConfig, longest: int) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise ModelError(
            f"data.max_length: the longest sequence has {longest} tokens, {cfg.repo_name} has {positions} positions; "
            f"set data.max_length={positions}"
        )


def _zero_dropout(config: Any) -> None:
    """Every dropout probability of a model's config to 0, nested configs included.

    Done before the model is built, since modules copy their probability from the config (GPT-2's `*_pdrop`,
    attention dropout that is not a module at all, layer drop).
    """
    for key, value in vars(config).items():
        if _DROPOUT_KEY.search(key) and isinstance(value, float | int) and not isinstance(value, bool):
            setattr(config, key, 0.0)
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            _zero_dropout(getattr(config, name))


def _train_head_alone(model: PreTrainedModel, cfg: ModelConfig) -> None:
    head = _head(model)
    if head.weight is model.get_input_embeddings().weight:
        raise ModelError(
            f"model.freeze_transformer=true: the head of {cfg.repo_name} shares its weights with the input embeddings; "
            "set model.freeze_transformer=false, or model.finetune_mode=LORA to train less"
        )
    model.requires_grad_(False)
    head.requires_grad_(True)  # with its bias, where it has one


def _head(model: PreTrainedModel) -> Any:
    """The head that reads the hidden states: the language head, or a reward model's score head."""
    language_head = model.get_output_embeddings()
    return model.score if language_head is None else language_head


def _check_width(model: PreTrainedModel, cfg: ModelConfig) -> None:
    name = str(cfg.embedding_dim_name)
    stated, width = getattr(model.config, name, None), _head(model).weight.shape[1]
    if stated != width:
        raise ModelError(
            f"model.embedding_dim_name={name}: the model's config says {stated}, its head reads vectors of {width}; "
            "set model.embedding_dim_name=null"
        )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def backbone_and_head(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The part of a causal language model that makes hidden states, and its language head."""
    backbone, head = getattr(model, model.base_model_prefix), model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    softcap = getattr(config, "final_logit_softcapping", None)
    return backbone, head if scale == 1 and softcap is None else _AdjustedHead(head, scale, softcap)


class _AdjustedHead(nn.Module):
    """A language head whose logits are scaled (Granite, Cohere) or soft-capped (Gemma 2) afterwards."""

    def __init__(self, head: nn.Module, scale: float, softcap: float | None) -> None:
        super().__init__()
        self.head, self.scale, self.softcap = head, scale, softcap

    @property
    def weight(self) -> Tensor:
        """(V, C) of the head."""
        return cast(Tensor, self.head.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states."""
        logits: Tensor = self.head(hidden) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def hidden_states(backbone: nn.Module, **inputs: Any) -> Tensor:
    """(B, T, C) last hidden states of a backbone."""
    return backbone(use_cache=False, **inputs).last_hidden_state


def choose_template(tokenizer: Any, choice: str | None) -> None:
    """Make the chosen chat template the only one of a tokenizer, so that it is saved and loaded with the tokenizer.

    Args:
        tokenizer: of transformers.
        choice: `model.chat_template`: a name of the tokenizer's own templates, of `built_in_templates`, or a file; None
            leaves the tokenizer as it is.

    Raises:
        ModelError: there is no such template, or the file cannot be read.
    """
    if choice is None:
        return
    own = own_templates(tokenizer)
    if choice in own:
        tokenizer.chat_template = own[choice]
    elif is_template_file(choice):
        tokenizer.chat_template = _read(expand_home(choice), choice)
    elif choice in built_in_templates():
        tokenizer.chat_template = _read(FOLDER / f"{choice}{SUFFIX}", choice)
    else:
        near = nearest(choice, [*own, *built_in_templates()])
        did = f"did you mean {OPTION}={near}? It may be" if near else "it may be"
        raise ModelError(f"{OPTION}={choice} is unknown: {did} {template_names(tokenizer)}")


def _read(path: Path, choice: str) -> str:
    try:
        return read_small(path, MAX_TEMPLATE).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ModelError(f"{OPTION}={choice} cannot be read: {reason}; give another file") from error
