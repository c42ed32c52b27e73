"""Rows of the embedding and the language head for tokens that the model has none for."""

import json
import shlex
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from sheeprlhf.model.folder.weights import find_files
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.utils.chat_templates import own_templates
from sheeprlhf.utils.errors import ModelError
from sheeprlhf.utils.vocabulary import new_ids

RESIZED = "resized_model"  # a folder, in messages
_TRAINED_ROWS = "sheeprlhf_trained_rows"  # attribute of an input embedding: rows that train next to adapters


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
