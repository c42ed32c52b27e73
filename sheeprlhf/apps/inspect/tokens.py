"""Tokens as people read them: the text that each adds, nothing hidden in it, laid out in lines."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rich.cells import cell_len

from sheeprlhf.security.redaction import secret_spans

NEWLINE = "\n"
_UNFINISHED = "\ufffd"  # what decoders write for bytes that are no character yet


class Token(NamedTuple):
    """A token as it is shown.

    Attributes:
        text: what it adds to the text; empty for one that ends inside a character.
        trained: the loss counts it.
        special: it is a special token, not text that looks like one.
    """

    text: str
    trained: bool
    special: bool


class Piece(NamedTuple):
    """A token, or what of it stands in one line.

    Attributes:
        number: the token's, counted from the part's first.
        token: the whole token.
        text: NEWLINE where the token ends the line, else printable.
    """

    number: int
    token: Token
    text: str


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Text that each token adds to those before it; all together are the decoded text.

    A character can be several tokens: the last one adds it and the others nothing. Every token is decoded after the
    one before it, because some decoders drop the space that a text begins with.
    """
    texts: list[str] = []
    context = done = 0  # tokens before `done` are told; those from `context` on are enough to decode the next
    for end in range(1, len(ids) + 1):
        before = _decode(tokenizer, ids[context:done])
        whole = _decode(tokenizer, ids[context:end])
        if whole.endswith(_UNFINISHED):
            texts.append("")
            continue
        texts.append(whole[len(before) :])
        context, done = done, end
    return texts


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""


def without_secrets(texts: Sequence[str]) -> list[str]:
    """The texts of consecutive tokens, those that are part of something like an API key as stars."""
    spans = secret_spans("".join(texts))
    hidden, start = [], 0
    for text in texts:
        end = start + len(text)
        inside = any(start < last and end > first for first, last in spans)
        hidden.append("*" * len(text) if inside else text)
        start = end
    return hidden


def printable(text: str) -> str:
    """The text; characters that a terminal would obey or not show are written as Python escapes them."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def lines(tokens: Sequence[Token], width: int) -> Iterator[list[Piece]]:
    """Lines of at most `width` columns, each all trained on or all not; a newline in the text ends one too.

    A token is divided at its newlines alone, so one that is wider than a line stands out.
    """
    line: list[Piece] = []
    used = 0
    for number, token in enumerate(tokens):
        for part in re.findall(r"\n|[^\n]+", token.text) or [""]:
            piece = Piece(number, token, part if part == NEWLINE else printable(part))
            columns = cell_len(piece.text) + 1
            if line and part != NEWLINE and (line[0].token.trained != token.trained or used + columns > width):
                yield line
                line, used = [], 0
            line.append(piece)
            used += columns
            if part == NEWLINE:
                yield line
                line, used = [], 0
    if line:
        yield line
