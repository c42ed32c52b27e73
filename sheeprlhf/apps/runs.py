"""The files of runs for `list`, `report`, `pipeline` and `export`; untrusted, half written or of any size."""

import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sheeprlhf.apps.terminal import clean, counted, is_number
from sheeprlhf.config.registry import leaves
from sheeprlhf.config.run_lookup import REPORT_FILE, RUN_FILE, order_of, read_run_config
from sheeprlhf.engine.rundir import is_locked
from sheeprlhf.security.json_records import DATA_REPORT, RESULT, RUN, STATE, Schema, load_json
from sheeprlhf.security.redaction import redact
from sheeprlhf.utils.errors import ConfigError, DataError, RecordError
from sheeprlhf.utils.output import read_small, read_tail, real_path

MAX_DEPTH = 8  # root_dir/<data>/<model>/<task>/<time>/<run_name>, and some room
MAX_FOLDERS = 20_000
_MAX_NAMES = 5_000  # in one folder
_MAX_FILES = 200  # of one kind, of one run
_MAX_JSON = 100_000  # bytes
_TAIL_BYTES = 65_536  # bytes of metrics.csv: many rows
_NAME_COLUMNS = 16  # columns of a name: helpful_harmless
_UNKNOWN = "?"
_RUN_FILES = {RUN_FILE, "config.yaml", "metrics.csv", "checkpoints", "final"}
_MAIN_NUMBERS = {  # of the numbers of an evaluation; of another one, all
    "preference": ("accuracy", "margin"),
    "reward": ("score", "win_rate", "kl"),
    "generate": (),
    "frontier": (),
}
_VALIDATION_TAGS = {  # tags of a validation that tell more than its loss
    "val/rewards/accuracies": "accuracy",
    "val/rewards/margins": "margin",
}
_GROUPS = ("data", "model", "task")


class Curve(NamedTuple):
    """The finite numbers of one tag by step, and the time of each (seconds since 1970)."""

    steps: list[int]
    values: list[float]
    times: list[float]


class FoundRuns(NamedTuple):
    """Run directories, newest first, and what kept the search from being complete, if anything."""

    runs: list[tuple[Path, dict[str, Any]]]
    note: str


class PastRun(NamedTuple):
    """One run; every text is fit for a terminal."""

    dir: Path  # its directory
    started: str  # local time, empty if unknown
    names: tuple[str, str, str]  # of data, model and task
    state: str  # finished, stopped early, running, unfinished; unreadable or unknown if run.json is damaged or missing
    step: int | None  # optimizer steps done, None if unknown
    best: float | None  # the best validation result, None if there is none
    results: list[str]  # the newest of each metric, such as "perplexity 38.06", or figures of a validation on pairs
    problems: list[str]  # one sentence for each of its files that is damaged


def find_past_runs(root: Path) -> FoundRuns:
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
        if RUN_FILE in names or len(_RUN_FILES & set(names)) > 1:
            runs.append((folder, _read_object(folder, RUN_FILE, RUN, [])))
        elif depth < MAX_DEPTH:
            below = sorted((name for name, is_dir in names.items() if is_dir and name[0] != "."), reverse=True)
            waiting.extend((folder / name, depth + 1) for name in below)
    notes = [f"not all was searched: {MAX_FOLDERS:,} folders are the limit"] if waiting else []
    notes += [f"{counted(unreadable, 'folder')} could not be read"] if unreadable else []
    return FoundRuns(sorted(runs, key=run_order, reverse=True), "; ".join(notes))


def run_order(run: tuple[Path, dict[str, Any]]) -> tuple[float, str]:
    """Key that sorts runs by their start."""
    folder, info = run
    return order_of(info), str(folder)


