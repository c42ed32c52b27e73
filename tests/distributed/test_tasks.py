"""Training on two processes, by the real command, against one: the same losses, gradients, figures and weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.support.jobs import JobServer
from tests.support.runs import WRITERS, figures, train, train_words


class Case(NamedTuple):
    """A task, more words of its command, the figures to compare, and the number of its rows."""

    task: str
    words: list[str]
    tags: tuple[str, ...]
    num_rows: int = 49  # an epoch ends in a step of a single row, so that one process has none


WHOLE = "task.max_eval_batches=null"
STEP = ("train/loss", "train/grad_norm")
KTO = ("loss", "kl", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen")
PPO = ("objective/scores", "objective/kl", "loss/policy", "loss/value", "policy/approxkl", "val/scores", "val/kl")
# Seven prompts a rollout and three a step, so that the ranks never have equal shares. Scores are spread: where all are
# alike, a gradient is rounding alone, which Adam makes as large as any other.
ONLINE = ["task.rollout_size=14", "task.max_num_steps=6", "task.eval_interval=3", "reward.normalize=true"]
ONLINE += ["reward.path=tests.support.rewards:spread", "task.save_rollouts=2"]
LORA = ["model.finetune_mode=LORA", "model.lora_cfg.rank=4"]
EVERYTHING = ["task.share_trunk=true", "task.ptx_coeff=0.5", "task.ptx_batch_size=3", "task.ema_decay=0.8"]
ILQL = ("q_loss", "v_loss", "cql_loss", "nll", "advantage")
DISTILL = ["task.rollout_size=14", "task.max_num_steps=6", "task.eval_interval=3", "task.teacher=TEACHER"]
STOPS = ["task.early_stopping_metric=nll", "task.early_stopping_patience=1", "task.eval_interval=2", "optim.lr=1e-30"]
STOPS += ["optim.weight_decay=0", "task.eval_at_start=true", "data.shuffle=false"]  # at step 4: no weight changes
CASES = {
    "sft": Case("sft", [], (*STEP, "train/items", "val/nll")),
    "sft, quantised": Case("sft", [*LORA, "model.quantization=nf4"], (*STEP, "val/nll")),
    "sft, quantised to 8 bits": Case("sft", [*LORA, "model.quantization=int8"], (*STEP, "val/nll")),
    "sft, early stopping": Case("sft", STOPS, (*STEP, "val/nll")),
    "rm": Case("rm", [WHOLE], (*STEP, "train/rewards/accuracies", "train/rewards/margins", "val/loss")),
    "prm": Case("prm", [WHOLE], (*STEP, "train/accuracy", "val/loss")),
    "ilql": Case("ilql", [WHOLE, "optim.lr=3e-3"], (*STEP, *(f"train/{name}" for name in ILQL), "val/loss")),
    "dpo, sorted": Case("dpo", [WHOLE, "task.loss_type=aot"], (*STEP, "train/rewards/margins", "val/loss")),
    "distill": Case("distill", DISTILL, ("objective/kl", "loss/policy", "val/kl"), 21),
    "dpo": Case("dpo", [WHOLE], (*STEP, "train/rewards/margins", "train/kl/chosen", "val/loss")),
    "kto": Case("kto", ["task.epochs=2", "optim.lr=3e-3"], tuple(f"train/{name}" for name in KTO)),
    "ppo": Case("ppo", ONLINE, PPO, 21),
    "ppo, lora": Case("ppo", [*ONLINE, *LORA], PPO, 21),
    "ppo, everything": Case("ppo", [*ONLINE, *EVERYTHING], (*PPO, "loss/ptx"), 21),
    "grpo": Case("grpo", ONLINE, ("objective/scores", "objective/kl", "loss/policy", "policy/kl", "val/scores"), 21),
    "rloo": Case("rloo", ONLINE, ("objective/scores", "objective/rlhf_reward", "loss/policy", "val/scores"), 21),
}
NIGHTLY = (
    "dpo",
    "sft, early stopping",
    "grpo",
    "prm",
    "ilql",
    "dpo, sorted",
    "distill",
    "rm",
    "ppo",
    "ppo, lora",
    "rloo",
    "sft, quantised",
    "sft, quantised to 8 bits",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.nightly if name in NIGHTLY else pytest.mark.slow) for name in CASES]
)
def test_two_processes_equal_one(
    name: str, server: JobServer, tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    case = CASES[name]
    if "quantised" in name:
        pytest.importorskip("bitsandbytes")
    data = WRITERS[case.task](tmp_path / "rows.jsonl", case.num_rows)
    words = ["task.epochs=1", "task.mini_batch_size=6", "task.micro_batch_size=1"]
    words += [word.replace("TEACHER", str(model_folder("gpt2"))) for word in case.words]
    cache = f"data.cache_dir={tmp_path / 'cache'}"  # its own, so that two processes compute a reference together
    two_words = train_words(model_folder(), data, tmp_path / "two", *words, cache, task=case.task)
    job = server.start_ranks(two_words, tmp_path / "log", 2)
    train(model_folder(), data, tmp_path / "one", *words, task=case.task)
    assert job.wait(150) == 0, job.text()
    two, one = (figures(tmp_path / name) for name in ("two", "one"))
    for tag in case.tags:
        ours, expected = (torch.tensor(found[tag]).double() for found in (two, one))
        assert len(expected) >= 2, tag
        assert_close(ours, expected, rtol=1e-5, atol=1e-5, msg=lambda text, tag=tag: f"{tag}: {text}")
        assert name != "sft" or abs(float((ours - expected).mean())) <= 1e-6, tag  # no drift to one side
    assert name != "kto" or max(one["train/kl"]) > 0.1  # it is estimated, and not always cut at 0
    for path in sorted((tmp_path / "one").glob("rollouts/*")):
        two, one = (pq.read_table(folder / path.name) for folder in (tmp_path / "two" / "rollouts", path.parent))
        for column in one.column_names:
            values = [np.concatenate([np.atleast_1d(row) for row in table[column].to_pylist()]) for table in (two, one)]
            if values[1].dtype.kind == "f":
                assert_close(*map(torch.from_numpy, values), rtol=0, atol=1e-5)
            else:
                assert values[0].tolist() == values[1].tolist(), column
    ended = json.loads((tmp_path / "two" / "run.json").read_text())
    assert ended["stopped_early"] is (case.words is STOPS) and (not ended["stopped_early"] or ended["step"] == 4)
    saved = ["final" if case.num_rows == 49 else "checkpoints/step-6", "model.safetensors"]
    if "quantised" in name:
        saved = ["final", "adapter_model.safetensors"]
    weights = (load_file((tmp_path / name).joinpath(*saved)) for name in ("two", "one"))
    assert_close(*weights, rtol=0, atol=1e-5)
