"""PPO on two processes against one: the same responses, rewards, whitening and updates."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.distributed.test_sft import series
from tests.support.jobs import JobServer
from tests.support.runs import train, train_words, write_rows

MODEL = "model.safetensors"
ModelFolder = Callable[..., Path]
PPO = ("objective/scores", "objective/kl", "loss/policy", "loss/value", "policy/approxkl", "val/scores", "val/kl")
VARIANTS: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    "ppo": ("ppo", [], PPO),
    "ppo, lora": ("ppo", ["model.finetune_mode=LORA", "model.lora_cfg.rank=4"], PPO),
    "ppo, everything": (
        "ppo",
        ["task.share_trunk=true", "task.ptx_coeff=0.5", "task.ptx_batch_size=3", "task.ema_decay=0.8"],
        (*PPO, "loss/ptx"),
    ),
    "grpo": ("grpo", [], ("objective/scores", "objective/kl", "loss/policy", "policy/kl", "val/scores")),
    "rloo": ("rloo", [], ("objective/scores", "objective/rlhf_reward", "loss/policy", "val/scores")),
}


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=pytest.mark.nightly if v in ("ppo", "rloo") else pytest.mark.slow) for v in VARIANTS],
)
def test_two_processes_equal_one(variant: str, server: JobServer, tmp_path: Path, model_folder: ModelFolder) -> None:
    """Seven prompts a rollout and three a step, so that the ranks never have equal shares.

    Scores are spread: where all are alike, a gradient is rounding alone, which Adam makes as large as any other.
    """
    task, options, tags = VARIANTS[variant]
    data = write_rows(tmp_path / "rows.jsonl", 21)
    words = ["task.rollout_size=14", "task.mini_batch_size=6", "task.micro_batch_size=1", "task.max_num_steps=18"]
    words += ["task.epochs=2", "reward.normalize=true", "reward.path=tests.support.rewards:spread", *options]
    words += ["task.save_rollouts=2"]
    two_words = train_words(model_folder(), data, tmp_path / "two", *words, task=task)
    job = server.start_ranks(two_words, tmp_path / "log", 2)
    train(model_folder(), data, tmp_path / "one", *words, task=task)
    assert job.wait(150) == 0, job.text()
    for tag in tags:
        two, one = series(tmp_path / "two", tag), series(tmp_path / "one", tag)
        assert len(one) >= 2, tag
        assert_close(two, one, rtol=0, atol=1e-5)
    for path in sorted((tmp_path / "one" / "rollouts").iterdir()):
        two, one = (pq.read_table(folder / path.name) for folder in (tmp_path / "two" / "rollouts", path.parent))
        for name in one.column_names:
            values = [np.concatenate([np.atleast_1d(row) for row in table[name].to_pylist()]) for table in (two, one)]
            if values[1].dtype.kind == "f":
                assert_close(*map(torch.from_numpy, values), rtol=0, atol=1e-5)
            else:
                assert values[0].tolist() == values[1].tolist(), name
    [ours, expected] = (
        load_file(max((tmp_path / name / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime) / MODEL)
        for name in ("two", "one")
    )
    assert_close(ours, expected, rtol=0, atol=1e-5)
