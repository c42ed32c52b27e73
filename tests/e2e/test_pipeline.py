"""Pipelines as processes: killed and resumed, stopped by a signal; every recipe in two steps on small models."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.support.jobs import ColdJob
from tests.support.models import make_model_folder
from tests.support.pipelines import folders, write_recipe
from tests.support.runs import ONLINE_TASKS, WRITERS, exit_code, write_pairs

ModelFolder = Callable[..., Path]
CHAIN = """\
# @package _global_
common:
  train: >-
    model=auto model.repo_name={model} data=local data.train_file={rows} data.max_length=120 data.max_prompt_length=70
    task.mini_batch_size=6 task.save_interval=2 generation.max_new_tokens=4
stages:
  sft: train task=sft task.max_num_steps=6
  text: eval -m task=perplexity experiment_dir=<sft>
"""


def chain(tmp_path: Path, model_folder: ModelFolder) -> list[str]:
    rows = write_pairs(tmp_path / "rows.jsonl")
    content = CHAIN.format(model=model_folder(), rows=rows)
    return ["pipeline", write_recipe(tmp_path / "own", content, "chain"), "experiment=chain"]


def wait_for_a_checkpoint(run_dir: Path, job: ColdJob) -> None:
    deadline = time.monotonic() + 300
    while not [path for path in run_dir.glob("checkpoints/step-*") if path.name[5:].isdecimal()]:
        assert job.poll() is None and time.monotonic() < deadline, job.text()
        time.sleep(0.02)


@pytest.mark.nightly  # tests/unit/utils/test_processes.py sends signals to a command that waits for its stage
def test_a_signal_reaches_the_stage_which_saves(tmp_path: Path, model_folder: ModelFolder) -> None:
    job = ColdJob(
        [*chain(tmp_path, model_folder), "sft.task.epochs=500", "sft.task.max_num_steps=4000"], tmp_path / "log"
    )
    job.wait_for("starting at step 0", 300)
    [folder] = folders(tmp_path / "logs" / "pipelines")
    wait_for_a_checkpoint(folder / "sft", job)
    job.kill(signal.SIGHUP)
    assert job.wait(120) == 128 + signal.SIGHUP, job.text()
    assert "the state is saved" in job.text()
    assert "[1/2] sft: stopped after" in job.text()
    assert f"resume_from={folder}" in job.text().splitlines()[-1]
    job.assert_all_gone()


def hub_data(folder: Path, form: str) -> Path:
    """A dataset in the layout of the hub's: prompt, chosen and rejected in data/<split>-00000-of-00001.parquet."""
    (folder / "data").mkdir(parents=True)
    for split, count in (("train", 40), ("valid1" if "TL;DR" in form else "test", 8)):
        rows = [
            {
                "prompt": form.format(split, number),
                "chosen": f" a good answer of some words to {number}.",
                "rejected": f" bad words to {number} and what has to be said.",
            }
            for number in range(count)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


POST = "SUBREDDIT: r/a\n\nTITLE: {}\n\nPOST: post {}\n\nTL;DR:"
DIALOGUE = "\n\nHuman: {} question {}?\n\nAssistant:"
RECIPES = {
    "tldr_opt": ("opt", POST),
    "hh_gpt2": ("gpt2", DIALOGUE),
    "tldr_trlx": ("llama", POST),
    "hh_deepspeed_chat": ("opt", DIALOGUE),
    "hh_ppo_max": ("llama", DIALOGUE),
}


CONFIGS = Path(__file__).parents[2] / "configs" / "experiment"
PUBLISHED = sorted(path.stem for path in CONFIGS.glob("*_published.yaml"))


@pytest.mark.nightly
@pytest.mark.parametrize("recipe", PUBLISHED)
def test_published_settings_run_in_two_steps(recipe: str, tmp_path: Path, model_folder: ModelFolder) -> None:
    """With smaller batches and shorter texts; what a response is rewarded for comes from the command line."""
    choices = {}
    for line in yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text())["defaults"]:
        choices |= {group.removeprefix("override /"): choice for group, choice in line.items()}
    task = choices["task"]
    data = WRITERS[task](tmp_path / "rows.jsonl")
    words = [f"experiment={recipe}", "dry_run=true", "model=auto", f"model.repo_name={model_folder()}", "data=local"]
    words += [f"data.train_file={data}", "data.max_length=100", "data.max_prompt_length=70"]
    words += [f"root_dir={tmp_path}/runs", "task.mini_batch_size=16"]
    if task in (*ONLINE_TASKS, "distill"):
        words += ["generation.max_new_tokens=8", "task.num_generations=4", "task.rollout_size=32"]
        words += ["task.self_check=off"]
    if task == "distill":
        words += [f"task.teacher={model_folder('gpt2')}", "model.lora_cfg.rank=4"]
    elif choices.get("reward") == "list":
        members = [make_model_folder(tmp_path / f"rm{seed}", seed=seed, scores=True) for seed in range(2)]
        words += [f"reward.terms=[{','.join(f'model:{member}' for member in members)}]"]
    elif task in ONLINE_TASKS:
        words += ["reward=function", "reward.path=tests.support.rewards:letters"]
        words += ["reward.overlong_buffer=4"] if recipe == "dapo_published" else []
    assert exit_code(["train", *words]) == 0
    assert list((tmp_path / "runs").rglob("final/*model.safetensors"))


@pytest.mark.nightly
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs_in_two_steps_on_local_folders(
    recipe: str, tmp_path: Path, model_folder: ModelFolder
) -> None:
    architecture, form = RECIPES[recipe]
    model, data = model_folder(architecture), hub_data(tmp_path / "hub", form)
    words = ["data.max_length=110", "data.max_prompt_length=80", "fabric=cpu", "generation.max_new_tokens=8"]
    words += [f"model.repo_name={model}", f"data.dataset_name={data}", "dry_run=true"]
    words += ["sft.data.max_length=100"] if recipe == "tldr_opt" else []
    words += ["rm.model.frozen_layers=1", "ppo.model.frozen_layers=1"] if recipe == "tldr_trlx" else []
    job = ColdJob(["pipeline", f"experiment={recipe}", *words], tmp_path / "log")
    assert job.wait(900) == 0, job.text()
    [folder] = folders(tmp_path / "logs" / "pipelines")
    rows = {row.pop("stage"): row for row in json.loads((folder / "results.json").read_text())}
    assert {"pairs_right", "pairs"} <= rows["rm"].keys()
    assert {"reward", "kl", "rouge_l", "perplexity"} <= rows["ppo"].keys()
    assert ("dpo" in rows) == (recipe in ("tldr_opt", "hh_gpt2"))
