"""Columns are read as they are meant; others are kept for rewards, counted, or refused with a fix."""

import datetime
import json
import re
import shlex
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from pyarrow import parquet

from sheeprlhf.config.validate import MAPPED, column_problems
from sheeprlhf.data.prepare import PreparedData, prepare_data
from sheeprlhf.data.report import render_report
from sheeprlhf.data.rows import COLUMNS, STEPS, decode_columns, encode_columns
from sheeprlhf.structure.data import KeptColumns, LocalDataConfig
from sheeprlhf.utils.errors import DataError
from tests.unit.data.toy import TEMPLATE, byte_tokenizer, local, prepare, texts

END = "<|im_end|>"
ALPACA = {"instruction": "Write it as a word.", "input": "3", "output": "three"}
READ = {  # a row, the kind of the task, and the texts that are read
    "alpaca": (ALPACA, "sft", ("Write it as a word.\n\n3", "three")),
    "alpaca, no input": (ALPACA | {"input": ""}, "sft", ("Write it as a word.", "three")),
    "alpaca, null input": (ALPACA | {"input": None}, "sft", ("Write it as a word.", "three")),
    "alpaca, empty system": (ALPACA | {"system": " ", "history": []}, "sft", ("Write it as a word.\n\n3", "three")),
    "completion": ({"prompt": "a", "completion": "b"}, "sft", ("a", "b")),
    "answer": ({"question": "a", "answer": "b"}, "sft", ("a", "b")),
    "query": ({"query": "a", "response": "b"}, "sft", ("a", "b")),
    "solution": ({"problem": "a", "solution": "b", "answer": "c"}, "sft", ("a", "b")),
    "number": ({"question": "a", "answer": 42}, "sft", ("a", "42")),
    "pair": ({"question": "a", "chosen": "b", "rejected": "c"}, "preference", ("a", "b", "c")),
    "prompt alone": ({"problem": "a", "answer": "b"}, "prompts", ("a",)),
    "own names win": ({"prompt": "a", "response": "b", "question": "c", "answer": "d"}, "sft", ("a", "b")),
}


@pytest.mark.parametrize(("row", "kind", "expected"), READ.values(), ids=READ)
def test_known_layouts(tmp_path: Path, row: dict[str, Any], kind: str, expected: tuple[str, ...]) -> None:
    tokenizer = byte_tokenizer()
    data = prepare(local(tmp_path, [row]), tokenizer, kind)
    assert texts(data, tokenizer) == [(expected[0], *(text + END for text in expected[1:]))]


REFUSED = {  # a row, the kind of the task, and the options of which the message names one that is then followed
    "input": ({"prompt": "Say", "input": "x", "response": "b"}, "sft", ("Say\n\nx", "b")),
    "context": ({"prompt": "Say", "context": "x", "response": "b"}, "sft", ("x\n\nSay", "b")),
    "context of prompts": ({"prompt": "Say", "context": "x"}, "prompts", ("x\n\nSay",)),
    "context of pairs": (
        {"prompt": "q", "context": "x", "chosen": "b", "rejected": "c"},
        "preference",
        ("x\n\nq", "b", "c"),
    ),
    "tools": ({"prompt": "Say", "tools": [{"name": "f"}], "response": "b"}, "sft", ("Say", "b")),
    "weight": ({"prompt": "Say", "weight": 0, "response": "b"}, "sft", ("Say", "b")),
    "train": ({"prompt": "Say", "train": False, "response": "b"}, "sft", ("Say", "b")),
    "history beside a prompt": ({"prompt": "Say", "history": [["a", "b"]], "response": "b"}, "sft", ("Say", "b")),
    "reasoning_content": ({"prompt": "Say", "reasoning_content": "hm", "response": "b"}, "sft", ("Say", "b")),
    "two prompts": ({"question": "Say", "answer": "b", "problem": "x", "solution": "y"}, "sft", ("Say", "b")),
    "instructions with an input": ({"instructions": "Say", "input": "x", "output": "b"}, "sft", ("Say\n\nx", "b")),
    "dolly": ({"instruction": "Say", "context": "x", "response": "b"}, "sft", ("x\n\nSay", "b")),
    "answer of a prompt": ({"prompt": "Say", "answer": "b"}, "sft", ("Say", "b")),
    "name with a blank": ({"Prompt ": "Say", "response": "b"}, "sft", ("Say", "b")),
}


