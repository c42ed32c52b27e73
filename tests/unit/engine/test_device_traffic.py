"""Losses of packed batches make the host wait for nothing and leave no tensor on another device."""

import json
from pathlib import Path

import pytest

from sheeprlhf.config.registry import choices
from tests.support.jobs import JobServer
from tests.support.losses import LOSSES


@pytest.mark.slow
def test_packed_losses_copy_nothing_between_devices(server: JobServer, tmp_path: Path) -> None:
    program = "import sys; from tests.support.absent_device import main; main(); sys.exit()"
    job = server.start([], tmp_path / "log", program)
    assert job.wait() == 0, job.text()
    assert json.loads(job.text().splitlines()[-1]) == {name: [] for name in LOSSES}


def test_the_losses_of_all_trained_tasks_are_checked() -> None:
    """Also by benchmarks/gpu_check.py."""
    assert {name.split(",")[0] for name in LOSSES} == choices("task", "train").keys() - {"best_of_n"}
