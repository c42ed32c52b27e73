"""Killed twice and gone on with twice: the bytes and the records of a run that was left alone.

`pytest -n 0 -m "slow or nightly" -s tests/faults/test_twice.py` prints the rows of the table in docs/reliability.md.
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.backend.event_processing.plugin_event_accumulator import TENSORS, EventAccumulator

from tests.faults.test_resume import LORA, without_time
from tests.support.jobs import JobServer
from tests.support.runs import ONLINE_TASKS, WRITERS, digests, result_of, train_words

ModelFolder = Callable[..., Path]
Points = dict[tuple[str, int], list[bytes]]  # by tag and step, what TensorBoard would show
TASKS = {
    "sft": LORA,
    "rm": [*LORA, "task.loss_type=per_sample"],
    "dpo": LORA,
    "ppo": ["task.adaptive_kl_coeff=true", "reward.normalize=true", "task.ema_decay=0.9"],
}
# Two steps after a checkpoint, whose numbers are logged then and have to be taken back; online tasks look once a turn.
CALLS = {"offline": 10, "online": 3}
PAUSED = """
import time
from sheeprlhf.engine.run import Run
begin, stop_signal, calls = Run.begin, Run.stop_signal, []
def began(run, step):
    begin(run, step)
    rows = (run.dir / "metrics.csv").read_text().splitlines()[1:]
    print("records up to step", max([int(row.split(",")[0]) for row in rows], default=0), flush=True)
def paused(run):
    calls.append(1)
    if len(calls) == NUMBER:
        print("waiting to be killed", flush=True)
        time.sleep(600)
    return stop_signal(run)
Run.begin, Run.stop_signal = began, paused
"""


def shown(run_dir: Path) -> Points:
    """All points of a run's event files, as TensorBoard reads them, purges and all; of times that they are there."""
    events = EventAccumulator(str(run_dir), size_guidance={TENSORS: 0})  # 0: all of them
    events.Reload()
    found: Points = defaultdict(list)
    for tag in events.Tags()[TENSORS]:
        for event in events.Tensors(tag):
            found[tag, event.step].append(
                b"" if tag.startswith(("time/", "memory/")) else event.tensor_proto.SerializeToString()
            )
    return dict(found)


def num_written(run_dir: Path) -> int:
    """Points in all event files, whatever was taken back."""
    files = sorted(run_dir.glob("events.out.tfevents.*"))
    return sum(len(event.summary.value) for file in files for event in EventFileLoader(str(file)).Load())


def killed_twice(server: JobServer, words: list[str], run_dir: Path, number: int) -> list[str]:
    """Start, `kill -9` at the `number`-th look for signals, again, and to the end; what each said."""
    told = []
    for start in range(3):
        log = run_dir.with_name(f"log-{start}")
        job = server.start([*words, "resume=true"], log, PAUSED.replace("NUMBER", str(number if start < 2 else -1)))
        if start < 2:
            job.wait_for("waiting to be killed")
            job.kill()
        assert job.wait() == (-9 if start < 2 else 0), job.text()
        told.append(job.text())
    return told


@pytest.mark.nightly
@pytest.mark.parametrize("task", TASKS)
def test_bytes_and_records(task: str, server: JobServer, tmp_path: Path, model_folder: ModelFolder) -> None:
    data, model = WRITERS[task](tmp_path / "rows.jsonl"), model_folder()
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def words(run_dir: Path) -> list[str]:
        return train_words(model, data, run_dir, "task.keep_checkpoints=99", *TASKS[task], task=task)

    job = server.start(words(whole), tmp_path / "log")
    assert job.wait() == 0, job.text()
    told = killed_twice(server, words(killed), killed, CALLS["online" if task in ONLINE_TASKS else "offline"])
    for text, step in zip(told, (0, 8, 16), strict=True):
        assert f"{'going on after' if step else 'starting at'} step {step}\n" in text
        assert f"records up to step {step}\n" in text

    assert result_of(killed) == result_of(whole)
    assert without_time(killed / "metrics.csv") == without_time(whole / "metrics.csv")
    rows = [tuple(row.split(",")[:2]) for row in (killed / "metrics.csv").read_text().splitlines()[1:]]
    assert len(set(rows)) == len(rows)
    if task != "rm":
        assert digests(killed / "samples") == digests(whole / "samples")

    points, expected = shown(killed), shown(whole)
    assert [key for key, values in points.items() if len(values) != 1] == []
    assert points == expected
    assert {(str(step), tag) for tag, step in points if not tag.endswith("text_summary")} == set(rows)
    again = num_written(killed) - num_written(whole)
    assert again > 0 and num_written(whole) == len(expected)  # there was something to take back
    num_tags = len({tag for tag, _ in points})
    print(f"| {task} | 2 | 8, 16 | {num_tags} of {num_tags} | {len(points)} | {again} | 0 |")
