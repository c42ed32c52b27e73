"""Rows of jsonl, json, csv and parquet files, streamed; every error names the file and the line or row.

Parquet goes through `datasets.load_dataset`. The text formats are read here instead: only a reader that sees the lines
can name the bad one, a type guessed from the first chunk cannot reject a later row, and no second copy is written.
"""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sheeprlhf.data.rows import COLUMNS
from sheeprlhf.utils.errors import DataError

MAX_LINE = 16 * 2**20  # bytes; a longer line is a damaged file, or one that is not made of lines
MAX_JSON = 512 * 2**20  # bytes; a JSON array is read at once
BATCH = 1000


class Row(NamedTuple):
    """One row of a source file.

    Attributes:
        number: the row's number in its split, from 0.
        place: where it stands, for messages: "pairs.jsonl line 3".
        values: the columns of `COLUMNS` that it has.
    """

    number: int
    place: str
    values: dict[str, Any]


def read_batches(files: list[Path], limit: int | None, size: int = BATCH) -> Iterator[list[Row]]:
    """The rows of a split in batches, in the files' order.

    Args:
        files: files of one split, of any readable kind.
        limit: most rows; None reads all.
        size: rows of a batch.

    Raises:
        DataError: for what cannot be read, naming file and line.
    """
    batch: list[Row] = []
    number = 0
    for file in files:
        before = number
        for place, values in READERS[file.suffix.lower()](file):
            if limit is not None and number >= limit:
                break
            known = {name: values[name] for name in COLUMNS if name in values}
            batch.append(Row(number, f"{file.name} {place}", known))
            number += 1
            if len(batch) == size:
                yield batch
                batch = []
        if number == before and (limit is None or number < limit):
            raise DataError(f"{file}: there are no rows in this file; give a file with rows or remove it")
    if batch:
        yield batch


def _read_jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """One JSON object a line; empty lines are skipped."""
    with file.open("rb") as stream:
        for number in range(1, 2**62):
            line = stream.readline(MAX_LINE + 1)
            if not line:
                return
            if len(line) > MAX_LINE:
                raise DataError(f"{file} line {number}: longer than {MAX_LINE >> 20} MiB; a row is one line of JSON")
            if line.isspace():
                continue
            value = _parse(_decode(line, file, number), f"{file} line {number}")
            yield f"line {number}", _object(value, f"{file} line {number}")


def _read_json(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """One array of objects; a file that does not begin with a bracket is read line by line."""
    with file.open("rb") as stream:
        start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        yield from _read_jsonl(file)
        return
    if file.stat().st_size > MAX_JSON:
        raise DataError(f"{file}: larger than {MAX_JSON >> 20} MiB; write it as .jsonl, which is read line by line")
    for number, value in enumerate(_parse(_decode(file.read_bytes(), file, 1), str(file)), start=1):
        yield f"item {number}", _object(value, f"{file} item {number}")


def _decode(data: bytes, file: Path, line: int) -> str:
    """Text of UTF-8 bytes, a byte order mark at a file's start removed."""
    if line == 1 and data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{file}: the file is UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise DataError(f"{file} line {line}: byte {data[error.start]:#04x} is not UTF-8; save it as UTF-8") from None


def _parse(text: str, place: str) -> Any:
    """The value of JSON text."""
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, place))
    except json.JSONDecodeError as error:
        line = f", line {error.lineno} of it" if error.lineno > 1 else ""
        raise DataError(
            f"{place}: malformed JSON at character {error.colno}{line}: {error.msg}; mend the line"
        ) from None
    except RecursionError:
        raise DataError(f"{place}: JSON nested too deeply; mend the line") from None


def _unique(pairs: list[tuple[str, Any]], place: str) -> dict[str, Any]:
    """A JSON object, each key once: which of two values is meant cannot be known."""
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise DataError(f"{place}: key '{twice}' appears twice; keep one")
    return values


def _object(value: Any, place: str) -> dict[str, Any]:
    """The value, which must be an object."""
    if not isinstance(value, dict):
        raise DataError(f'{place}: a row must be an object such as {{"prompt": ..., "response": ...}}')
    return value


def _read_csv(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Comma-separated values with a header line; every value is text."""
    csv.field_size_limit(MAX_LINE)  # the module's own limit, 128 KiB, is shorter than real prompts
    with file.open("rb") as binary:
        lines = (_decode(line, file, number) for number, line in enumerate(binary, start=1))
        reader = csv.DictReader(lines, strict=True)
        try:
            header = reader.fieldnames or []
            if len(set(header)) != len(header):
                raise DataError(f"{file} line 1: a column name appears twice; keep one")
            for values in reader:
                if None in values or None in values.values():
                    raise DataError(
                        f"{file} line {reader.line_num}: not the header's {len(header)} columns; "
                        "put text with commas, quotes or line ends in double quotes"
                    )
                yield f"line {reader.line_num}", values
        except csv.Error as error:
            raise DataError(f"{file} line {reader.reader.line_num}: malformed csv: {error}; mend the line") from None


def _read_parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The known columns of a parquet file."""
    columns = _parquet_columns(file)
    from datasets import load_dataset  # here, because a prepared dataset starts without this import

    rows = load_dataset("parquet", data_files={"train": [str(file)]}, split="train", streaming=True, columns=columns)
    number = 0
    try:
        for table in rows.with_format("arrow").iter(batch_size=BATCH):
            for values in table.to_pylist():
                number += 1
                yield f"row {number}", values
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} after row {number}: damaged parquet: {error}; fetch or write it again") from None


def _parquet_columns(file: Path) -> list[str]:
    """Names of the known columns; checked before a row is read, since a parquet file states its types."""
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable parquet file ({error}); fetch or write it again") from None
    columns = [name for name in COLUMNS if name in schema.names]
    if not columns:
        raise DataError(f"{file}: none of the columns {', '.join(COLUMNS)}; it has {', '.join(schema.names)}")
    for name in columns:
        kind = schema.field(name).type
        if name != "messages" and not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"{file}: column '{name}' is of type {kind}, not text; write it as strings")
    return columns


Reader = Callable[[Path], Iterator[tuple[str, dict[str, Any]]]]
READERS: dict[str, Reader] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
}
