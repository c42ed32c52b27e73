"""Read our own JSON files: plain, of bounded size and depth, validated against the schemas below. Imports no torch."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import GenericAlias, NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

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

    kind: Any  # a type; or fields and their types, with "?" behind the name of one that may be missing, else any JSON
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
        record = next((kind for kind in kinds if isinstance(kind, dict)), None)
        inner = next((get_args(kind)[1] for kind in kinds if get_origin(kind) is dict), Any)
        if record is None and not _allows(kinds, dict):
            yield field, f"is an object instead of {_names(kinds)}"
            return
        fields = {name.removesuffix("?"): kind for name, kind in (record or {}).items()}
        missing = sorted(name for name in record or () if not name.endswith("?") and name not in value)
        yield from ((_joined(field, name), "is missing") for name in missing)
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
    if get_origin(hint) in (Union, UnionType):
        return tuple(kind for part in get_args(hint) for kind in _kinds(part))
    return (hint,)


def _each(fields: dict[str, Any]) -> Any:
    """The type of an object whose values all have these fields."""
    return GenericAlias(dict, (str, fields))


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
    if origin is dict or isinstance(kind, dict):
        return "an object"
    plain = {int: "an integer", float: "a number", str: "a string", bool: "true or false", NoneType: "null"}
    return "a list" if origin is list else plain.get(kind, "an object")


def _joined(field: str, name: str) -> str:
    return f"{field}.{name}" if field else name


Step = Annotated[int, Range(0, 10**12)]
_Positive = Annotated[float, Range(0, 1e300)]


RUN = Schema(
    {
        **{"status": Literal["running", "finished"], "started": Time, "order?": Time, "finished?": Time | None},
        **dict.fromkeys(("task?", "model?", "data?", "run_name?", "config_hash?", "data_fingerprint?"), str),
        **{"command?": list[str], "trackers?": dict[str, str], "peak_memory?": Count | None},
        **{"step?": Step, "best_metric?": float | None, "best_step?": Step | None, "stopped_early?": bool},
    },
    "put back a copy, or delete {file} and give the run's training command again with hydra.run.dir={folder}, which "
    "continues from the newest checkpoint",
)
_STAGE = {
    "seconds": _Positive,
    "status?": Literal["running", "finished", "failed", "stopped"],
    **{"command?": list[str], "exit_code?": int},
}
PIPELINE = Schema(
    {
        **{"recipe": dict[str, list[str]], "stages": _each(_STAGE), "command?": list[str]},
        **{"experiment?": str | None, "version?": str},
        **dict.fromkeys(("started?", "order?", "finished?"), Time),
    },
    "put back a copy, or start again without resume",
)
_NUMBER = Annotated[int, Range(1, 10**6)]
MANIFEST = Schema(
    {
        **{"format": int, "files": _each({"size": Count, "sha256": str}), "sha256": str},
        **{"config_hash?": str, "step?": Step, "sharded?": bool, "device?": str},
        **dict.fromkeys(("world_size?", "tensor_parallel?", "torch_threads?"), _NUMBER),
        **{"weights_of?": Step, "key?": str},  # of a rollout that a server sampled
    },
    "delete {folder}: the checkpoint before it is used",
)
_EXTRA = {  # additional state of tasks, see `TrainState.extra`
    **dict.fromkeys(("kl_coeff?", "reward_m2?"), _Positive),
    **{"reward_count?": Count, "reward_mean?": float},
    **dict.fromkeys(("shard?", "shard_step?", "shard_rollout?"), Step),
    "shard_digest?": Annotated[int, Range(0, 2**48)],
}
STATE = Schema(
    {
        **{"step": Step, "items_seen": Count, "best_metric": float | None, "best_step": Step | None, "extra": _EXTRA},
        **{"skipped_steps?": Step, "stale_validations?": Count},  # older checkpoints lack these
    },
    "delete {folder}: the checkpoint before it is used",
)
_SPLIT = {  # all other fields are counts, too
    **dict.fromkeys(("read", "kept", "templated_rows?", "trained_tokens?", "prompts_alone?"), Count),
    **dict.fromkeys(("dropped?", "truncated?", "remarks?", "labels?", "unused?"), dict[str, Count]),
    **{"first_dropped?": dict[str, str], "tokens?": dict[str, dict[str, float]], "eos_share?": float | None},
}
_REPORT = {"splits": _each(_SPLIT), **{"columns?": dict[str, dict[str, Any]], "mix?": list[dict[str, Any]]}}
DATA_REPORT = Schema(  # also of an earlier version
    {**_REPORT, "name?": str, "kind?": str, "notes?": list[str]}, "delete {file}: a resumed run writes it again"
)
PREPARED = Schema(
    {**_REPORT, "name": str, "kind": str, "notes": list[str], "available_columns": dict[str, list[str]]},
    "delete {folder}: the data is prepared again",
)
DIGESTS = Schema(dict[str, str], "delete {folder}: the data is prepared again")
RESULT = Schema(  # the figures are what else it holds
    {
        **dict.fromkeys(("task?", "split?", "data?", "weights?", "time?", "version?"), str),
        **dict.fromkeys(("model?", "experiment_dir?"), str | None),
    },
    "delete {file} and run the evaluation again",
)
ADAPTER_CONFIG = Schema(dict[str, Any], "give another folder")
BEST_ROW = Schema(
    {
        "status": Literal["kept", "cut", "low"],
        **dict.fromkeys(("prompt", "response", "rejected"), str),
        **dict.fromkeys(("score", "rejected_score", "mean_score", "first_score"), float),
        "n": Count,
    },
    "delete {file}: a resumed run samples it again",
)
