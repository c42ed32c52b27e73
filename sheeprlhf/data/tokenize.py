"""Text examples become token ids: one BOS, an end token last, too long ones cut or dropped.

A tokenizer of the sentencepiece family writes a space before a text, so a response that is encoded as a text of its own
begins with a space that the text does not have. It encodes responses behind their prompts. All other tokenizers encode
prompt and response apart: no merge crosses the border, and what is sampled after a prompt has the prompt's own ids.

`TextExchange` makes the ids of another tokenizer from those of a policy, for a reward model that reads other tokens.
"""

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from sheeprlhf.data.conversation import (
    ConversationExample,
    each_answer,
    is_answer,
    is_trained,
    raw_example,
    reasoning_pattern,
    remove_reasoning,
    render_example,
)
from sheeprlhf.data.example import Example
from sheeprlhf.data.read import Row
from sheeprlhf.data.rows import (
    STEPS,
    DropRowError,
    MissingColumnError,
    PreferenceExample,
    TemplatedExample,
    column_advice,
    encode_columns,
    labelled,
    reward_of,
)
from sheeprlhf.structure.data import DataConfig, LayoutDataConfig
from sheeprlhf.utils.end_tokens import control_tokens, end_texts, end_token_ids, response_end
from sheeprlhf.utils.errors import DataError, ModelError, Notify
from sheeprlhf.utils.rendering import RefusedByTemplateError, check_template_args, render_chat

# Texts to put before a response. The first one whose ids do not change is used, and cut off again.
SENTINELS = ("\n", "a", ".", "0", "|")
_FIRST, _SECOND = "b", ("a", " a", "\na", "1")  # a text, and texts that may follow it
REFUSED = "refused_by_template"  # a reason why a row is left out
_NEW_LINE = "\n"  # in place of a prompt whose ids are known
KINDS = ("sft", "preference", "unpaired", "rewarded", "stepwise", "prompts")


class EncodedPair(NamedTuple):
    """A prompt and the responses behind it, as ids."""

    prompt: list[int]  # ids, nothing added
    responses: list[list[int]]  # ids of each response, nothing added
    mismatch: str = ""  # "prompt" or "response" where the ids do not decode to that text; empty if all of them do


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
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        return backend.decode_batch([list(row) for row in ids], skip_special_tokens=False)
    return tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_index(tokenizer: Any, before: Sequence[int], ids: Sequence[int], place: int) -> int:
    """The first token of `ids` that begins at character `place` or later; those `before` decide on a space."""
    context = list(before[-8:])

    def begin(number: int) -> int:
        return len(decode(tokenizer, [[*context, *ids[:number]]])[0].rstrip("\ufffd")) - start

    start = len(decode(tokenizer, [context])[0])
    return bisect_left(range(len(ids)), place, key=begin)


class StepFinder:
    """Finds the steps of responses, between which a separator is written."""

    def __init__(self, tokenizer: Any, separator: str) -> None:
        self._tokenizer, self._ends = tokenizer, end_token_ids(tokenizer)
        self._border = re.compile("{0}(?:\\s*{0})*".format(re.escape(separator)))

    def __call__(self, before: Sequence[int], ids: Sequence[int]) -> np.ndarray:
        """(R,) bool, True at the last token of each step: that with the end of its separator, or the response's last.

        Separators that follow each other count as one; behind the last step and before the first they divide nothing.

        Args:
            before: ids of the prompt.
            ids: (R,) those of the response.
        """
        written = ids[:-1] if len(ids) and ids[-1] in self._ends else ids
        context = list(before[-8:])
        start = len(decode(self._tokenizer, [context])[0])
        text = decode(self._tokenizer, [[*context, *written]])[0][start:]
        last_N = np.zeros(len(ids), dtype=bool)
        last_N[-1:] = True
        for border in self._border.finditer(text):
            if text[: border.start()].strip() and text[border.end() :].strip():
                last_N[token_index(self._tokenizer, before, written, border.end()) - 1] = True
        return last_N


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
        """Encode prompts with their responses; with `control_tokens` a special token's text means that token."""
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
        """Ids of prompts, and of responses behind them, or behind a sentinel if a token crosses the border."""
        prompt_ids = encode(self._tokenizer, prompts, control_tokens=control_tokens)
        places = [(row, text) for row, of in enumerate(responses) for text in of]
        before = [(prompts[row], prompt_ids[row]) for row, _ in places]
        found: list[list[int] | None] = [None] * len(places)
        sentinels = zip(SENTINELS, encode(self._tokenizer, SENTINELS), strict=True)
        for same in (None, *sentinels):
            left = [place for place, ids in enumerate(found) if ids is None]
            heads = {place: before[place] if same is None else same for place in left}
            joined = [heads[place][0] + places[place][1] for place in left]
            whole = encode(self._tokenizer, joined, control_tokens=control_tokens)
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
        """The part of each row that does not decode to its text: "response", "prompt" or nothing; a space aside."""
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


