"""Past runs as `list` shows them, read from files that may be a stranger's, half written or of any size."""

import math
import os
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sheeprlhf.apps.terminal import clean
from sheeprlhf.config.run_lookup import order_of, read_run_config
from sheeprlhf.engine.rundir import RUN_FILE, is_locked, read_run
from sheeprlhf.security.files import read_tail
from sheeprlhf.security.json_records import Schema, load_json
from sheeprlhf.security.record_schemas import RESULT, STATE
from sheeprlhf.utils.errors import ConfigError, RecordError

MAX_DEPTH = 8  # root_dir/<data>/<model>/<task>/<time>/<run_name>, and some room
MAX_FOLDERS = 20_000
_MAX_NAMES = 5_000  # in one folder
_MAX_JSON = 100_000  # bytes
_MAX_RESULTS = 200  # files of one run
_TAIL = 65_536  # bytes of metrics.csv: many rows
_NAME = 16  # columns of a name: helpful_harmless
_UNKNOWN = "?"
_MARKS = {RUN_FILE, "config.yaml", "metrics.csv", "checkpoints", "final"}
_SHOWN = {  # of the numbers of an evaluation; of another one, all
    "preference": ("accuracy", "margin"),
    "reward": ("score", "win_rate", "kl"),
    "generate": (),
    "frontier": (),
}
_VALIDATED = {  # tags of a validation that tell more than its loss
    "val/rewards/accuracies": "accuracy",
    "val/rewards/margins": "margin",
}
_GROUPS = ("data", "model", "task")


class Found(NamedTuple):
    """Run directories, newest first, and what kept the search from being complete, if anything."""

    runs: list[tuple[Path, dict[str, Any]]]
    note: str


class PastRun(NamedTuple):
    """One run; every text is fit for a terminal.

    Attributes:
        dir: its directory.
        started: local time, empty if unknown.
        names: of data, model and task.
        state: finished, running or unfinished; unreadable or unknown if run.json is damaged or missing.
        step: optimizer steps done, None if unknown.
        best: the best validation result, None if there is none.
        results: the newest result of each metric, such as "perplexity 38.06", or what a validation told of pairs.
        problems: one sentence for each of its files that is damaged.
    """

    dir: Path
    started: str
    names: tuple[str, str, str]
    state: str
    step: int | None
    best: float | None
    results: list[str]
    problems: list[str]


def find_past_runs(root: Path) -> Found:
    """Every run directory at or below `root`, except below links, and what its run.json says."""
    runs, unreadable, seen = [], 0, 0
    waiting = deque([(root, 0)])
    while waiting and seen < MAX_FOLDERS:
        folder, depth = waiting.popleft()
        seen += 1
        try:
            with os.scandir(folder) as entries:
                names = {entry.name: entry.is_dir(follow_symlinks=False) for entry in islice(entries, _MAX_NAMES)}
        except OSError:
            unreadable += 1
            continue
        if RUN_FILE in names or len(_MARKS & set(names)) > 1:
            runs.append((folder, _read_run(folder, [])))
        elif depth < MAX_DEPTH:
            below = sorted((name for name, is_dir in names.items() if is_dir and name[0] != "."), reverse=True)
            waiting.extend((folder / name, depth + 1) for name in below)
    notes = [f"not all was searched: {MAX_FOLDERS:,} folders are the limit"] if waiting else []
    notes += [f"{unreadable} folder{'s' * (unreadable > 1)} could not be read"] if unreadable else []
    return Found(sorted(runs, key=_when, reverse=True), "; ".join(notes))


def _when(run: tuple[Path, dict[str, Any]]) -> tuple[float, str]:
    folder, info = run
    return order_of(info), str(folder)


def _read_run(folder: Path, problems: list[str]) -> dict[str, Any]:
    """The content of run.json; empty, and a problem, if it is damaged."""
    try:
        return read_run(folder)
    except RecordError as error:
        problems.append(str(error))
        return {}


def _read(path: Path, schema: Schema, problems: list[str]) -> dict[str, Any]:
    """The content of another file of a run; empty, and a problem, if it is damaged."""
    try:
        return load_json(path, schema)
    except RecordError as error:
        problems.append(str(error))
        return {}


