"""The content of a run's files as the report shows it. They may be untrusted, half written or of any size."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sheeprlhf.apps.list import PastRun, past_run
from sheeprlhf.apps.pipeline import COLUMNS, RESULT_FILES, Row
from sheeprlhf.apps.terminal import clean, is_number
from sheeprlhf.config.run_lookup import REPORT_FILE, read_run_config
from sheeprlhf.engine.rundir import leaves
from sheeprlhf.security.files import read_small, read_tail, real_path
from sheeprlhf.security.json_records import DATA_REPORT, RESULT, Schema, load_json
from sheeprlhf.security.redaction import redact
from sheeprlhf.utils.errors import ConfigError, DataError, RecordError

MARK = "sheeprlhf report"  # in every file that the report writes; only files with it are overwritten
_METRICS_BYTES = 32 << 20
_MAX_TAGS = 150
_ROWS_BYTES = 16 << 20
_SAMPLE_BYTES = 1 << 20
_IMAGE_BYTES = 1 << 20
_MAX_FILES = 100  # of one kind, of one run
_MAX_NAMES = 5_000  # of a folder
_MAX_STAGES = 60
_MAX_NUMBERS = 60  # of an evaluation
_MAX_POINTS = 80
_MAX_EXCHANGES = 2_000
_MAX_TEXT = 3_000  # characters
_MAX_ROLLOUTS = 20
_MAX_ROLLOUT_ROWS, _MAX_ROLLOUT_COLUMNS = 64, 20
_ROLLOUT_BYTES = 256 << 20
_PNG = b"\x89PNG\r\n\x1a\n"

_HEADER = re.compile(r"\[(prompt|model|best|worst|reference)\](.*)")
_TOKENS = r"(?:<\|[^<>|\s]{1,24}\|>|</?s>|<(?:bos|eos|pad|unk|end_of_turn|start_of_turn)>)+"
_FIRST_TOKENS, _LAST_TOKENS = re.compile(rf"^{_TOKENS}"), re.compile(rf"{_TOKENS}$")

_FACTS = ("task", "split", "data", "model", "weights", "experiment_dir", "time", "version", "seed", "generation")
_INTERVAL = "_interval"  # suffix of the key that holds a number's interval


class Curve(NamedTuple):
    """The finite numbers of one tag by step, and the time of each (seconds since 1970)."""

    steps: list[int]
    values: list[float]
    times: list[float]


class Answer(NamedTuple):
    """A generated or reference text.

    Attributes:
        step: of the training in which it was generated; None for an evaluation or a reference.
        note: its score and the like.
        text: without control tokens at its ends.
        end: the control tokens at its end; empty where the file has none, or the text was cut.
    """

    step: int | None
    note: str
    text: str
    end: str

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
    """One result file.

    Attributes:
        title: metric and data: "rouge on docstrings/test", "reward by length on docstrings/test".
        weights: the evaluated weights.
        numbers: by name: a number, an interval, or a number with its interval.
        lists: points by name, such as those of a calibration.
    """

    title: str
    weights: str
    numbers: dict[str, tuple[float, ...]]
    lists: dict[str, list[dict[str, Any]]]


class Record(NamedTuple):
    """Everything that is shown of a run; `notes` lists what could not be read."""

    label: str
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


def read_record(folder: Path, info: dict[str, Any], label: str) -> Record:
    """Read a run; missing and damaged files are left out and noted.

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
    curves = _read_curves(folder, notes)
    evaluations = []
    for name in _names(folder, "eval", ".json")[:_MAX_FILES]:
        content = _read_object(folder, f"eval/{name}", RESULT, notes)
        evaluations += [parse_evaluation(name.removesuffix(".json"), content)] if content else []
    rows = {
        clean(name.removesuffix(".jsonl")): parse_rows(_read_text(folder, f"eval/{name}", _ROWS_BYTES, notes))
        for name in _names(folder, "eval", ".jsonl")[:_MAX_FILES]
    }
    steps = [name.removeprefix("step-").removesuffix(".txt") for name in _names(folder, "samples", ".txt")]
    newest = sorted(int(step) for step in steps if step.isdecimal() and len(step) < 13)[-_MAX_FILES:]
    samples = [(step, _read_text(folder, f"samples/step-{step}.txt", _SAMPLE_BYTES, notes)) for step in newest]
    return Record(
        label,
        past,
        info,
        _read_config(folder, notes),
        curves,
        evaluations,
        parse_samples(samples),
        rows,
        _read_rollouts(folder, notes),
        _read_object(folder, REPORT_FILE, DATA_REPORT, notes),
        dict(_read_images(folder)),
        notes,
    )


