"""Prompt and response ids decode to the text of both, with every family of tokenizers."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sheeprlhf.data.read import Row
from sheeprlhf.data.report import render_report
from sheeprlhf.data.tokenize import PairEncoder, RowTokenizer, encode
from sheeprlhf.structure.data import LocalDataConfig
from tests.unit.data.toy import byte_tokenizer, local, piece_tokenizer, prepare

PREFIXES = ("prepend", "first", "always")
INST = "{{ bos_token }}{% for m in messages %}{{ ' ' ~ m.content ~ eos_token if m.role == 'assistant' else '[INST] ' ~ m.content ~ ' [/INST]' }}{% endfor %}"  # noqa: E501
MARKED = "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ eos_token ~ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"  # noqa: E501


def byte_level(*, prefix: bool, regex: bool) -> PreTrainedTokenizerFast:
    """Bytes with merges over words and spaces; `prefix` writes a space before each text, as some RoBERTa-like do."""
    tokenizer = byte_tokenizer(bos=True, merges=("t h", "th e", "Ġ t", "Ġt h", "c a", "ca t"))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    return tokenizer


FAMILIES = {
    "sentencepiece, normalizer": lambda: piece_tokenizer("prepend"),
    "sentencepiece, first": lambda: piece_tokenizer("first"),
    "sentencepiece, unigram": lambda: piece_tokenizer("always"),
    "sentencepiece, no prefix": lambda: piece_tokenizer("none"),
    "bytes": lambda: byte_level(prefix=False, regex=True),
    "bytes without words": lambda: byte_level(prefix=False, regex=False),
    "bytes behind a space": lambda: byte_level(prefix=True, regex=True),
}
STARTS = ("ask: the cat", "the cat", "the ", "a\n", "answer:\n\n", "ca", "t")
ENDS = ("the cat", " the cat", "\nthe cat", "at. a dog", ", a dog", "7", " t", "e", "\n", "\n\n a")


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_response_decode_to_their_text(family: str) -> None:
    tokenizer = FAMILIES[family]()
    pairs = list(itertools.product(STARTS, ENDS))
    prompts, responses = [prompt for prompt, _ in pairs], [(response, response + "x") for _, response in pairs]
    got = PairEncoder(tokenizer)(prompts, responses, control_tokens=False)
    spaces = 1 if family in ("bytes behind a space", "sentencepiece, unigram") else 0
    for prompt, of, pair in zip(prompts, responses, got, strict=True):
        assert pair.prompt == encode(tokenizer, [prompt])[0]  # what a sampler is given
        for response, ids in zip(of, pair.responses, strict=True):
            read = tokenizer.decode([*pair.prompt, *ids], clean_up_tokenization_spaces=False)
            assert read in (prompt + response, " " * spaces + prompt + response)
        assert pair.mismatch == ("prompt" if family == "bytes behind a space" else "")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("template", [INST, MARKED])
def test_a_response_has_the_ids_behind_its_prompt(prefix: str, template: str) -> None:
    """As one text encodes, by transformers alone."""
    tokenizer = piece_tokenizer(prefix, template=template)
    user, answer = {"role": "user", "content": "ask the cat"}, {"role": "assistant", "content": "the cat sat 3"}
    prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    joint = tokenizer(tokenizer.apply_chat_template([user, answer], tokenize=False), add_special_tokens=False)
    head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert joint["input_ids"][: len(head)] == head
    end = joint["input_ids"].index(tokenizer.eos_token_id, len(head)) + 1
    plain = {"prompt": "ask: the cat is\nanswer:", "response": " the cat"}
    rows = [Row(0, "", {"messages": [user, answer]}), Row(1, "", plain)]
    made = RowTokenizer(LocalDataConfig(minimum_response_length=1), tokenizer, "sft")(rows)
    responses = [row.tokens[row.sizes[0] :].tolist() for row in made]
    assert responses[0] == joint["input_ids"][len(head) : end]
    head, both = tokenizer(plain["prompt"])["input_ids"], tokenizer(plain["prompt"] + plain["response"])["input_ids"]
    assert made[1].tokens.tolist() == [*both, tokenizer.eos_token_id]
    assert both[: len(head)] == head
    assert tokenizer.convert_ids_to_tokens(responses[1][0]) == "\u2581the"
    assert [row.mismatch for row in made] == ["prompt" if prefix != "first" and template == MARKED else "", ""]


def test_a_token_over_the_border_is_cut_there() -> None:
    """The prompt keeps its ids, and the response those that it has inside a text."""
    tokenizer = piece_tokenizer("prepend")
    whole = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    [pair] = PairEncoder(tokenizer)(["the c"], [("at sat",)], control_tokens=False)
    assert pair.prompt == tokenizer("the c", add_special_tokens=False)["input_ids"] != whole[: len(pair.prompt)]
    behind = tokenizer("\nat sat", add_special_tokens=False)["input_ids"]
    [line] = tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
    assert pair.responses == [behind[behind.index(line) + 1 :]]
    assert pair.mismatch == ""


def test_rows_that_do_not_decode_to_their_text_are_counted(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    rows = [("a", "b"), ("A", "c"), ("A", "D"), ("e", "F")]
    data: list[dict[str, Any]] = [{"prompt": prompt, "response": response} for prompt, response in rows]
    prepared = prepare(local(tmp_path, data), tokenizer)
    part = prepared.report["splits"]["train"]
    assert (part["kept"], part["prompt_mismatch_rows"], part["response_mismatch_rows"]) == (4, 1, 2)
    assert (
        sum(line.endswith(("  1", "  2")) and "decode" in line for line in render_report(prepared.report).split("\n"))
        == 2
    )


def test_a_tokenizer_of_words_is_no_error() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    [row] = RowTokenizer(LocalDataConfig(minimum_response_length=1), tokenizer, "sft")(
        [Row(0, "", {"prompt": "a", "response": " b"})]
    )
    assert np.array_equal(row.tokens, [2, 3, 1])
