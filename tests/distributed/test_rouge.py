"""ROUGE on two processes, by the real command, against one process: the same rows, texts and scores."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sheeprlhf.cli import run
from tests.support.jobs import JobServer
from tests.support.runs import train, write_rows


def result_of(run_dir: Path) -> tuple[dict[str, Any], list[str]]:
    result = json.loads((run_dir / "eval" / "rouge-test-final.json").read_text())
    result.pop("time")
    return result, (run_dir / "eval" / "rouge-test-final.jsonl").read_text().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("num_samples", [19, 1])  # an uneven share; a process without a row
def test_two_processes_equal_one(
    num_samples: int, server: JobServer, tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    words = ["task.epochs=40", "task.mini_batch_size=20", "task.micro_batch_size=20", "optim.lr=0.02"]
    words += ["task.eval_interval=40", "task.save_interval=40"]
    run_dir = train(model_folder(), write_rows(tmp_path / "rows.jsonl", 20), tmp_path / "run", *words)
    evaluation = ["eval", "task=rouge", f"experiment_dir={run_dir}", f"task.num_samples={num_samples}"]
    evaluation += ["generation.max_new_tokens=24", "task.mini_batch_size=4"]
    run(evaluation)
    expected = result_of(run_dir)
    assert len(set(map(len, expected[1]))) > min(num_samples, 5) - 1  # texts of many lengths
    (run_dir / "eval" / "rouge-test-final.json").unlink()
    job = server.start_ranks(evaluation, tmp_path / "log", 2)
    assert job.wait(200) == 0, job.text()
    assert result_of(run_dir) == expected
    assert job.text().count("saved: ") == 2  # by one process: the numbers and the texts