class TokenRow(NamedTuple):
    """One source row after tokenisation."""

    number: int  # the row's number in its split's source
    # two numbers in [0, 1) made from the prompt only, before a chat template; they decide the row's split (see
    # `RowTokenizer`)
    shares: tuple[float, float]
    dropped: str | None = None  # why the row is left out (with `detail`; fields below are empty); None if kept
    tokens: np.ndarray = np.empty(0, np.int32)  # (L,) int32, prompt and responses laid end to end
    sizes: tuple[int, ...] = ()  # lengths of the prompt and of each response, if there is one
    digest: int = 0  # 64 bits that equal rows share, made before a chat template
    cut: tuple[str, ...] = ()  # what was truncated, of "prompt" and "response"
    special_text: bool = False  # the row's text contains a special token's text (encoded as plain text)
    repeats_prompt: bool = False  # all responses begin with the text of the prompt
    num_eos: int = 0  # responses that end in an end token
    margin: float = 0.0  # of the row's preference; of rewarded data the reward of the desirable response
    desirable: tuple[bool, ...] = ()  # of each response of unpaired data; empty for other data
    templated: bool = False  # the row went through the chat template
    is_text: bool = False  # it is a text without a prompt, of which all tokens are learned
    mismatch: str = ""  # what its ids do not decode to, "prompt" or "response"; empty if they do
    remarks: tuple[str, ...] = ()  # for the data report, which counts the rows of each
    untrained: int = 0  # answers of earlier turns, which are not learned
    is_further: bool = False  # it has another answer of the row, or another part of its text, than the first
    num_joined: int = 0  # answers to learn behind the first that are in the same response
    trained: np.ndarray | None = None  # as `Example.trained`
    columns: str = ""  # columns that are stored with the tokens, as JSON text; empty if there are none
    detail: str = ""  # of a row that is left out, its place and what is said of it


class _Pieces(NamedTuple):
    """The texts of a row that is worth tokenising."""

    row: Row
    shares: tuple[float, float]
    same: tuple[Any, ...]  # what equal rows have in common, before a chat template
    example: PreferenceExample
    responses: tuple[str, ...]  # those of the example that the task learns from, best first
    desirable: tuple[bool, ...]  # of each response of unpaired data
    is_further: bool = False

    @property
    def templated(self) -> bool:
        """True if the row went through the chat template."""
        return isinstance(self.example, TemplatedExample)

    def dropped(self, reason: str) -> TokenRow:
        """The row, dropped."""
        return TokenRow(self.row.number, self.shares, reason, is_further=self.is_further, detail=self.row.place)


class SpecialIds:
    """Special tokens that the tokenizer puts around a text."""

    def __init__(self, tokenizer: Any) -> None:
        """Encode a text to find them; names and settings do not tell. Raises DataError without an EOS token."""
        if tokenizer.eos_token_id is None:
            raise DataError("the model's tokenizer has no EOS token: set eos_token in its tokenizer_config.json")
        plain = encode(tokenizer, ["a"])[0]
        full = list(tokenizer("a")["input_ids"])
        starts = [i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain]
        self.bos: list[int] = full[: starts[0]] if starts else []  # ids before a text, usually one or none
        self.eos: int = tokenizer.eos_token_id  # the id that ends a response that no template has ended
        self.ends = end_token_ids(tokenizer)  # all ids that end one
        # how the special tokens are written
        self.texts: list[str] = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]