def read_pipeline(folder: Path, notes: list[str]) -> list[Row]:
    """The stages in a pipeline's results.json; none if the folder is not of a finished pipeline."""
    name = RESULT_FILES[2]
    if not os.path.lexists(folder / name):
        return []
    try:
        content = json.loads(read_small(real_path(folder / name, folder), _SAMPLE_BYTES))
        stages = [stage for stage in content[:_MAX_STAGES] if isinstance(stage["stage"], str)]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        notes.append(f"{folder}/{name} is damaged: left out")
        return []
    names = [column.name for column in COLUMNS]
    return [
        Row(stage["stage"], {key: value for key, value in stage.items() if key in names and is_number(value)})
        for stage in stages
    ]


def _read_config(folder: Path, notes: list[str]) -> dict[str, Any]:
    """The saved configuration by dotted keys."""
    try:
        real_path(folder / "config.yaml", folder)
        saved = redact(read_run_config(str(folder)))
    except (ConfigError, OSError) as error:
        notes.append(f"its configuration cannot be read: {error}")
        return {}
    return {key.removesuffix(".config_name"): value for key, value in leaves(saved)}


def _read_curves(folder: Path, notes: list[str]) -> dict[str, Curve]:
    """The numbers of metrics.csv; those of its last part if the file is large."""
    try:
        content = read_tail(real_path(folder / "metrics.csv", folder), _METRICS_BYTES)
    except OSError as error:
        notes.append(f"metrics.csv cannot be read ({error.strerror or 'a link'}): no curves")
        return {}
    if len(content) == _METRICS_BYTES:
        notes.append(f"metrics.csv is large: the curves are of its last {_METRICS_BYTES >> 20} MB")
        content = content.partition(b"\n")[2]  # it begins in the middle of a row
    points: dict[str, dict[int, tuple[float, float]]] = {}
    invalid = 0
    for line in content.decode(errors="replace").split("\n")[:-1]:  # the text after the last newline is half a row
        step, _, rest = line.partition(",")
        tag, *numbers = rest.rsplit(",", 2)
        value, time = map(_parse_number, numbers) if len(numbers) == 2 else (None, None)
        if step.isdecimal() and len(step) < 13 and value is not None and (tag in points or len(points) < _MAX_TAGS):
            points.setdefault(tag, {})[int(step)] = value, time or 0.0
        else:
            invalid += step != "step" and bool(line.strip())
    if invalid:
        notes.append(
            f"{invalid:,} row{'s' * (invalid > 1)} of metrics.csv hold no finite number, or too many names: left out"
        )
    if not points:
        notes.append("metrics.csv has no rows" + (" yet" if not invalid else ""))
    return {
        clean(tag, 60): Curve(list(steps), [value for value, _ in steps.values()], [time for _, time in steps.values()])
        for tag, steps in ((tag, dict(sorted(found.items()))) for tag, found in points.items())
    }


def _parse_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if is_number(number) else None


def _read_images(folder: Path) -> Iterator[tuple[str, bytes]]:
    """The plots of evaluations; a calibration is drawn from its numbers instead."""
    for name in _names(folder, "eval", ".png")[:_MAX_FILES]:
        try:
            content = read_small(real_path(folder / "eval" / name, folder), _IMAGE_BYTES)
        except OSError:
            continue
        if content.startswith(_PNG) and not name.startswith("preference-"):
            yield clean(name.removesuffix(".png")), content


def _names(folder: Path, inside: str, suffix: str) -> list[str]:
    """Names of files in a folder of the run; none if it is missing, or a link."""
    try:
        with os.scandir(real_path(folder / inside, folder)) as entries:
            return sorted(entry.name for entry in islice(entries, _MAX_NAMES) if entry.name.endswith(suffix))
    except OSError:
        return []


def _read_object(folder: Path, inside: str, schema: Schema, notes: list[str]) -> dict[str, Any]:
    """The object of a JSON file; empty, and noted, if it is damaged."""
    try:
        return load_json(folder / inside, schema, root=folder)
    except RecordError as error:
        note = f"left out: {error}"
        notes += [] if note in notes else [note]
        return {}


def _read_text(folder: Path, inside: str, limit: int, notes: list[str]) -> str:
    try:
        return read_small(real_path(folder / inside, folder), limit).decode(errors="replace")
    except OSError:
        notes.append(f"{inside} is a link, no plain file, or larger than {limit >> 20} MB: left out")
        return ""


