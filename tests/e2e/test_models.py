"""The published table of architectures is what the program does."""

from pathlib import Path

import pytest

from tests.support.compatibility import NAMES, published_rows, row_of


def test_every_architecture_is_published() -> None:
    assert [row.split("|")[1].strip() for row in published_rows()] == list(NAMES)


IN_CI = ("gpt_oss", "qwen3_5_text", "mixtral", "phi3 (longrope)")


def marks(name: str) -> list[pytest.MarkDecorator]:
    if name == "gemma2":
        return []
    return [pytest.mark.slow if name in IN_CI else pytest.mark.nightly]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in NAMES])
def test_the_table_is_true(name: str, tmp_path: Path) -> None:
    assert row_of(name, tmp_path) in published_rows()
