"""Reward models and preference optimisation on two processes against one, uneven numbers of rows included."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.distributed.test_sft import series
from tests.support.jobs import JobServer
from tests.support.runs import train, train_words, write_pairs

ModelFolder = Callable[..., Path]
TAGS = {
    "rm": ("train/loss", "train/grad_norm", "train/rewards/accuracies", "train/rewards/margins", "val/loss"),
    "dpo": ("train/loss", "train/grad_norm", "train/rewards/margins", "train/kl/chosen", "val/loss", "val/entropy"),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", TAGS)
def test_two_processes_equal_one(task: str, server: JobServer, tmp_path: Path, model_folder: ModelFolder) -> None:
    """Each epoch of 49 rows ends in a step of a single row, so that one process has none."""
    data = write_pairs(tmp_path / "rows.jsonl", 49)
    words = ["task.epochs=2", "task.micro_batch_size=1", "task.max_eval_batches=null"]
    cache = f"data.cache_dir={tmp_path / 'cache'}"  # its own, so that two processes compute the reference together
    two_words = train_words(model_folder(), data, tmp_path / "two", *words, cache, task=task)
    job = server.start_ranks(two_words, tmp_path / "log", 2)
    train(model_folder(), data, tmp_path / "one", *words, task=task)
    assert job.wait(150) == 0, job.text()
    for tag in TAGS[task]:
        two, one = series(tmp_path / "two", tag), series(tmp_path / "one", tag)
        assert len(one) == (3 if tag.startswith("val") else 18), tag
        assert_close(two, one, rtol=0, atol=1e-5)
    ours, expected = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("two", "one"))
    assert_close(ours, expected, rtol=0, atol=1e-5)