@pytest.mark.parametrize(("row", "kind", "expected"), REFUSED.values(), ids=REFUSED)
def test_the_advice_is_followed_to_the_letter(
    tmp_path: Path, row: dict[str, Any], kind: str, expected: tuple[str, ...]
) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(DataError) as refused:
        prepare(local(tmp_path, [row]), tokenizer, kind)
    assert re.search(r"rows.jsonl line 1: ", str(refused.value))
    words = re.findall(r"'data\.(?:columns|ignore_columns)=[^']*'", str(refused.value))
    [override] = OverridesParser.create().parse_overrides(shlex.split(words[0]))
    given = {override.key_or_group.removeprefix("data."): override.value()}
    given = OmegaConf.to_object(OmegaConf.create(given))
    made = prepare(local(tmp_path, [row], **given), tokenizer, kind)
    assert texts(made, tokenizer) == [(expected[0], *(text + END for text in expected[1:]))]


@pytest.mark.parametrize("others", [("response_0", "response_1", "better_response_id"), ("answer", "labels")])
def test_pairs_are_never_made_of_columns_for_one_response(others: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=others[0]) as refused:
        prepare(local(tmp_path, [{"prompt": "Say", **dict.fromkeys(others, "a")}]), byte_tokenizer(), "preference")
    assert "data.columns" not in str(refused.value)


@pytest.mark.parametrize("history", [[["a", "b"]], '[["a", "b"]]', None])
def test_alpaca_with_a_system_text_and_earlier_questions_is_a_conversation(history: Any, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(template=TEMPLATE)
    data = prepare(local(tmp_path, [ALPACA | {"system": "Be brief.", "history": history}]), tokenizer)
    earlier = [("user", "a"), ("assistant", "b")] if history else []
    turns = [("system", "Be brief."), *earlier, ("user", "Write it as a word.\n\n3")]
    prompt = "".join(f"<|im_start|>{role}\n{text}{END}\n" for role, text in turns) + "<|im_start|>assistant\n"
    assert texts(data, tokenizer) == [(prompt, "three" + END)]
    assert data.report["columns"]["not_read"] == {}
    assert not any("plain text" in note for note in data.report["notes"])
    mixed = prepare(local(tmp_path, [ALPACA, ALPACA | {"system": "Be brief.", "history": history}]), tokenizer)
    assert any("1 of 2 rows" in note and "plain text" in note for note in mixed.report["notes"])
    for wrong in ("a", [["a"]], [["a", 3]]):
        with pytest.raises(DataError, match=r"history|prompt"):
            prepare(local(tmp_path, [ALPACA | {"history": wrong}]), tokenizer)
    with pytest.raises(DataError, match=r"model\.chat_template"):
        prepare(local(tmp_path, [ALPACA | {"history": [["a", "b"]]}]), byte_tokenizer())


def test_columns_that_are_not_read_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "response": "r", "id": n, "note": "x" if n else None, "label": True} for n in range(3)]
    report = prepare(local(tmp_path, rows), byte_tokenizer()).report
    assert report["columns"]["not_read"] == {"id": 3, "label": 3, "note": 2}
    assert "id (3 rows), label (3 rows), note (2 rows)" in render_report(report)
    report = prepare(local(tmp_path, rows), byte_tokenizer(), "unpaired").report
    assert report["columns"]["not_read"] == {"id": 3, "note": 2}
    report = prepare(local(tmp_path, rows, ignore_columns=["id"]), byte_tokenizer(), "unpaired").report
    assert report["columns"]["not_read"] == {"note": 2}


