"""Ids that a tokenizer defines (a model may have more rows: padding, and holes without a token); response texts."""

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from sheeprlhf.utils.chat_templates import own_templates
from sheeprlhf.utils.errors import DataError
from sheeprlhf.utils.rendering import render_chat

_NEW, _MISSING = "sheeprlhf_new_ids", "sheeprlhf_missing_tokens"  # attributes of a tokenizer
_CONTROL = re.compile(r"<[|\uff5c][^<>|\uff5c\s]{1,60}[|\uff5c]>|<(?:start|end)_of_\w{1,60}>")
_CHAT = ({"role": "system", "content": "A"}, {"role": "user", "content": "B"}, {"role": "assistant", "content": "C"})


def defined_ids(tokenizer: Any) -> np.ndarray:
    """(D,) int64, ascending: the ids of tokens."""
    ids = {*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder}
    return np.array(sorted(map(int, ids)), dtype=np.int64)


def num_rows_needed(tokenizer: Any) -> int:
    """Rows of an embedding that has all ids: the largest one, plus one."""
    ids = defined_ids(tokenizer)
    return int(ids[-1]) + 1 if len(ids) else 0


def undefined_ids(tokenizer: Any, num_rows: int) -> np.ndarray | None:
    """(U,) int64, ascending: ids below `num_rows` of the head without a token; None if there are none."""
    missing = np.setdiff1d(np.arange(num_rows, dtype=np.int64), defined_ids(tokenizer), assume_unique=True)
    return missing if len(missing) else None


def template_tokens(tokenizer: Any) -> list[str]:
    """Texts in the form of control tokens, such as <|im_start|>, that the tokenizer's chat template writes."""
    text = str(own_templates(tokenizer).get("default", ""))
    for chat in (_CHAT, _CHAT[1:]):  # some templates reject a system message
        with suppress(DataError):
            text += render_chat(tokenizer, chat)
            break
    return list(dict.fromkeys(_CONTROL.findall(text)))


def add_special_tokens(tokenizer: Any, tokens: Sequence[str], *, missing: bool = False) -> None:
    """Add undefined tokens as special ones (`new_ids`); with `missing`, none (`missing_tokens` has them)."""
    vocabulary = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys(tokens) if token not in vocabulary]
    if missing:
        setattr(tokenizer, _MISSING, new)
    else:
        tokenizer.add_tokens(new, special_tokens=True)
        setattr(tokenizer, _NEW, tokenizer.convert_tokens_to_ids(new))


def new_ids(tokenizer: Any) -> list[int]:
    """Ids of the tokens that `add_special_tokens` has added."""
    return list(getattr(tokenizer, _NEW, ()))


def missing_tokens(tokenizer: Any) -> list[str]:
    """Control tokens that the chosen chat template writes and the tokenizer does not define."""
    return list(getattr(tokenizer, _MISSING, ()))


class ResponseDecoder:
    """Decodes responses, without special tokens.

    A decoder of the sentencepiece family drops the space that a text begins with. A response is not text of its own, so
    it is decoded behind another token, whose text is cut off. Any other tokenizer decodes it as it is.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Try out whether the tokenizer drops the first space."""
        self._tokenizer = tokenizer
        self._before: list[int] = []
        first, both = tokenizer(["b", "b a"], add_special_tokens=False)["input_ids"]
        behind = both[len(first) :]
        if both[: len(first)] == first and self._decode(both) == "b a" and self._decode(behind) != " a":
            self._before = list(first)
        self._size = len(self._decode(self._before))

    def __call__(self, ids: Sequence[int]) -> str:
        """The text of a response."""
        return self._decode([*self._before, *ids])[self._size :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)) if len(ids) else ""
