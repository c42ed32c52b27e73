"""Evaluations on two processes, by the real command, against one: the same texts, scores and numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sheeprlhf.cli import run
from tests.support.jobs import JobServer
from tests.support.runs import train, write_pairs


def results_of(run_dir: Path) -> dict[str, Any]:
    """Every result, without its time, and every row."""
    found: dict[str, Any] = {}
    for path in (run_dir / "eval").glob("*.json*"):
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else None
        found[path.name] = lines or json.loads(path.read_text()) | {"time": None}
        path.unlink()
    return found


@pytest.mark.slow
def test_two_processes_equal_one(server: JobServer, tmp_path: Path, model_folder: Callable[..., Path]) -> None:
    data = write_pairs(tmp_path / "rows.jsonl", 11)  # an uneven share
    rm = train(model_folder(), data, tmp_path / "rm", "task.max_num_steps=8", "optim.lr=5e-3", task="rm")
    adapters = ["model.finetune_mode=LORA", "model.lora_cfg.rank=4", "task.max_num_steps=4", "optim.lr=0.05"]
    policy = train(model_folder(), data, tmp_path / "dpo", *adapters, task="dpo")
    of_run = f"experiment_dir={policy}"
    short = f"{of_run} generation.max_new_tokens=6"
    for words in (
        f"task=reward {short} reward=model task.rm_experiment_dir={rm} task.against=start",
        f"task=generate {short} generation.do_sample=true generation.top_p=0.9 task.num_samples=1",  # one has no row
        f"task=rouge {of_run} generation.max_new_tokens=24 task.mini_batch_size=4",
        f"task=perplexity {of_run}",
    ):
        run(["eval", *words.split()])
        expected = results_of(policy)
        job = server.start_ranks(["eval", *words.split()], tmp_path / "log", 2)
        assert job.wait(400) == 0, job.text()
        found = results_of(policy)
        assert found.keys() == expected.keys()
        assert job.texts().count("saved: ") == len(found)  # by one process
        for name, result in expected.items():
            if name.endswith(".jsonl"):
                assert [row["response"] for row in found[name]] == [row["response"] for row in result]
            else:
                same = {key: value for key, value in result.items() if not isinstance(value, float | list)}
                assert {key: found[name][key] for key in same} == same
                floats = {key: value for key, value in result.items() if isinstance(value, float | list)}
                assert {key: found[name][key] for key in floats} == {
                    k: pytest.approx(v, abs=1e-5) for k, v in floats.items()
                }
