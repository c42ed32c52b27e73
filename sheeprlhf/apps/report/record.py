"""A run as the report shows it, read from files that may be a stranger's, half written or of any size."""

import math
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sheeprlhf.apps.past_runs import PastRun, past_run
from sheeprlhf.apps.report.results import Evaluation, parse_evaluation
from sheeprlhf.apps.report.texts import Exchange, parse_rows, parse_samples
from sheeprlhf.apps.terminal import clean
from sheeprlhf.config.run_lookup import REPORT_FILE
from sheeprlhf.config.saved_config import read_run_config
from sheeprlhf.security.files import read_small, read_tail, real_path
from sheeprlhf.security.json_records import Schema, load_json
from sheeprlhf.security.record_schemas import DATA_REPORT, RESULT
from sheeprlhf.security.redaction import redact
from sheeprlhf.utils.errors import ConfigError, RecordError

_METRICS_BYTES = 32 << 20
_MAX_TAGS = 150
_ROWS_BYTES = 16 << 20
_SAMPLE_BYTES = 1 << 20
_IMAGE_BYTES = 1 << 20
_MAX_FILES = 100  # of one kind, of one run
_MAX_NAMES = 5_000  # of a folder
_PNG = b"\x89PNG\r\n\x1a\n"


class Curve(NamedTuple):
    """The finite numbers of one tag, by step, and when they were written (seconds since 1970)."""

    steps: list[int]
    values: list[float]
    times: list[float]


class Record(NamedTuple):
    """All that is shown of a run; `notes` says what could not be read."""

    label: str
    past: PastRun
    info: dict[str, Any]
    config: dict[str, Any]
    curves: dict[str, Curve]
    evaluations: list[Evaluation]
    samples: dict[str, Exchange]
    generations: dict[str, dict[str, Exchange]]
    data: dict[str, Any]
    images: dict[str, bytes]
    notes: list[str]


def read_record(folder: Path, info: dict[str, Any], label: str) -> Record:
    """Read a run; what is missing or damaged is left out and noted.

    Args:
        folder: the run's directory.
        info: the content of its run.json; empty if it has none that may be read.
        label: its short name on the page.
    """
    past = past_run(folder, info)
    notes = [f"left out: {problem}" for problem in past.problems]
    if past.state == "running":
        notes.append("is running: this is how far it was")
    elif past.state != "finished":
        notes.append(f"its state is {past.state}" if past.state != "unfinished" else "is not finished")
    curves = _curves(folder, notes)
    evaluations = []
    for name in _names(folder, "eval", ".json")[:_MAX_FILES]:
        found = _object(folder, f"eval/{name}", RESULT, notes)
        evaluations += [parse_evaluation(name.removesuffix(".json"), found)] if found else []
    rows = {
        name: _text(folder, f"eval/{name}", _ROWS_BYTES, notes)
        for name in _names(folder, "eval", ".jsonl")[:_MAX_FILES]
    }
    return Record(
        label,
        past,
        info,
        _config(folder, notes),
        curves,
        evaluations,
        parse_samples(_samples(folder, notes)),
        {clean(name.removesuffix(".jsonl")): parse_rows(content) for name, content in rows.items()},
        _object(folder, REPORT_FILE, DATA_REPORT, notes),
        dict(_images(folder)),
        notes,
    )


def _samples(folder: Path, notes: list[str]) -> list[tuple[int, str]]:
    """Step and content of the newest sample texts, oldest first."""
    steps = [name.removeprefix("step-").removesuffix(".txt") for name in _names(folder, "samples", ".txt")]
    newest = sorted(int(step) for step in steps if step.isdecimal() and len(step) < 13)[-_MAX_FILES:]
    return [(step, _text(folder, f"samples/step-{step}.txt", _SAMPLE_BYTES, notes)) for step in newest]


def _config(folder: Path, notes: list[str]) -> dict[str, Any]:
    """The saved configuration by dotted keys."""
    try:
        real_path(folder / "config.yaml", folder)
        saved = redact(read_run_config(str(folder)))
    except (ConfigError, OSError) as error:
        notes.append(f"its configuration cannot be read: {error}")
        return {}
    return dict(_flat(saved))


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}".removesuffix(".config_name"), value


def _curves(folder: Path, notes: list[str]) -> dict[str, Curve]:
    """What metrics.csv has; its newest part, if it is large."""
    try:
        content = read_tail(real_path(folder / "metrics.csv", folder), _METRICS_BYTES)
    except OSError as error:
        notes.append(f"metrics.csv cannot be read ({error.strerror or 'a link'}): no curves")
        return {}
    if len(content) == _METRICS_BYTES:
        notes.append(f"metrics.csv is large: the curves are of its last {_METRICS_BYTES >> 20} MB")
        content = content.partition(b"\n")[2]  # it begins in the middle of a row
    points: dict[str, dict[int, tuple[float, float]]] = {}
    odd = 0
    for line in content.decode(errors="replace").split("\n")[:-1]:  # what follows the last end of a line is half a row
        step, _, rest = line.partition(",")
        tag, *numbers = rest.rsplit(",", 2)
        value, time = map(_number, numbers) if len(numbers) == 2 else (None, None)
        if step.isdecimal() and len(step) < 13 and value is not None and (tag in points or len(points) < _MAX_TAGS):
            points.setdefault(tag, {})[int(step)] = value, time or 0.0
        else:
            odd += step != "step" and bool(line.strip())
    if odd:
        notes.append(f"{odd:,} row{'s' * (odd > 1)} of metrics.csv hold no finite number, or too many names: left out")
    if not points:
        notes.append("metrics.csv has no rows" + (" yet" if not odd else ""))
    return {
        clean(tag, 60): Curve(list(steps), [value for value, _ in steps.values()], [time for _, time in steps.values()])
        for tag, steps in ((tag, dict(sorted(found.items()))) for tag, found in points.items())
    }


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and abs(number) < 1e300 else None


def _images(folder: Path) -> Iterator[tuple[str, bytes]]:
    """The plots that evaluations have left."""
    for name in _names(folder, "eval", ".png")[:_MAX_FILES]:
        try:
            content = read_small(real_path(folder / "eval" / name, folder), _IMAGE_BYTES)
        except OSError:
            continue
        if content.startswith(_PNG):
            yield clean(name.removesuffix(".png")), content


def _names(folder: Path, inside: str, suffix: str) -> list[str]:
    """Files of a folder of the run; none if it is missing, or a link."""
    try:
        with os.scandir(real_path(folder / inside, folder)) as entries:
            return sorted(entry.name for entry in islice(entries, _MAX_NAMES) if entry.name.endswith(suffix))
    except OSError:
        return []


def _object(folder: Path, inside: str, schema: Schema, notes: list[str]) -> dict[str, Any]:
    """An object of a JSON file; empty, and noted, if it is damaged."""
    try:
        return load_json(folder / inside, schema, root=folder)
    except RecordError as error:
        note = f"left out: {error}"
        notes += [] if note in notes else [note]
        return {}


def _text(folder: Path, inside: str, limit: int, notes: list[str]) -> str:
    try:
        return read_small(real_path(folder / inside, folder), limit).decode(errors="replace")
    except OSError:
        notes.append(f"{inside} is a link, no plain file, or larger than {limit >> 20} MB: left out")
        return ""
