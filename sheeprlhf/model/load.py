"""Load tokenizers and causal language models: a hub name, a local folder, or the embedded model, by the same code."""

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sheeprlhf.model.attention import PACKED, register
from sheeprlhf.model.chat_template import choose_template
from sheeprlhf.model.folder import check_model, check_tokenizer, folder_of
from sheeprlhf.model.locate import locate
from sheeprlhf.model.norm import replace_rms_norms
from sheeprlhf.model.template import check_templates
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.utils.errors import ModelError
from sheeprlhf.utils.hub import EMBEDDED

_DROPOUT_KEY = re.compile(r"(drop|_pdrop$)")


def _source(cfg: ModelConfig, *, weights: bool = False) -> tuple[str, dict[str, Any]]:
    """Folder or hub id of the model, looked at, and the keyword arguments that every `from_pretrained` call gets.

    Args:
        cfg: the model's configuration.
        weights: the model is wanted, with its weights if they are not random; else the tokenizer.

    Raises:
        ModelError: it cannot be found, or a library should not be given it.
    """
    found, library = locate(cfg), cfg.library_cfg
    options = {"trust_remote_code": library.trust_remote_code, "revision": library.revision}
    if not str(cfg.repo_name).startswith(EMBEDDED):
        try:
            folder = folder_of(found.source, library.revision, local_only=found.local_only)
        except OSError as error:
            raise ModelError(f"model.repo_name={cfg.repo_name} cannot be loaded: {_first_line(error)}") from error
        if weights:
            check_model(folder, weights=found.local_only and not cfg.random_init)
        else:
            check_tokenizer(folder)
    return found.source, options | {"local_files_only": found.local_only}


def load_tokenizer(cfg: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ModelError: it cannot be read, has no EOS token, or the chat template is unknown or must not be used.
    """
    source, options = _source(cfg)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"model.repo_name={cfg.repo_name}: its tokenizer cannot be loaded: {_first_line(error)}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model.repo_name={cfg.repo_name}: its tokenizer has no EOS token, so no response could end")
    choose_template(tokenizer, cfg.chat_template)
    whose = f"repo_name={cfg.repo_name}" if cfg.chat_template is None else f"chat_template={cfg.chat_template}"
    check_templates(tokenizer, f"model.{whose}")
    return tokenizer


def num_positions(cfg: ModelConfig) -> int | None:
    """Tokens of the longest sequence that a model can read, by its configuration; None if that sets no limit.

    Raises:
        ModelError: its configuration cannot be read.
    """
    source, options = _source(cfg)
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"model.repo_name={cfg.repo_name}: the model cannot be loaded: {_first_line(error)}"
        ) from error
    return getattr(config, "max_position_embeddings", None)


def load_causal_lm(
    cfg: ModelConfig, *, vocabulary: int, longest: int, auto: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """The language model in `cfg.dtype`, in training mode, with packed attention where its code allows.

    Args:
        cfg: the model's configuration.
        vocabulary: size of the tokenizer, checked against the model's.
        longest: tokens of the longest sequence, checked against the model's positions.
        auto: transformers' class for the kind of model: the same with another head.

    Raises:
        ModelError: it cannot be loaded, or it is too small for the tokenizer or the sequences.
    """
    register()
    source, options = _source(cfg, weights=True)
    dtype = getattr(torch, cfg.dtype)
    try:
        config = AutoConfig.from_pretrained(source, **options)
        _check_positions(config, cfg, longest)
        if cfg.disable_dropout:
            _zero_dropout(config)
        config.use_cache = False
        config._attn_implementation = None  # sdpa, or eager for a model without
        if cfg.random_init:
            trust = options["trust_remote_code"]
            model = auto.from_config(config, dtype=dtype, trust_remote_code=trust)
        else:
            model = auto.from_pretrained(source, config=config, dtype=dtype, use_safetensors=True, **options)
    except ModelError:  # a ValueError too, and complete as it is
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"model.repo_name={cfg.repo_name}: the model cannot be loaded: {_first_line(error)}"
        ) from error
    rows = model.get_input_embeddings().weight.shape[0]
    if vocabulary > rows:
        raise ModelError(
            f"model.repo_name={cfg.repo_name}: its tokenizer has {vocabulary} tokens, the model only {rows}"
        )
    replace_rms_norms(model)
    if model._supports_sdpa and model._can_set_attn_implementation():  # else it has what sdpa lacks, as a soft cap
        model.set_attn_implementation(PACKED)
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if cfg.freeze_transformer:
        _train_head_alone(model, cfg)
    if cfg.embedding_dim_name is not None:
        _check_width(model, cfg)
    return model.train()


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
    attention dropout that is no module at all, layer drop).
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
    """What reads the hidden states: the language head, or that of a reward model, which has no other."""
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
    return getattr(model, model.base_model_prefix), model.get_output_embeddings()


def uses_packed_attention(model: PreTrainedModel) -> bool:
    """Whether the model's attention goes through `packed_attention` (falcon's, for one, does not)."""
    return bool(model.config._attn_implementation == PACKED)


def hidden_states(backbone: nn.Module, **inputs: Any) -> Tensor:
    """(B, T, C) last hidden states of a backbone."""
    return backbone(use_cache=False, **inputs).last_hidden_state
