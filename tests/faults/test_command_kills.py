"""Kill -9 of the commands beside training: the same command again ends in the same files, and leaves nothing else.

The campaign (docs/reliability.md has its table):
`KILLS=40 SEED=2026 pytest -n 0 -m nightly -s tests/faults/test_command_kills.py`; `-k <command>` takes one of them.
"""

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.faults.test_kill import print_row
from tests.support.hub import serve
from tests.support.jobs import Job, JobServer
from tests.support.models import ModelFolder
from tests.support.past_runs import make_past_run
from tests.support.pipelines import write_recipe
from tests.support.runs import train, write_pairs, write_rows

Files = dict[str, bytes]
CHAIN = """\
# @package _global_
common:
  train: >-
    model=auto model.repo_name={model} data=local data.train_file={rows} data.max_length=120 data.max_prompt_length=70
    task.mini_batch_size=6 task.save_interval=2 task.num_sample_prompts=0
stages:
  sft: train task=sft task.max_num_steps=6
  dpo: train task=dpo task.sft_experiment_dir=<sft> task.max_num_steps=6
  text: eval task=perplexity experiment_dir=<dpo>
"""
ONLINE = """
import os
from huggingface_hub import constants
os.environ |= {{"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": {endpoint!r}}}
constants.HF_HUB_OFFLINE = False
constants.ENDPOINT = {endpoint!r}
constants.HUGGINGFACE_CO_URL_TEMPLATE = {endpoint!r} + "/{{repo_id}}/resolve/{{revision}}/{{filename}}"
constants.HF_HUB_CACHE = {cache!r}
"""


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def processes_with(text: str) -> list[int]:
    """The pids of processes that were started with this text in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if text.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


class Command(NamedTuple):
    """A command whose words are those that run it again after a kill.

    Attributes:
        words: (working directory) -> the command line.
        files: (working directory) -> what it has made, without times.
        setup: (working directory) -> code that runs in the job before it.
    """

    words: Callable[[Path], list[str]]
    files: Callable[[Path], Files]
    setup: Callable[[Path], str] = lambda folder: ""


@contextmanager
def fetch(place: Path, model_folder: ModelFolder) -> Iterator[Command]:
    """Of a model with pickled weights alone, from a hub on the loopback interface; converted."""
    model = place / "model"
    shutil.copytree(model_folder("opt"), model, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(AutoModelForCausalLM.from_pretrained(model_folder("opt")).state_dict(), model / "pytorch_model.bin")
    with serve({"models/facebook/opt-350m": model}) as hub:
        yield Command(
            lambda folder: ["fetch", "model=opt"],
            lambda folder: {Path(k).name: v for k, v in content_of(folder / "cache" / "converted").items() if v},
            lambda folder: ONLINE.format(endpoint=hub.endpoint, cache=str(folder / "hub")),
        )


@contextmanager
def report(place: Path, model_folder: ModelFolder) -> Iterator[Command]:
    runs = [make_past_run(place / f"run-{number}", number) for number in range(8)]

    def files(folder: Path) -> Files:
        return {"page": re.sub(rb"\d\d:\d\d(:\d\d)?", b"", (folder / "page.html").read_bytes())}

    yield Command(lambda folder: ["report", *map(str, runs), "--to", "page.html"], files)


@contextmanager
def best_of_n(place: Path, model_folder: ModelFolder) -> Iterator[Command]:
    rows, model = write_rows(place / "rows.jsonl"), model_folder()
    words = ["train", "task=best_of_n", "model=auto", f"model.repo_name={model}", "data=local", "fabric=cpu"]
    words += [f"data.train_file={rows}", "data.max_length=120", "data.max_prompt_length=70", "resume=true"]
    words += ["task.num_generations=2", "task.rollout_size=8", "generation.max_new_tokens=8", "hydra.run.dir=run"]
    words += ["reward=function", "reward.path=tests.support.rewards:spread", "data.minimum_response_length=1"]
    yield Command(lambda folder: words, lambda folder: content_of(folder / "run" / "dataset"))


@contextmanager
def export(place: Path, model_folder: ModelFolder) -> Iterator[Command]:
    """Of adapters, which are merged."""
    lora = ["model.finetune_mode=LORA", "task.max_num_steps=2"]
    run_dir = train(model_folder(), write_rows(place / "rows.jsonl"), place / "run", *lora)
    yield Command(
        lambda folder: ["export", str(run_dir), "--to", "exported"], lambda folder: content_of(folder / "exported")
    )


@contextmanager
def pipeline(place: Path, model_folder: ModelFolder) -> Iterator[Command]:
    """Its stages are processes of their own, which die with it."""
    content = CHAIN.format(model=model_folder(), rows=write_pairs(place / "rows.jsonl"))
    flag = write_recipe(place / "own", content, "chain")

    def files(folder: Path) -> Files:
        [result] = folder.glob("all/*/results.json")
        records = [{k: v for k, v in record.items() if k != "seconds"} for record in json.loads(result.read_text())]
        finals = {f"{stage}/{name}": text for stage in ("sft", "dpo") for name, text in final(result.parent / stage)}
        return finals | {"results": json.dumps(records).encode()}

    def final(run_dir: Path) -> list[tuple[str, bytes]]:
        return [(name, text) for name, text in content_of(run_dir / "final").items() if not name.endswith(".md")]

    yield Command(lambda folder: ["pipeline", flag, "experiment=chain", "root_dir=all", "resume=true"], files)


COMMANDS = {command.__name__: command for command in (fetch, report, best_of_n, export, pipeline)}


def leftovers(folder: Path) -> list[str]:
    """Names of half-made files and folders; the hub's client keeps and continues its own."""
    found = (path for path in folder.rglob("*") if "hub" not in path.parts)
    return [str(path) for path in found if re.search(r"\.tmp\b|\.incomplete$", path.name)]


