"""Columns of the files reach the rows of a prepared dataset as they are, whatever the file's kind."""

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from sheeprlhf.data.prepare import PreparedData, prepare_data
from sheeprlhf.data.rows import decode_columns, encode_columns
from sheeprlhf.structure.data import KeptColumns, LocalDataConfig
from sheeprlhf.utils.errors import DataError
from tests.unit.data.toy import byte_tokenizer

ROWS: list[dict[str, Any]] = [
    {
        "prompt": f"{number} is?",
        "answer": str(number),
        "meta": {"level": number, "tags": [None, "a"], "more": [{"x": 1.5}]},
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
