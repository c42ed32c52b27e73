"""Pipelines as processes: killed and resumed, stopped by a signal; every recipe in two steps on small models."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.jobs import ColdJob
from tests.support.pipelines import folders, write_recipe
from tests.support.runs import write_pairs

ModelFolder = Callable[..., Path]
CHAIN = """\
# @package _global_
common:
  train: >-
    model=auto model.repo_name={model} data=local data.train_file={rows} data.max_length=120 data.max_prompt_length=70
    task.mini_batch_size=6 task.save_interval=2 generation.max_new_tokens=4
stages:
  sft: train task=sft task.max_num_steps=6
  rm: train task=rm task.sft_experiment_dir=<sft> task.epochs=30 task.max_num_steps=60
  accuracy: eval task=preference experiment_dir=<rm>
  text: eval -m task=perplexity experiment_dir=<sft>
"""


def chain(tmp_path: Path, model_folder: ModelFolder) -> list[str]:
    rows = write_pairs(tmp_path / "rows.jsonl")
    content = CHAIN.format(model=model_folder(), rows=rows)
    return ["pipeline", write_recipe(tmp_path / "own", content, "chain"), "experiment=chain"]


def figures(folder: Path) -> list[dict[str, float]]:
    """The table without the times."""
    records = json.loads((folder / "results.json").read_text())
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def wait_for_a_checkpoint(run_dir: Path, job: ColdJob) -> None:
    deadline = time.monotonic() + 300
    while not [path for path in run_dir.glob("checkpoints/step-*") if path.name[5:].isdecimal()]:
        assert job.poll() is None and time.monotonic() < deadline, job.text()
        time.sleep(0.02)


@pytest.mark.nightly
def test_killed_in_the_second_stage_and_resumed_it_ends_in_the_same_table(
    tmp_path: Path, model_folder: ModelFolder
) -> None:
    words = chain(tmp_path, model_folder)
    whole = ColdJob([*words, "root_dir=whole"], tmp_path / "whole.log")
    assert whole.wait(600) == 0, whole.text()
    killed = ColdJob([*words, "root_dir=killed"], tmp_path / "killed.log")
    killed.wait_for("[2/4] rm:", 300)
    [folder] = folders(tmp_path / "killed")
    wait_for_a_checkpoint(folder / "rm", killed)
    killed.kill(signal.SIGKILL)
    killed.wait()
    time.sleep(0.5)  # the stage dies with it
    assert json.loads((folder / "rm" / "run.json").read_text())["status"] == "running"
    begun = (folder / "sft" / "run.json").stat().st_mtime_ns
    resumed = ColdJob([*words, "root_dir=killed", "resume=true"], tmp_path / "resumed.log")
    assert resumed.wait(600) == 0, resumed.text()
    assert "[1/4] sft: finished before" in resumed.text()
    assert "going on after step" in resumed.text()
    assert (folder / "sft" / "run.json").stat().st_mtime_ns == begun
    assert figures(folder) == figures(folders(tmp_path / "whole")[0])
    assert figures(folder)[1]["pairs"] > 0 and figures(folder)[0]["perplexity"] > 1
    resumed.assert_all_gone()


@pytest.mark.parametrize(
    "signum",
    [
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.nightly),
        pytest.param(signal.SIGINT, marks=pytest.mark.nightly),
    ],
)
def test_a_signal_reaches_the_stage_which_saves(signum: int, tmp_path: Path, model_folder: ModelFolder) -> None:
    job = ColdJob(
        [*chain(tmp_path, model_folder), "skip=[rm,accuracy]", "sft.task.epochs=500", "sft.task.max_num_steps=4000"],
        tmp_path / "log",
    )
    job.wait_for("starting at step 0", 300)
    [folder] = folders(tmp_path / "logs" / "pipelines")
    wait_for_a_checkpoint(folder / "sft", job)
    job.kill(signum)
    assert job.wait(120) == 128 + signum, job.text()
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
    job = ColdJob(["pipeline", f"experiment={recipe}", *words], tmp_path / "log")
    assert job.wait(900) == 0, job.text()
    [folder] = folders(tmp_path / "logs" / "pipelines")
    rows = {row.pop("stage"): row for row in json.loads((folder / "results.json").read_text())}
    assert {"pairs_right", "pairs"} <= rows["rm"].keys()
    assert {"reward", "kl", "rouge_l", "perplexity"} <= rows["ppo"].keys()
    assert ("dpo" in rows) == (recipe in ("tldr_opt", "hh_gpt2"))
