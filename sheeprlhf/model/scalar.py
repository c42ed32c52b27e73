"""A language model whose head gives one number instead of a token: reward models, and the critics made of them.

It is transformers' own `AutoModelForSequenceClassification` with one label, so plain transformers loads what we save.
"""

import copy
import math

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from sheeprlhf.model.load import backbone_and_head
from sheeprlhf.utils.end_tokens import end_texts, end_tokens
from sheeprlhf.utils.errors import ModelError

HEAD = "score"  # the head's name in every decoder's classification model


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
    return model.train(causal_lm.training)


def padding_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A token that no text has and no response ends in: transformers scores the rightmost token that is another one.

    The tokenizer's own padding unless that is an end token, else another special token, of those without a role too,
    else the byte 0xFF, which UTF-8 never has, as byte-level tokenizers write it.

    Raises:
        ModelError: there is no such token.
    """
    vocabulary = tokenizer.get_vocab()
    taken = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token, *end_texts(tokenizer), None}
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for token in (tokenizer.pad_token, *tokenizer.all_special_tokens, *added, "\u00ff", "<0xFF>"):
        if token not in taken and token in vocabulary:
            return str(token)
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id, end_tokens(tokenizer).closing):
        return str(tokenizer.pad_token)  # only the configuration lists it as an end token
    raise ModelError(
        "the model's tokenizer has no token for padding but EOS: set pad_token in its tokenizer_config.json"
    )


def head_scores(hidden_RC: Tensor, head: nn.Module) -> Tensor:
    """(R,) scores of hidden states, in float32 whatever the precision of the run."""
    with torch.autocast(hidden_RC.device.type, enabled=False):
        return head(hidden_RC.float()).squeeze(-1)
