"""Load tokenizers and causal language models: a hub name, a local folder, or the embedded model, by the same code."""

import copy
import dataclasses
import math
import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sheeprlhf.config.model_lookup import with_own_tokenizer
from sheeprlhf.config.option_checks import nearest
from sheeprlhf.config.path_checks import is_template_file
from sheeprlhf.config.run_lookup import saved_group
from sheeprlhf.model.attention import register, use_packed_attention
from sheeprlhf.model.folder.account import HEAD
from sheeprlhf.model.folder.architecture import (
    has_other_parts,
    num_positions_of,
    unpackable_layers,
    use_frequencies_of_rows,
)
from sheeprlhf.model.folder.embedding_rows import add_rows, too_few_rows
from sheeprlhf.model.folder.quantize import keep_quantization
from sheeprlhf.model.folder.weights import find_files, find_weights, from_checked_files, read_config, read_model
from sheeprlhf.model.lm_head import backbone_and_head
from sheeprlhf.model.rms_norm import replace_rms_norms
from sheeprlhf.security.model_folder import MAX_TEMPLATE, check_templates, read_json
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.utils.chat_templates import FOLDER, OPTION, SUFFIX, built_in_templates, own_templates, template_names
from sheeprlhf.utils.end_tokens import padding_token, set_configured_end_ids
from sheeprlhf.utils.errors import ConfigError, ModelError, Notify
from sheeprlhf.utils.home import expand_home
from sheeprlhf.utils.output import read_small
from sheeprlhf.utils.rendering import read_prompt_form
from sheeprlhf.utils.vocabulary import add_special_tokens, num_rows_needed, template_tokens

_END_ID_FILES = ("generation_config.json", "config.json")
_DROPOUT_KEY = re.compile(r"(drop|_pdrop$)")


def load_tokenizer(cfg: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises ModelError if it cannot be read, has no EOS token, or the chat template is unknown or must not be used.
    """
    files = find_files(cfg)
    tokenizer = from_checked_files(AutoTokenizer, cfg, files, "its tokenizer")
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


def model_of_start(cfg: ModelConfig, run_dir: str, tokenizer: PreTrainedTokenizerBase) -> ModelConfig:
    """Return the model of the run that a training starts from; arguments as of `load_initial_policy`.

    Raises ConfigError if the run has another tokenizer.
    """
    of_run = saved_group(run_dir, "model")
    assert isinstance(of_run, ModelConfig)
    own = with_own_tokenizer(of_run, Path(run_dir))
    theirs = load_tokenizer(own if own.resize_embeddings else dataclasses.replace(own, chat_template=None))
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"task.sft_experiment_dir={run_dir} was trained with the tokenizer of {of_run.repo_name}, which is not "
            f"that of {cfg.repo_name}: give model={of_run.config_name} model.repo_name={of_run.repo_name}"
        )
    return of_run


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
    files = find_weights(cfg, say)
    config = read_config(cfg, files, auto)
    _check_positions(config, cfg, longest)
    if cfg.disable_dropout:
        _zero_dropout(config)
    config.use_cache = False
    config._attn_implementation = cfg.attn_implementation  # null: sdpa, or eager for a model without
    model = read_model(cfg, files, config, auto, say, new_head=new_head, in_files=in_files)
    if cfg.resize_embeddings:
        own_tokenizer = load_tokenizer(cfg)
        add_rows(model, own_tokenizer, cfg, max(vocabulary, num_rows_needed(own_tokenizer)))
    rows = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    if vocabulary > rows:
        raise too_few_rows(cfg, vocabulary, rows, auto)
    replace_rms_norms(model)
    use_frequencies_of_rows(model)
    if cfg.attn_implementation is None and not unpackable_layers(model):
        use_packed_attention(model)
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if has_other_parts(model):
        model.requires_grad_(False)  # DDP waits for the gradients of all others
        for part in (model.get_decoder(), _head(model)):
            part.requires_grad_(True)
    if cfg.freeze_transformer:
        _train_head_alone(model, cfg)
    if cfg.embedding_dim_name is not None:
        _check_width(model, cfg)
    return model.train()


def _check_positions(config: Any, cfg: ModelConfig, longest: int) -> None:
    positions = num_positions_of(config)
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
            setattr(config, key, type(value)())  # 0, in the type that the config checks
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


def scalar_model(causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The classification model around a causal language model's backbone, with a new head; the backbone is shared.

    The head is N(0, 1/sqrt(d+1)) (learning to summarize, arXiv 2009.01325), in float32.

    Raises:
        ModelError: transformers has no such model of this architecture, or no token is left for padding.
    """
    padding = tokenizer.convert_tokens_to_ids(padding_token(tokenizer))
    assert isinstance(padding, int)
    return with_score_head(causal_lm, padding)


def with_score_head(causal_lm: PreTrainedModel, padding_id: int) -> PreTrainedModel:
    """`scalar_model` with this token for padding."""
    config = copy.deepcopy(causal_lm.config)
    config.num_labels = 1
    config.pad_token_id = padding_id
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, dtype=causal_lm.dtype)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]  # the others list all architectures
        raise ModelError(f"{type(causal_lm).__name__} cannot become a reward model or critic: {reason}") from error
    backbone, _ = backbone_and_head(causal_lm)
    head = getattr(model, HEAD, None)
    if not isinstance(head, nn.Linear) or model.base_model_prefix != causal_lm.base_model_prefix:
        raise ModelError(f"{type(model).__name__} has no linear layer '{HEAD}' on {type(backbone).__name__}")
    setattr(model, model.base_model_prefix, backbone)
    new = nn.Linear(head.in_features, 1, bias=False, device=causal_lm.device)
    nn.init.normal_(new.weight, std=1 / math.sqrt(head.in_features + 1))
    setattr(model, HEAD, new)
    keep_quantization(model, causal_lm)
    return model.train(causal_lm.training)
