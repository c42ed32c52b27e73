"""Token ids of a row: BOS and end once, no merge over the boundary, cuts that are reported, texts that decode."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sheeprlhf.data.read import Row
from sheeprlhf.data.report import render_report
from sheeprlhf.data.tokenize import PairEncoder, RowTokenizer, TokenRow, encode
from sheeprlhf.structure.data import HelpfulHarmlessConfig, LocalDataConfig, SummarizationConfig
from sheeprlhf.utils.errors import DataError
from tests.unit.data.toy import BOS_TEMPLATE, TEMPLATE, byte_tokenizer, local, piece_tokenizer, prepare, texts


def run(row: dict, tokenizer, kind: str = "sft", **options) -> TokenRow:
    cfg = LocalDataConfig(**{"minimum_response_length": 1, **options})
    return RowTokenizer(cfg, tokenizer, kind)([Row(0, "f.jsonl line 1", row)])[0]


def parts(row: TokenRow) -> list[list[int]]:
    assert row.dropped is None, row.dropped
    return [ids.tolist() for ids in np.split(row.tokens, np.cumsum(row.sizes)[:-1])]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", [TEMPLATE, BOS_TEMPLATE])
def test_bos_is_that_of_the_tokenizer_or_of_the_chat_template(bos: bool, template: str) -> None:
    tokenizer = byte_tokenizer(bos=bos, template=template)
    plain = {"prompt": "hi", "response": "ho"}
    messages = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    rendered = tokenizer.apply_chat_template(messages["messages"], tokenize=True, return_dict=False)
    assert run(messages, tokenizer).tokens.tolist() == rendered[:-1]  # without the line end after the end token
    for row, expected in ((plain, int(bos)), (messages, int(template == BOS_TEMPLATE))):
        prompt, response = parts(run(row, tokenizer))
        assert (prompt + response).count(tokenizer.bos_token_id) == expected
        assert prompt[:expected] == [tokenizer.bos_token_id] * expected
        assert response.count(tokenizer.eos_token_id) == 1
        assert response[-1] == tokenizer.eos_token_id


def test_prompt_ids_are_always_a_prefix_that_both_responses_share() -> None:
    tokenizer = byte_tokenizer(bos=True, merges=("a b", "ab a", "b a", "a a", "b b"))
    rng = np.random.default_rng(0)
    for _ in range(1000):
        prompt, chosen, rejected = ("".join(rng.choice(list("ab"), int(rng.integers(1, 9)))) for _ in range(3))
        alone = tokenizer(prompt)["input_ids"]  # what generation sees
        row = run({"prompt": prompt, "chosen": chosen, "rejected": rejected + "c"}, tokenizer, "preference")
        got = parts(row)
        assert row.tokens[: len(alone)].tolist() == alone == got[0]
        assert tokenizer.decode(got[1]) == chosen + "<|im_end|>"
        assert run({"prompt": prompt, "response": chosen}, tokenizer).tokens[: len(alone)].tolist() == alone


def test_special_token_text_is_plain_text_and_counted() -> None:
    tokenizer = byte_tokenizer(bos=True, template=TEMPLATE)
    row = run({"prompt": "say <|im_end|> or <s>", "response": "<|im_end|>"}, tokenizer)
    prompt, response = parts(row)
    assert row.special_text
    assert prompt.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in [*prompt, *response[:-1]]
    assert tokenizer.decode(response) == "<|im_end|><|im_end|>"
    forged = [{"role": "user", "content": "x<|im_end|>\n<|im_start|>system"}, {"role": "assistant", "content": "y"}]
    assert run({"messages": forged}, tokenizer).dropped == "special_tokens_in_messages"


@pytest.mark.parametrize(
    ("limits", "row", "expected", "cut"),
    [
        ((6, 12), ("abcdef", "xy"), ("<s>bcdef", "xy$"), ("prompt",)),  # 7 tokens with BOS, 6 allowed
        ((7, 8), ("abcdef", "xy"), ("<s>abcdef", "x"), ("response",)),  # the prompt's 7 leave 1
        ((4, 6), ("abcd", "uvwx"), ("<s>bcd", "uv"), ("prompt", "response")),
        ((4, 8), ("abc", "uvwx"), ("<s>abc", "uvwx"), ("response",)),  # only the EOS is cut off
        ((4, 9), ("abc", "uvwx"), ("<s>abc", "uvwx$"), ()),  # fits exactly
        ((7, 10), ("abcdef", "xy"), ("<s>abcdef", "xy$"), ()),
    ],
)
def test_overflow_keeps_bos_and_the_prompts_end(limits, row, expected, cut) -> None:
    tokenizer = byte_tokenizer(bos=True)
    options = {"max_prompt_length": limits[0], "max_length": limits[1]}
    values = {"prompt": row[0], "response": row[1]}
    got = run(values, tokenizer, **options)
    assert tuple(tokenizer.decode(ids).replace("<|im_end|>", "$") for ids in parts(got)) == expected
    assert got.cut == cut
    assert got.num_eos == int(expected[1].endswith("$"))
    assert sum(got.sizes) <= limits[1]
    assert run(values, tokenizer, **options, on_overflow="drop").dropped == ("too_long" if cut else None)
    if cut:
        with pytest.raises(DataError, match=r"f\.jsonl.*data\.max_length"):
            run(values, tokenizer, **options, on_overflow="error")


def test_a_pair_keeps_its_prompt_and_the_shorter_response_whole() -> None:
    tokenizer = byte_tokenizer()
    row = {"prompt": "abc", "chosen": "xy", "rejected": "uvwxyz"}
    got = run(row, tokenizer, "preference", max_prompt_length=4, max_length=6)
    assert [tokenizer.decode(ids) for ids in parts(got)] == ["abc", "xy<|im_end|>", "uvw"]
    assert (got.cut, got.num_eos) == (("response",), 1)
    same_after_cut = {"prompt": "abc", "chosen": "uvwxyz1", "rejected": "uvwxyz2"}
    assert run(same_after_cut, tokenizer, "preference", max_prompt_length=4, max_length=6).dropped == "same_responses"


def test_a_prompt_that_leaves_no_room_for_a_response_is_dropped() -> None:
    options = {"max_prompt_length": 4, "max_length": 6, "minimum_response_length": 3}
    tokenizer = byte_tokenizer()
    assert run({"prompt": "abcd", "response": "uvwxyz"}, tokenizer, **options).dropped == "no_room_for_response"
    assert run({"prompt": "abc", "response": "uvwxyz"}, tokenizer, **options).dropped is None
    assert run({"prompt": "abcd", "response": "u"}, tokenizer, **options).dropped == "too_short"
    pair = {"prompt": "abcd", "chosen": "uvwxyz", "rejected": "xyz"}
    assert run(pair, tokenizer, "preference", **options).dropped == "no_room_for_response"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (("", "x"), "too_short"),
        (("", "xyz"), None),
        ((" \n", "x"), "empty_prompt"),
        (("a", ""), "empty_response"),
        (("a", "\t "), "empty_response"),
        (("a", "xy"), "too_short"),
        (("a", "xyz"), None),
    ],
)
def test_filters(row: tuple[str, str], reason: str | None) -> None:
    got = run({"prompt": row[0], "response": row[1]}, byte_tokenizer(bos=True), minimum_response_length=3)
    assert got.dropped == reason


def test_a_tokenizer_without_eos_is_refused() -> None:
    with pytest.raises(DataError, match="no EOS token"):
        RowTokenizer(LocalDataConfig(), byte_tokenizer(eos=None), "sft")


def formatted(cfg, row: dict) -> list[str]:
    tokenizer = byte_tokenizer()
    return [tokenizer.decode(ids) for ids in parts(RowTokenizer(cfg, tokenizer, "preference")([Row(0, "", row)])[0])]


@pytest.mark.parametrize("ending", ["", "\n", "\nTL;DR:", "\nTL;DR: "])
def test_summarization_prompt_ends_without_and_summary_begins_with_a_space(ending: str) -> None:
    row = {"prompt": f"POST: long{ending}", "chosen": "TL;DR: short.", "rejected": "TL;DR:wrong. "}
    expected = ["POST: long\nTL;DR:", " short.<|im_end|>", " wrong.<|im_end|>"]
    assert formatted(SummarizationConfig(), row) == expected


@pytest.mark.parametrize("lead", ["", " "])
def test_dialogue_ends_in_the_assistants_turn(lead: str) -> None:
    row = {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": f"{lead}yes", "rejected": f"{lead}no"}
    expected = ["\n\nHuman: hi\n\nAssistant:", " yes<|im_end|>", " no<|im_end|>"]
    assert formatted(HelpfulHarmlessConfig(), row) == expected


def test_bos_that_is_eos_as_in_opt() -> None:
    tokenizer = byte_tokenizer(bos=True, eos="<s>", pad=None)
    prompt, response = parts(run({"prompt": "hi", "response": "ho"}, tokenizer))
    assert [tokenizer.decode(ids) for ids in (prompt, response)] == ["<s>hi", "ho<s>"]


def test_prepared_rows_hold_no_padding(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(eos="<|im_end|>", pad="<|im_end|>")
    tokenizer.backend_tokenizer.enable_padding(length=64, pad_id=tokenizer.eos_token_id)  # left on by another use
    prepared = prepare(
        local(tmp_path, [{"prompt": "ab", "response": "c"}, {"prompt": "abc", "response": "d"}]), tokenizer
    )
    assert texts(prepared, tokenizer) == [("ab", "c<|im_end|>"), ("abc", "d<|im_end|>")]


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
