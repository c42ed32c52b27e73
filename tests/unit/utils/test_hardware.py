"""What the machine is asked without torch."""

import sys
from pathlib import Path

import pytest

from sheeprlhf.utils import hardware as machine
from sheeprlhf.utils.hardware import available_memory

GB = 10**9


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"/proc/meminfo": 9 * GB}, 9 * GB),
        ({"/proc/meminfo": 9 * GB, "memory.max": 4 * GB, "memory.current": 3 * GB, "memory.stat": 2 * GB}, 3 * GB),
        ({"/proc/meminfo": 2 * GB, "memory.max": 4 * GB, "memory.current": 1 * GB}, 2 * GB),
        ({"/proc/meminfo": 9 * GB, "memory.limit_in_bytes": 4 * GB, "memory.usage_in_bytes": 5 * GB}, 0),
        ({"/proc/meminfo": 9 * GB, "memory.current": 3 * GB}, 9 * GB),  # memory.max says "max"
        ({}, None),
    ],
)
def test_the_tightest_limit_counts(
    files: dict[str, int], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def field(path: str, name: str = "", unit: int = 1) -> int | None:
        return files.get(path if path.startswith("/proc") else Path(path).name)

    monkeypatch.setattr(machine, "_field", field)
    assert available_memory() == expected


def test_numbers_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:  7 kB\nMemAvailable:    5 kB\nHugePages: many\n")
    assert machine._field(str(file), "MemAvailable:", 1024) == 5 * 1024
    assert machine._field(str(file), "HugePages:") is None and machine._field(str(file), "Swap:") is None
    (tmp_path / "max").write_text("max\n")
    assert machine._field(str(tmp_path / "max")) is None and machine._field(str(tmp_path / "none")) is None
    (tmp_path / "now").write_text("123\n")
    assert machine._field(str(tmp_path / "now")) == 123


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_this_machine() -> None:
    total = machine._field("/proc/meminfo", "MemTotal:", 1024)
    found = available_memory()
    assert total is not None and found is not None and 0 < found < total
