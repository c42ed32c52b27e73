"""KTO on two processes, by the real command, against one: the KL's estimate is that of the whole step on both."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.distributed.test_sft import series
from tests.support.jobs import JobServer
from tests.support.runs import train, train_words, write_labelled

ModelFolder = Callable[..., Path]
TAGS = ("loss", "kl", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen")


@pytest.mark.slow
def test_two_processes_equal_one(server: JobServer, tmp_path: Path, model_folder: ModelFolder) -> None:
    """Two epochs of 49 rows: each ends in a step of a single row, so that one process has none."""
    data = write_labelled(tmp_path / "rows.jsonl", 49)
    words = ["task.epochs=2", "task.micro_batch_size=1", "optim.lr=3e-3"]
    two_words = train_words(model_folder(), data, tmp_path / "two", *words, task="kto")
    job = server.start_ranks(two_words, tmp_path / "log", 2)
    train(model_folder(), data, tmp_path / "one", *words, task="kto")
    assert job.wait(150) == 0, job.text()
    assert max(series(tmp_path / "one", "train/kl")) > 0.1  # it is estimated, and not always cut at 0
    for tag in (*(f"train/{name}" for name in TAGS), "val/loss", "val/kl", "val/rewards/margins"):
        ours, expected = (series(tmp_path / name, tag) for name in ("two", "one"))
        everywhere = {"train/loss": 18, "train/kl": 18, "train/grad_norm": 18}  # a step may lack a label
        assert len(expected) == everywhere.get(tag, len(ours)) >= 3
        assert_close(ours, expected, rtol=1e-5, atol=1e-5, msg=lambda text, tag=tag: f"{tag}: {text}")
    ours, expected = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("two", "one"))
    assert_close(ours, expected, rtol=0, atol=1e-5)