def parse_samples(files: Iterable[tuple[int, str]]) -> dict[str, Exchange]:
    """Exchanges in sample files, by their prompt without white space and control tokens.

    Args:
        files: step and content of each, oldest first.
    """
    exchanges: dict[str, Exchange] = {}
    for step, content in files:
        exchange = None
        for kind, note, body in _blocks(content):
            if kind == "prompt":
                exchange = _exchange(exchanges, body)
            elif exchange is not None and kind == "reference":
                exchange.references.append(_answer(None, "", body))
            elif exchange is not None:
                exchange.answers.append(_answer(step, note if kind == "model" else f"{kind}: {note}", body))
    return exchanges


def _blocks(content: str) -> list[tuple[str, str, str]]:
    """Kind and note of each header, and the lines below it."""
    blocks: list[tuple[str, str, list[str]]] = []
    for line in content.split("\n"):
        match = _HEADER.fullmatch(line)
        if match:
            blocks.append((match[1], match[2].strip(), []))
        elif blocks and not line.startswith("--- "):
            blocks[-1][2].append(line)
    return [(kind, note, "\n".join(lines)) for kind, note, lines in blocks]


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
    for name in _names(folder, "rollouts", ".parquet")[-_MAX_ROLLOUTS:]:
        try:
            rows = _first_rows(real_path(folder / "rollouts" / name, folder))
        except (DataError, OSError) as error:
            notes.append(f"rollouts/{clean(name)} cannot be read: left out ({clean(error)})")
            continue
        for row in rows:
            scores = {key: value for key, value in row.items() if key.startswith(("score", "reward/"))}
            note = ", ".join(f"{key.removeprefix('reward/')} {value:.4g}" for key, value in scores.items())
            answer = _answer(row["step"], note if row["finished"] else f"{note}, cut", row["response"])
            _exchange(exchanges, row["prompt"]).answers.append(answer)
    return exchanges


def _first_rows(path: Path) -> list[dict[str, Any]]:
    """The texts and scores in the first rows of a saved rollout.

    Raises:
        DataError: it is damaged, far larger than a rollout, or not one.
        OSError: it cannot be read.
    """
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


def _answer(step: int | None, note: str, text: str) -> Answer:
    text = _FIRST_TOKENS.sub("", text.strip())
    end = _LAST_TOKENS.search(text[-200:])
    return Answer(step, note, _shorten(text.removesuffix(end[0]).strip() if end else text), end[0] if end else "")


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} … ({len(text) - _MAX_TEXT:,} more characters)"


def parse_evaluation(stem: str, record: dict[str, Any]) -> Evaluation:
    """A result file.

    Args:
        stem: its name without the suffix: <task>-<split>-<weights>, or <task>-<judge>-<split>-<weights>.
        record: its content.
    """
    task, data, split, weights = (clean(record.get(key, "?"), 24) for key in ("task", "data", "split", "weights"))
    judge = clean(stem.removesuffix(f"-{weights}").removesuffix(f"-{split}"), 40).removeprefix(f"{task}-")
    by = f" by {judge}" if judge != task and stem.startswith(f"{task}-") else ""
    results = {key: value for key, value in record.items() if key not in _FACTS}
    numbers: dict[str, tuple[float, ...]] = {}
    for name, values in _numbers(results, ""):
        if name in numbers or len(numbers) < _MAX_NUMBERS:
            numbers[name] = values
    lists = {
        clean(key.replace("_", " "), 50): value[:_MAX_POINTS] for key, value in results.items() if _is_points(value)
    }
    return Evaluation(f"{task}{by} on {data}/{split}", weights, numbers, lists)


def _numbers(tree: dict[str, Any], prefix: str, depth: int = 0) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Numbers by name; those of the model have no prefix, those of baselines have one."""
    for key, value in tree.items():
        name, interval = clean(f"{prefix}{key}".replace("_", " "), 50), tree.get(f"{key}{_INTERVAL}")
        if isinstance(value, dict) and depth < 3:
            inner = prefix if key in ("mean_low_high", "model") else f"{prefix}{key} "
            yield from _numbers(value, inner, depth + 1)
        elif is_number(value):
            yield name, (value, *(interval if interval is not None and _are_numbers(interval, 2) else ()))
        elif _are_numbers(value, 3) or (_are_numbers(value, 2) and not _is_interval(key, tree)):
            yield name, tuple(value)


def _is_interval(key: str, tree: dict[str, Any]) -> bool:
    """True if this is the interval of another number."""
    return key.endswith(_INTERVAL) and key.removesuffix(_INTERVAL) in tree


def _are_numbers(value: Any, size: int) -> bool:
    return isinstance(value, list) and len(value) == size and all(map(is_number, value))


def _is_points(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(point, dict) for point in value)
