"""Signals, locks and finished runs, on real runs in processes of their own."""

import json
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.jobs import Job, JobServer
from tests.support.models import ModelFolder
from tests.support.runs import digests, result_of, train_words, write_rows

pytestmark = pytest.mark.slow  # tests/unit/engine/test_run.py and tests/e2e/test_api.py send signals to this process
PAUSE = """
import itertools, sys, time
import sheeprlhf.task.loop as loop
update, steps = loop.update, itertools.count(1)
def pausing(*words, **options):
    step = next(steps)
    if step == {step}:
        print("pausing in step", step, file=sys.stderr, flush=True)
        time.sleep({seconds})
    return update(*words, **options)
loop.update = pausing
"""
LAST = 12  # steps, in two epochs
HANGING = PAUSE.format(step=2, seconds=60)


class Whole(NamedTuple):
    """The command without its directory, and the directory of a run that nothing disturbed."""

    words: list[str]
    dir: Path

    def in_dir(self, run_dir: Path, *extra: str) -> list[str]:
        return [*self.words, f"hydra.run.dir={run_dir}", *extra]


@pytest.fixture(scope="module")
def whole(server: JobServer, tmp_path_factory: pytest.TempPathFactory, model_folder: ModelFolder) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    words = train_words(model_folder(), write_rows(folder / "rows.jsonl"), folder / "run")
    words += ["task.save_interval=5", "task.keep_checkpoints=99", "model.finetune_mode=LORA", "model.lora_cfg.rank=4"]
    words += ["model.lora_cfg.dropout=0.1", f"task.max_num_steps={LAST}"]
    assert server.start(words, folder / "log").wait() == 0
    return Whole([word for word in words if not word.startswith("hydra.run.dir")], folder / "run")


def steps_of(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").iterdir())


def signalled(server: JobServer, whole: Whole, tmp_path: Path, signum: int, step: int) -> Job:
    """A run that gets a signal while it computes a step."""
    job = server.start(whole.in_dir(tmp_path / "run"), tmp_path / "log", PAUSE.format(step=step, seconds=1))
    job.wait_for(f"pausing in step {step}")
    job.kill(signum)
    return job


@pytest.mark.parametrize(
    ("signum", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.nightly),
        pytest.param(signal.SIGQUIT, 131, marks=pytest.mark.nightly),
    ],
)
def test_a_signal_saves_and_stops(signum: int, code: int, server: JobServer, whole: Whole, tmp_path: Path) -> None:
    job = signalled(server, whole, tmp_path, signum, 7)
    assert job.wait() == code
    assert f"stopped by signal {int(signum)}" in job.text()
    assert "Traceback" not in job.text()
    assert steps_of(tmp_path / "run") == [5, 7]
    resumed = server.start(whole.in_dir(tmp_path / "run", "resume=true"), tmp_path / "log")
    assert resumed.wait() == 0
    assert "going on after step 7" in resumed.text()
    assert result_of(tmp_path / "run", LAST) == result_of(whole.dir, LAST)


CLOSING = """
import os, pty, signal
master, terminal = pty.openpty()
os.dup2(terminal, 1)
os.dup2(terminal, 2)
os.close(terminal)
signal.signal(signal.SIGHUP, signal.{disposition})
import sheeprlhf.task.loop as loop
update, steps = loop.update, iter(range(1, 10**6))
def closing(*words, **options):
    if next(steps) == 7:
        os.close(master)
        os.kill(os.getpid(), signal.SIGHUP)
    return update(*words, **options)
loop.update = closing
"""


@pytest.mark.parametrize(("disposition", "code", "last"), [("SIG_DFL", 129, 7), ("SIG_IGN", 0, LAST)])
def test_a_closed_terminal_stops_no_save(
    disposition: str, code: int, last: int, server: JobServer, whole: Whole, tmp_path: Path
) -> None:
    """Where SIGHUP is ignored, as under nohup, the run goes on to its end, and what it prints is lost."""
    job = server.start(whole.in_dir(tmp_path / "run"), tmp_path / "log", CLOSING.format(disposition=disposition))
    assert job.wait() == code
    assert steps_of(tmp_path / "run")[-1] == last
    if code == 0:
        assert result_of(tmp_path / "run", LAST) == result_of(whole.dir, LAST)


def test_sigusr1_saves_and_goes_on(server: JobServer, whole: Whole, tmp_path: Path) -> None:
    """Before there is something to save it does nothing."""
    job = server.start(whole.in_dir(tmp_path / "run"), tmp_path / "log", PAUSE.format(step=7, seconds=1))
    while not (tmp_path / "run" / "run.json").exists():
        assert job.poll() is None, job.text()
    job.kill(signal.SIGUSR1)
    job.wait_for("pausing in step 7")
    job.kill(signal.SIGUSR1)
    assert job.wait() == 0
    assert set(steps_of(tmp_path / "run")) - set(steps_of(whole.dir)) == {7}
    assert result_of(tmp_path / "run", LAST) == result_of(whole.dir, LAST)


def test_a_second_interrupt_exits_at_once(server: JobServer, whole: Whole, tmp_path: Path) -> None:
    job = server.start(whole.in_dir(tmp_path / "run"), tmp_path / "log", HANGING)
    job.wait_for("pausing in step 2")
    job.kill(signal.SIGINT)
    job.wait_for("press Ctrl-C again")
    job.kill(signal.SIGINT)
    assert job.wait(10) == 130  # of a pause of a minute
    assert "Traceback" not in job.text()


def test_a_finished_run_is_left_as_it_is(server: JobServer, whole: Whole, tmp_path: Path) -> None:
    before = digests(whole.dir)
    for words in (whole.in_dir(whole.dir, "resume=true"), [*whole.words, f"resume_from={whole.dir}"]):
        job = server.start(words, tmp_path / "log")
        assert job.wait() == 0
        assert f"{whole.dir} is finished" in job.text()
        assert digests(whole.dir) == before


def big_file(path: Path, num_rows: int) -> Path:
    line = '{{"prompt": "row {} of a large file, which takes a while to read", "response": " and to tokenise {}"}}\n'
    with path.open("w") as file:
        file.writelines(line.format(number, number) for number in range(num_rows))
    return path


def test_interrupt_while_data_is_prepared(server: JobServer, whole: Whole, tmp_path: Path) -> None:
    """A terminal sends it to every process of the group: the tokenising ones get it too."""
    data, cache = big_file(tmp_path / "big.jsonl", 200_000), tmp_path / "cache"
    words = [*whole.in_dir(tmp_path / "run"), f"data.train_file={data}"]
    new_session = "import os; os.setsid()"
    job = server.start([*words, "data.num_proc=2"], tmp_path / "log", new_session, SHEEPRLHF_CACHE=str(cache))
    job.wait_for("preparing train")
    time.sleep(0.5)
    os.killpg(job.pid, signal.SIGINT)
    assert job.wait(30) == 128 + signal.SIGINT, job.text()  # of minutes that the whole file takes
    assert "Traceback" not in job.text()
    job.assert_all_gone()
    assert [path.name for path in (cache / "data").iterdir() if not path.name.endswith(".lock")] == []
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "running"
    (tmp_path / "big.jsonl").write_text("".join(data.read_text().splitlines(keepends=True)[:48]))
    small = [*words, "task.max_num_steps=1", "hydra.run.dir=" + str(tmp_path / "next")]
    assert server.start(small, tmp_path / "log", SHEEPRLHF_CACHE=str(cache)).wait() == 0
