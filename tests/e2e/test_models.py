"""The published table of architectures is what the program does."""

from pathlib import Path

import pytest

from tests.support.compatibility import NAMES, published_rows, row_of


def test_every_architecture_is_published() -> None:
    assert [row.split("|")[1].strip() for row in published_rows()] == list(NAMES)


@pytest.mark.parametrize(
    "name", [name if name == "gemma2" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_the_table_is_true(name: str, tmp_path: Path) -> None:
    assert row_of(name, tmp_path) in published_rows()