class RowTokenizer:
    """Rows in, token rows out, in order; holds no state, so that processes may share the work."""

    def __init__(self, cfg: DataConfig, tokenizer: Any, kind: str) -> None:
        """Prepare for one dataset, one tokenizer and one kind (see `prepare_data`)."""
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} is none of {', '.join(KINDS)}")
        self._reasoning = reasoning_pattern(cfg.reasoning_tags)
        row_format = cfg.prompt_format if kind == "prompts" and cfg.prompt_format else cfg.row_format
        module, name = row_format.split(":")
        self.format_row: Callable[..., PreferenceExample | ConversationExample | None]
        self.format_row = getattr(import_module(module), name)
        check_template_args(tokenizer, cfg.template_args)
        self.cfg, self.tokenizer, self.kind = cfg, tokenizer, kind
        # shares of prompts that have most of the rows; the shares of such a row are made from the whole row
        self.divided: frozenset[tuple[float, float]] = frozenset()
        self.ids = SpecialIds(tokenizer)
        self._encode = PairEncoder(tokenizer)
        self._control_tokens: bool = getattr(cfg, "control_tokens", False)
        self._end_texts = tuple(end_texts(tokenizer))
        self._learns_texts = kind == "sft" and isinstance(cfg, LayoutDataConfig)
        self._separator: str = getattr(cfg, "step_separator", "\n")
        self._find_steps = StepFinder(tokenizer, self._separator)

    def __call__(self, rows: Sequence[Row]) -> list[TokenRow]:
        """Format, tokenise and cut the rows of a batch."""
        formatted = [one for row in rows for one in self._format(row)]
        kept = [piece for piece in formatted if isinstance(piece, _Pieces)]
        encoded: dict[bool, Iterator[EncodedPair]] = {}
        for templated in (False, True):
            of = [piece for piece in kept if piece.templated is templated]
            texts = [piece.example.prompt for piece in of], [piece.responses for piece in of]
            encoded[templated] = iter(self._encode(*texts, control_tokens=templated or self._control_tokens))
        made: list[TokenRow] = []
        for p in formatted:
            if isinstance(p, TokenRow):
                made.append(p)
            else:
                made += self._finish_all(p, next(encoded[p.templated]))
        return [part for row in made for part in self._parts(row)]

    def _format(self, row: Row) -> list[_Pieces | TokenRow]:
        """The texts of a row's examples, or the row dropped with its reason."""
        nowhere = split_shares(self.cfg.split_seed, "")
        try:
            examples = self._examples(row)
            if not examples:
                return [TokenRow(row.number, nowhere, "not_wanted")]
            first = examples[0]
            is_text = self._is_text(first) and first.response is not None
            shared = str(first.response) if is_text else (first.raw or first).prompt
            shares = split_shares(self.cfg.split_seed, shared)
            if shares in self.divided:
                known = {name: value for name, value in row.values.items() if value is not None}
                shares = split_shares(self.cfg.split_seed, json.dumps(known, sort_keys=True, default=str))
            made = [self._texts(row, example, shares) for example in examples]
            return [made[0], *(_as_further(one) for one in made[1:])]
        except DropRowError as reason:
            return [TokenRow(row.number, nowhere, str(reason), detail=row.place)]
        except RefusedByTemplateError as error:
            return [TokenRow(row.number, nowhere, REFUSED, detail=f"{row.place}: {error}")]
        except MissingColumnError as error:
            present = [name for name, value in row.values.items() if value is not None]
            unread = ("response", "label") if self.kind == "preference" else ()
            raise DataError(f"{row.place}: {error}; {column_advice(present, row.others, unread)}") from None
        except DataError as error:
            raise DataError(f"{row.place}: {error}") from None

    def _examples(self, row: Row) -> list[PreferenceExample]:
        """The examples of a row: one, or none if it is not wanted, or one for each answer of a conversation."""
        example = self.format_row(row.values, self.tokenizer)
        pattern = self._reasoning
        removes = self.cfg.reasoning == "remove"
        if example is None:
            return []
        if not isinstance(example, ConversationExample):
            return [remove_reasoning(example, pattern)._replace(raw=example) if removes else example]
        several = self.kind == "sft" and self.cfg.train_on != "last"
        rendered: list[PreferenceExample] = []
        for one in each_answer(example, marked=self.cfg.train_on == "weights") if several else [example]:
            text = render_example(
                remove_reasoning(one, pattern) if removes else one,
                self.tokenizer,
                self.cfg.template_args,
                masked=pattern if self.cfg.reasoning == "mask" else None,
            )
            rendered.append(text._replace(raw=raw_example(one)))
        if not several:
            return rendered
        answers = [one for one in (*example.context, example.response) if one is not None and is_answer(one)]
        unmarked = sum(is_trained(one) is None for one in answers) if self.cfg.train_on == "weights" else 0
        return [
            one._replace(untrained=0 if number else unmarked)
            for number, one in enumerate(_join_answers(rendered, self._end_texts))
        ]

    def _is_text(self, example: PreferenceExample) -> bool:
        """True if an example is a text without a prompt, which the task learns as a whole."""
        return self._learns_texts and example.prompt == "" and not isinstance(example, TemplatedExample)

    def _texts(self, row: Row, example: PreferenceExample, shares: tuple[float, float]) -> _Pieces | TokenRow:
        """The texts of an example that is worth tokenising."""
        responses, desirable = self._responses(example)
        raw = example.raw or example
        same = (raw.prompt, self._responses(raw)[0], *desirable)
        if self.kind == "rewarded":
            example = example._replace(margin=reward_of(example))
            same = (*same, example.margin)
        pieces = _Pieces(row, shares, same, example, responses, desirable)
        if not example.prompt.strip() and not self._is_text(example):
            return pieces.dropped("empty_prompt")
        if not all(response.strip() for response in responses):
            return pieces.dropped("empty_response")
        return pieces.dropped("same_responses") if self._same(responses) else pieces

    def _responses(self, example: PreferenceExample) -> tuple[tuple[str, ...], tuple[bool, ...]]:
        """The responses that a task of this kind learns from, best first, and which are desirable (unpaired)."""
        if self.kind in ("unpaired", "rewarded"):
            return labelled(example, rewarded=self.kind == "rewarded")
        if self.kind == "stepwise":
            if not example.steps:
                raise MissingColumnError("task=prm needs the columns completions, a list of steps, and labels")
            return (self._separator.join(step.removesuffix(self._separator) for step in example.steps),), ()
        if self.kind == "preference":
            if example.ranked is not None:
                return example.ranked, ()
            if example.chosen is None or example.rejected is None:
                raise MissingColumnError("a preference task needs the columns chosen and rejected, or responses")
            return (example.chosen, example.rejected), ()
        best = example.chosen if example.ranked is None else example.ranked[0]
        response = best if example.response is None else example.response
        if response is None and self.kind == "prompts":
            return (), ()
        if response is None:
            raise MissingColumnError("column 'response' is missing")
        return (response,), ()

    def _same(self, responses: Sequence[Any]) -> bool:
        """True if two responses are the same text; a pair without a difference teaches nothing."""
        return self.cfg.remove_same_responses and len(set(responses)) < len(responses)

    def _finish_all(self, pieces: _Pieces, ids: EncodedPair) -> list[TokenRow]:
        """The row of an example; that of a conversation is divided at its answers if it is too long."""
        example = pieces.example
        if not example.turns:
            return [self._finish(pieces, ids)]
        texts = [*pieces.responses, *example.turns]
        behind = self._encode(texts[:-1], [[text] for text in texts[1:]], control_tokens=True)
        parts = [*ids.responses, *(pair.responses[0] for pair in behind)]
        mismatch = ids.mismatch or ("response" if any(pair.mismatch == "response" for pair in behind) else "")
        whole = EncodedPair(ids.prompt, [[token for part in parts for token in part]], mismatch)
        num_prompt, num_added = len(ids.prompt), parts[-1][-1] not in self.ids.ends
        room = self.cfg.max_length - num_prompt - num_added
        if num_prompt <= self.cfg.max_prompt_length and len(whole.responses[0]) <= room:
            return [self._finish(pieces, whole, tuple(map(len, parts)))]
        rows = []
        for number in range(0, len(parts), 2):
            before = [token for part in (ids.prompt, *parts[:number]) for token in part]
            own = example._replace(prompt=example.prompt + "".join(texts[:number]), turns=())
            if number:
                own = own._replace(remarks=(), untrained=0)
            one = pieces._replace(
                example=own,
                responses=(texts[number],),
                same=(*pieces.same, number),
                is_further=pieces.is_further or number > 0,
            )
            rows.append(self._finish(one, EncodedPair(before, [parts[number]], mismatch)))
        return rows

    def _finish(self, pieces: _Pieces, ids: EncodedPair, turns: tuple[int, ...] = ()) -> TokenRow:
        """Add special tokens, then cut or drop; `turns`: sizes of the parts of the response."""
        row, shares, example = pieces.row, pieces.shares, pieces.example
        if not ids.prompt and example.prompt:
            return pieces.dropped("empty_prompt")
        prompt, ended = self._with_special_tokens(pieces, ids.prompt, ids.responses)
        shortest = min((len(r) - 1 for r in ended), default=None)  # without the end token
        if shortest == 0:
            return pieces.dropped("empty_response")
        splits = not example.prompt and self.cfg.on_overflow == "truncate_prompt"  # into parts, by _parts
        prompt, cut_responses, cut = (prompt, ended, ()) if splits else self._fit(prompt, ended, row.place)
        if cut and self.cfg.on_overflow == "drop":
            return pieces.dropped("too_long")
        if "response" in cut and self.cfg.max_length - len(prompt) < self.cfg.minimum_response_length:
            return pieces.dropped("no_room_for_response")
        with_eos = [len(r) == len(whole) for r, whole in zip(cut_responses, ended, strict=True)]
        if shortest is not None and shortest < self.cfg.minimum_response_length:
            return pieces.dropped("too_short")
        if self._same([tuple(r) for r in cut_responses]):
            return pieces.dropped("same_responses")
        masks = self._masks(pieces, prompt, cut_responses, turns)
        kept: Mapping[str, Any] | None = row.kept
        if self.kind == "stepwise":
            labels = self._labels_of_steps(example.label, masks[0], cut=not all(with_eos))
            if not labels:
                return pieces.dropped("no_room_for_response" if cut else "steps_without_border")
            kept = {STEPS[1]: labels}
        if not all(mask.any() for mask in masks):
            return pieces.dropped("reasoning_alone")
        try:
            columns = encode_columns(kept) if kept else ""
        except DataError as error:
            raise DataError(f"{row.place}: {error}") from None
        texts = (example.prompt, *pieces.responses)
        same = (*pieces.same, *([columns] if columns else []))
        rendered = pieces.templated or self._control_tokens
        special = not rendered and any(special in text for text in texts for special in self.ids.texts)
        repeats = [text.startswith(example.prompt) for text in pieces.responses if example.prompt]
        return TokenRow(
            number=row.number,
            shares=shares,
            tokens=np.concatenate([np.asarray(part, dtype=np.int32) for part in (prompt, *cut_responses)]),
            sizes=(len(prompt), *(len(r) for r in cut_responses)),
            digest=int.from_bytes(_digest(json.dumps(same))[:8], "big"),
            cut=cut,
            special_text=special,
            repeats_prompt=bool(repeats) and all(repeats),
            num_eos=sum(with_eos),
            margin=example.margin,
            desirable=pieces.desirable,
            templated=pieces.templated,
            is_text=not example.prompt,
            mismatch=ids.mismatch,
            remarks=example.remarks,
            untrained=example.untrained if self.kind == "sft" else 0,
            is_further=pieces.is_further,
            num_joined=len(turns) // 2,
            trained=np.concatenate(masks) if masks else None,
            columns=columns,
        )

    def _with_special_tokens(
        self, pieces: _Pieces, prompt: list[int], responses: list[list[int]]
    ) -> tuple[list[int], list[list[int]]]:
        """The prompt with BOS, unless a chat template wrote it, and the responses, each with its end token or EOS."""
        bos, eos, ends = self.ids.bos, self.ids.eos, self.ids.ends
        rendered = pieces.templated or self._control_tokens
        if not pieces.example.prompt:  # a text: behind one token that begins it, all of its tokens are learned
            prompt = bos or [eos]
            if rendered:
                responses = [r[len(bos) :] if self._begins_with_bos(r) else r for r in responses]
        elif not pieces.templated and not (rendered and self._begins_with_bos(prompt)):
            prompt = bos + prompt
        return prompt, [r if rendered and r and r[-1] in ends else [*r, eos] for r in responses]

    def _masks(
        self, pieces: _Pieces, prompt: list[int], responses: list[list[int]], turns: tuple[int, ...]
    ) -> list[np.ndarray]:
        """(R_k,) bool for each response: its tokens that count in the loss. No masks if all of them count."""
        if self.kind == "stepwise":
            return [self._find_steps(prompt, ids) for ids in responses]
        has_reasoning = self.cfg.reasoning == "mask" and self.kind != "prompts"
        if not turns and not has_reasoning:
            return []
        masks = [np.ones(len(ids), dtype=bool) for ids in responses]
        if turns:
            masks[0][: sum(turns)] = np.repeat(np.arange(len(turns)) % 2 == 0, turns)
        if not has_reasoning:
            return masks
        for mask, text, ids in zip(masks, pieces.responses, responses, strict=True):
            starts = np.cumsum([0, *turns])[::2].tolist()
            for start, answer in zip(starts, (text, *pieces.example.turns[1::2]), strict=False):
                before, own = [*prompt, *ids[:start]], ids[start:]
                for first, last in (block.span() for block in self._reasoning.finditer(answer)):
                    begin = token_index(self.tokenizer, before, own, first)
                    mask[start + begin : start + token_index(self.tokenizer, before, own, last)] = False
        return masks

    @staticmethod
    def _labels_of_steps(labels: tuple[bool, ...], last_N: np.ndarray, *, cut: bool) -> list[bool]:
        """The labels of the steps that a response has whole; none if they are not the steps that it is divided into.

        A step that was cut is taken out of `last_N`.
        """
        if cut:
            last_N[-1] = False
            return list(labels[: int(last_N.sum())])
        return list(labels) if last_N.sum() == len(labels) else []

    def _parts(self, row: TokenRow) -> list[TokenRow]:
        """A text that is too long as several rows, each but the first behind the last token of the one before."""
        most = self.cfg.max_length
        if not row.is_text or len(row.tokens) <= most:
            return [row]
        parts = []
        for start in range(0, len(row.tokens) - 1, most - 1):
            tokens = row.tokens[start : start + most]
            num_prompt = 1 if start else row.sizes[0]
            is_last = start + most >= len(row.tokens)
            sizes, num_eos = (num_prompt, len(tokens) - num_prompt), row.num_eos if is_last else 0
            first, last = (place - row.sizes[0] for place in (start + num_prompt, start + len(tokens)))
            trained = None if row.trained is None else row.trained[first:last]
            if trained is not None and not trained.any():
                parts.append(TokenRow(row.number, row.shares, "reasoning_alone", is_text=True, is_further=start > 0))
                continue
            part = row._replace(tokens=tokens, sizes=sizes, num_eos=num_eos, trained=trained)
            if start:
                digest = int.from_bytes(_digest(f"{row.digest} {start}")[:8], "big")
                part = part._replace(digest=digest, is_further=True, remarks=())
            parts.append(part)
        return parts

    def _begins_with_bos(self, prompt: list[int]) -> bool:
        """True if a rendered prompt already begins with the BOS token."""
        return prompt[: len(self.ids.bos)] == self.ids.bos

    def _fit(
        self, prompt: list[int], responses: list[list[int]], place: str
    ) -> tuple[list[int], list[list[int]], tuple[str, ...]]:
        """Cut to the limits of the config: the prompt keeps its BOS and its end, responses their starts."""
        cfg = self.cfg
        longest = max((len(r) for r in responses), default=0)
        if len(prompt) <= cfg.max_prompt_length and len(prompt) + longest <= cfg.max_length:
            return prompt, responses, ()
        if cfg.on_overflow == "error":
            whole = f", {len(prompt) + longest} with its response" if responses else ""
            raise DataError(
                f"{place}: prompt of {len(prompt)} tokens{whole}; the limits are "
                f"data.max_prompt_length={cfg.max_prompt_length} and data.max_length={cfg.max_length}: raise them, or "
                "set data.on_overflow=truncate_prompt or drop"
            )
        cut = []
        bos = len(self.ids.bos) if self._begins_with_bos(prompt) else 0
        room = max(min(cfg.max_prompt_length, cfg.max_length), bos, 1)
        if len(prompt) > room:
            prompt = prompt[:bos] + prompt[len(prompt) - (room - bos) :]
            cut.append("prompt")
        room = max(cfg.max_length - len(prompt), 0)
        if longest > room:
            responses = [r[:room] for r in responses]
            cut.append("response")
        return prompt, responses, tuple(cut)