def past_run(folder: Path, info: dict[str, Any]) -> PastRun:
    """Summary of a run.

    Args:
        folder: its directory.
        info: the content of its run.json; empty if it has none that can be read.
    """
    problems: list[str] = []
    if not info:
        _read_run(folder, problems)
    names, finished = _names(folder, info), info.get("status") == "finished"
    progress = info if finished else _newest_state(folder, problems)
    logged = _logged(folder)
    steps = [step for step in (progress.get("step"), None if finished else _last_step(logged)) if step]
    return PastRun(
        folder,
        _local_time(info.get("started")),
        names,
        _state(folder, info),
        max(steps, default=0 if info else None),
        progress.get("best_metric"),
        _results(folder, names[0], problems) or _validated(logged),
        problems,
    )


def _state(folder: Path, info: dict[str, Any]) -> str:
    if not info:
        return "unreadable" if os.path.lexists(folder / RUN_FILE) else "unknown"
    if info.get("status") == "finished":
        return "finished"
    return "running" if is_locked(folder) else "unfinished"


def _names(folder: Path, info: dict[str, Any]) -> tuple[str, str, str]:
    """Of data, model and task, from run.json, else from the saved configuration."""
    found = info
    if not info:
        try:
            if os.path.getsize(folder / "config.yaml") <= _MAX_JSON:
                saved = read_run_config(str(folder))
                found = {key: value.get("config_name") for key, value in saved.items() if isinstance(value, dict)}
        except (ConfigError, OSError):
            found = {}  # a stranger's: shown as unknown
    data, model, task = (clean(found[key], _NAME) if isinstance(found.get(key), str) else _UNKNOWN for key in _GROUPS)
    return data, model, task


def _newest_state(folder: Path, problems: list[str]) -> dict[str, Any]:
    """State of the newest readable checkpoint; empty if there is none."""
    try:
        with os.scandir(folder / "checkpoints") as entries:
            names = [entry.name for entry in islice(entries, _MAX_NAMES)]
    except OSError:
        return {}
    steps = [int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdecimal() and len(name) < 18]
    for step in sorted(steps, reverse=True):
        if state := _read(folder / "checkpoints" / f"step-{step}" / "state.json", STATE, problems):
            return state
    return {}


def _logged(folder: Path) -> list[str]:
    """The last complete rows of metrics.csv."""
    try:
        return read_tail(folder / "metrics.csv", _TAIL).decode(errors="replace").split("\n")[:-1]
    except OSError:
        return []


def _last_step(lines: list[str]) -> int | None:
    """The step of the last row."""
    first = lines[-1].partition(",")[0] if lines else ""
    return int(first) if first.isdecimal() and len(first) <= 12 else None


def _validated(lines: list[str]) -> list[str]:
    """Results of the newest validation on pairs."""
    newest: dict[str, str] = {}
    for line in lines:
        _, _, rest = line.partition(",")
        tag, _, rest = rest.partition(",")
        if tag in _VALIDATED:
            with suppress(ValueError):
                number = _finite(float(rest.partition(",")[0]))
                if number is not None:
                    newest[_VALIDATED[tag]] = f"{_VALIDATED[tag]} {number:.4g} (validation)"
    return list(newest.values())


def _results(folder: Path, data: str, problems: list[str]) -> list[str]:
    """The newest number of each metric in eval/*.json; what is not of the final weights on the test split says so."""
    newest: dict[str, tuple[float, str]] = {}
    for path in islice(_result_files(folder / "eval"), _MAX_RESULTS):
        record = _read(path, RESULT, problems)
        usual = {"weights": "final", "split": "test"} | ({"data": data} if data != _UNKNOWN else {})
        said = {key: clean(record.get(key, value), _NAME) for key, value in usual.items()}
        odd = [said[key] for key, value in usual.items() if said[key] != value]
        when, task = _time_of(record.get("time")), record.get("task", "")
        shown = _SHOWN.get(task, tuple(record))
        for key in shown:
            value = record.get(key)
            number = _finite(value) if isinstance(value, float) else None
            if number is not None and when >= newest.get(key, (0.0, ""))[0]:
                newest[key] = when, f"{clean(key, _NAME)} {number:.4g}" + (f" ({', '.join(odd)})" if odd else "")
    return [text for _, text in newest.values()]


def _result_files(folder: Path) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in islice(entries, _MAX_NAMES))
    except OSError:
        return
    yield from (folder / name for name in names if name.endswith(".json"))


def _local_time(seconds: Any) -> str:
    try:
        return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
    except (TypeError, ValueError, OverflowError, OSError):
        return ""


def _time_of(text: Any) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError, OverflowError, OSError):
        return 0.0


def _finite(value: Any) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > 1e300 or not math.isfinite(value):
        return None
    return float(value)
