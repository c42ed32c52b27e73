"""Signals to stop or to save at any moment: what was learnt is saved, and the run ends in the same bytes.

The campaign (docs/reliability.md has its table):
`SIGNALS=200 SEED=2026 pytest -n 0 -m nightly -s tests/faults/test_signal_campaign.py`. Everything about signal number n
but what the machine is doing then comes from the seed and n: `SIGNAL=<n>` beside the same two repeats it alone.
`MINUTES=<m>` begins nothing new after m minutes.
"""

import os
import random
import signal
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

from sheeprlhf.engine.checkpoint import latest_checkpoint, saved_steps
from tests.faults.test_kill import LAST, Victim, differing_bytes, print_row
from tests.support.jobs import Job, JobServer
from tests.support.models import ModelFolder
from tests.support.phases import BEFORE, Moment, durations, last_moment, setup, wait_until_in
from tests.support.runs import WRITERS, train_words
from tests.support.scenarios import LORA

TWICE = "SIGINT twice"
KINDS = {
    "SIGTERM": signal.SIGTERM,
    "SIGINT": signal.SIGINT,
    TWICE: signal.SIGINT,
    "SIGUSR1": signal.SIGUSR1,
    "SIGHUP": signal.SIGHUP,
    "SIGQUIT": signal.SIGQUIT,
    "SIGXCPU": signal.SIGXCPU,
    "SIGUSR2": signal.SIGUSR2,
}
SCENARIOS = {  # the task's more words, and the optimizer steps between moments at which it can be saved
    "sft": (LORA, 1),
    "dpo": (["model.finetune_mode=ALL"], 1),
    "ppo": (["task.adaptive_kl_coeff=true", "reward.normalize=true"], 4),
}
UNPREPARED = ("data preparation", "reference")  # a start finds these in its cache, unless it has a new one
IN_STEP = ("forward pass", "backward pass")
AIMS = {
    "sft": ("start", "data preparation", "validation", "samples", "save", *IN_STEP),
    "dpo": ("start", *UNPREPARED, "validation", "samples", "save", *IN_STEP),
    "ppo": ("start", "data preparation", "rollout", "validation", "save", *IN_STEP),
}
BLOCK = 8  # signals of one scenario, before the next has its turn
AIMED_SHARE = 0.6
COLD_EVERY = 17  # a signal in so many is for a `python sheeprlhf.py`
LONGEST_SECOND_EXIT = 2.0  # seconds


class Plan(NamedTuple):
    """What the seed says of a signal."""

    number: int
    kind: str
    aim: str | None
    cold: bool
    rng: random.Random


def plan_of(number: int, seed: int, task: str) -> Plan:
    rng = random.Random(f"{seed} {number}")
    aim = rng.choice(AIMS[task]) if rng.random() < AIMED_SHARE else None
    return Plan(number, list(KINDS)[number % len(KINDS)], aim, number % COLD_EVERY == COLD_EVERY // 2, rng)


class Strike(NamedTuple):
    """A signal that was sent: where the job was just before and just after, and when the (second) signal came."""

    plan: Plan
    before: Moment
    after: Moment
    at: float


# Exit codes, tracebacks and a slow second Ctrl-C; signals after which the next step was not saved; starts that went on
# from less than what was saved; bytes.
FAULTS = ("wrong", "late", "lost", "differing")


@dataclass
class Tally:
    """What a campaign did and found."""

    kinds: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)  # of starts, runs, and signals in cold starts
    faults: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(FAULTS, 0)))
    second_exit: float = 0.0
    exit: float = 0.0


def strike(job: Job, path: Path, plan: Plan, lasts: dict[str, float], left: float) -> Strike | None:
    """Send a signal at the planned moment, and the second Ctrl-C after the first was heard; None if the job ended.

    `left` is about the share of a whole run that the job has before it.
    """
    if plan.aim is not None:
        if not wait_until_in(job, path, plan.aim):
            return None
        time.sleep(plan.rng.uniform(0, lasts.get(plan.aim, 0.0)))
    else:
        while last_moment(path) is None and job.poll() is None:
            time.sleep(0.001)
        time.sleep(plan.rng.uniform(0, lasts["all"] * left))
    before = last_moment(path)
    if job.poll() is not None or before is None:
        return None
    job.kill(KINDS[plan.kind])
    at, after = time.monotonic(), last_moment(path)
    assert after is not None
    if plan.kind == TWICE:
        while "press Ctrl-C again" not in job.text() and job.poll() is None and time.monotonic() < at + 1:
            time.sleep(0.001)
        time.sleep(plan.rng.uniform(0, 0.1))
        if job.poll() is None:
            at = time.monotonic()
            job.kill(signal.SIGINT)
    return Strike(plan, before, after, at)


