"""A run stopped at any step and resumed ends in the same bytes as one that was never stopped."""

import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from sheeprlhf.cli import run
from tests.support.models import make_model_folder
from tests.support.runs import WRITERS, digests, killed, result_of, train, train_words, write_rows

ModelFolder = Callable[..., Path]
LORA = ["model.finetune_mode=LORA", "model.lora_cfg.rank=4", "model.lora_cfg.dropout=0.1"]
VARIANTS = {
    "full": ("sft", []),
    "lora with dropout": ("sft", LORA),
    "noise on embeddings": ("sft", ["model.neftune_alpha=50"]),
    "8-bit moments": ("sft", ["optim=adamw_8bit"]),
    "model dropout": ("sft", ["model.disable_dropout=false"]),
    "reward model": ("rm", ["task.loss_type=per_sample"]),
    "reward model, lora with dropout": ("rm", LORA),
    "reward model, likelihood": ("rm", ["task.likelihood_coeff=0.5", "model.frozen_layers=1"]),
    "steps": ("prm", LORA),
    "preferences": ("dpo", []),
    "preferences, lora with dropout": ("dpo", LORA),
    "preferences, moving reference": ("dpo", ["task.ref_sync_interval=3", "task.loss_type=bco", "task.ld_alpha=0.5"]),
    "preferences, sorted": ("dpo", ["task.ref_sync_interval=4", "task.loss_type=aot_unpaired"]),
    "ppo": ("ppo", ["task.adaptive_kl_coeff=true", "reward.normalize=true"]),
    "ppo, lora": ("ppo", [*LORA[:2], "task.bootstrap_truncated=true"]),
    "grpo, lora": ("grpo", [*LORA[:2], "task.max_resamples=2", "task.entropy_coeff=0.01"]),
    "grpo, ensemble": (
        "grpo",
        ["reward=list", "reward.terms=[model:FIRST,model:SECOND]", "reward.combine=uncertainty"],
    ),
    "ppo, everything": ("ppo", ["task.share_trunk=true", "task.ptx_coeff=0.5", "task.ema_decay=0.8"]),
    "rloo": ("rloo", ["task.num_iterations=2"]),
    "reinforce_pp": ("reinforce_pp", ["task.num_iterations=2"]),
    "online dpo": ("online_dpo", []),
    "offline rl": ("ilql", ["task.target_update_rate=0.1"]),
    "distillation": ("distill", ["task.teacher=TEACHER", "task.num_iterations=2"]),
    "labels": ("kto", []),
    "labels, lora with dropout": ("kto", LORA),
}

PLAIN = ("full", "ppo")
NIGHTLY = (
    "noise on embeddings",
    "reward model, lora with dropout",
    "labels, lora with dropout",
    "online dpo",
    "lora with dropout",
    "reward model",
    "reward model, likelihood",
    "steps",
    "preferences",
    "preferences, sorted",
    "ppo, lora",
    "grpo, lora",
    "grpo, ensemble",
    "rloo",
    "reinforce_pp",
    "distillation",
    "offline rl",
    "labels",
)
KL = ",objective/kl_coeff,"


def without_time(path: Path) -> list[str]:
    """The lines of metrics.csv but for what a clock said."""
    return [line.rsplit(",", 1)[0] for line in path.read_text().splitlines() if not re.search(",(time|memory)/", line)]


def check_resume_at(
    steps: Iterable[int], variant: str, tmp_path: Path, model_folder: ModelFolder, *, last: int = 24, interval: int = 1
) -> None:
    task, options = VARIANTS[variant]
    options = [word.replace("TEACHER", str(model_folder("gpt2"))) for word in options]
    if variant == "grpo, ensemble":
        for seed, name in enumerate(("FIRST", "SECOND")):
            member = make_model_folder(tmp_path / name, seed=seed, scores=True)
            options = [word.replace(name, str(member)) for word in options]
    if variant == "8-bit moments":
        pytest.importorskip("bitsandbytes")
    data = WRITERS[task](tmp_path / "rows.jsonl")
    words = [*options, f"task.save_interval={interval}", "task.keep_checkpoints=99", f"task.max_num_steps={last}"]
    model = model_folder("gpt2" if variant == "model dropout" else "llama")
    whole = train(model, data, tmp_path / "whole", *words, task=task)
    expected = result_of(whole, last)
    if "task.adaptive_kl_coeff=true" in options:
        coefficients = [line.split(",")[2] for line in (whole / "metrics.csv").read_text().splitlines() if KL in line]
        assert len(set(coefficients)) > 2  # each turn goes on from the last one's
    for step in steps:
        resumed = killed(shutil.copytree(whole, tmp_path / f"from-{step}"), step)
        train(model, data, resumed, *words, "resume=true", task=task)
        assert result_of(resumed, last) == expected, step
        assert without_time(resumed / "metrics.csv") == without_time(whole / "metrics.csv")
        if task != "rm":
            assert digests(resumed / "samples") == digests(whole / "samples")
        shutil.rmtree(resumed)


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=() if v in PLAIN else pytest.mark.slow) for v in VARIANTS if v not in NIGHTLY]
)
def test_resume_at_chosen_steps_is_bit_identical(variant: str, tmp_path: Path, model_folder: ModelFolder) -> None:
    check_resume_at((6,), variant, tmp_path, model_folder, last=12 if variant == "ppo" else 8, interval=2)


def test_a_mixture_of_datasets_is_resumed(tmp_path: Path, model_folder: ModelFolder) -> None:
    """Rows that are repeated and left out are the same after a resume, also if their prepared files were deleted."""
    few, many = write_rows(tmp_path / "few.jsonl", 12), write_rows(tmp_path / "many.jsonl", 30, seed=1)
    own = ("data=local", "data.train_file", "data.validation_file", "data.test_file", "hydra.run.dir")
    words = [word for word in train_words(model_folder(), few, tmp_path) if not word.startswith(own)]
    words += ["data=mix", f"data.mix=[{{train_file:{few},weight:2}},{{train_file:{many},weight:1}}]"]
    words += ["task.max_num_steps=8", "task.save_interval=1", "task.keep_checkpoints=99", "task.eval_interval=4"]
    whole, cache = tmp_path / "whole", tmp_path / "cache"
    run([*words, f"data.cache_dir={cache}", f"hydra.run.dir={whole}"])
    resumed = killed(shutil.copytree(whole, tmp_path / "resumed"), 3)
    shutil.rmtree(cache)
    run([*words, f"data.cache_dir={cache}", f"hydra.run.dir={resumed}", "resume=true"])
    assert result_of(resumed, 8) == result_of(whole, 8)
    assert without_time(resumed / "metrics.csv") == without_time(whole / "metrics.csv")


@pytest.mark.nightly
@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_at_every_step_is_bit_identical(variant: str, tmp_path: Path, model_folder: ModelFolder) -> None:
    check_resume_at(range(1, 25), variant, tmp_path, model_folder)
