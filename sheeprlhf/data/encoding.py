"""Token ids of prompts and of the responses behind them, such that both together decode to the text.

A tokenizer of the sentencepiece family writes a space before a text, so a response that is encoded as a text of its own
begins with a space that the text does not have. It encodes responses behind their prompts. All other tokenizers encode
prompt and response apart: no merge crosses the border, and what is sampled after a prompt has the prompt's own ids.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

# Texts to put before a response. The first one whose ids do not change is used, and cut off again.
SENTINELS = ("\n", "a", ".", "0", "|")
_FIRST, _SECOND = "b", ("a", " a", "\na", "1")  # a text, and texts that may follow it


class EncodedPair(NamedTuple):
    """A prompt and the responses behind it, as ids.

    Attributes:
        prompt: ids, nothing added.
        responses: ids of each response, nothing added.
        mismatch: "prompt" or "response" where the ids do not decode to that text; empty if all of them do.
    """

    prompt: list[int]
    responses: list[list[int]]
    mismatch: str = ""


def encode(tokenizer: Any, texts: Sequence[str], *, control_tokens: bool = False) -> list[list[int]]:
    """Token ids of texts, nothing added. With `control_tokens` a special token's text means that token."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=not control_tokens,
        padding=False,
        return_attention_mask=False,
        verbose=False,
    )
    return encoded["input_ids"]


def decode(tokenizer: Any, ids: Sequence[Sequence[int]]) -> list[str]:
    """Texts of token ids, special tokens written out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return backend.decode_batch([list(row) for row in ids], skip_special_tokens=False)
    return tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_index(tokenizer: Any, before: Sequence[int], ids: Sequence[int], place: int) -> int:
    """The first of the tokens `ids` that begins at character `place` of their text or later.

    Args:
        tokenizer: made the ids.
        before: tokens in front of them, which decide whether a decoder writes a space.
        ids: tokens. All tokens of one character begin with it.
        place: in the text that `ids` add to `before`.
    """
    context = list(before[-8:])

    def begin(number: int) -> int:
        return len(decode(tokenizer, [[*context, *ids[:number]]])[0].rstrip("\ufffd")) - start

    start = len(decode(tokenizer, [context])[0])
    return bisect_left(range(len(ids)), place, key=begin)


def writes_prefix_space(tokenizer: Any) -> bool:
    """True if two texts that are encoded separately decode to something else than the two texts."""
    first, *second = encode(tokenizer, [_FIRST, *_SECOND])
    return decode(tokenizer, [[*first, *ids] for ids in second]) != [_FIRST + text for text in _SECOND]


class PairEncoder:
    """Encodes prompts with the responses behind them."""

    def __init__(self, tokenizer: Any) -> None:
        """Test whether the tokenizer encodes a text the same at every position."""
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._special = {number: token.content for number, token in added if token.special}
        self._in_context = writes_prefix_space(tokenizer)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[Sequence[str]], *, control_tokens: bool
    ) -> list[EncodedPair]:
        """Encode a batch.

        Args:
            prompts: the texts of the prompts.
            responses: the texts of each prompt's responses, any number of them.
            control_tokens: a special token's text means that token.
        """
        encode_batch = self._encode_in_context if self._in_context else self._encode_apart
        prompt_ids, response_ids = encode_batch(prompts, responses, control_tokens)
        mismatches = self._mismatches(prompts, responses, prompt_ids, response_ids, control_tokens)
        return [EncodedPair(*pair) for pair in zip(prompt_ids, response_ids, mismatches, strict=True)]

    def _encode_apart(
        self, prompts: Sequence[str], responses: Sequence[Sequence[str]], control_tokens: bool
    ) -> tuple[list[list[int]], list[list[list[int]]]]:
        """Ids of prompts and responses, each as a text of its own."""
        texts = [text for prompt, of in zip(prompts, responses, strict=True) for text in (prompt, *of)]
        ids = iter(encode(self._tokenizer, texts, control_tokens=control_tokens))
        rows = [[next(ids) for _ in range(1 + len(of))] for of in responses]
        return [row[0] for row in rows], [row[1:] for row in rows]

    def _encode_in_context(
        self, prompts: Sequence[str], responses: Sequence[Sequence[str]], control_tokens: bool
    ) -> tuple[list[list[int]], list[list[list[int]]]]:
        """Ids of prompts, and of responses as they follow them.

        Where a token crosses the border, so that the prompt's ids do not begin those of both, a sentinel replaces the
        prompt's place; where every sentinel merges with the response too, the response is encoded as it is.
        """
        prompt_ids = encode(self._tokenizer, prompts, control_tokens=control_tokens)
        places = [(row, text) for row, of in enumerate(responses) for text in of]
        before = [(prompts[row], prompt_ids[row]) for row, _ in places]
        found: list[list[int] | None] = [None] * len(places)
        sentinels = zip(SENTINELS, encode(self._tokenizer, SENTINELS), strict=True)
        for same in (None, *sentinels):
            left = [place for place, ids in enumerate(found) if ids is None]
            heads = {place: before[place] if same is None else same for place in left}
            whole = encode(
                self._tokenizer, [heads[place][0] + places[place][1] for place in left], control_tokens=control_tokens
            )
            for place, ids in zip(left, whole, strict=True):
                size = len(heads[place][1])
                if ids[:size] == heads[place][1]:
                    found[place] = ids[size:]
        by_row: list[list[list[int]]] = [[] for _ in prompts]
        for (row, text), known in zip(places, found, strict=True):
            alone = encode(self._tokenizer, [text], control_tokens=control_tokens)[0] if known is None else known
            by_row[row].append(alone)
        return prompt_ids, by_row

    def _mismatches(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        prompt_ids: list[list[int]],
        response_ids: list[list[list[int]]],
        control_tokens: bool,
    ) -> list[str]:
        """The part of each row that does not decode to its text: "response", "prompt" or nothing.

        A space that a decoder writes between a special token and the text does not count.
        """
        parts = [
            (row, text, ids)
            for row, of in enumerate(responses)
            for text, ids in (zip(of, response_ids[row], strict=True) if of else [("", [])])
        ]
        whole = decode(self._tokenizer, [[*prompt_ids[row], *ids] for row, _, ids in parts])
        wrong = [part for part, read in zip(parts, whole, strict=True) if read != prompts[part[0]] + part[1]]
        whole = self._decode_plain([[*prompt_ids[row], *ids] for row, _, ids in wrong])
        alone = self._decode_plain([prompt_ids[row] for row, _, _ in wrong])
        found = [""] * len(prompts)
        for (row, text, _), read, prompt in zip(wrong, whole, alone, strict=True):
            plain = self._without_special(prompts[row] + text) if control_tokens else prompts[row] + text
            response = self._without_special(text) if control_tokens else text
            if read == plain:
                continue
            if read != prompt + response:
                found[row] = "response"
            elif not found[row]:
                found[row] = "prompt"
        return found

    def _decode_plain(self, ids: list[list[int]]) -> list[str]:
        """Texts of token ids without the special tokens."""
        return decode(self._tokenizer, [[token for token in row if token not in self._special] for row in ids])

    def _without_special(self, text: str) -> str:
        """The text without that of special tokens."""
        for special in self._special.values():
            text = text.replace(special, "")
        return text
