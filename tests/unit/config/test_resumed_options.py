"""`train resume_from=<run>` without a task takes the run's options; its file may say no more than another file."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from sheeprlhf.config.compose import Source, check, compose_job, configs_directory
from sheeprlhf.config.registry import choices, config_to_dict
from sheeprlhf.structure.data import DocstringsConfig
from sheeprlhf.structure.model import TinyConfig
from sheeprlhf.structure.run import TrainConfig

SOURCE = Source("train", configs_directory(), "train")


def write_run(folder: Path, **root: Any) -> Path:
    reward = choices("reward")["function"](path="os:getcwd")  # type: ignore[call-arg]
    task = choices("task", "train")["grpo"](sft_experiment_dir=None, max_num_steps=3)  # type: ignore[call-arg]
    parts = {"model": TinyConfig(), "data": DocstringsConfig(), "task": task, "reward": reward}
    saved = {group: config_to_dict(config) for group, config in parts.items()} | root
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    return folder


def test_options_are_those_of_the_run_unless_given(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", seed=7, run_name="mine", generation={"temperature": 0.5})
    given = ["reward.path=length", "reward.target_length=9", "task.max_num_steps=5"]
    config = compose_job(SOURCE, [f"resume_from={run_dir}", *given]).config
    assert isinstance(config, TrainConfig)
    assert (config.task.config_name, config.task.max_num_steps, config.seed, config.run_name) == ("grpo", 5, 7, "mine")
    assert (config.generation.temperature, config.resume_from) == (0.5, str(run_dir))


@pytest.mark.parametrize("seed", [7, "${oc.env:HOME}"])
def test_the_file_names_no_code_and_reads_nothing_else(seed: Any, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", seed=seed)
    problems = check(SOURCE, [f"resume_from={run_dir}"])
    assert any("reward.path" in problem for problem in problems)
    assert any("seed" in problem for problem in problems) == (seed != 7)
