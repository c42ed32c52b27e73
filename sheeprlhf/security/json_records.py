"""Read our own JSON files: plain, of bounded size and depth, validated against the schemas below. Imports no torch."""

import json
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NotRequired,
    Required,
    TypedDict,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from sheeprlhf.utils.errors import RecordError
from sheeprlhf.utils.output import read_small, real_path

MAX_DEPTH = 32  # objects and lists inside one another
MAX_DIGITS = 18  # of an integer, so that it fits into 64 bits and into a float
_TOO_LARGE = object()  # replaces a number beyond MAX_DIGITS, or beyond the largest float


class Range(NamedTuple):
    """The numbers that a field may have, both ends included: `Annotated[int, Range(0, 10)]`."""

    least: float
    most: float


Count = Annotated[int, Range(0, 10**MAX_DIGITS)]
LATEST = 1e11  # seconds since 1970: the year 5138
Time = Annotated[float, Range(0, LATEST)]


class Schema(NamedTuple):
    """Fields of one kind of JSON file."""

    kind: Any  # a TypedDict. Keys that it does not name may hold any JSON
    fix: str  # for a damaged file; "{file}" and "{folder}" are replaced by its path and its folder's
    max_bytes: int = 1 << 22  # size of the largest file that is read


def load_json(path: Path, schema: Schema, *, root: Path | None = None) -> dict[str, Any]:
    """The object in one of our files, {} if there is none. Raises RecordError with file, field and fix."""
    try:
        text = read_small(path if root is None else real_path(path, root), schema.max_bytes)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise damaged(path, schema, "", f"cannot be read ({error.strerror or error})") from error
    return parse_json(text, path, schema)


