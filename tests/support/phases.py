"""What a running job does, told to its test through a small file: to aim signals and kills, and say what they hit."""

import importlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.jobs import Job

START, TRAINING = "start", "training"  # outside of all others, before and after the run listens to signals
BEFORE = (START, "data preparation", "reference")  # nothing can be saved yet
_PLACES = [  # where each begins and ends; inside one, no other is told
    ("data preparation", "sheeprlhf.data.prepare", "_build"),
    ("samples", "sheeprlhf.task.finish", "generate_responses"),
    ("save", "sheeprlhf.engine.run", "Run.save"),
    ("final folder", "sheeprlhf.task.finish", "write_folder"),
    ("final folder", "sheeprlhf.task.finish", "write_model"),
    ("all-reduce", "sheeprlhf.engine.step", "of_ranks"),
    ("all-reduce", "sheeprlhf.engine.step", "_reduce"),
]
_PLACES_OF_TASK = {
    "sft": [("validation", "sheeprlhf.task.train.sft", "evaluate")],
    "dpo": [
        ("validation", "sheeprlhf.task.train.dpo", "evaluate"),
        ("reference", "sheeprlhf.task.train.dpo", "reference_logprobs"),
    ],
    "ppo": [
        ("rollout", "sheeprlhf.rollout.rollout", "RolloutCollector.__call__"),
        ("validation", "sheeprlhf.task.loop", "RolloutValidator.__call__"),
    ],
}


class Moment(NamedTuple):
    """Where a job is.

    Attributes:
        step: optimizer steps done, as it shows them.
        phase: what it does.
    """

    step: int
    phase: str


class Recorder:
    """In the job: keeps the file up to date."""

    def __init__(self, path: str) -> None:
        self._path, self._file = path, -1
        self._step, self._phase, self._outside = 0, START, START

    def open(self) -> None:
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
        self._tell(START)

    def launched(self, launch: Any) -> Any:
        """Around the product's `launch`: before it, the program is not ours yet."""

        def telling(*words: Any, **options: Any) -> Any:
            self.open()
            return launch(*words, **options)

        return telling

    def _tell(self, phase: str) -> None:
        self._phase = phase
        os.pwrite(self._file, f"{self._step:>8} {phase:<24}\n".encode(), 0)

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        if self._phase != self._outside:
            yield
            return
        self._tell(phase)
        try:
            yield
        finally:
            self._tell(self._outside)

    def _at(self, step: int) -> None:
        self._step, self._outside = step, TRAINING
        self._tell(TRAINING)

    def named(self, phase: Any) -> Any:
        """Around the product's own phases of a step."""

        @contextmanager
        def telling(name: str) -> Iterator[None]:
            with phase(name), self.inside(name):
                yield

        return telling

    def begun(self, begin: Any) -> Any:
        """Around `Run.begin`, at whose end the run listens to signals."""

        def telling(run: Any, step: int) -> None:
            begin(run, step)
            self._at(step)

        return telling

    def shown(self, show: Any) -> Any:
        """Around `Run.show_progress`, which comes between a step and the look at signals after it."""

        def telling(run: Any, state: Any, *words: Any, **options: Any) -> None:
            self._at(state.step)
            show(run, state, *words, **options)

        return telling


def record(path: str, task: str, *, cold: bool) -> None:
    """In the job, before the command, or in a cold one before its task: tell what it does, in a file for each rank."""
    recorder = Recorder(f"{path}-{os.environ.get('LOCAL_RANK', '0')}")
    for phase, module, name in _PLACES + _PLACES_OF_TASK[task]:
        _patch(module, name, _telling(recorder, phase))
    _patch("sheeprlhf.engine.step", "phase", recorder.named)
    _patch("sheeprlhf.engine.run", "Run.begin", recorder.begun)
    _patch("sheeprlhf.engine.run", "Run.show_progress", recorder.shown)
    if cold:
        recorder.open()
    else:
        _patch("sheeprlhf.launch", "launch", recorder.launched)


def _telling(recorder: Recorder, phase: str) -> Callable[[Any], Any]:
    def around(function: Any) -> Any:
        @wraps(function)
        def telling(*words: Any, **options: Any) -> Any:
            with recorder.inside(phase):
                return function(*words, **options)

        return telling

    return around


def _patch(module: str, name: str, around: Callable[[Any], Any]) -> None:
    place: Any = importlib.import_module(module)
    *outer, attribute = name.split(".")
    for part in outer:
        place = getattr(place, part)
    setattr(place, attribute, around(getattr(place, attribute)))


def setup(path: Path, task: str, *, cold: bool) -> str:
    """The code that makes a job (see `JobServer.start`, and `site` for cold ones) tell its moments in `path`."""
    return f"from tests.support.phases import record\nrecord({str(path)!r}, {task!r}, cold={cold})\n"


def last_moment(path: Path, rank: int = 0) -> Moment | None:
    """In the test: where the job is, or was when it ended; None before it tells."""
    try:
        step, _, phase = path.with_name(f"{path.name}-{rank}").read_text().strip().partition(" ")
        return Moment(int(step), phase)
    except (OSError, ValueError):
        return None


def wait_until_in(job: Job, path: Path, phase: str, ranks: tuple[int, ...] = (0,)) -> bool:
    """Return when one of these ranks is in a phase; False if the job ended before."""
    while job.poll() is None:
        if any(moment is not None and moment.phase == phase for moment in (last_moment(path, rank) for rank in ranks)):
            return True
        time.sleep(0.0003)
    return False


def durations(job: Job, path: Path) -> dict[str, float]:
    """Let a job go through; mean seconds that it stays in each phase, and under "all" those it takes."""
    totals: dict[str, float] = {}
    visits: dict[str, int] = {}
    began = last = time.monotonic()
    before = ""
    while job.poll() is None:
        moment, now = last_moment(path), time.monotonic()
        if moment is not None:
            totals[moment.phase] = totals.get(moment.phase, 0.0) + now - last
            visits[moment.phase] = visits.get(moment.phase, 0) + (moment.phase != before)
            before = moment.phase
        last = now
        time.sleep(0.0003)
    assert job.wait() == 0, job.text()
    return {phase: totals[phase] / max(visits[phase], 1) for phase in totals} | {"all": time.monotonic() - began}
