"""`task.save_rollouts` against plain transformers and hand-computed advantages; speed, memory and epoch in the log."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sheeprlhf.task import loop
from sheeprlhf.task.finish import saved_rollouts
from tests.support.models import ModelFolder
from tests.support.plain import response_logprobs
from tests.support.rewards import letters
from tests.support.runs import figures, train, write_rows

SHORT = ["task.max_num_steps=12", "task.save_interval=4"]  # three rollouts of 12 prompts with 2 responses each
TERM = "reward/tests.support.rewards:letters"


def tables(run_dir: Path) -> dict[str, pa.Table]:
    return {path.stem: pq.read_table(path) for path in sorted((run_dir / "rollouts").iterdir())}


@pytest.mark.parametrize(
    ("num_rollouts", "count", "expected"),
    [
        (5, 0, set()),
        (5, 1, {0}),
        (5, 2, {0, 4}),
        (5, 3, {0, 2, 4}),
        (5, 9, {0, 1, 2, 3, 4}),
        (1, 2, {0}),
        (0, 2, set()),
    ],
)
def test_the_saved_rollouts_are_spread_evenly(num_rollouts: int, count: int, expected: list[int]) -> None:
    assert saved_rollouts(num_rollouts, count) == set(expected)


@pytest.mark.parametrize(
    "task", ["grpo", "ppo", *(pytest.param(task, marks=pytest.mark.nightly) for task in ("online_dpo", "rloo"))]
)
def test_rows_hold_what_the_models_computed(task: str, tmp_path: Path, model_folder: ModelFolder) -> None:
    model = model_folder()
    words = [*SHORT, "task.save_rollouts=2", "reward.clip=0.5"]
    run_dir = train(model, write_rows(tmp_path / "r.jsonl"), tmp_path / "run", *words, task=task)
    found = tables(run_dir)
    assert list(found) == ["rollout-000000", "rollout-000002"]
    assert [table.column("step")[0].as_py() for table in found.values()] == [0, 8]
    rows = found["rollout-000000"].to_pylist()
    assert len(rows) == 24
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    num_tokens = len(AutoTokenizer.from_pretrained(model))  # the rows of ids without a token are never sampled
    for row in rows:
        assert row[TERM] == letters([row["prompt"]], [row["response"]])[0]
        assert row["score"] == min(row[TERM], 0.5)
        with torch.no_grad():
            logprobs = response_logprobs(plain, row["prompt_ids"], row["response_ids"], num_ids=num_tokens)
        for name in ("sampled", "logprobs", "reference"):
            torch.testing.assert_close(torch.tensor(row[name]), logprobs, rtol=0, atol=1e-5)
    pairs = [(rows[i], rows[i + 1]) for i in range(0, 24, 2)]
    assert all(first["row_id"] == second["row_id"] for first, second in pairs)
    if task == "online_dpo":
        assert "advantages" not in rows[0]
    elif task == "ppo":
        everything = np.concatenate([row["advantages"] for row in rows])
        assert abs(everything.mean()) < 1e-5 and abs(everything.std() - 1) < 1e-2  # whitened over the rollout
        assert all(len(row["values"]) == len(row["returns"]) == len(row["response_ids"]) for row in rows)
    else:
        for first, second in pairs:  # of two responses, GRPO's is (score - mean) / deviation, RLOO's the difference
            difference = first["score"] - second["score"]
            expected = difference
            if task == "grpo":
                expected = difference / 2 / (abs(difference) / math.sqrt(2) + 1e-4)
            assert first["advantages"] == pytest.approx([expected] * len(first["response_ids"]), abs=1e-3)
            assert second["advantages"] == pytest.approx([-expected] * len(second["response_ids"]), abs=1e-3)


@pytest.mark.slow
def test_a_resumed_run_leaves_the_same_rows_once(
    tmp_path: Path, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends right after it has saved its second rollout, before the checkpoint of that rollout."""
    model, data = model_folder(), write_rows(tmp_path / "rows.jsonl")
    words = [*SHORT, "task.save_rollouts=3"]
    expected = tables(train(model, data, tmp_path / "whole", *words, task="grpo"))
    write = loop.write_rollout

    def interrupted(*args: object) -> None:
        write(*args)
        if args[2] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "write_rollout", interrupted)
    with pytest.raises(SystemExit):
        train(model, data, tmp_path / "run", *words, task="grpo")
    assert list(tables(tmp_path / "run")) == list(expected)[:2]
    monkeypatch.undo()
    found = tables(train(model, data, tmp_path / "run", *words, "resume=true", task="grpo"))
    assert found.keys() == expected.keys() and all(found[name].equals(expected[name]) for name in expected)


def test_epoch_speed_and_memory_are_logged(tmp_path: Path, model_folder: ModelFolder) -> None:
    """48 rows, 12 prompts a rollout of 4 steps; of SFT, see tests/e2e/test_sft.py."""
    data = write_rows(tmp_path / "rows.jsonl")
    found = figures(train(model_folder(), data, tmp_path / "run", "task.max_num_steps=12", task="grpo"))
    assert found["train/epoch"] == pytest.approx([0.25, 0.5, 0.75])
    for name, least in (("time/tokens_per_second", 1.0), ("memory/peak_gb", 0.05)):
        assert len(found[name]) == 3 and min(found[name]) > least, name
