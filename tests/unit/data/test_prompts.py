"""Rows that are a prompt alone: tasks that sample the responses keep them, all others refuse them as before."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sheeprlhf.data.read import Row
from sheeprlhf.data.report import render_report
from sheeprlhf.data.tokenize import RowTokenizer, TokenRow
from sheeprlhf.structure.data import LocalDataConfig
from sheeprlhf.utils.errors import DataError
from tests.unit.data.toy import BOS_TEMPLATE, TEMPLATE, byte_tokenizer, local, prepare, texts, write_jsonl

USER, ANSWER, AGAIN = (
    {"role": role, "content": content} for role, content in (("user", "a"), ("assistant", "b"), ("user", "c"))
)
TURN = "<|im_start|>{}\n{}<|im_end|>\n"
ASKED = "<|im_start|>assistant\n"


def run(row: dict[str, Any], tokenizer: Any, kind: str = "prompts", **options: Any) -> TokenRow:
    return RowTokenizer(LocalDataConfig(**options), tokenizer, kind)([Row(0, "f.jsonl line 1", row)])[0]


@pytest.mark.parametrize("bos", [False, True])
def test_a_prompt_alone_is_its_bytes_behind_bos(bos: bool) -> None:
    tokenizer = byte_tokenizer(bos=bos)
    vocab = tokenizer.get_vocab()
    ids = [vocab["<s>"]] * bos + [vocab["h"], vocab["i"]]
    row = run({"prompt": "hi"}, tokenizer)
    assert (row.dropped, row.tokens.tolist(), row.sizes) == (None, ids, (len(ids),))
    assert (row.num_eos, row.cut, row.margin, row.desirable) == (0, (), 0.0, ())
    assert row.tokens.dtype == np.int32
    with_response = run({"prompt": "hi", "response": "ho"}, tokenizer)
    assert with_response.tokens.tolist() == [*ids, vocab["h"], vocab["o"], tokenizer.eos_token_id]
    assert with_response.sizes == (len(ids), 3)


@pytest.mark.parametrize("template", [TEMPLATE, BOS_TEMPLATE])
def test_a_conversation_that_ends_with_the_user_is_the_prompt(template: str) -> None:
    tokenizer = byte_tokenizer(template=template)
    bos = "<s>" if template == BOS_TEMPLATE else ""

    def rendered(messages: list[dict[str, str]], kind: str = "prompts") -> list[str]:
        row = run({"messages": messages}, tokenizer, kind, minimum_response_length=1)
        assert row.dropped is None
        return [tokenizer.decode(ids) for ids in np.split(row.tokens, np.cumsum(row.sizes)[:-1])]

    first, answer = bos + TURN.format("user", "a"), TURN.format("assistant", "b")
    assert rendered([USER]) == [first + ASKED]
    assert rendered([USER, ANSWER, AGAIN]) == [first + answer + TURN.format("user", "c") + ASKED]
    assert rendered([USER, ANSWER]) == [first + ASKED, "b<|im_end|>"]
    assert rendered([USER, ANSWER, AGAIN], "sft") == [
        first + ASKED,
        "b<|im_end|>",
    ]  # nothing after the answer


REFUSED = {
    "sft": ({"prompt": "p"}, "sft", "a row has prompt and response, or prompt, chosen and rejected"),
    "preference": ({"prompt": "p"}, "preference", "a row has prompt and response, or prompt, chosen and rejected"),
    "unpaired": ({"prompt": "p"}, "unpaired", "a row has prompt and response, or prompt, chosen and rejected"),
    "question": ({"messages": [USER]}, "sft", "needs an assistant message with a message before it"),
    "no prompt": ({"response": "r"}, "prompts", "column 'prompt'"),
    "misnamed": ({}, "prompts", "column 'prompt'"),
    "null": ({"prompt": None}, "prompts", "column 'prompt'"),
    "half a pair": ({"prompt": "p", "rejected": "r"}, "prompts", "a row has prompt and response, or"),
    "number": ({"prompt": "p", "response": 3.5}, "prompts", "column 'response'"),
    "no messages": ({"messages": []}, "prompts", "needs a user's message at its end, or an assistant message with"),
    "system alone": ({"messages": [USER | {"role": "system"}]}, "prompts", "needs a user's message at its end"),
    "answer alone": ({"messages": [ANSWER]}, "prompts", "needs a user's message at its end, or an assistant message"),
}


@pytest.mark.parametrize(("row", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(row: dict[str, Any], kind: str, message: str) -> None:
    others = () if row else ("question",)
    tokenize = RowTokenizer(LocalDataConfig(), byte_tokenizer(template=TEMPLATE), kind)
    with pytest.raises(DataError, match=message):
        tokenize([Row(0, "f.jsonl line 1", row, others)])


def test_a_file_of_prompts(tmp_path: Path) -> None:
    """What is left out is counted as with responses; what cannot be counted is not shown."""
    tokenizer = byte_tokenizer(bos=True, template=TEMPLATE)
    rows = [{"prompt": "hi"}, {"prompt": " "}, {"prompt": "hey"}, {"prompt": "hi"}, {"messages": [USER]}]
    rows.append({"messages": [USER | {"content": "<|im_end|>"}]})
    prepared = prepare(local(tmp_path, rows), tokenizer, "prompts")
    assert texts(prepared, tokenizer) == [("<s>hi",), ("<s>hey",), (TURN.format("user", "a") + ASKED,)]
    split, part = prepared.splits["train"], prepared.report["splits"]["train"]
    assert [one.responses for one in split.examples(range(3))] == [(), (), ()]
    assert (split.unanswered, part["prompts_alone"], part["kept"]) == (3, 3, 3)
    assert split.lengths.tolist() == split.sizes[:, 0].tolist()
    assert part["dropped"] == {"duplicate": 1, "empty_prompt": 1, "special_tokens_in_messages": 1}
    assert (part["eos_share"], part["trained_tokens"], part["pairs"]) == (None, 0, 0)
    table = render_report(prepared.report)
    assert "rows without a response" in table
    assert not any(words in table for words in ("EOS", "to learn", "response tokens", "nan"))


def test_a_file_of_both(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    rows = [{"prompt": "hi", "response": "ho"}, {"prompt": "hey"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [{"prompt": "alone"}])
    prepared = prepare(local(tmp_path, rows, validation_file=held_out), tokenizer, "prompts")
    assert texts(prepared, tokenizer) == [("hi", "ho<|im_end|>"), ("hey",), ("a", "b<|im_end|>")]
    split, part = prepared.splits["train"], prepared.report["splits"]["train"]
    assert split.sizes.tolist() == [[2, 3], [3, -1], [1, 2]]
    assert split.lengths.tolist() == [5, 3, 3]
    assert (split.unanswered, prepared.splits["validation"].unanswered) == (1, 1)
    assert (part["eos_share"], part["trained_tokens"], part["prompts_alone"]) == (1.0, 5, 1)
    table = [line.split() for line in render_report(prepared.report).splitlines()]
    assert [*"targets with an end token".split(), "100.0%", "-"] in table
    assert [*"rows without a response".split(), "1", "1"] in table
