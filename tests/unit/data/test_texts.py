"""Texts without a prompt, of which all tokens are learned; and rows whose control tokens are meant."""

from pathlib import Path

import pytest

from sheeprlhf.data.report import check_prompts, render_report
from sheeprlhf.utils.errors import DataError
from tests.unit.data.toy import byte_tokenizer, local, prepare, write_jsonl

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