def parse_json(text: bytes, path: Path, schema: Schema) -> dict[str, Any]:
    """The object in the text of a file, or of one of its lines; see `load_json`."""
    try:
        content = json.loads(text, parse_int=_integer, parse_float=_float, object_pairs_hook=_unique)
    except RecursionError as error:
        raise damaged(path, schema, "", "is nested too deeply") from error
    except _RepeatedKeyError as error:
        raise damaged(path, schema, str(error), "is there twice") from error
    except ValueError as error:  # also bytes that are not text
        raise damaged(path, schema, "", f"is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise damaged(path, schema, "", "holds no object")
    for field, problem in type_problems(content, schema.kind):
        raise damaged(path, schema, field, problem)
    return content


def damaged(path: Path, schema: Schema, field: str, problem: str) -> RecordError:
    """The error of a file in which a field has a problem, with the fix of its schema."""
    return RecordError(str(path), field, problem, schema.fix.format(file=path, folder=path.parent))


class _RepeatedKeyError(ValueError):
    """A key that an object has twice."""


def _integer(text: str) -> Any:
    return int(text) if len(text.lstrip("-")) <= MAX_DIGITS else _TOO_LARGE


def _float(text: str) -> Any:
    number = float(text)
    return number if math.isfinite(number) else _TOO_LARGE


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(next(name for name in names if names.count(name) > 1))
    return content


def type_problems(value: Any, hint: Any, field: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Field and problem of every part of a value that does not have the type of a hint."""
    kinds = _kinds(hint)
    if value is _TOO_LARGE:
        yield field, "is a number that is too large"
    elif depth > MAX_DEPTH:
        yield field, "is nested too deeply"
    elif isinstance(value, dict):
        typed = next((kind for kind in kinds if is_typeddict(kind)), None)
        inner = next((get_args(kind)[1] for kind in kinds if get_origin(kind) is dict), Any)
        if typed is None and not _allows(kinds, dict):
            yield field, f"is an object instead of {_names(kinds)}"
            return
        fields = {} if typed is None else _fields(typed)
        required = () if typed is None else typed.__required_keys__
        yield from ((_joined(field, name), "is missing") for name in sorted(required) if name not in value)
        for name, part in value.items():
            yield from type_problems(part, fields.get(name, inner), _joined(field, name), depth + 1)
    elif isinstance(value, list):
        inner = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is list), Any)
        if not _allows(kinds, list):
            yield field, f"is a list instead of {_names(kinds)}"
            return
        for number, part in enumerate(value):
            yield from type_problems(part, inner, f"{field}[{number}]", depth + 1)
    elif not any(_fits(value, kind) for kind in kinds):
        shown = json.dumps(value)
        yield field, f"is {shown if len(shown) < 40 else f'{shown[:36]}...'} instead of {_names(kinds)}"


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type hint."""
    origin = get_origin(hint)
    if origin in (NotRequired, Required):
        return _kinds(get_args(hint)[0])
    if origin in (Union, UnionType):
        return tuple(kind for part in get_args(hint) for kind in _kinds(part))
    return (hint,)


@lru_cache
def _fields(typed: Any) -> dict[str, Any]:
    return get_type_hints(typed, include_extras=True)


def _allows(kinds: tuple[Any, ...], container: type) -> bool:
    return any(kind is Any or get_origin(kind) is container for kind in kinds)


def _fits(value: Any, kind: Any) -> bool:
    """True if a string, number, bool or null has the type; a bool does not count as a number."""
    if kind is Any:
        return True
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is Annotated:
        base, limits = get_args(kind)[:2]
        return _fits(value, base) and limits.least <= value <= limits.most
    if kind in (int, float):
        numbers = int if kind is int else int | float
        return isinstance(value, numbers) and type(value) is not bool and (type(value) is int or math.isfinite(value))
    return kind in (str, bool, NoneType) and isinstance(value, kind)


def _names(kinds: tuple[Any, ...]) -> str:
    """The types for people to read."""
    return " or ".join(_name(kind) for kind in kinds)


def _name(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Literal:
        return " or ".join(map(json.dumps, get_args(kind)))
    if origin is Annotated:
        base, limits = get_args(kind)[:2]
        return f"{_name(base)} from {limits.least:g} to {limits.most:g}"
    plain = {int: "an integer", float: "a number", str: "a string", bool: "true or false", NoneType: "null"}
    return "a list" if origin is list else plain.get(kind, "an object")


def _joined(field: str, name: str) -> str:
    return f"{field}.{name}" if field else name


Step = Annotated[int, Range(0, 10**12)]
_Positive = Annotated[float, Range(0, 1e300)]


class RunRecord(TypedDict):
    """run.json. Tasks add results of their own."""

    status: Literal["running", "finished"]
    started: Time
    order: NotRequired[Time]
    finished: NotRequired[Time | None]
    config_hash: NotRequired[str]
    data_fingerprint: NotRequired[str]
    task: NotRequired[str]
    model: NotRequired[str]
    data: NotRequired[str]
    run_name: NotRequired[str]
    command: NotRequired[list[str]]
    step: NotRequired[Step]
    best_metric: NotRequired[float | None]
    best_step: NotRequired[Step | None]
    stopped_early: NotRequired[bool]
    trackers: NotRequired[dict[str, str]]
    peak_memory: NotRequired[Count | None]


class StageRecord(TypedDict):
    """One stage in pipeline.json."""

    seconds: _Positive
    status: NotRequired[Literal["running", "finished", "failed", "stopped"]]
    command: NotRequired[list[str]]
    exit_code: NotRequired[int]


class PipelineRecord(TypedDict):
    """pipeline.json."""

    recipe: dict[str, list[str]]
    stages: dict[str, StageRecord]
    experiment: NotRequired[str | None]
    version: NotRequired[str]
    started: NotRequired[Time]
    order: NotRequired[Time]
    finished: NotRequired[Time]
    command: NotRequired[list[str]]


class FileRecord(TypedDict):
    """One file in MANIFEST.json."""

    size: Count
    sha256: str


class ManifestRecord(TypedDict):
    """MANIFEST.json."""

    format: int
    files: dict[str, FileRecord]
    sha256: str
    config_hash: NotRequired[str]
    step: NotRequired[Step]
    world_size: NotRequired[Annotated[int, Range(1, 10**6)]]
    tensor_parallel: NotRequired[Annotated[int, Range(1, 10**6)]]
    torch_threads: NotRequired[Annotated[int, Range(1, 10**6)]]
    sharded: NotRequired[bool]
    device: NotRequired[str]
    weights_of: NotRequired[Step]  # those two of a rollout that a server sampled
    key: NotRequired[str]


class ExtraRecord(TypedDict):
    """Additional state of tasks in state.json; see `TrainState.extra`."""

    kl_coeff: NotRequired[_Positive]
    reward_count: NotRequired[Count]
    reward_mean: NotRequired[float]
    reward_m2: NotRequired[_Positive]
    shard: NotRequired[Step]
    shard_step: NotRequired[Step]
    shard_rollout: NotRequired[Step]
    shard_digest: NotRequired[Annotated[int, Range(0, 2**48)]]


class StateRecord(TypedDict):
    """state.json of a checkpoint."""

    step: Step
    items_seen: Count
    best_metric: float | None
    best_step: Step | None
    extra: ExtraRecord
    skipped_steps: NotRequired[Step]  # older checkpoints lack these
    stale_validations: NotRequired[Count]


class SplitRecord(TypedDict):
    """One split in a data report; all other fields are counts, too."""

    read: Count
    kept: Count
    dropped: NotRequired[dict[str, Count]]
    first_dropped: NotRequired[dict[str, str]]
    truncated: NotRequired[dict[str, Count]]
    unused: NotRequired[dict[str, Count]]
    labels: NotRequired[dict[str, Count]]
    tokens: NotRequired[dict[str, dict[str, float]]]
    eos_share: NotRequired[float | None]
    templated_rows: NotRequired[Count]
    trained_tokens: NotRequired[Count]
    prompts_alone: NotRequired[Count]


class DataRecord(TypedDict):
    """Fields of both data reports."""

    splits: dict[str, SplitRecord]
    columns: NotRequired[dict[str, dict[str, Any]]]
    mix: NotRequired[list[dict[str, Any]]]


class DataReportRecord(DataRecord):
    """data_report.json of a run, also of an earlier version."""

    name: NotRequired[str]
    kind: NotRequired[str]
    notes: NotRequired[list[str]]


class PreparedRecord(DataRecord):
    """report.json of prepared data."""

    name: str
    kind: str
    notes: list[str]
    available_columns: dict[str, list[str]]


class ResultRecord(TypedDict):
    """A file of `eval/`. The figures are what else it holds."""

    task: NotRequired[str]
    split: NotRequired[str]
    data: NotRequired[str]
    model: NotRequired[str | None]
    weights: NotRequired[str]
    experiment_dir: NotRequired[str | None]
    time: NotRequired[str]
    version: NotRequired[str]


class BestRowRecord(TypedDict):
    """A line of `parts/` of task=best_of_n."""

    status: Literal["kept", "cut", "low"]
    prompt: str
    response: str
    score: float
    rejected: str
    rejected_score: float
    n: Count
    mean_score: float
    first_score: float


RUN = Schema(
    RunRecord,
    "put back a copy, or delete {file} and give the run's training command again with hydra.run.dir={folder}, which "
    "continues from the newest checkpoint",
)
PIPELINE = Schema(PipelineRecord, "put back a copy, or start again without resume")
MANIFEST = Schema(ManifestRecord, "delete {folder}: the checkpoint before it is used")
STATE = Schema(StateRecord, "delete {folder}: the checkpoint before it is used")
DATA_REPORT = Schema(DataReportRecord, "delete {file}: a resumed run writes it again")
PREPARED = Schema(PreparedRecord, "delete {folder}: the data is prepared again")
DIGESTS = Schema(dict[str, str], "delete {folder}: the data is prepared again")
RESULT = Schema(ResultRecord, "delete {file} and run the evaluation again")
ADAPTER_CONFIG = Schema(dict[str, Any], "give another folder")
BEST_ROW = Schema(BestRowRecord, "delete {file}: a resumed run samples it again")
