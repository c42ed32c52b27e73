"""A run gone on with by as many processes as before, by more and by fewer: sft, rm, dpo and ppo.

As many: the same bytes. Another number: the same rows in each step, losses to 1e-5, and a line that says so.
`pytest -n 0 -m nightly tests/distributed/test_other_ranks.py`
"""

import contextlib
import importlib
import io
import shutil
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from sheeprlhf.config.registry import to_typed
from sheeprlhf.launch import _seed
from sheeprlhf.utils.lightning import gather_objects
from tests.faults.test_resume import without_time
from tests.support.models import make_model_folder
from tests.support.runs import WRITERS, figures, killed, result_of, train_words
from tests.unit.config.test_registry import composed
from tests.unit.engine.toy import on_ranks

PPO = ["reward.path=tests.support.rewards:spread", "reward.normalize=true", "task.sft_experiment_dir=null"]
TASKS: dict[str, list[str]] = {"sft": [], "rm": [], "dpo": [], "ppo": PPO}
TAGS = {task: ("train/loss", "train/grad_norm") for task in TASKS if task != "ppo"} | {
    "ppo": ("loss/policy", "loss/value", "objective/scores", "objective/kl", "policy/grad_norm", "critic/grad_norm")
}
STOP, LAST = 12, 24
TIMEOUT = 900  # seconds
MOVES = {"2 to 2": ("2", "2"), "1 to 2": ("1", "2"), "2 to 1": ("2", "1")}


class Found(NamedTuple):
    """What a run said, and the rows of each of its updates, those of all ranks."""

    said: str
    rows: list[list[int]]


def go_on(fabric: Any, folder: Path, task: str, name: str) -> Found:
    """All ranks: the run in `folder/name`, from its newest checkpoint on."""
    words = train_words(folder / "model", folder / f"{task}.jsonl", folder / name, task=task)
    words += ["task.max_num_steps=24", "task.keep_checkpoints=99", f"data.cache_dir={folder / 'cache'}", "resume=true"]
    own = [word for word in words[1:] if not word.startswith("hydra.run.dir")]
    config = to_typed(composed("train", *own, *TASKS[task]))
    module = importlib.import_module(config.task.entry_point.partition(":")[0])
    update, seen = module.update, []

    def recording(fabric: Any, net: Any, optimizer: Any, micro_batches: Any, *rest: Any, **options: Any) -> Any:
        seen.append([row for micro in micro_batches for row in micro.row_ids])
        return update(fabric, net, optimizer, micro_batches, *rest, **options)

    if fabric.is_global_zero:
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "run.json").write_text('{"status": "running", "started": 0.0}')
    fabric.barrier()
    _seed(config, on_cuda=False)
    module.update = recording
    with contextlib.redirect_stderr(io.StringIO()) as said:
        resolve_name(config.task.entry_point)(fabric, config, folder / name)
    module.update = update
    of_ranks = gather_objects(fabric, seen)
    return Found(
        said.getvalue(), [sorted(row for rows in step for row in rows) for step in zip(*of_ranks, strict=True)]
    )


def work(fabric: Any, folder: Path, names: list[tuple[str, str]]) -> list[Found]:
    return [go_on(fabric, folder, task, name) for task, name in names]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Found]]:
    """Whole runs by one process and by two, then what each would have left at step 12, gone on with."""
    folder = tmp_path_factory.mktemp("ranks")
    make_model_folder(folder / "model", "llama")
    for task in TASKS:
        WRITERS[task](folder / f"{task}.jsonl", 49)  # an epoch ends in a step of one row: one of two processes has none
    found: dict[str, Found] = {}

    def launch(size: str, names: list[tuple[str, str]]) -> None:
        of_ranks = on_ranks(int(size), work, folder, names, timeout=TIMEOUT)
        found.update({name: Found(*one) for (_, name), one in zip(names, of_ranks[0], strict=True)})

    for size in ("1", "2"):
        launch(size, [(task, f"{task} by {size}") for task in TASKS])
    for task in TASKS:
        for move, (before, _) in MOVES.items():
            killed(shutil.copytree(folder / f"{task} by {before}", folder / f"{task} {move}"), STOP)
    for size in ("1", "2"):
        launch(
            size, [(task, f"{task} {move}") for task in TASKS for move, (_, after) in MOVES.items() if after == size]
        )
    return folder, found


@pytest.mark.nightly
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("task", TASKS)
def test_gone_on_with(task: str, move: str, runs: tuple[Path, dict[str, Found]]) -> None:
    folder, found = runs
    before, after = MOVES[move]
    ours, expected = folder / f"{task} {move}", folder / f"{task} by {before}"
    said, rows = found[ours.name]
    assert f"going on after step {STOP}" in said
    assert len(rows) >= LAST - STOP and rows == found[expected.name].rows[-len(rows) :]  # of ppo, two updates a step
    line = f"world_size was {before} and is {after} now: the run continues, but not bit for bit the same"
    assert (line in said) == (before != after) and ("not bit for bit" in said) == (before != after)
    if before == after:
        assert result_of(ours) == result_of(expected)
        assert without_time(ours / "metrics.csv") == without_time(expected / "metrics.csv")
        return
    for tag in TAGS[task]:
        one, other = (torch.tensor(figures(run)[tag]).double() for run in (ours, expected))
        assert len(other) == (6 if task == "ppo" else LAST)
        assert_close(one, other, rtol=0, atol=1e-5, msg=lambda text, tag=tag: f"{tag}: {text}")
        print(f"{task} {move} {tag}: at most {float((one - other).abs().max()):.1g}")
    weights = (load_file(run / "checkpoints" / f"step-{LAST}" / "model.safetensors") for run in (ours, expected))
    assert_close(*weights, rtol=0, atol=1e-5)
