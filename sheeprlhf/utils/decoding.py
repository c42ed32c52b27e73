"""Texts of responses: token ids that stand behind others, decoded as they read there."""

from collections.abc import Sequence
from typing import Any


class ResponseDecoder:
    """Decodes responses, without special tokens.

    A decoder of the sentencepiece family drops the space that a text begins with. A response is no text of its own, so
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