def start(server: JobServer, command: Command, folder: Path, number: int = 0) -> Job:
    folder.mkdir(exist_ok=True)
    log = folder / f"log-{number}"
    cache = {"SHEEPRLHF_CACHE": str(folder / "cache")}
    return server.start(command.words(folder), log, command.setup(folder), **cache)


def campaign(server: JobServer, place: Path, command: Command, kills: int, seed: int) -> dict[str, int]:
    """Kill one to three starts in each working directory, then let the command end there.

    Returns:
        Numbers of kills, of working directories, and of those with other files, leftovers and orphans.
    """
    rng = random.Random(seed)
    began = time.monotonic()
    job = start(server, command, place / "whole")
    assert job.wait(600) == 0, job.text()
    lasts, expected = time.monotonic() - began, command.files(place / "whole")
    assert expected
    found = {"kills": 0, "places": 0, "differing": 0, "leftovers": 0, "orphans": 0}
    while found["kills"] < kills:
        folder = place / f"killed-{found['places']}"
        found["places"] += 1
        finished = False
        for number in range(min(rng.randint(1, 3), kills - found["kills"])):
            began, moment = time.monotonic(), rng.uniform(0, lasts)
            job = start(server, command, folder, number)
            while job.poll() is None and time.monotonic() < began + moment:
                time.sleep(0.005)
            if job.poll() is None:
                job.kill()
            if finished := job.wait() != -signal.SIGKILL:
                assert job.wait() == 0, job.text()
                lasts = time.monotonic() - began
                break
            found["kills"] += 1
        deadline = time.monotonic() + 20
        while (orphans := processes_with(f"SHEEPRLHF_CACHE={folder / 'cache'}")) and time.monotonic() < deadline:
            time.sleep(0.05)
        found["orphans"] += len(orphans)
        if not finished:
            job = start(server, command, folder, 9)
            assert job.wait(600) == 0, job.text()
        found["differing"] += command.files(folder) != expected
        found["leftovers"] += len(leftovers(folder))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fetch"])
def test_a_killed_command_leaves_what_it_finishes(
    name: str, server: JobServer, tmp_path: Path, model_folder: ModelFolder
) -> None:
    with COMMANDS[name](tmp_path, model_folder) as command:
        found = campaign(server, tmp_path, command, 2, int(os.environ.get("SEED", "7")))
    assert (found["differing"], found["leftovers"], found["orphans"]) == (0, 0, 0)


@pytest.mark.nightly
@pytest.mark.parametrize("name", COMMANDS)
def test_campaign(name: str, server: JobServer, tmp_path: Path, model_folder: ModelFolder) -> None:
    kills, seed = int(os.environ.get("KILLS", "40")), int(os.environ.get("SEED", "2026"))
    began = time.monotonic()
    with COMMANDS[name](tmp_path, model_folder) as command:
        found = campaign(server, tmp_path, command, kills, seed)
    print_row({"command": name, **found}, seed, began)
    assert found["kills"] == kills
    assert (found["differing"], found["leftovers"], found["orphans"]) == (0, 0, 0)
