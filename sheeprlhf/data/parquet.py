"""Rows of parquet files. The file states its columns and types, so most mistakes show before a row is read."""

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sheeprlhf.data.rows import COLUMNS, TEXT_COLUMNS, column_advice
from sheeprlhf.utils.errors import DataError

BATCH_ROWS = 1000  # of a part that is decoded at once
MAX_UNPACKED, MAX_ROWS = 1000, 50  # for each byte of the file: text does not shrink to a thousandth
FREE_UNPACKED, FREE_ROWS = 2**26, 2**20  # of any file
BUFFER = 2**20  # bytes read at once from a column, which may be as large as the file


def read_parquet(file: Path, known: Sequence[str] = COLUMNS) -> Iterator[tuple[str, dict[str, Any]]]:
    """The known columns, streamed; any other is None.

    Args:
        file: what to read.
        known: names of columns that a row format may read.

    Raises:
        DataError: if it is damaged, or a column is not text.
    """
    schema = open_parquet(file).schema_arrow
    columns = _known_columns(file, schema, known)
    others = dict.fromkeys(name for name in schema.names if name not in columns)
    number = 0
    try:
        for values in _stream(file, schema, columns):
            number += 1
            yield f"row {number}", values | others
    except UnicodeDecodeError:
        raise DataError(_not_utf8(file, columns)) from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file} after row {number}: damaged parquet: {_line(error)}; fetch or write it again"
        ) from None


def count_values(file: Path, known: Sequence[str]) -> dict[str, int]:
    """Rows that have a value in each column that is not known, by the file's own statistics.

    A column without statistics, or of lists, counts as having a value in every row.

    Args:
        file: the parquet file.
        known: names of columns that are read.
    """
    parquet = open_parquet(file)
    facts, schema = parquet.metadata, parquet.schema_arrow
    empty = {field.name for field in schema if pa.types.is_null(field.type)}
    counts: dict[str, int] = {}
    for group in (facts.row_group(number) for number in range(facts.num_row_groups)):
        nulls: dict[str, list[int]] = {}
        for number in range(group.num_columns):
            column = group.column(number)
            name = column.path_in_schema
            name = name if name in schema.names else name.partition(".")[0]
            has_count = column.statistics is not None and column.statistics.has_null_count
            nulls.setdefault(name, []).append(column.statistics.null_count if has_count else 0)
        for name, of_leaves in nulls.items():
            counts[name] = counts.get(name, 0) + group.num_rows - min(*of_leaves, group.num_rows)
    return {name: rows for name, rows in counts.items() if name not in empty.union(known)}


def _stream(file: Path, schema: pa.Schema, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows by `load_dataset`, nothing copied to its cache.

    The features are given, so that metadata which another program left in the file is not read; the path is escaped,
    as `load_dataset` takes brackets and stars in it for a pattern.
    """
    import datasets
    from pyarrow.dataset import ParquetFragmentScanOptions

    kinds = {name: schema.field(name).type for name in columns}
    kinds = {name: pa.string() if _is_text(kind) else kind for name, kind in kinds.items()}
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises
    rows = datasets.load_dataset(
        "parquet",
        data_files=[glob.escape(str(file.absolute()))],
        split="train",
        streaming=True,
        columns=columns,
        features=datasets.Features.from_arrow_schema(pa.schema(kinds)),
        batch_size=BATCH_ROWS,
        fragment_scan_options=ParquetFragmentScanOptions(use_buffered_stream=True, buffer_size=BUFFER),
    )
    for row in rows:
        yield {name: _without_nulls(value) if isinstance(value, list | dict) else value for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    """A nested value without the keys that are null: in parquet all objects of a column have the keys of each."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def open_parquet(file: Path) -> pq.ParquetFile:
    """The file, its footer read.

    Raises:
        DataError: if it is none, or says that it holds far more than its size.
    """
    try:
        parquet = pq.ParquetFile(file, buffer_size=BUFFER)
        _check_ratio(file, parquet.metadata)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not a readable parquet file ({_line(error)}); fetch or write it again") from None
    return parquet


def _check_ratio(file: Path, facts: pq.FileMetaData) -> None:
    """Refuse a small file that would fill the memory or the disk."""
    size = file.stat().st_size
    groups = [facts.row_group(number) for number in range(facts.num_row_groups)]
    unpacked = sum(group.total_byte_size for group in groups)
    limits = (("bytes", unpacked, FREE_UNPACKED, MAX_UNPACKED), ("rows", facts.num_rows, FREE_ROWS, MAX_ROWS))
    for what, number, free, ratio in limits:
        if number > max(free, ratio * size):
            raise DataError(
                f"{file}: {number:,} {what} in a file of {size:,} bytes: this is not text; give another file"
            )


def _known_columns(file: Path, schema: pa.Schema, known: Sequence[str]) -> list[str]:
    """Names of the columns to read, checked."""
    columns = [name for name in known if name in schema.names]
    if not columns:
        raise DataError(f"{file}: none of the columns {', '.join(COLUMNS)}: {column_advice([], schema.names)}")
    for name in columns:
        if schema.names.count(name) > 1:
            raise DataError(f"{file}: column '{name}' appears twice; keep one")
        kind = schema.field(name).type
        if name in TEXT_COLUMNS and not (_is_text(kind) or _is_list(kind)) and not pa.types.is_integer(kind):
            raise DataError(f"{file}: column '{name}' is of type {kind}, not text; write it as strings")
    return columns


def _is_list(kind: pa.DataType) -> bool:
    """True if values of this type may be messages: lists, or one object with a role."""
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_list_view, pa.types.is_large_list_view)
    if pa.types.is_struct(kind):
        return any(kind.get_field_index(name) >= 0 for name in ("role", "from"))
    return any(test(kind) for test in tests)


def _is_text(kind: pa.DataType) -> bool:
    """True if values of this type are strings or null."""
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(test(kind) for test in tests)


def _not_utf8(file: Path, columns: list[str]) -> str:
    """Position of the first byte that is not UTF-8, which parquet does not check."""
    number = 0
    for batch in open_parquet(file).iter_batches(BATCH_ROWS, columns=columns):
        for row in range(batch.num_rows):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                try:
                    column[row].as_py()
                except UnicodeDecodeError as error:
                    byte = error.object[error.start]
                    place = f"{file} row {number + row + 1}: column '{name}'"
                    return f"{place}: byte {byte:#04x} is not UTF-8; write it as UTF-8"
        number += batch.num_rows
    return f"{file}: a text is not UTF-8; write it as UTF-8"


def _line(error: Exception) -> str:
    """The first line of a library's message."""
    return str(error).partition("\n")[0]