def test_columns_of_parquet_that_are_not_read_are_counted(tmp_path: Path) -> None:
    table = {"prompt": ["a", "b"], "response": ["c", "d"], "id": [1, None], "a.b": ["x", "y"], "none": pa.nulls(2)}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    report = prepare(local(tmp_path, train_file=str(tmp_path / "a.parquet")), byte_tokenizer()).report
    assert report["columns"]["not_read"] == {"a.b": 2, "id": 1}
    for name, values in {"context": ["x", None], "images": [[b"x"], [b"y"]]}.items():
        pq.write_table(pa.table(table | {name: values}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=rf"column '{name}' is not read .*data.ignore_columns=\[{name}\]"):
            prepare(local(tmp_path, train_file=str(tmp_path / "a.parquet")), byte_tokenizer())
    pq.write_table(pa.table(table | {"context": ["", None], "answer": [7, 8]}), tmp_path / "a.parquet")
    mapped = local(tmp_path, train_file=str(tmp_path / "a.parquet"), columns={"response": "answer"})
    tokenizer = byte_tokenizer()
    data = prepare(mapped, tokenizer)
    assert texts(data, tokenizer) == [("a", "7" + END), ("b", "8" + END)]
    assert data.report["columns"]["read_as"] == {"response from answer": 2}
    assert data.report["columns"]["numbers_as_text"] == {"response": 2}
    assert data.report["columns"]["not_read"] == {"a.b": 2, "response": 2, "id": 1}


@pytest.mark.parametrize(
    ("columns", "ignored", "named"),
    [
        ({"promt": "a"}, [], "data.columns.promt"),
        ({"prompt": 3}, [], "data.columns.prompt=3"),
        ({"prompt": []}, [], "data.columns.prompt"),
        ({"label": ["a", "b"]}, [], "data.columns.label"),
        ({"prompt": "a", "response": "a"}, [], "names a twice"),
        ({"prompt": "a"}, ["a"], "data.ignore_columns"),
        ("prompt", [], "data.columns=prompt"),
        ({}, [""], "data.ignore_columns"),
    ],
)
def test_options_are_checked(columns: Any, ignored: list[str], named: str) -> None:
    [problem] = column_problems(LocalDataConfig(train_file="x", columns=columns, ignore_columns=ignored))
    assert named in problem
    assert not list(column_problems(LocalDataConfig(train_file="x", columns={"prompt": ["a", "b"]})))
    assert MAPPED == COLUMNS + STEPS


ROWS: list[dict[str, Any]] = [
    {
        "prompt": f"{number} is?",
        "answer": str(number),
        "meta": {"level": number if number % 2 else None, "tags": [None, "a"], "more": [{"x": 1.5}]},
        "empty": None,
    }
    for number in range(6)
]


def prepared(tmp_path: Path, rows: list[dict[str, Any]], kept: KeptColumns, **options: Any) -> PreparedData:
    kind = options.pop("kind", "jsonl")
    file = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), file)
    elif kind == "json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = LocalDataConfig(
        train_file=str(file), validation_split=0.0, test_split=0.0, cache_dir=str(tmp_path / "cache"), **options
    )
    return prepare_data(cfg, byte_tokenizer(), kind="prompts", say=print, progress=False, kept=kept)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_named_columns_come_back_nested_and_null(kind: str, tmp_path: Path) -> None:
    data = prepared(tmp_path, ROWS, KeptColumns(("meta", "answer", "empty", "absent")), kind=kind)
    split = data.splits["train"]
    found = [split.example(index) for index in range(len(split))]
    assert [example.row_id for example in found] == list(range(6))
    assert [example.columns for example in found] == [
        {name: row[name] for name in ("answer", "meta", "empty")} for row in ROWS
    ]
    assert "meta" not in data.report["columns"]["not_read"]


def test_a_row_without_the_column_has_none_and_nothing_is_kept_unasked(tmp_path: Path) -> None:
    rows = [{"prompt": "a b", "answer": 1}, {"prompt": "c d"}]
    split = prepared(tmp_path, rows, KeptColumns(("answer",))).splits["train"]
    assert [split.example(index).columns for index in range(2)] == [{"answer": 1}, {"answer": None}]
    plain = prepared(tmp_path, rows, KeptColumns()).splits["train"]
    assert [plain.example(index).columns for index in range(2)] == [None, None]


def test_columns_are_in_the_fingerprint_and_tell_rows_apart(tmp_path: Path) -> None:
    rows = [{"prompt": "same", "answer": "1"}, {"prompt": "same", "answer": "2"}, {"prompt": "same", "answer": "1"}]
    kinds = [KeptColumns(), KeptColumns(("answer",)), KeptColumns(("other",)), KeptColumns(every=True)]
    data = [prepared(tmp_path, rows, kept) for kept in kinds]
    assert len({one.fingerprint for one in data}) == 4
    assert [len(one.splits["train"]) for one in data] == [1, 2, 1, 2]  # equal rows are kept once


def test_a_column_that_changes_the_meaning_may_be_for_the_reward(tmp_path: Path) -> None:
    rows = [{"prompt": "a b", "context": "c"}]
    with pytest.raises(DataError, match="context"):
        prepared(tmp_path, rows, KeptColumns())
    split = prepared(tmp_path, rows, KeptColumns(("context",))).splits["train"]
    assert split.example(0).columns == {"context": "c"}


def test_values_that_json_lacks() -> None:
    values = {
        "when": datetime.datetime(2024, 2, 3, 4, 5, 6, 7),
        "day": datetime.date(2024, 2, 3),
        "price": Decimal("1.10"),
        "raw": b"\0\xff",
        "took": datetime.timedelta(seconds=1.5),
        "odd": "\ud800 \u00e9",
        "nested": [{"day": datetime.date(2024, 2, 3)}],
    }
    found = decode_columns(encode_columns(values))
    assert found == values and type(found["day"]) is datetime.date
    with pytest.raises(DataError, match="column 'bad' holds object"):
        encode_columns({"good": 1, "bad": object()})
