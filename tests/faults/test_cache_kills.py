"""Two processes prepare the same data and are killed meanwhile, one or both: nothing torn stays, nothing foreign goes.

The campaign (docs/reliability.md has its table):
`KILLS=50 SEED=2026 pytest -n 0 -m nightly -s tests/faults/test_cache_kills.py`; the seed and its number decide about a
round, and `ROUND=<n>` beside them repeats it alone.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.test_kill import versions
from tests.support.jobs import ColdJob, Job, JobServer, site
from tests.support.phases import durations, setup, told
from tests.support.runs import train_words, write_rows

ModelFolder = Callable[..., Path]
COLD_EVERY = 10  # rounds; these tokenise in two more processes each
STOP = """
import sheeprlhf.task.loop as loop
def prepared(*_):
    raise SystemExit(0)
loop.report_data = prepared
"""  # in a cold job: it has read what was prepared, and no model loads
PREPARE = """
from sheeprlhf.data.prepare import prepare_data
from sheeprlhf.model.load import load_tokenizer
from sheeprlhf.structure.data import LocalDataConfig
from sheeprlhf.structure.model import AutoModelConfig
files = dict(train_file={rows!r}, validation_file={few!r}, test_file={few!r})
cfg = LocalDataConfig(**files, max_length=120, max_prompt_length=70)
prepare_data(cfg, load_tokenizer(AutoModelConfig(repo_name={model!r})), kind="sft", say=print, progress=False)
raise SystemExit(0)
"""  # a warm one does only this, as the command does; the cold ones show that it comes to the same
VICTIMS = ("first", "second", "both")


@dataclass
class Tally:
    """What a campaign did and found."""

    rounds: int = 0
    kills: int = 0
    cold: int = 0
    victims: Counter[str] = field(default_factory=Counter)
    before: int = 0  # kills before the folder was there
    left: int = 0  # rounds after which a half-made folder lay about, which the next start has to remove
    torn: int = 0  # other content than without a kill
    failed: int = 0  # survivors, or next starts, that did not end well
    foreign: int = 0  # what was not ours and has changed
    orphans: int = 0

    def faults(self) -> tuple[int, ...]:
        return self.torn, self.failed, self.foreign, self.orphans


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def prepared(cache: Path) -> list[Path]:
    """The folders of prepared data."""
    return [path for path in (cache / "data").glob("local-*") if path.is_dir()]


def leftovers(cache: Path) -> list[Path]:
    return [path for path in (cache / "data").glob(".local-*.tmp-*") if not (path / "mine.txt").exists()]


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


class Wanted(NamedTuple):
    """The data, as code that prepares it and as the words of a command that does."""

    code: str
    words: list[str]


class Round:
    """One cache, two runs that want it, and what of it was there before and is nobody's business."""

    def __init__(self, server: JobServer, folder: Path, wanted: Wanted, name: str, *, cold: bool) -> None:
        folder.mkdir()
        self.folder, self.cache, self._server, self._wanted, self._cold = folder, folder / "cache", server, wanted, cold
        for foreign in (f".{name}.tmp-0badcafe", "notes"):
            (self.cache / "data" / foreign).mkdir(parents=True)
            (self.cache / "data" / foreign / "mine.txt").write_text("not made by us")

    def start(self, name: str) -> Job:
        log, telling = self.folder / f"{name}.log", setup(self.folder / f"told-{name}", "sft", cold=True)
        if not self._cold:
            return self._server.start([], log, telling + self._wanted.code, SHEEPRLHF_CACHE=str(self.cache))
        path = site(log.with_suffix(".site"), telling + STOP)
        words = [*self._wanted.words, f"hydra.run.dir={self.folder / name}", "data.num_proc=2"]
        return ColdJob(words, log, OMP_NUM_THREADS="1", PYTHONPATH=path, SHEEPRLHF_CACHE=str(self.cache))

    def is_preparing(self) -> bool:
        moments = (told(self.folder / f"told-{name}") for name in ("first", "second"))
        return any(moment is not None and moment.phase == "data preparation" for moment in moments)

    def foreign(self) -> list[str]:
        return [path.read_text() for path in (self.cache / "data").glob("*/mine.txt")]


