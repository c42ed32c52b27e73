"""Kill -9 of one of two processes, in each phase of a run: the job ends soon, leaves nobody behind, and can go on.

The campaign (docs/reliability.md has its table):
`KILLS=20 SEED=2026 pytest -n 0 -m nightly -s tests/faults/test_rank_kills.py`; the seed and its number decide
about a kill, and `KILL=<n>,<n>` beside them repeats these alone.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.distributed.test_sft import LORA, start
from tests.faults.test_kill import Victim, differing_bytes, versions
from tests.support.jobs import ColdJob, JobServer, site
from tests.support.phases import durations, setup, wait_until_in
from tests.support.runs import train_words, write_rows

ModelFolder = Callable[..., Path]
LONGEST_EXIT = 15.0  # seconds until nobody of the job is left
STARTING = "starting the other process"  # which then imports for seconds, and knows of no collective yet
PHASES = (
    "forward pass",
    "backward pass",  # the gradients' all-reduce is in it
    "all-reduce",
    "save",
    "samples",
    "data preparation",
    STARTING,
)


@dataclass
class Tally:
    """What a campaign did and found."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    slow: int = 0
    orphans: int = 0
    wrong: int = 0  # exit code 0, or a run that could not go on
    lost: int = 0
    differing: int = 0
    longest: float = 0.0

    def faults(self) -> tuple[int, ...]:
        return self.slow, self.orphans, self.wrong, self.lost, self.differing


class TwoProcesses(Victim):
    """A run on two processes, always cold: the second is."""

    def __init__(self, words: list[str], place: Path) -> None:
        super().__init__(JobServer(), words, place, by_root_dir=False)

    def start_two(self, record: str, **environment: str) -> ColdJob:
        self._starts += 1
        log = self._place.with_name(f"{self._place.name}-{self._starts}.log")
        return start(self._words, log, PYTHONPATH=site(log.with_suffix(".site"), record), **environment)


def second_process(job: ColdJob) -> int | None:
    """The pid of rank 1, once it is there."""
    for pid in job.group():
        try:
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == job.pid and b"LOCAL_RANK=1" in words:
            return pid
    return None


def kill_in(job: ColdJob, told: Path, phase: str, rank: int, rng: random.Random, lasts: dict[str, float]) -> bool:
    """Kill a rank while one of them is in a phase; False if the job ended before."""
    second = second_process(job)
    while second is None and job.poll() is None:
        time.sleep(0.01)
        second = second_process(job)
    if phase == STARTING:
        time.sleep(rng.uniform(0, 3))
    elif not wait_until_in(job, told, phase, ranks=(0, 1) if phase == "data preparation" else (0,)):
        return False
    else:
        time.sleep(rng.uniform(0, lasts.get(phase, 0.0)))
    if job.poll() is not None or second is None:
        return False
    os.kill(job.pid if rank == 0 else second, signal.SIGKILL)
    return True


def seconds_until_gone(job: ColdJob) -> tuple[float, str]:
    """How long the job's processes live on, at most three times the limit; the commands of those seen last."""
    began, seen = time.monotonic(), ""
    while ((group := job.group()) or job.poll() is None) and time.monotonic() - began < 3 * LONGEST_EXIT:
        if time.monotonic() - began > LONGEST_EXIT:
            seen = "; ".join(filter(None, map(command_of, group))) or seen
        time.sleep(0.02)
    return time.monotonic() - began, seen


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:160]
    except OSError:
        return ""


def campaign(tmp_path: Path, model: Path, numbers: list[int], seed: int) -> Tally:
    """The kills with these numbers, on one run after the other; the number says which rank, and in which phase."""
    tally, told = Tally(), tmp_path / "told"
    words = train_words(model, write_rows(tmp_path / "rows.jsonl"), tmp_path, "data.num_proc=2", *LORA)
    record = setup(told, "sft", cold=True)
    whole = TwoProcesses(words, tmp_path / "whole")
    lasts = durations(whole.start_two(record, SHEEPRLHF_CACHE=str(tmp_path / "cache")), told)
    while numbers:
        tally.runs += 1
        run = TwoProcesses(words, tmp_path / f"run-{tally.runs}")
        newest = 0
        while not run.is_finished():
            number = numbers[0] if numbers else 0
            rng, rank, phase = random.Random(f"{seed} {number}"), number % 2, PHASES[number // 2 % len(PHASES)]
            cache = f"cache-{time.monotonic_ns()}" if numbers and phase == "data preparation" else "cache"
            for path in told.parent.glob("told-*"):
                path.unlink()
            job = run.start_two(record, SHEEPRLHF_CACHE=str(tmp_path / cache))
            if numbers and kill_in(job, told, phase, rank, rng, lasts):
                numbers.pop(0)
                seconds, seen = seconds_until_gone(job)
                orphans = job.group()
                for pid in orphans:
                    os.kill(pid, signal.SIGKILL)
                code = job.wait()
                tally.kills[f"rank {rank}, {phase}"] += 1
                tally.longest = max(tally.longest, seconds)
                tally.slow += seconds > LONGEST_EXIT
                tally.orphans += len(orphans)
                tally.wrong += code == 0
                print(f"kill {number}: rank {rank}, {phase}: exit code {code}, {seconds:.1f} s {seen}", flush=True)
            else:
                assert job.wait() == 0, job.text()
            began = next((line for line in job.text().splitlines() if line.startswith("going on after")), None)
            tally.lost += began is not None and int(began.rpartition(" ")[2]) < newest
            newest = max(newest, run.newest())
        if found := differing_bytes(run.dir, whole.dir):
            print(f"{run.dir} differs: {dict(found)}", flush=True)
            tally.differing += found.total()
        assert not run.temporaries()
    return tally


@pytest.mark.nightly
def test_campaign(tmp_path: Path, model_folder: ModelFolder) -> None:
    kills, seed = int(os.environ.get("KILLS", "20")), int(os.environ.get("SEED", "2026"))
    only = os.environ.get("KILL")
    numbers = list(range(kills)) if only is None else [int(number) for number in only.split(",")]
    began = time.monotonic()
    tally = campaign(tmp_path, model_folder(), list(numbers), seed)
    print(
        "| kills | rank 0, rank 1 | longest until all are gone | over 15 s | orphans | wrong | lost | "
        "differing bytes | runs | seed | minutes | versions |"
    )
    ranks = ", ".join(str(sum(n for what, n in tally.kills.items() if what[5] == rank)) for rank in "01")
    print(
        f"| {tally.kills.total()} | {ranks} | {tally.longest:.1f} s | {' | '.join(map(str, tally.faults()))} | "
        f"{tally.runs} | {seed} | {(time.monotonic() - began) / 60:.1f} | {versions()} |"
    )
    print("hit: " + ", ".join(f"{what} {count}" for what, count in tally.kills.items()))
    assert tally.kills.total() == len(numbers)
    assert tally.faults() == (0, 0, 0, 0, 0)