def _as_further(row: _Pieces | TokenRow) -> _Pieces | TokenRow:
    """A row with another answer than the first of its source row, which alone has the remarks."""
    if isinstance(row, TokenRow):
        return row._replace(is_further=True)
    return row._replace(is_further=True, example=row.example._replace(remarks=()))


def _join_answers(answers: Sequence[PreferenceExample], ends: tuple[str, ...]) -> list[PreferenceExample]:
    """One example for answers in the same text: each prompt begins with all before, which end with one of `ends`."""
    joined: list[PreferenceExample] = []
    for one in answers:
        if joined:
            example = joined[-1]
            texts = (str(example.response), *example.turns)
            written = example.prompt + "".join(texts)
            if one.prompt.startswith(written) and texts[-1].endswith(ends):
                assert example.raw is not None and one.raw is not None
                turns = (*example.turns, one.prompt[len(written) :], str(one.response))
                raw = example.raw._replace(response=f"{example.raw.response}{one.raw.prompt}{one.raw.response}")
                joined[-1] = example._replace(turns=turns, raw=raw)
                continue
        joined.append(one)
    return joined


def split_shares(seed: int, prompt: str) -> tuple[float, float]:
    """Two independent numbers in [0, 1), the same for the same prompt on every machine."""
    digest = _digest(f"{seed}\0{prompt}")
    return int.from_bytes(digest[:8], "big") / 2**64, int.from_bytes(digest[8:], "big") / 2**64


