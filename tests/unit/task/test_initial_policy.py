"""What is checked before a training prepares its data."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.runs import exit_code

ModelFolder = Callable[..., Path]


@pytest.mark.parametrize(("task", "targets"), [("sft", "lm_head"), ("dpo", "q_prj"), ("grpo", "lm_head")])
def test_adapters_are_checked_before_data_is_prepared(
    task: str, targets: str, model_folder: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data file has no row that any task could use: preparing it would be another error."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"nothing": 1}\n')
    words = [f"task={task}", "model=auto", f"model.repo_name={model_folder()}", "data=local", f"data.train_file={rows}"]
    words += ["model.finetune_mode=LORA", f"model.lora_cfg.targets=[{targets},q_proj]", f"root_dir={tmp_path / 'runs'}"]
    words += ["reward=function", "reward.path=length", "reward.target_length=8"] if task == "grpo" else []
    assert exit_code(["train", *words]) == 2
    printed = capsys.readouterr().err
    assert (
        "model.lora_cfg.targets" in printed and targets in printed and "nothing" not in printed.split("nothing was")[0]
    )
    assert not list(tmp_path.glob("runs/**/run.json"))