class Campaign:
    """One scenario: runs that are signalled again and again until every number of theirs was used."""

    def __init__(self, server: JobServer, folder: Path, model: Path, task: str, seed: int, tally: Tally) -> None:
        folder.mkdir()
        more, self._between = SCENARIOS[task]
        self._words = train_words(model, WRITERS[task](folder / "rows.jsonl"), folder, task=task)
        self._words += ["task.save_interval=5", "task.keep_checkpoints=99", *more]
        self._server, self._folder, self._task, self._seed, self.tally = server, folder, task, seed, tally
        self._moments = folder / "moments"
        self._whole = Victim(server, self._words, folder / "whole", by_root_dir=False)
        self._lasts = durations(self._start(self._whole, cold=False, cache="cache"), self._moments)

    def _start(self, victim: Victim, *, cold: bool, cache: str) -> Job:
        self._moments.with_name(f"{self._moments.name}-0").unlink(missing_ok=True)
        telling = setup(self._moments, self._task, cold=cold)
        return victim.start(cold=cold, setup=telling, SHEEPRLHF_CACHE=str(self._folder / cache))

    def run(self, numbers: deque[int]) -> None:
        while numbers:
            self.tally.counts["runs"] += 1
            place = self._folder / f"run-{self.tally.counts['runs']}"
            victim = Victim(self._server, self._words, place, by_root_dir=False)
            newest = 0
            while not victim.is_finished():
                newest = self._signalled(victim, numbers, newest)
            if found := differing_bytes(victim.dir, self._whole.dir):
                print(f"{victim.dir} differs: {dict(found)}", flush=True)
                self.tally.faults["differing"] += found.total()
            assert not victim.temporaries()

    def _signalled(self, victim: Victim, numbers: deque[int], newest: int) -> int:
        """Start the run and signal it until it has ended; the newest step that is saved then."""
        plans = [plan_of(number, self._seed, self._task) for number in list(numbers)]
        first = plans[0] if plans else None
        fresh, cold = first is not None and first.aim in UNPREPARED, first is not None and first.cold
        cache = f"cache-{first.number}-{time.monotonic_ns()}" if first and fresh else "cache"
        job = self._start(victim, cold=cold, cache=cache)
        strikes: list[Strike] = []
        for plan in plans:
            if plan is not first and (plan.cold or plan.aim in (*UNPREPARED, "start")):
                break  # needs a start of its own
            struck = strike(job, self._moments, plan, self._lasts, max(1 - newest / LAST, 0.3))
            if struck is None:  # too late: the machine was slower when this was measured
                self._lasts = {phase: 0.8 * seconds for phase, seconds in self._lasts.items()}
                break
            numbers.popleft()
            strikes.append(struck)
            if plan.kind != "SIGUSR1":
                break
        code = job.wait()
        ended = time.monotonic()
        self._count(strikes, cold, ended)
        for what, told_of in self._problems(victim, job, code, ended, strikes, newest):
            self.tally.faults[what] += 1
            hit = "; ".join(f"{s.plan.number} {s.plan.kind} in {s.before.phase}, step {s.before.step}" for s in strikes)
            print(f"{what}: {told_of}: {self._task}, seed {self._seed}, signals {hit}\n{job.text()}", flush=True)
        found: list[str] = []
        path = latest_checkpoint(victim.dir, found.append)
        assert found == [], found
        return 0 if path is None else int(path.name.removeprefix("step-"))

    def _count(self, strikes: list[Strike], cold: bool, ended: float) -> None:
        tally = self.tally
        tally.counts.update(starts=1, cold_starts=cold, cold=cold * len(strikes))
        tally.kinds.update(struck.plan.kind for struck in strikes)
        tally.phases.update(struck.before.phase for struck in strikes)
        if strikes and strikes[-1].plan.kind == TWICE:
            tally.second_exit = max(tally.second_exit, ended - strikes[-1].at)
        elif strikes and strikes[-1].plan.kind != "SIGUSR1":
            tally.exit = max(tally.exit, ended - strikes[-1].at)

    def _problems(
        self, victim: Victim, job: Job, code: int, ended: float, strikes: list[Strike], newest: int
    ) -> list[tuple[str, str]]:
        """What is not as promised: the tally's name for it, and what was found."""
        found, text = [], job.text()
        finished = victim.is_finished()
        last = strikes[-1] if strikes and strikes[-1].plan.kind != "SIGUSR1" else None
        allowed = {0} if finished else set()
        if last is not None:
            signum = KINDS[last.plan.kind]
            allowed.add(128 + signum)
            if signum != signal.SIGINT and (finished or last.before.phase in BEFORE):
                allowed.add(-signum)  # the same to a shell: the signal itself ends it, while Python starts or ends
        if code not in allowed:
            found.append(("wrong", f"exit code {code}, not {sorted(allowed)}"))
        if "Traceback" in text:
            found.append(("wrong", "a traceback"))
        if last is not None and last.plan.kind == TWICE and ended - last.at > LONGEST_SECOND_EXIT:
            found.append(("wrong", f"a second Ctrl-C took {ended - last.at:.1f} s"))
        began = next((line for line in text.splitlines() if line.startswith(("going on after", "starting at"))), None)
        if began is not None and int(began.rpartition(" ")[2]) < newest:
            found.append(("lost", f"{began!r}, and step {newest} was saved"))
        saved = set(saved_steps(victim.dir / "checkpoints"))
        end = last_moment(self._moments)
        for struck in strikes:
            steps = range(struck.before.step, struck.after.step + self._between + 1)
            cut_off = last is not None and last.plan.kind == TWICE and end is not None and end.step < steps.stop
            if struck.before.phase not in BEFORE and not cut_off and not saved & set(steps):
                found.append(("late", f"none of steps {steps.start} to {steps.stop - 1} is saved, but {sorted(saved)}"))
        return found