def _digest(text: str) -> bytes:
    """16 bytes that identify a text."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def has_same_tokens(first: Any, second: Any) -> bool:
    """Return whether ids of one tokenizer mean the same to the other."""
    return bool(first.get_vocab() == second.get_vocab())


class TextExchange:
    """Encodes prompts and responses for a reward model that reads other tokens than the policy.

    Args:
        policy: the policy's tokenizer.
        reward: the reward model's.
        say: prints a line for the user.
        chat: write a prompt and its response as two turns of the reward model's chat template.
        own_prompts: by the bytes of a prompt's ids in the policy's tokens, its ids as the reward model's chat template
            renders the messages of its row; for rows of messages.

    Raises:
        ModelError: the tokenizer of the reward model has no chat template.
    """

    def __init__(
        self,
        policy: Any,
        reward: Any,
        say: Notify,
        *,
        chat: bool = False,
        own_prompts: Mapping[bytes, np.ndarray] | None = None,
    ) -> None:
        self._policy, self.reward, self._say, self._own_prompts = policy, reward, say, own_prompts or {}
        self._turns = turn_texts(reward) if chat else None
        self._policy_bos, self._reward_bos = SpecialIds(policy).bos, SpecialIds(reward).bos
        self._encode = PairEncoder(reward)
        self._control, self._known = control_tokens(policy), set(control_tokens(reward).values())
        self._warned = False

    def __call__(
        self, rows: Sequence[Example], texts: Sequence[tuple[str, str, bool]], prompts: Sequence[Example] | None = None
    ) -> tuple[Example, ...]:
        """The rows in the reward model's tokens, with its end token where a response ended."""
        rest, found = iter(texts), []
        for number, row in enumerate(rows):
            part = list(islice(rest, len(row.responses)))
            written = [response for _, response, _ in part]
            if self._turns is not None:
                found.append(self._chat_row(row._replace(trained=None), part[0][0], written))
                continue
            if prompts is None:
                prompt_ids, ids = self._encode_pair(row.prompt_ids, written)
            else:
                prompt_ids, ids = prompts[number].prompt_ids, self._encode_responses(written)
            end = response_end(self.reward, prompt_ids)
            responses = tuple(
                np.array([*response, end] if ended or not response else response, dtype=np.int32)
                for response, (_, _, ended) in zip(ids, part, strict=True)
            )
            found.append(row._replace(prompt_ids=prompt_ids, responses=responses, trained=None))
        return tuple(found)

    def _encode_pair(self, prompt_ids: np.ndarray, responses: list[str]) -> tuple[np.ndarray, list[list[int]]]:
        """Ids of a prompt of the policy's and of its responses; control tokens of a chat template stay such tokens."""
        bos, ids = self._policy_bos, prompt_ids.tolist()
        ids = ids[len(bos) :] if ids[: len(bos)] == bos else ids
        [prompt] = decode(self._policy, [ids])
        control = {self._control[token] for token in ids if token in self._control}
        self._warn(control)
        if control:
            [head] = encode(self.reward, [prompt], control_tokens=True)
            response_ids = self._encode_responses(responses)
        else:
            [(head, response_ids, _)] = self._encode([prompt], [responses], control_tokens=False)
        own = self._reward_bos
        head = head if control and head[: len(own)] == own else [*own, *head]
        return np.array(head, dtype=np.int32), response_ids

    def _chat_row(self, row: Example, prompt: str, responses: list[str]) -> Example:
        """Return a row in the chat template; the text of a control token stays plain text."""
        assert self._turns is not None
        before, between, after = (encode(self.reward, [text], control_tokens=True)[0] for text in self._turns)
        if self._own_prompts:
            own = self._own_prompts[row.prompt_ids.tobytes()]
            return row._replace(prompt_ids=own, responses=self._arrays(self._encode_responses(responses), after))
        if any(token in text for text in (prompt, *responses) for token in self._known):
            [prompt_ids, *ids] = encode(self.reward, [prompt, *responses])
            head = np.array([*before, *prompt_ids, *between], dtype=np.int32)
            return row._replace(prompt_ids=head, responses=self._arrays(ids, after))
        asked = {"role": "user", "content": prompt}
        whole = [render_chat(self.reward, [asked, {"role": "assistant", "content": text}]) for text in responses]
        ids = encode(self.reward, whole, control_tokens=True)
        shortest = min(map(len, ids)) - 1
        shared = next((i for i, column in enumerate(zip(*ids, strict=False)) if len(set(column)) > 1), shortest)
        shared = min(shared, shortest)
        head = np.array(ids[0][:shared], dtype=np.int32)
        return row._replace(prompt_ids=head, responses=self._arrays([one[shared:] for one in ids], []))

    @staticmethod
    def _arrays(responses: list[list[int]], end: list[int]) -> tuple[np.ndarray, ...]:
        return tuple(np.array([*response, *end], dtype=np.int32) for response in responses)

    def _encode_responses(self, responses: list[str]) -> list[list[int]]:
        [pair] = self._encode([_NEW_LINE], [responses], control_tokens=False)
        return pair.responses

    def _warn(self, control: set[str]) -> None:
        """Warn once that control tokens of the policy's template mean nothing to the reward model."""
        unknown = sorted(control - self._known)
        if unknown and not self._warned:
            self._warned = True
            self._say(
                f"warning: the reward model's tokenizer lacks control tokens of the prompts ({', '.join(unknown[:4])}) "
                "and reads them as plain text; give a reward model with the policy's chat template, or rows with a "
                "prompt instead of messages"
            )


def turn_texts(tokenizer: Any) -> tuple[str, str, str]:
    """Texts of a chat template before, between and after user message and answer. Raises ModelError."""
    asked, answered = "a question", "an answer"
    if not tokenizer.chat_template:
        raise ModelError("reward.template=chat: the reward model has no chat template: give reward.template=plain")
    text = render_chat(tokenizer, [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}])
    before, found, rest = text.partition(asked)
    between, also_found, after = rest.partition(answered)
    if not (found and also_found):
        raise ModelError("reward.template=chat: the reward model's chat template does not write the texts as they are")
    return before, between, after
