"""Rows that are a prompt or a text alone, and rows whose control tokens are meant."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sheeprlhf.data.read import Row
from sheeprlhf.data.report import check_prompts, render_report
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
    "sft": ({"prompt": "p"}, "sft", "chosen and rejected"),
    "preference": ({"prompt": "p"}, "preference", "chosen and rejected"),
    "unpaired": ({"prompt": "p"}, "unpaired", "chosen and rejected"),
    "question": ({"messages": [USER]}, "sft", "assistant message"),
    "no prompt": ({"response": "r"}, "prompts", "column 'prompt'"),
    "misnamed": ({}, "prompts", "column 'prompt'"),
    "null": ({"prompt": None}, "prompts", "column 'prompt'"),
    "half a pair": ({"prompt": "p", "rejected": "r"}, "prompts", "prompt and response"),
    "number": ({"prompt": "p", "response": 3.5}, "prompts", "column 'response'"),
    "no messages": ({"messages": []}, "prompts", "user's message"),
    "system alone": ({"messages": [USER | {"role": "system"}]}, "prompts", "user's message"),
    "answer alone": ({"messages": [ANSWER]}, "prompts", "user's message"),
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


TEXTS = ["one two", "three", "four five six"]
BOS, EOS = 256, 258  # of the toy tokenizer: <s> and <|im_end|>


def files(folder: Path) -> dict[str, str]:
    (folder / "c.txt").write_text("\n".join([*TEXTS[:2], "  ", TEXTS[2]]) + "\r\n")
    return {
        "text": write_jsonl(folder / "a.jsonl", [{"text": text, "id": 1} for text in TEXTS]),
        "empty prompt": write_jsonl(folder / "b.jsonl", [{"prompt": "", "response": text} for text in TEXTS]),
        "txt": str(folder / "c.txt"),
    }


@pytest.mark.parametrize("kind", ["text", "empty prompt", "txt"])
@pytest.mark.parametrize("bos", [False, True])
def test_all_tokens_of_a_text_are_learned(kind: str, bos: bool, tmp_path: Path) -> None:
    """One byte a token: each text is behind BOS, or behind EOS where the tokenizer adds no BOS, and ends in EOS."""
    prepared = prepare(local(tmp_path, train_file=files(tmp_path)[kind]), byte_tokenizer(bos=bos))
    rows = prepared.splits["train"].examples(range(3))
    assert [row.prompt_ids.tolist() for row in rows] == [[BOS if bos else EOS]] * 3
    expected = [[*byte_tokenizer().encode(text), EOS] for text in TEXTS]
    assert [[ids.tolist() for ids in row.responses] for row in rows] == [[ids] for ids in expected]
    assert prepared.report["splits"]["train"]["trained_tokens"] == sum(len(text) + 1 for text in TEXTS)
    assert prepared.report["splits"]["train"]["text_rows"] == 3
    assert "texts without a prompt" in render_report(prepared.report)
    with pytest.raises(DataError, match="task=rouge"):
        check_prompts(prepared.report, "rouge")


@pytest.mark.parametrize("bos", [False, True])
def test_all_tokens_of_a_long_text_are_learned_in_parts(bos: bool, tmp_path: Path) -> None:
    long = "abcdefghijklmnopqrstuvwxyz"
    tokenizer = byte_tokenizer(bos=bos)
    cfg = local(tmp_path, [{"text": long}, {"text": "xy"}, {"text": long}], max_length=10, max_prompt_length=5)
    prepared = prepare(cfg, tokenizer)
    rows = prepared.splits["train"].examples(range(4))
    assert max(row.num_tokens() for row in rows) == 10
    learned = [token for row in rows[:3] for token in row.responses[0].tolist()]
    assert learned == [*byte_tokenizer().encode(long), EOS]
    before = [BOS if bos else EOS, *learned]
    assert [row.prompt_ids.tolist() for row in rows[:3]] == [[before[0]], [before[9]], [before[18]]]
    part = prepared.report["splits"]["train"]
    assert (part["read"], part["kept"], part["text_parts"], part["rows_cut"]) == (3, 4, 2, 0)
    assert (part["dropped"], part["further_answers"]) == ({"duplicate": 3}, 0)
    dropped = prepare(local(tmp_path, [{"text": long}, {"text": "xy"}], max_length=10, on_overflow="drop"), tokenizer)
    assert dropped.report["splits"]["train"]["dropped"] == {"too_long": 1}


@pytest.mark.parametrize("kind", ["preference", "unpaired", "prompts"])
def test_other_tasks_refuse_texts(kind: str, tmp_path: Path) -> None:
    for name in ("text", "txt"):
        with pytest.raises(DataError, match="task=sft") as refused:
            prepare(local(tmp_path, train_file=files(tmp_path)[name]), byte_tokenizer(), kind)
        assert ("'data.columns={prompt: text}'" in str(refused.value)) is (kind == "prompts")
    prepared = prepare(
        local(tmp_path, train_file=files(tmp_path)["text"], columns={"prompt": "text"}), byte_tokenizer(), "prompts"
    )
    assert prepared.report["splits"]["train"]["prompts_alone"] == 3


def test_text_files_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    files(folder)
    prepared = prepare(local(tmp_path, train_file=str(folder)), byte_tokenizer())
    assert prepared.report["splits"]["train"]["read"] == 6
    assert any("c.txt" in note for note in prepared.report["notes"])
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).unlink()
    assert prepare(local(tmp_path, train_file=str(folder)), byte_tokenizer()).report["splits"]["train"]["read"] == 3


RENDERED = [{"prompt": f"<|im_start|>u\n{n}<|im_end|>\n<|im_start|>a\n", "response": "ok<|im_end|>"} for n in (3, 4)]


@pytest.mark.parametrize("bos", [False, True])
def test_control_tokens_of_rendered_rows_are_read_where_asked(bos: bool, tmp_path: Path) -> None:
    """Expected ids by the tokenizer alone, which reads control tokens in a text: no second BOS, no second end."""
    tokenizer = byte_tokenizer(bos=bos)
    plain = prepare(local(tmp_path, RENDERED), tokenizer)
    assert plain.splits["train"].example(0).prompt_ids.tolist().count(EOS) == 0
    [note] = [note for note in plain.report["notes"] if "data.control_tokens=true" in note]
    assert "2 of 2 rows" in note
    rows = [*RENDERED, RENDERED[0] | {"prompt": "<s>" + RENDERED[0]["prompt"], "response": "no"}]
    read = prepare(local(tmp_path, rows, control_tokens=True), tokenizer)
    assert read.fingerprint != prepare(local(tmp_path, rows), tokenizer).fingerprint
    assert not any("control_tokens" in note for note in read.report["notes"])
    for example, row in zip(read.splits["train"].examples(range(3)), rows, strict=True):
        prompt = tokenizer.encode(row["prompt"].removeprefix("<s>"), add_special_tokens=False)
        first = [BOS] if bos or row["prompt"].startswith("<s>") else []
        assert example.prompt_ids.tolist() == [*first, *prompt]
        assert prompt.count(EOS) == 1
        [response] = example.responses
        answer = row["response"].removesuffix("<|im_end|>") + "<|im_end|>"
        assert response.tolist() == tokenizer.encode(answer, add_special_tokens=False)
