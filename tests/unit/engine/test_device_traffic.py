"""Losses of packed batches make the host wait for nothing and leave no tensor on another device."""

import json
from pathlib import Path

import pytest

from tests.support.jobs import JobServer
from tests.support.losses import LOSSES


@pytest.mark.slow
def test_packed_losses_copy_nothing_between_devices(server: JobServer, tmp_path: Path) -> None:
    program = "import sys; from tests.support.absent_device import main; main(); sys.exit()"
    job = server.start([], tmp_path / "log", program)
    assert job.wait() == 0, job.text()
    assert json.loads(job.text().splitlines()[-1]) == {name: [] for name in LOSSES}