def campaign(server: JobServer, tmp_path: Path, model: Path, numbers: range, seed: int, minutes: float = 1e9) -> Tally:
    """The scenarios take blocks of the numbers in turn; no block is begun after so many minutes."""
    tally, ends = Tally(), time.monotonic() + 60 * minutes
    parts: dict[str, Campaign] = {}
    for first in range(0, numbers.stop, BLOCK):
        task = list(SCENARIOS)[first // BLOCK % len(SCENARIOS)]
        block = deque(number for number in range(first, first + BLOCK) if number in numbers)
        if not block or time.monotonic() > ends:
            continue
        if task not in parts:
            parts[task] = Campaign(server, tmp_path / task, model, task, seed, tally)
        parts[task].run(block)
        print(f"{task}, up to signal {first + BLOCK}, seed {seed}: {tally}", flush=True)
    return tally


@pytest.mark.nightly
def test_campaign(server: JobServer, tmp_path: Path, model_folder: ModelFolder) -> None:
    total, seed = int(os.environ.get("SIGNALS", "200")), int(os.environ.get("SEED", "2026"))
    only, minutes = os.environ.get("SIGNAL"), os.environ.get("MINUTES")
    numbers = range(total) if only is None else range(int(only), int(only) + 1)
    began = time.monotonic()
    tally = campaign(server, tmp_path, model_folder(), numbers, seed, float(minutes or 1e9))
    counts = tally.counts
    row: dict[str, object] = {
        "signals": tally.kinds.total(),
        "of each kind": ", ".join(f"{kind} {tally.kinds[kind]}" for kind in KINDS),
        "in cold starts": counts["cold"],
        "starts (cold)": f"{counts['starts']} ({counts['cold_starts']})",
        "runs": counts["runs"],
        **tally.faults,
        "longest exit": f"{tally.exit:.1f} s",
        "after a second Ctrl-C": f"{tally.second_exit:.2f} s",
    }
    print_row(row, seed, began)
    print("hit: " + ", ".join(f"{phase} {count}" for phase, count in tally.phases.most_common()))
    assert minutes or tally.kinds.total() == len(numbers)
    assert not tally.faults.total()
