"""Online tasks with transformers' engines: a whole run, its first ratio, and the line about its generator."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.runs import figures, train, write_rows

ModelFolder = Callable[..., Path]


@pytest.mark.parametrize(
    ("task", "engine"), [("ppo", "hf"), pytest.param("grpo", "continuous", marks=pytest.mark.nightly)]
)
def test_a_run(
    task: str, engine: str, tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"generation.engine={engine}", "task.max_num_steps=3", "task.mini_batch_size=24", "task.eval_interval=99"]
    data = write_rows(tmp_path / "rows.jsonl")
    run_dir = train(model_folder(), data, tmp_path / "run", *words, task=task)
    assert capsys.readouterr().err.count(f"generation.engine={engine} draws from torch's generator") == 1
    found = figures(run_dir)
    assert found["policy/ratio"] == pytest.approx([1.0, 1.0, 1.0], abs=1e-5)
    assert abs(found["objective/kl"][0]) < 1e-4 < abs(found["objective/kl"][-1])
    assert (run_dir / "final").is_dir()
    again = train(model_folder(), data, tmp_path / "again", *words, task=task)
    assert figures(again)["objective/scores"] == found["objective/scores"]
