"""The snapshot as it is shipped: columns, balance, disjoint splits, forms and licences."""

import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import sheeprlhf.assets
from sheeprlhf.reward.inflect import style_of

FOLDER = Path(sheeprlhf.assets.__file__).parent / "docstrings"
SPLITS = ("train", "validation", "test")
COLUMNS = ["prompt", "response", "chosen", "rejected", "style", "package", "version", "file", "qualname", "licence"]
LICENCES = {"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT", "PSF-2.0", "Zlib"}

Rows = dict[str, list[dict[str, str]]]


@pytest.fixture(scope="module")
def rows() -> Rows:
    return {split: pq.read_table(FOLDER / f"{split}.parquet").to_pylist() for split in SPLITS}


def words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def test_columns_and_sizes(rows: Rows) -> None:
    for split in SPLITS:
        schema = pq.read_schema(FOLDER / f"{split}.parquet")
        assert schema.names == COLUMNS
        assert {str(kind) for kind in schema.types} == {"string"}
    assert len(rows["train"]) >= 12_000
    assert 1_000 <= len(rows["validation"]) <= 1_500
    assert 1_000 <= len(rows["test"]) <= 1_500
    assert sum((FOLDER / f"{split}.parquet").stat().st_size for split in SPLITS) <= 2_500_000


def test_authors_of_both_styles_are_equally_many(rows: Rows) -> None:
    for split in SPLITS:
        styles = Counter(row["style"] for row in rows[split])
        assert styles == {"imperative": len(rows[split]) // 2, "third_person": len(rows[split]) // 2}


def test_no_split_shares_a_package(rows: Rows) -> None:
    packages = [{row["package"] for row in rows[split]} for split in SPLITS]
    assert sum(map(len, packages)) == len(set.union(*packages))


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected", "response"])
def test_no_text_occurs_twice_in_or_between_splits(rows: Rows, column: str) -> None:
    texts = Counter(words(row[column]) for split in SPLITS for row in rows[split])
    assert texts.most_common(1)[0][1] == 1


def test_pair_differs_in_its_first_word_only(rows: Rows) -> None:
    for split in SPLITS:
        for row in rows[split]:
            assert (style_of(row["chosen"]), style_of(row["rejected"])) == ("imperative", "third_person")
            assert row["chosen"].split(" ")[1:] == row["rejected"].split(" ")[1:]
            assert row["chosen"].split(" ")[0] != row["rejected"].split(" ")[0]
            assert row["response"] == row["chosen" if row["style"] == "imperative" else "rejected"]


def test_texts_are_clean(rows: Rows) -> None:
    for split in SPLITS:
        for row in rows[split]:
            assert all(value and value.isascii() for value in row.values())
            assert 4 <= len(row["response"].split()) <= 20
            assert row["response"].endswith(".")
            assert row["response"][0].isupper()
            assert not set("`*<>{}%=:\n") & set(row["response"])
            assert row["prompt"].endswith(':\n    """') or row["prompt"].endswith(':\n        """')
            assert len(row["prompt"]) <= 200


def test_notice_names_every_package_with_its_licence(rows: Rows) -> None:
    text = (FOLDER / "NOTICE").read_text(encoding="ascii")
    counts = Counter((r["package"], r["version"], r["licence"]) for split in SPLITS for r in rows[split])
    assert {licence for _, _, licence in counts} <= LICENCES
    for (package, version, licence), count in counts.items():
        assert f"\n{package} {version} | {licence} | {count} rows\n    " in text
    for licence in {licence for _, _, licence in counts}:
        assert f"\n==================== {licence}, as " in text
