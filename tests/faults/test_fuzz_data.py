"""Random bytes, values and texts through reader, row formats, tokenizer, collators and masks: 10,000, no crash.

Only a DataError is allowed, on one line and with its place. What holds of every row and batch is checked against the
text (numbers as in tests/unit/test_traps.py): BOS at most once (3), prompt and response tokenised apart (13), EOS if
nothing was cut (1, 15), each response token a target exactly once, predicted by the place before it (4), and the same
targets packed, padded with any pad, or cut for several ranks (9).
"""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sheeprlhf.data.example import Example, collate_packed, collate_padded
from sheeprlhf.data.layout import RowLayout
from sheeprlhf.data.read import Row, read_batches
from sheeprlhf.data.rows import COLUMNS, has_value
from sheeprlhf.data.sampler import cut_micro_batches
from sheeprlhf.data.tokenize import RowTokenizer, TokenRow
from sheeprlhf.structure.data import (
    DataConfig,
    DocstringsConfig,
    HelpfulHarmlessConfig,
    LocalDataConfig,
    SummarizationConfig,
)
from sheeprlhf.utils.errors import DataError
from tests.support.batches import as_read, by_definition
from tests.unit.data.toy import BOS_TEMPLATE, byte_tokenizer

FEW = 90  # of each of the three sources
ALL = pytest.param(3_334, marks=pytest.mark.nightly)
FORMATS = (LocalDataConfig, DocstringsConfig, SummarizationConfig, HelpfulHarmlessConfig)
TOKENIZERS = [
    byte_tokenizer(bos=bos, eos=eos, pad=pad, template=BOS_TEMPLATE, merges=merges)
    for bos, eos, pad, merges in (
        (False, "<|im_end|>", "<|pad|>", ()),
        (True, "<|im_end|>", "<|im_end|>", ("a b", "b a", "ab a")),  # pad is EOS, as in most models
        (True, "<s>", None, ()),  # BOS is EOS, as in OPT
    )
]
ROW_TOKENIZERS = {
    options: [RowTokenizer(options(), TOKENIZERS[1], kind) for kind in ("sft", "preference")] for options in FORMATS
}

words = st.text(max_size=12) | st.sampled_from(
    ["", " ", "\n", "\0", "\ud800", "<|im_end|>", "<s>", "<|pad|>", "a", "abab"]
)
names = st.sampled_from([*COLUMNS, "promt", "completion", "role", "content", ""])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | words, inner, max_size=3),
    max_leaves=6,
)
turns = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]) | words, "content": words})
json_rows = st.dictionaries(names, words | json_values, max_size=5) | st.fixed_dictionaries(
    {"messages": st.lists(turns, max_size=4)}
)
text_rows = st.fixed_dictionaries({"prompt": words, "chosen": words, "rejected": words})
limits = st.tuples(
    st.integers(1, 20), st.integers(2, 24), st.integers(1, 3), st.sampled_from(["truncate_prompt", "drop"])
)


def fuzz(examples: int, *strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], None]:
    """Call the decorated function with examples: the same ones in every plain run, new ones in every other."""

    def run(check: Callable[..., None]) -> None:
        options = {"max_examples": examples, "deadline": None, "derandomize": examples == FEW, "database": None}
        settings(**options, suppress_health_check=list(HealthCheck))(given(*strategies)(check))()

    return run


@pytest.mark.parametrize("examples", [FEW, ALL])
def test_any_bytes(examples: int, tmp_path: Path) -> None:
    good = [
        b'{"prompt": "p", "response": "r"}',
        b"prompt,response",
        b"a,b",
        b'"a\n""b",c',
        b"\xef\xbb\xbf",
        b"\xff\xfe",
    ]
    pieces = st.sampled_from([*good, b"[", b"]", b",", b"{", b"}", b'"', b"\n", b"\r\n", b"\0", b":", b"\\ud800"])
    contents = st.binary(max_size=60) | st.lists(pieces | st.binary(max_size=4), max_size=9).map(b"".join)

    @fuzz(examples, contents, st.sampled_from(["jsonl", "json", "csv"]))
    def check(content: bytes, kind: str) -> None:
        with new_file(tmp_path, kind, content) as file:
            rows = tokenize_what_can_be_read(file, ROW_TOKENIZERS[LocalDataConfig])
            assert [row.number for row in rows] == list(range(len(rows)))


@pytest.mark.parametrize("examples", [FEW, ALL])
def test_any_row(examples: int, tmp_path: Path) -> None:
    @fuzz(examples, st.lists(json_rows, min_size=1, max_size=3), st.sampled_from(FORMATS), st.booleans())
    def check(rows: list[dict[str, Any]], options: type[DataConfig], array: bool) -> None:
        text = json.dumps(rows) if array else "\n".join(map(json.dumps, rows))
        with new_file(tmp_path, "json" if array else "jsonl", text.encode()) as file:
            read = tokenize_what_can_be_read(file, ROW_TOKENIZERS[options])
        if options is LocalDataConfig and not read:  # text that begins as a list and is no JSON
            return
        assert [row.number for row in read] == list(range(len(rows)))
        for row, values in zip(read, rows, strict=True):
            named = [*COLUMNS, "completion"] if options is LocalDataConfig else COLUMNS
            known = {name: values[name] for name in named if name in values}
            assert set(row.others) <= {name for name, value in values.items() if has_value(value)}
            assert set(values) - set(known) - set(row.others) <= {n for n, v in values.items() if not has_value(v)}
            if options is not LocalDataConfig:
                assert repr(sorted(row.values.items())) == repr(sorted(known.items()))  # NaN is not equal to itself


