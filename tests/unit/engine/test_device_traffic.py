"""Losses of packed batches make the host wait for nothing and leave no tensor on another device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.losses import LOSSES

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_packed_losses_copy_nothing_between_devices() -> None:
    command = [sys.executable, "-m", "tests.support.absent_device"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {name: [] for name in LOSSES}