def past_run(folder: Path, info: dict[str, Any]) -> PastRun:
    """Summary of a run; `info` is the content of its run.json, empty if it has none that can be read."""
    problems: list[str] = []
    if not info:
        _read_object(folder, RUN_FILE, RUN, problems)
    names, finished = _names(folder, info), info.get("status") == "finished"
    progress = info if finished else _newest_state(folder, problems)
    logged, _ = _parse_metrics(_read_metrics(folder, _TAIL_BYTES))
    last_step = max((curve.steps[-1] for curve in logged.values()), default=0)
    steps = [step for step in (progress.get("step"), None if finished else last_step) if step]
    try:
        started = datetime.fromtimestamp(info["started"]).strftime("%Y-%m-%d %H:%M")
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        started = ""
    validated = [
        f"{_VALIDATION_TAGS[tag]} {curve.values[-1]:.4g} (validation)"
        for tag, curve in logged.items()
        if tag in _VALIDATION_TAGS
    ]
    return PastRun(
        folder,
        started,
        names,
        _state(folder, info),
        max(steps, default=0 if info else None),
        progress.get("best_metric"),
        _main_results(folder, names[0], problems) or validated,
        problems,
    )


def _state(folder: Path, info: dict[str, Any]) -> str:
    if not info:
        return "unreadable" if os.path.lexists(folder / RUN_FILE) else "unknown"
    if info.get("status") == "finished":
        return "stopped early" if info.get("stopped_early") else "finished"
    return "running" if is_locked(folder) else "unfinished"


def _names(folder: Path, info: dict[str, Any]) -> tuple[str, str, str]:
    """Names of data, model and task, from run.json, else from the saved configuration."""
    found = info
    if not info:
        try:
            if os.path.getsize(folder / "config.yaml") <= _MAX_JSON:
                saved = read_run_config(str(folder))
                found = {key: value.get("config_name") for key, value in saved.items() if isinstance(value, dict)}
        except (ConfigError, OSError):
            found = {}  # damaged or untrusted: shown as unknown
    names = (found.get(key) for key in _GROUPS)
    data, model, task = (clean(name, _NAME_COLUMNS) if isinstance(name, str) else _UNKNOWN for name in names)
    return data, model, task


def _newest_state(folder: Path, problems: list[str]) -> dict[str, Any]:
    """State of the newest readable checkpoint; empty if there is none."""
    for step in sorted(_steps(_names_in(folder, "checkpoints"), "step-"), reverse=True):
        if state := _read_object(folder, f"checkpoints/step-{step}/state.json", STATE, problems):
            return state
    return {}


def _steps(names: list[str], prefix: str, suffix: str = "") -> list[int]:
    """Steps in the names of checkpoints or sample files."""
    texts = [name.removeprefix(prefix).removesuffix(suffix) for name in names if name.startswith(prefix)]
    return [int(text) for text in texts if text.isdecimal() and len(text) < 13]


