"""Tokens that end a response. The one place that knows them: samplers, data, rewards, evaluations and saving ask here.

A model may end its turn with another token than its tokenizer's EOS: Gemma with `<end_of_turn>`, Llama 3 with
`<|eot_id|>`. The set has the EOS, the `eos_token_id` of the model's configuration files, and the token with which the
chat template closes an assistant turn. Imports neither torch nor transformers.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import dropwhile
from typing import Any, NamedTuple

from sheeprlhf.utils.errors import ModelError

_CONFIGURED = "sheeprlhf_configured_end_ids"  # attribute of a tokenizer: what the files next to it say
_QUESTION, _ANSWER = "Is it warm?", "Yes, it is warm."


class EndTokens(NamedTuple):
    """The end tokens of a tokenizer and its model."""

    ids: tuple[int, ...]  # all of them, the tokenizer's EOS first; empty if there is none
    closing: int | None = None  # with it the chat template closes an assistant turn; None if it has no such
    ignored: tuple[int, ...] = ()  # listed by the configuration, and no control tokens: they end nothing


def end_tokens(tokenizer: Any) -> EndTokens:
    """The end tokens of a tokenizer that `load_tokenizer` returned; of another one without those of a configuration."""
    control = control_tokens(tokenizer)
    closing = _closing_token(tokenizer, str(getattr(tokenizer, "chat_template", None) or ""), len(tokenizer))
    configured = getattr(tokenizer, _CONFIGURED, ())
    known = [number for number in configured if number in control]
    eos = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    others = sorted({*known, *([] if closing is None else [closing])} - set(eos))
    return EndTokens((*eos, *others), closing, tuple(number for number in configured if number not in control))


def end_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """`EndTokens.ids` of a tokenizer."""
    return end_tokens(tokenizer).ids


def set_configured_end_ids(tokenizer: Any, configs: Sequence[Mapping[str, Any]]) -> None:
    """Note on a tokenizer the `eos_token_id` of its model's configuration files, a number or a list of numbers."""
    found: list[int] = []
    for config in configs:
        for part in (config, config.get("text_config")):  # the language part of a model that also sees images
            value = part.get("eos_token_id") if isinstance(part, Mapping) else None
            listed = value if isinstance(value, list | tuple) else [value]
            found += [number for number in listed if isinstance(number, int) and not isinstance(number, bool)]
    setattr(tokenizer, _CONFIGURED, tuple(dict.fromkeys(number for number in found if number >= 0)))


def add_end_ids(config: Any, tokenizer: Any) -> None:
    """Complete the `eos_token_id` of a (generation) configuration that is going to be saved; ids that it lists stay."""
    present = getattr(config, "eos_token_id", None)
    listed = [*present] if isinstance(present, list | tuple) else [] if present is None else [present]
    missing = [number for number in end_token_ids(tokenizer) if number not in listed]
    if missing:
        all_ids = [*listed, *missing]
        config.eos_token_id = all_ids if len(all_ids) > 1 else all_ids[0]


def response_end(tokenizer: Any, prompt_ids: Iterable[int]) -> int:
    """The token that ends a response: the chat template's if the prompt is written in it, else the EOS."""
    ends, control = end_tokens(tokenizer), control_tokens(tokenizer)
    after_start = dropwhile(control.__contains__, map(int, prompt_ids))
    templated = any(number in control for number in after_start)
    return ends.closing if templated and ends.closing is not None else ends.ids[0]


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """Texts of the tokens that the tokenizer defines outside of its vocabulary of text, by id."""
    added = {int(number): token.content for number, token in tokenizer.added_tokens_decoder.items()}
    special = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return {int(number): str(text) for number, text in special} | added


def end_texts(tokenizer: Any) -> list[str]:
    """Texts of the end tokens."""
    control = control_tokens(tokenizer)
    return [control[number] for number in end_token_ids(tokenizer) if number in control]


def first_end(text: str, texts: Sequence[str]) -> str | None:
    """The end token of `end_texts` that comes first in a rendered response; None if it has none."""
    places = [(place, -len(end), end) for end in texts if end and (place := text.find(end)) >= 0]
    return min(places)[2] if places else None


@lru_cache(maxsize=16)
def _closing_token(tokenizer: Any, template: str, num_tokens: int) -> int | None:
    """The token after a rendered answer, white space aside; template and size are arguments for the cache."""
    if not template:
        return None
    talk = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(talk, tokenize=False))
    except Exception:  # a template is somebody's program and raises anything; rendering a row reports it
        return None
    _, answer, after = text.rpartition(_ANSWER)
    after = after.lstrip()
    texts = sorted(control_tokens(tokenizer).items(), key=lambda token: -len(token[1]))
    return next((number for number, content in texts if answer and content and after.startswith(content)), None)


def padding_token(tokenizer: Any) -> str:
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
    raise ModelError("the tokenizer has no token for padding but EOS: set pad_token in its tokenizer_config.json")
