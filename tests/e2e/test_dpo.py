"""Preference optimisation by the command line: where it starts, what it learns, and where its reference comes from."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.structure.model import TinyConfig
from sheeprlhf.task.models import load_initial_policy
from sheeprlhf.utils.errors import ConfigError
from tests.support.runs import figures, train, write_pairs

ModelFolder = Callable[..., Path]
LORA = ["model.finetune_mode=LORA", "model.lora_cfg.rank=4", "model.lora_cfg.dropout=0.0"]
AT_ZERO = {  # the loss of a pair that policy and reference like alike, beta 0.1
    "sigmoid": math.log(2),
    "ipo": 25.0,
    "apo_zero": 1.0,
}


@pytest.mark.parametrize("loss_type", AT_ZERO)
def test_the_first_loss_is_that_of_no_difference_and_then_it_falls(
    loss_type: str, tmp_path: Path, model_folder: ModelFolder
) -> None:
    data = write_pairs(tmp_path / "rows.jsonl")
    words = [f"task.loss_type={loss_type}", "task.max_num_steps=8", "task.lr_warmup_steps=0", *LORA]
    run_dir = train(model_folder(), data, tmp_path / "run", *words, task="dpo")
    found = figures(run_dir)
    losses, margins = found["train/loss"], found["train/rewards/margins"]
    assert losses[0] == pytest.approx(AT_ZERO[loss_type], abs=1e-5)
    assert losses[-1] < losses[0]
    assert margins[0] == pytest.approx(0.0, abs=1e-5)
    assert margins[-1] > 0
    assert found["train/rewards/accuracies"][0] == 0.5  # equal rewards count half
    names = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
    names += ["logps/chosen", "logps/rejected", "kl/chosen", "loss"]
    assert {f"{part}/{name}" for part in ("train", "val") for name in names} <= found.keys()
    assert 0 < found["val/entropy"][-1] < math.log(260)  # nats a token, of 260 tokens


def test_without_a_reference(tmp_path: Path, model_folder: ModelFolder) -> None:
    data = write_pairs(tmp_path / "rows.jsonl")
    run_dir = train(model_folder(), data, tmp_path / "run", "task.loss_type=orpo", task="dpo")
    losses = figures(run_dir)["train/loss"]
    assert losses[-1] < losses[0]
    assert not list((tmp_path / "run").rglob("reference*"))


@pytest.mark.slow
def test_the_reference_is_computed_once_and_is_that_of_these_weights(tmp_path: Path, model_folder: ModelFolder) -> None:
    data = write_pairs(tmp_path / "rows.jsonl")
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    words = ["task.max_num_steps=2", cache]
    train(model_folder(), data, tmp_path / "one", *words, task="dpo")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("reference-*.safetensors")}
    assert len(files) == 2  # training and validation rows
    train(model_folder(), data, tmp_path / "two", *words, task="dpo")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("reference-*.safetensors")} == files
    sft = train(model_folder(), data, tmp_path / "sft", "task.max_num_steps=2", cache)
    train(model_folder(), data, tmp_path / "three", *words, f"task.sft_experiment_dir={sft}", task="dpo")
    there = sorted((tmp_path / "cache").rglob("reference-train-*.safetensors"))
    assert len(there) == 2
    first, second = (load_file(path)["logprobs"] for path in there)
    assert np.nanmax(np.abs(first - second)) > 1e-3


def test_a_policy_that_leaves_the_data_is_reported(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pairs(tmp_path / "rows.jsonl")
    for name, lr in (("fast", "0.1"), ("slow", "1e-4")):
        words = [f"optim.lr={lr}", "task.lr_warmup_steps=0", "task.beta=0.01"]
        run_dir = train(model_folder(), data, tmp_path / name, *words, task="dpo")
        warned = "task.beta" in capsys.readouterr().err
        assert warned == (name == "fast")
        lost = [kl / n for kl, n in zip(*(figures(run_dir)[f"val/{x}/chosen"] for x in ("kl", "tokens")), strict=True)]
        assert (max(lost) > 0.5) == (name == "fast")  # nats a token, at any of the validations


def test_a_run_with_another_tokenizer_is_refused(tmp_path: Path, model_folder: ModelFolder) -> None:
    data = write_pairs(tmp_path / "rows.jsonl")
    sft = train(model_folder("llama"), data, tmp_path / "sft", "task.max_num_steps=1")
    tiny = TinyConfig()
    of = {"longest": 8, "batching": "auto", "say": print}
    with pytest.raises(ConfigError, match="embedded:tiny"):
        load_initial_policy(tiny, str(sft), "final", load_tokenizer(tiny), **of)
