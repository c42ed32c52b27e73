"""Tokens of examples as `inspect` shows them: texts of tokens, colours, and which of them are trained on.

Letters of tensor names: T positions of a packed row, N targets.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from rich.cells import cell_len
from torch import Tensor

from sheeprlhf.data.encoding import encode
from sheeprlhf.data.example import Batch, Example, collate_packed
from sheeprlhf.security.redaction import secret_spans
from sheeprlhf.utils.end_tokens import end_token_ids
from sheeprlhf.utils.errors import DataError
from sheeprlhf.utils.rendering import render_chat

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


_CUT = "cut at data.max_length: no end token"


class View(NamedTuple):
    """An example, ready to print.

    Attributes:
        parts: the tokens of the prompt and of each response, by name.
        ranks: what a response is among the others, by name; empty where there is one alone.
        facts: what was counted.
        warnings: what is wrong with it.
    """

    parts: dict[str, list[Token]]
    ranks: dict[str, str]
    facts: list[str]
    warnings: list[str]


def response_names(count: int) -> dict[str, str]:
    """The names of an example's responses, which come best first, and what each is among them; it may have none."""
    if count == 1:
        return {"response": ""}
    if count == 2:
        return {"chosen": "the better one", "rejected": "the worse one"}
    ends = {1: ", the best", count: ", the worst"}
    return {f"response {_letter(rank)}": f"rank {rank} of {count}{ends.get(rank, '')}" for rank in range(1, count + 1)}


def _letter(rank: int) -> str:
    return chr(ord("A") + rank - 1) if rank <= 26 else f"no. {rank}"


def trained_tokens(batch: Batch, *, scored: bool = False) -> Tensor:
    """Tokens that the loss counts, taken from the batch that training makes of one example.

    A target stands one place after the one that predicts it; each response's first is predicted at the prompt's end.

    Args:
        batch: the example's.
        scored: it was made with `targets="scores"` or "last": a target stands where it is read.

    Returns:
        (T,) bool.
    """
    assert batch.layout is not None
    [(num_prompt, sizes)] = batch.layout.segments
    response_starts = torch.tensor([*accumulate(sizes[:-1], initial=num_prompt)])
    source_N = batch.head_positions_R[batch.logit_index_N]
    first_N = response_starts[batch.response_index_N]
    place_N = source_N if scored else torch.where(source_N == num_prompt - 1, first_N, source_N + 1)
    ids_T = batch.input_ids_BT[0]
    if not torch.equal(ids_T[place_N], batch.target_ids_N):
        raise AssertionError("a target is not the token at its place: this is a bug")
    trained_T = torch.zeros(len(ids_T), dtype=torch.bool)
    trained_T[place_N] = True
    return trained_T


class Viewer:
    """Makes views of examples.

    Args:
        tokenizer: the model's.
        targets: what the task trains on: "response", "all", "scores" or "last", as `collate_packed` takes it.
        template_args: variables of its chat template.
    """

    def __init__(self, tokenizer: Any, *, targets: str, template_args: Mapping[str, Any] | None = None) -> None:
        self._tokenizer, self._targets = tokenizer, targets
        self._scored = targets in ("scores", "last")
        self._special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._opening = _answer_opening(tokenizer, template_args)

    def view(self, example: Example) -> View:
        """The tokens of an example and the facts about it."""
        trained = [False] * len(example.prompt_ids)
        if example.responses:
            batch = collate_packed([example], targets=self._targets)
            trained = trained_tokens(batch, scored=self._scored).tolist()
        names = response_names(len(example.responses))
        prompt = example.prompt_ids.tolist()
        responses = {name: ids.tolist() for name, ids in zip(names, example.responses, strict=True)}
        parts: dict[str, list[Token]] = {}
        warnings: list[str] = []
        start = 0
        for name, ids in {"prompt": prompt, **responses}.items():
            marks = trained[start : start + len(ids)]
            start += len(ids)
            texts = token_texts(self._tokenizer, ids)
            shown = without_secrets(texts)
            if shown != texts:
                warnings.append(
                    f"stars in the {name} hide what looks like a key or a password; training sees it as it is"
                )
            special = [number in self._special for number in ids]
            parts[name] = [Token(*fields) for fields in zip(shown, marks, special, strict=True)]
        sizes = " + ".join(f"{name} {len(tokens)}" for name, tokens in parts.items())
        facts = [f"{sizes} = {len(trained)} tokens", f"{sum(trained)} {'scored' if self._scored else 'trained on'}"]
        if not responses:
            facts = [f"prompt {len(prompt)} tokens", "no response: the model writes it"]
        self._look_at_start(prompt, facts, warnings)
        end_ids = end_token_ids(self._tokenizer)
        ended = {name: ids[-1] in end_ids for name, ids in responses.items()}
        if len(ended) > 2 and all(ended.values()):
            facts.append("all responses end in an end token")
        else:
            facts += [
                f"{name} {f'ends in {self._end_name(responses[name][-1])}' if end else _CUT}"
                for name, end in ended.items()
            ]
        self._look_at_template(prompt, facts, warnings)
        ranks = {name: rank for name, rank in names.items() if rank}
        if ranks and example.margin:
            facts.append(f"margin {example.margin:g}")
        return View(parts, ranks, facts, warnings)

    def _end_name(self, number: int) -> str:
        return "EOS" if number == self._tokenizer.eos_token_id else str(self._tokenizer.convert_ids_to_tokens(number))

    def _look_at_start(self, prompt: Sequence[int], facts: list[str], warnings: list[str]) -> None:
        bos = self._tokenizer.bos_token_id
        number = next((place for place, token in enumerate(prompt) if token != bos), len(prompt))
        facts.append(f"BOS: {number}" + ("" if number else " (the tokenizer adds none)"))
        if number > 1:
            warnings.append(
                f"the prompt begins with {number} BOS tokens, and models know one: take it out of the chat template, "
                "or out of the tokenizer's post-processor"
            )
        if number == len(prompt) or list(prompt) == [self._tokenizer.eos_token_id]:
            facts.append("no prompt: it is a text of which all tokens are learned, or data.max_prompt_length cut it")

    def _look_at_template(self, prompt: Sequence[int], facts: list[str], warnings: list[str]) -> None:
        """A template that is applied to its own output opens an answer and leaves it empty."""
        size = len(self._opening)
        if not size or list(prompt[-size:]) != self._opening:
            return
        ends = [end for end in range(size, len(prompt) + 1) if list(prompt[end - size : end]) == self._opening]
        empty = sum(1 for end in ends if end < len(prompt) and prompt[end] in self._special)
        if not empty:
            facts.append("chat template applied once")
            return
        warnings.append(
            f"the prompt opens {empty + 1} answers and leaves {empty} without text: the chat template was applied to "
            "its own output, or an assistant's message is empty"
        )


def _answer_opening(tokenizer: Any, template_args: Mapping[str, Any] | None) -> list[int]:
    """The ids with which the chat template asks for an answer; empty if it has no such thing."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    turns = [{"role": "user", "content": "a"}]
    try:
        asked, bare = (render_chat(tokenizer, turns, template_args, ask=ask) for ask in (True, False))
    except DataError:
        return []  # one that refuses this conversation
    return encode(tokenizer, [asked.removeprefix(bare)], control_tokens=True)[0] if asked.startswith(bare) else []