def play(round_: Round, rng: random.Random, lasts: float, expected: dict[str, bytes], tally: Tally) -> bool:
    """One round; False if all was prepared before the kill, which comes within about `lasts` seconds."""
    jobs = {"first": round_.start("first")}
    time.sleep(rng.choice((0.0, rng.uniform(0, lasts))))
    jobs["second"] = round_.start("second")
    while not round_.is_preparing() and not prepared(round_.cache):
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, lasts * 1.2))
    who = rng.choice(VICTIMS)
    killed = [name for name in jobs if who in (name, "both") and jobs[name].poll() is None]
    before = not prepared(round_.cache)
    for name in killed:
        jobs[name].kill()
    codes = {name: jobs[name].wait() for name in killed}
    killed = [name for name, code in codes.items() if code == -signal.SIGKILL]  # others ended just before the kill
    if not killed:
        return False
    tally.kills += len(killed)
    tally.victims[who] += 1
    tally.before += before
    survivors = [name for name in jobs if name not in killed]
    tally.failed += sum(jobs[name].wait() != 0 for name in survivors)
    tally.left += bool(leftovers(round_.cache))
    tally.torn += any(content_of(folder) != expected for folder in prepared(round_.cache))
    deadline = time.monotonic() + 60  # who was just started looks at its parent when it is imported
    while (orphans := processes_with(f"SHEEPRLHF_CACHE={round_.cache}")) and time.monotonic() < deadline:
        time.sleep(0.05)
    tally.orphans += len(orphans)
    for pid in orphans:
        os.kill(pid, signal.SIGKILL)
    job = round_.start("next")
    tally.failed += job.wait() != 0
    tally.torn += [content_of(folder) for folder in prepared(round_.cache)] != [expected]
    tally.foreign += len(leftovers(round_.cache)) > 0 or round_.foreign() != ["not made by us"] * 2
    return True


def campaign(server: JobServer, tmp_path: Path, model: Path, numbers: list[int], seed: int) -> Tally:
    tally = Tally()
    rows, few = write_rows(tmp_path / "rows.jsonl", 3000), write_rows(tmp_path / "few.jsonl")
    words = [word for word in train_words(model, rows, tmp_path) if not word.startswith(("hydra.run.dir=", "data.v"))]
    words = [word for word in words if not word.startswith("data.test")]
    words += [f"data.{split}_file={few}" for split in ("validation", "test")]
    wanted = Wanted(PREPARE.format(rows=str(rows), few=str(few), model=str(model)), words)
    quiet = Round(server, tmp_path / "undisturbed", wanted, "none", cold=False)
    lasts = durations(quiet.start("first"), tmp_path / "undisturbed" / "told-first")
    [folder] = prepared(quiet.cache)
    expected = content_of(folder)
    for number in numbers:
        rng, cold = random.Random(f"{seed} {number}"), number % COLD_EVERY == COLD_EVERY // 2
        for attempt in range(20):
            faults = tally.faults()
            round_ = Round(server, tmp_path / f"round-{number}-{attempt}", wanted, folder.name, cold=cold)
            if play(round_, rng, lasts["data preparation"] * 0.8**attempt, expected, tally):
                tally.rounds += 1
                tally.cold += cold
                break
        if tally.faults() != faults:
            print(f"round {number} of seed {seed}: {tally}", flush=True)
            for path in round_.folder.glob("*.log"):
                print(f"--- {path.name}\n{path.read_text(errors='replace')}", flush=True)
    return tally


@pytest.mark.slow
def test_kills_while_two_processes_prepare(server: JobServer, tmp_path: Path, model_folder: ModelFolder) -> None:
    tally = campaign(server, tmp_path, model_folder(), [0, 1], int(os.environ.get("SEED", "7")))
    assert tally.rounds == 2
    assert tally.faults() == (0, 0, 0, 0)


@pytest.mark.nightly
def test_campaign(server: JobServer, tmp_path: Path, model_folder: ModelFolder) -> None:
    rounds, seed = int(os.environ.get("KILLS", "50")), int(os.environ.get("SEED", "2026"))
    only = os.environ.get("ROUND")
    numbers = list(range(rounds)) if only is None else [int(only)]
    began = time.monotonic()
    tally = campaign(server, tmp_path, model_folder(), numbers, seed)
    print(
        "| rounds | kills | of whom | cold rounds | before the data was there | half-made folders left | torn | "
        "failed | foreign changed | orphans | seed | minutes | versions |"
    )
    print(
        f"| {tally.rounds} | {tally.kills} | {', '.join(f'{who} {tally.victims[who]}' for who in VICTIMS)} | "
        f"{tally.cold} | {tally.before} | {tally.left} | {' | '.join(map(str, tally.faults()))} | {seed} | "
        f"{(time.monotonic() - began) / 60:.1f} | {versions()} |"
    )
    assert tally.rounds == len(numbers)
    assert tally.faults() == (0, 0, 0, 0)
