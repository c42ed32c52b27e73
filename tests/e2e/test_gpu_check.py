"""`benchmarks/gpu_check.py` without a GPU: every check runs and passes, and (nightly) every task has a speed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.losses import LOSSES

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_attention_and_sampling(tmp_path: Path) -> None:
    from benchmarks import gpu_check

    device = torch.device("cpu")
    checks = [*gpu_check.check_attention(device, tmp_path / "a"), *gpu_check.check_sampling(device, tmp_path / "b")]
    assert len(checks) == 3 and all(check.passed() and check.limit is not None for check in checks)
    assert not checks[0]._replace(measured=1.0).passed()


@pytest.mark.nightly
def test_tiny_check_on_the_cpu() -> None:
    command = [sys.executable, "benchmarks/gpu_check.py", "--device", "cpu", "--tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    checks, speeds = done.stdout.split("| task |")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in checks.splitlines() if " | " in line][2:]
    assert len(lines) == len(LOSSES) + 6
    assert all(not limit or float(measured) <= float(limit) for _, measured, limit, _ in lines)
    assert {line.split("|")[1].strip() for line in speeds.splitlines()[2:] if line.startswith("| ")} == {
        "sft", "rm", "dpo", "ppo", "grpo"
    }  # fmt: skip
