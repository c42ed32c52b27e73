"""`benchmarks/scale.py --quick`: every table is printed, and the parts of a step add up to its time."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.nightly
def test_quick_tables() -> None:
    command = [sys.executable, "benchmarks/scale.py", "--quick"]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    tables = {}
    for text in output.split("\n### ")[1:]:
        title, header, _, *lines = text.strip().splitlines()
        names = [name.strip() for name in header.strip("|").split("|")]
        tables[title] = [
            dict(zip(names, (cell.strip() for cell in line.strip("|").split("|")), strict=True)) for line in lines
        ]
    assert {title: len(lines) for title, lines in tables.items()} == {
        "Weak scaling": 4,
        "Strong scaling": 4,
        "Rows of a step": 2,
        "Length of a row, 2,048 tokens a step": 2,
        "Responses of a prompt, 16 a step": 2,
        "Preparation of data": 2,
        "Start-up": 2,
    }
    for line in (
        line for title in ("Weak scaling", "Strong scaling") for line in tables[title] if line["ranks"] == "2"
    ):
        parts = [int(line[name]) for name in ("compute", "gather", "reduce", "wait")]
        assert abs(sum(parts) - int(line["sum ms"])) <= 4 and min(parts) >= 0  # rounded; one step, so medians add up
        assert (int(line["gather"]) > 0) == (line["strategy"] == "fsdp2") and int(line["reduce"]) > 0
