"""Unpaired data: every spelling of a label in every file format, pairs as two examples, and what the report says."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sheeprlhf.data.prepare import PreparedData
from sheeprlhf.data.report import render_report
from sheeprlhf.data.rows import is_desirable
from sheeprlhf.structure.data import DocstringsConfig, HelpfulHarmlessConfig, SummarizationConfig
from sheeprlhf.utils.errors import DataError
from tests.unit.data.toy import byte_tokenizer, local, prepare

EOS = "<|im_end|>"


def read(prepared: PreparedData, split: str = "train") -> list[tuple[int, str, str, bool]]:
    rows, tokenizer = prepared.splits[split], byte_tokenizer()
    examples = rows.examples(range(len(rows)))
    assert [e.desirable for e in examples] == rows.desirable.tolist()
    assert all(len(e.responses) == 1 for e in examples)
    return [(e.row_id, tokenizer.decode(e.prompt_ids), tokenizer.decode(e.responses[0]), e.desirable) for e in examples]


def write(file: Path, labels: list[Any]) -> str:
    rows = [{"prompt": f"p{i}", "response": f"r{i}", "label": label} for i, label in enumerate(labels)]
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["prompt", "response", "label"])
            writer.writeheader()
            writer.writerows(rows)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("labels", [[True, False], [1, 0], [1.0, 0.0], ["true", "False"], [" TRUE ", "0"]], ids=str)
def test_every_spelling_in_every_file(kind: str, labels: list[Any], tmp_path: Path) -> None:
    cfg = local(tmp_path, train_file=write(tmp_path / f"rows.{kind}", labels))
    data = prepare(cfg, byte_tokenizer(), "unpaired")
    assert read(data) == [(0, "p0", f"r0{EOS}", True), (1, "p1", f"r1{EOS}", False)]
    assert data.report["splits"]["train"]["labels"] == {"desirable": 1, "undesirable": 1, "pairs": 0}
    assert "two examples" not in render_report(data.report)


@pytest.mark.parametrize(
    ("kind", "label", "says"),
    [
        ("jsonl", "good", "rows.jsonl line 2: column 'label'"),
        ("json", 2, "rows.json item 2: column 'label'"),
        ("json", [True], "rows.json item 2: column 'label'"),
        ("csv", "", "rows.csv line 3: column 'label'"),
        ("csv", "-1", "rows.csv line 3: column 'label'"),
        ("jsonl", None, "rows.jsonl line 2: column 'label'"),
        ("parquet", None, "rows.parquet row 2: column 'label'"),
    ],
)
def test_a_bad_label_is_reported_with_its_place(kind: str, label: Any, says: str, tmp_path: Path) -> None:
    good = "true" if isinstance(label, str) else True
    cfg = local(tmp_path, train_file=write(tmp_path / f"rows.{kind}", [good, label]))
    with pytest.raises(DataError) as error:
        prepare(cfg, byte_tokenizer(), "unpaired")
    assert says in str(error.value)
    assert len(prepare(cfg, byte_tokenizer(), "sft").splits["train"]) == 2  # other tasks do not look at it


@pytest.mark.parametrize("label", [float("nan"), float("inf"), -1, 0.5, 10**400, "yes", "", {}, [1], "10"])
def test_nothing_else_is_a_label(label: Any) -> None:
    with pytest.raises(DataError, match="true"):
        is_desirable(label)


def test_rewards_are_numbers_and_of_pairs_one_and_zero(tmp_path: Path) -> None:
    """Rows that differ in their reward alone are no duplicates."""
    labels: list[Any] = [0.5, -2, True, "false", "1e1", 0.5]
    rows = [{"prompt": "p", "response": f"r{i % 5}", "label": label} for i, label in enumerate(labels)]
    rows += [{"prompt": "p", "response": "r0", "label": 0.25}, {"prompt": "q", "chosen": "good", "rejected": "bad"}]
    data = prepare(local(tmp_path, rows), byte_tokenizer(), "rewarded").splits["train"]
    found = [(e.margin, e.desirable) for e in data.examples(range(len(data)))]
    assert found == [*((r, True) for r in (0.5, -2.0, 1.0, 0.0, 10.0, 0.25, 1.0)), (1.0, False)]


@pytest.mark.parametrize("label", [float("nan"), 10**400, "yes", "", {}, None])
def test_nothing_else_is_a_reward(label: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 'label'"):
        prepare(local(tmp_path, [{"prompt": "p", "response": "r", "label": label}]), byte_tokenizer(), "rewarded")


def test_a_pair_becomes_two_examples(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "chosen": "good", "rejected": "bad"},
        {"prompt": "b", "response": "fine", "label": False},
        {"prompt": "c", "responses": ["best", "worst"]},
        {"prompt": "d", "chosen": "same", "rejected": "same"},
        {"prompt": "a", "chosen": "good", "rejected": "bad"},
    ]
    data = prepare(local(tmp_path, rows), byte_tokenizer(), "unpaired")
    assert read(data) == [
        (0, "a", f"good{EOS}", True),
        (0, "a", f"bad{EOS}", False),
        (1, "b", f"fine{EOS}", False),
        (2, "c", f"best{EOS}", True),
        (2, "c", f"worst{EOS}", False),
    ]
    part = data.report["splits"]["train"]
    assert (part["read"], part["kept"], part["dropped"]) == (5, 3, {"duplicate": 1, "same_responses": 1})
    assert part["labels"] == {"desirable": 2, "undesirable": 3, "pairs": 2}
    assert part["trained_tokens"] == 5 + 4 + 5 + 5 + 6  # "good$", "bad$", ...
    table = render_report(data.report)
    assert "two examples" in table
    assert "undesirable examples" in table


def test_one_response_with_two_opinions_stays(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "r", "label": label} for label in (True, False, True)]
    data = prepare(local(tmp_path, rows), byte_tokenizer(), "unpaired")
    assert [desirable for *_, desirable in read(data)] == [True, False]
    assert data.report["splits"]["train"]["dropped"] == {"duplicate": 1}


@pytest.mark.parametrize("config", [DocstringsConfig, SummarizationConfig, HelpfulHarmlessConfig])
def test_datasets_of_pairs_are_taken(config: type, tmp_path: Path) -> None:
    if config is DocstringsConfig:
        cfg = config(num_samples=20, cache_dir=str(tmp_path / "cache"))
    else:
        rows = [{"prompt": f"question {i}", "chosen": "a good answer", "rejected": "a bad one"} for i in range(20)]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        cfg = config(dataset_name=str(tmp_path), cache_dir=str(tmp_path / "cache"), minimum_response_length=1)
    data = prepare(cfg, byte_tokenizer(), "unpaired")
    pairs = prepare(cfg, byte_tokenizer(), "preference")
    for split, rows in pairs.splits.items():
        singles = data.splits[split]
        assert singles.desirable.tolist() == [True, False] * len(rows)
        for number in range(len(rows)):
            both, pair = singles.examples([2 * number, 2 * number + 1]), rows.example(number)
            assert [e.prompt_ids.tolist() for e in both] == [pair.prompt_ids.tolist()] * 2
            assert [e.responses[0].tolist() for e in both] == [r.tolist() for r in pair.responses]