@contextmanager
def new_file(folder: Path, kind: str, content: bytes) -> Iterator[Path]:
    """A file that is gone after the block; writing one again and again would wait for the disk."""
    with tempfile.NamedTemporaryFile(suffix=f".{kind}", dir=folder) as stream:
        stream.write(content)
        stream.flush()
        yield Path(stream.name)


def tokenize_what_can_be_read(file: Path, tokenizers: list[RowTokenizer]) -> list[Row]:
    """The rows of a file; each is refused with its place, dropped for a reason, or has tokens."""
    try:
        rows = [
            row for batch in read_batches([file], None, layout=RowLayout(tokenizers[0].cfg, "sft")) for row in batch
        ]
    except DataError as error:
        check_message(error, str(file))
        return []
    for row in rows:
        for tokenize in tokenizers:
            try:
                [made, *_] = tokenize([row])
            except DataError as error:
                check_message(error, row.place)
            else:
                assert bool(made.dropped) != bool(len(made.tokens))
                assert made.tokens.dtype == np.int32
                assert made.tokens.tolist().count(tokenize.tokenizer.bos_token_id) == (made.dropped is None)
    return rows


def check_message(error: DataError, place: str) -> None:
    assert str(error).startswith(place)
    assert "\n" not in str(error)


@pytest.mark.parametrize("examples", [FEW, ALL])
def test_any_text(examples: int) -> None:
    @fuzz(examples, st.lists(text_rows, min_size=1, max_size=5), limits, st.sampled_from(TOKENIZERS), st.booleans())
    def check(rows: list[dict[str, str]], options: tuple[int, int, int, str], tokenizer: Any, pairs: bool) -> None:
        prompt_limit, limit, shortest, overflow = options
        cfg = LocalDataConfig(
            max_prompt_length=prompt_limit, max_length=limit, minimum_response_length=shortest, on_overflow=overflow
        )
        tokenize = RowTokenizer(cfg, tokenizer, "preference" if pairs else "sft")
        examples = []
        for number, values in enumerate(rows):
            if not values["prompt"] and not pairs:
                continue  # a text, of which tests/unit/data/test_prompts.py tells the tokens
            try:
                [made, *further] = tokenize([Row(number, f"line {number}", values)])
            except DataError as error:
                check_message(error, f"line {number}: column")
                continue
            if further:  # a long text without a prompt, in parts
                assert not values["prompt"]
                continue
            if made.dropped is None:
                examples.append(check_row(made, values, cfg, tokenizer))
        if examples:
            check_batches(examples, tokenizer)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def check_row(row: TokenRow, values: dict[str, str], cfg: DataConfig, tokenizer: Any) -> Example:
    """One row against its text."""
    prompt, *responses = np.split(row.tokens, np.cumsum(row.sizes)[:-1])
    plain = ids_of(tokenizer, values["prompt"])
    whole = tokenizer(values["prompt"], split_special_tokens=True)["input_ids"]  # what generation sees
    bos = whole[: len(whole) - len(plain)]
    assert len(prompt) <= cfg.max_prompt_length
    if values["prompt"]:
        assert prompt.tolist() == bos + plain[len(whole) - len(prompt) :]  # cut at its start, behind the BOS
    else:  # a text without a prompt
        assert prompt.tolist() == (bos or [tokenizer.eos_token_id])
    assert prompt.tolist().count(tokenizer.bos_token_id) == len(bos)
    texts = [values[name] for name in ("chosen", "rejected")][: len(responses)]
    for response, text in zip(responses, texts, strict=True):
        ids = ids_of(tokenizer, text)
        assert cfg.minimum_response_length <= len(ids)
        assert 1 <= len(response) <= cfg.max_length - len(prompt)
        assert response.tolist() == [*ids, tokenizer.eos_token_id][: len(response)]
        assert tokenizer.eos_token_id not in response[:-1]
    assert row.num_eos == sum(response[-1] == tokenizer.eos_token_id for response in responses)
    assert bool(row.cut) == (row.num_eos < len(responses) or len(prompt) < len(whole))
    assert not (row.cut and cfg.on_overflow == "drop")
    assert len({response.tobytes() for response in responses}) == len(responses)
    return Example(row.number, prompt, tuple(responses))


def check_batches(examples: list[Example], tokenizer: Any) -> None:
    """Batches made in every way say the same: each target once, in order, with all that it may see before it."""
    for targets in ("response", "all"):
        expected = by_definition(examples, targets)
        assert as_read(collate_packed(examples, targets=targets)) == expected
        for pad in (0, tokenizer.eos_token_id, int(examples[0].prompt_ids[-1])):
            assert as_read(collate_padded(examples, pad_id=pad, targets=targets)) == expected
    once = Counter((context, token) for context, token, _ in by_definition(examples, "response"))
    lengths = np.array([example.num_tokens() for example in examples])
    for ranks in (1, 2, 3):
        parts = [
            [examples[index] for index in part]
            for rank in range(ranks)
            for part in cut_micro_batches(
                range(len(examples)), lengths, max_rows=2, token_budget=16, rank=rank, world_size=ranks
            )
        ]
        batches = [collate_packed(part) for part in parts]
        assert sorted(row for batch in batches for row in batch.row_ids) == [example.row_id for example in examples]
        assert Counter((context, token) for batch in batches for context, token, _ in as_read(batch)) == once