def read_results(folder: Path, problems: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Name and content of each result of an evaluation; of a damaged one a problem."""
    names = _names_in(folder, "eval", ".json")[:_MAX_FILES]
    read = [(name.removesuffix(".json"), _read_object(folder, f"eval/{name}", RESULT, problems)) for name in names]
    return [(name, record) for name, record in read if record]


def _main_results(folder: Path, data: str, problems: list[str]) -> list[str]:
    """The newest number of each metric in eval/*.json; what is not of the final weights on the test split says so."""
    newest: dict[str, tuple[float, str]] = {}
    for _, record in read_results(folder, problems):
        usual = {"weights": "final", "split": "test"} | ({"data": data} if data != _UNKNOWN else {})
        said = {key: clean(record.get(key, value), _NAME_COLUMNS) for key, value in usual.items()}
        odd = [said[key] for key, value in usual.items() if said[key] != value]
        when = _time_of(record.get("time"))
        for key in _MAIN_NUMBERS.get(record.get("task", ""), tuple(record)):
            number = record.get(key)
            if isinstance(number, float) and is_number(number) and when >= newest.get(key, (0.0, ""))[0]:
                text = f"{clean(key, _NAME_COLUMNS)} {number:.4g}" + (f" ({', '.join(odd)})" if odd else "")
                newest[key] = when, text
    return [text for _, text in newest.values()]


def _time_of(text: Any) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError, OverflowError, OSError):
        return 0.0


MARK = "sheeprlhf report"  # in every file that the report writes; only files with it are overwritten
_METRICS_BYTES = 32 << 20
_MAX_TAGS = 150
_ROWS_BYTES = 16 << 20
_MAX_SAMPLES = 100  # files
_SAMPLE_BYTES = 1 << 20
_IMAGE_BYTES = 1 << 20
_MAX_NUMBERS = 60  # of an evaluation
_MAX_POINTS = 80
_MAX_EXCHANGES = 2_000
_MAX_TEXT = 3_000  # characters
_MAX_ROLLOUTS = 20
_MAX_ROLLOUT_ROWS, _MAX_ROLLOUT_COLUMNS = 64, 20
_ROLLOUT_BYTES = 256 << 20
_PNG = b"\x89PNG\r\n\x1a\n"

_HEADER = re.compile(r"(?m)^\[(prompt|model|best|worst|reference)\](.*)$")
_METRIC = re.compile(r"(\d{1,12}),(.*),([^,]*),([^,]*)")  # step, tag, value, time
_TOKENS = r"(?:<\|[^<>|\s]{1,24}\|>|</?s>|<(?:bos|eos|pad|unk|end_of_turn|start_of_turn)>)+"
_FIRST_TOKENS, _LAST_TOKENS = re.compile(rf"^{_TOKENS}"), re.compile(rf"{_TOKENS}$")

_FACTS = ("task", "split", "data", "model", "weights", "experiment_dir", "time", "version", "seed", "generation")
_END = "<end>"
_INTERVAL = "_interval"  # suffix of the key that holds a number's interval


class Answer(NamedTuple):
    """A generated or reference text."""

    step: int | None  # of the training in which it was generated; None for an evaluation or a reference
    note: str  # its score and the like
    text: str  # without control tokens at its ends
    end: str  # the control tokens at its end, `_END` if they are not written; empty if unknown, or the text was cut

    def label(self) -> str:
        """Step and note."""
        step = "" if self.step is None else f"step {self.step:,}"
        return ", ".join(filter(None, (step, self.note)))


class Exchange(NamedTuple):
    """A prompt, the dataset's responses, and the generated answers, oldest first."""

    prompt: str
    references: list[Answer]
    answers: list[Answer]


class Evaluation(NamedTuple):
    """One result file."""

    title: str  # metric and data: "rouge on docstrings/test", "reward by length on docstrings/test"
    weights: str  # the evaluated weights
    numbers: dict[str, tuple[float, ...]]  # by name: a number, an interval, or a number with its interval
    lists: dict[str, list[dict[str, Any]]]  # points by name, such as those of a calibration


class Record(NamedTuple):
    """Everything that is shown of a run; `notes` lists what could not be read."""

    label: str  # name of the run on the page
    past: PastRun
    info: dict[str, Any]
    config: dict[str, Any]
    curves: dict[str, Curve]
    evaluations: list[Evaluation]
    samples: dict[str, Exchange]
    generations: dict[str, dict[str, Exchange]]
    rollouts: dict[str, Exchange]
    data: dict[str, Any]
    images: dict[str, bytes]
    notes: list[str]


def read_record(folder: Path, info: dict[str, Any]) -> Record:
    """Read a run, which has no label yet; missing and damaged files are left out and noted."""
    past = past_run(folder, info)
    notes = [f"left out: {problem}" for problem in past.problems]
    if past.state == "running":
        notes.append("is running: this is how far it was")
    elif past.state not in ("finished", "stopped early"):
        notes.append(f"its state is {past.state}" if past.state != "unfinished" else "is not finished")
    curves = _read_curves(folder, notes)
    evaluations = [parse_evaluation(name, content) for name, content in read_results(folder, [])]
    rows = {
        clean(name.removesuffix(".jsonl")): parse_rows(_read_text(folder, f"eval/{name}", _ROWS_BYTES, notes))
        for name in _names_in(folder, "eval", ".jsonl")[:_MAX_FILES]
    }
    newest = sorted(_steps(_names_in(folder, "samples", ".txt"), "step-", ".txt"))[-_MAX_SAMPLES:]
    samples = [(step, _read_text(folder, f"samples/step-{step}.txt", _SAMPLE_BYTES, notes)) for step in newest]
    problems: list[str] = []
    data = _read_object(folder, REPORT_FILE, DATA_REPORT, problems)
    notes += [f"left out: {problem}" for problem in problems]
    return Record(
        "",
        past,
        info,
        _read_config(folder, notes),
        curves,
        evaluations,
        parse_samples(samples),
        rows,
        _read_rollouts(folder, notes),
        data,
        dict(_read_images(folder)),
        notes,
    )


def _read_config(folder: Path, notes: list[str]) -> dict[str, Any]:
    """The saved configuration by dotted keys."""
    try:
        real_path(folder / "config.yaml", folder)
        saved = redact(read_run_config(str(folder)))
    except (ConfigError, OSError) as error:
        notes.append(f"its configuration cannot be read: {error}")
        return {}
    return {key.removesuffix(".config_name"): value for key, value in leaves(saved)}


def _read_metrics(folder: Path, num_bytes: int, notes: list[str] | None = None) -> bytes:
    """The last bytes of metrics.csv; none, and noted, if it cannot be read."""
    try:
        return read_tail(real_path(folder / "metrics.csv", folder), num_bytes)
    except OSError as error:
        if notes is not None:
            notes.append(f"metrics.csv cannot be read ({error.strerror or 'a link'}): no curves")
        return b""


def _parse_metrics(content: bytes) -> tuple[dict[str, Curve], int]:
    """The curves in the complete rows of metrics.csv, and the number of rows without a finite number."""
    points: dict[str, dict[int, tuple[float, float]]] = {}
    invalid = 0
    for line in content.decode(errors="replace").split("\n")[:-1]:  # the text after the last newline is half a row
        step, tag, *numbers = match.groups() if (match := _METRIC.fullmatch(line)) else ("", "")
        value, time = map(_parse_number, numbers or ("", ""))
        if value is not None and (tag in points or len(points) < _MAX_TAGS):
            points.setdefault(tag, {})[int(step)] = value, time or 0.0
        else:
            invalid += bool(line.strip()) and not line.startswith("step,")
    curves = {}
    for tag, found in points.items():
        steps = sorted(found)
        curves[clean(tag, 60)] = Curve(steps, [found[step][0] for step in steps], [found[step][1] for step in steps])
    return curves, invalid


def _read_curves(folder: Path, notes: list[str]) -> dict[str, Curve]:
    """The numbers of metrics.csv; those of its last part if the file is large."""
    num_notes = len(notes)
    content = _read_metrics(folder, _METRICS_BYTES, notes)
    if len(content) == _METRICS_BYTES:
        notes.append(f"metrics.csv is large: the curves are of its last {_METRICS_BYTES >> 20} MB")
        content = content.partition(b"\n")[2]  # it begins in the middle of a row
    curves, invalid = _parse_metrics(content)
    if invalid:
        notes.append(f"{counted(invalid, 'row')} of metrics.csv hold no finite number, or too many names: left out")
    if not curves and len(notes) == num_notes:
        notes.append("metrics.csv has no rows yet")
    return curves


def _parse_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if is_number(number) else None


def _read_images(folder: Path) -> Iterator[tuple[str, bytes]]:
    """The plots of evaluations; a calibration is drawn from its numbers instead."""
    for name in _names_in(folder, "eval", ".png")[:_MAX_FILES]:
        try:
            content = read_small(real_path(folder / "eval" / name, folder), _IMAGE_BYTES)
        except OSError:
            continue
        if content.startswith(_PNG) and not name.startswith("preference-"):
            yield clean(name.removesuffix(".png")), content


def _names_in(folder: Path, inside: str, suffix: str = "") -> list[str]:
    """Names of files in a folder of the run; none if it is missing, or a link."""
    try:
        with os.scandir(real_path(folder / inside, folder)) as entries:
            return sorted(entry.name for entry in islice(entries, _MAX_NAMES) if entry.name.endswith(suffix))
    except OSError:
        return []


def _read_object(folder: Path, inside: str, schema: Schema, problems: list[str]) -> dict[str, Any]:
    """The object of a JSON file of a run; empty, and a problem, if it is damaged."""
    try:
        return load_json(folder / inside, schema, root=folder)
    except RecordError as error:
        problems.append(str(error))
        return {}


def _read_text(folder: Path, inside: str, limit: int, notes: list[str]) -> str:
    try:
        return read_small(real_path(folder / inside, folder), limit).decode(errors="replace")
    except OSError:
        notes.append(f"{inside} is a link, no plain file, or larger than {limit >> 20} MB: left out")
        return ""


def parse_samples(files: Iterable[tuple[int, str]]) -> dict[str, Exchange]:
    """Exchanges in sample files, oldest first, by their prompt without white space and control tokens."""
    exchanges: dict[str, Exchange] = {}
    for step, content in files:
        exchange, scored = None, False  # texts of an RL task, which has scores, hold no control tokens
        _, *parts = _HEADER.split(re.sub(r"(?m)^--- .*$", "", content))
        for kind, note, body in zip(parts[::3], map(str.strip, parts[1::3]), parts[2::3], strict=True):
            if kind == "prompt":
                exchange = _exchange(exchanges, body)
            elif exchange is not None and kind == "reference":
                exchange.references.append(_answer(None, "", body, _END if scored else ""))
            elif exchange is not None:
                scored = note.startswith("score ")
                end = _END if scored and not note.endswith(", cut") else ""
                exchange.answers.append(_answer(step, note if kind == "model" else f"{kind}: {note}", body, end))
    return exchanges


def parse_rows(content: str) -> dict[str, Exchange]:
    """Exchanges in lines of JSON with a prompt and a response, likewise."""
    exchanges: dict[str, Exchange] = {}
    for line in content.split("\n")[:_MAX_EXCHANGES]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
            exchange = _exchange(exchanges, row["prompt"])
            if isinstance(row.get("reference"), str):
                exchange.references.append(_answer(None, "", row["reference"]))
            scores = {key: value for key, value in row.items() if isinstance(value, float)}
            note = ", ".join(f"{key} {value:.4g}" for key, value in scores.items())
            exchange.answers.append(_answer(None, note, row["response"]))
    return exchanges


def _read_rollouts(folder: Path, notes: list[str]) -> dict[str, Exchange]:
    """Exchanges in the first rows of the newest saved rollouts, each answer with its scores."""
    exchanges: dict[str, Exchange] = {}
    for name in _names_in(folder, "rollouts", ".parquet")[-_MAX_ROLLOUTS:]:
        try:
            rows = _first_rows(real_path(folder / "rollouts" / name, folder))
        except (DataError, OSError) as error:
            notes.append(f"rollouts/{clean(name)} cannot be read: left out ({clean(error)})")
            continue
        for row in rows:
            scores = {key: value for key, value in row.items() if key.startswith(("score", "reward/"))}
            note = ", ".join(f"{key.removeprefix('reward/')} {value:.4g}" for key, value in scores.items())
            note, end = (note, _END) if row["finished"] else (f"{note}, cut", "")
            answer = _answer(row["step"], note, row["response"], end)
            _exchange(exchanges, row["prompt"]).answers.append(answer)
    return exchanges


def _first_rows(path: Path) -> list[dict[str, Any]]:
    """Texts and scores in the first rows of a saved rollout. Raises DataError if it is none, OSError if unreadable."""
    import pyarrow as pa  # slow to import, and needed for a run with saved rollouts only

    from sheeprlhf.data.read import open_parquet

    if not path.is_file() or path.stat().st_size > _ROLLOUT_BYTES:
        raise DataError(f"no plain file of at most {_ROLLOUT_BYTES >> 20} MB")
    file = open_parquet(path)
    kinds = {"prompt": pa.string(), "response": pa.string(), "step": pa.int64(), "finished": pa.bool_()}
    kinds |= {"score": pa.float64()}
    kinds |= {name: pa.float64() for name in file.schema_arrow.names if name.startswith("reward/")}
    schema = {field.name: field.type for field in file.schema_arrow}
    if any(schema.get(name) != kind for name, kind in kinds.items()):
        raise DataError("it has not the columns of a rollout")
    try:
        batch = next(file.iter_batches(_MAX_ROLLOUT_ROWS, columns=list(islice(kinds, _MAX_ROLLOUT_COLUMNS))), None)
        rows: list[dict[str, Any]] = [] if batch is None else batch.to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(str(error)) from error
    return [row for row in rows if None not in row.values()]


def _exchange(exchanges: dict[str, Exchange], prompt: str) -> Exchange:
    shown = _LAST_TOKENS.sub("", _shorten(_FIRST_TOKENS.sub("", prompt.strip("\n"))))
    return exchanges.setdefault(" ".join(shown.split()), Exchange(shown, [], []))


def _answer(step: int | None, note: str, text: str, end: str = "") -> Answer:
    text = _FIRST_TOKENS.sub("", text.strip())
    written = _LAST_TOKENS.search(text[-200:])
    if written:
        text, end = text.removesuffix(written[0]).strip(), written[0]
    return Answer(step, note, _shorten(text), end)


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} … ({len(text) - _MAX_TEXT:,} more characters)"


def parse_evaluation(stem: str, record: dict[str, Any]) -> Evaluation:
    """A result file named <task>-<split>-<weights> or <task>-<judge>-<split>-<weights>, and its content."""
    task, data, split, weights = (clean(record.get(key, "?"), 24) for key in ("task", "data", "split", "weights"))
    judge = clean(stem.removesuffix(f"-{weights}").removesuffix(f"-{split}"), 40).removeprefix(f"{task}-")
    by = f" by {judge}" if judge != task and stem.startswith(f"{task}-") else ""
    results = {key: value for key, value in record.items() if key not in _FACTS}
    numbers: dict[str, tuple[float, ...]] = {}
    for name, values in _numbers(results, ""):
        if name in numbers or len(numbers) < _MAX_NUMBERS:
            numbers[name] = values
    lists = {
        clean(key.replace("_", " "), 50): value[:_MAX_POINTS]
        for key, value in results.items()
        if isinstance(value, list) and value and all(isinstance(point, dict) for point in value)
    }
    return Evaluation(f"{task}{by} on {data}/{split}", weights, numbers, lists)


def _numbers(tree: dict[str, Any], prefix: str, depth: int = 0) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Numbers by name; those of the model have no prefix, those of baselines have one."""
    for key, value in tree.items():
        name, interval = clean(f"{prefix}{key}".replace("_", " "), 50), tree.get(f"{key}{_INTERVAL}")
        is_interval = key.endswith(_INTERVAL) and key.removesuffix(_INTERVAL) in tree  # of another number
        if isinstance(value, dict) and depth < 3:
            inner = prefix if key in ("mean_low_high", "model") else f"{prefix}{key} "
            yield from _numbers(value, inner, depth + 1)
        elif is_number(value):
            yield name, (value, *(interval if interval is not None and _are_numbers(interval, 2) else ()))
        elif _are_numbers(value, 3) or (_are_numbers(value, 2) and not is_interval):
            yield name, tuple(value)


def _are_numbers(value: Any, size: int) -> bool:
    return isinstance(value, list) and len(value) == size and all(map(is_number, value))
