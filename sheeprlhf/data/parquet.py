"""Rows of parquet files. The file states its columns and types, so most mistakes show before a row is read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sheeprlhf.data.rows import COLUMNS, column_advice
from sheeprlhf.utils.errors import DataError

BATCH_ROWS = 1000  # of a part that is decoded at once
BUFFER = 2**20  # bytes read at once from a column, which may be as large as the file


def read_parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The known columns, streamed; a column that no row format reads is None.

    Raises:
        DataError: if it is damaged, or a column is not text.
    """
    parquet = open_parquet(file)
    schema = parquet.schema_arrow
    columns = _known_columns(file, schema)
    others = dict.fromkeys(name for name in schema.names if name not in columns)
    number = 0
    try:
        for batch in parquet.iter_batches(BATCH_ROWS, columns=columns):
            for values in _rows(file, batch, number):
                number += 1
                yield f"row {number}", values | others
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file} after row {number}: damaged parquet: {_line(error)}; fetch or write it again"
        ) from None


def open_parquet(file: Path) -> pq.ParquetFile:
    """The file, its footer read.

    Raises:
        DataError: if it is none.
    """
    try:
        return pq.ParquetFile(file, buffer_size=BUFFER)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not a readable parquet file ({_line(error)}); fetch or write it again") from None


def _known_columns(file: Path, schema: pa.Schema) -> list[str]:
    """Names of the columns to read, checked."""
    columns = [name for name in COLUMNS if name in schema.names]
    if not columns:
        raise DataError(f"{file}: none of the columns {', '.join(COLUMNS)}: {column_advice([], schema.names)}")
    for name in columns:
        if schema.names.count(name) > 1:
            raise DataError(f"{file}: column '{name}' appears twice; keep one")
        kind = schema.field(name).type
        if name != "messages" and not _is_text(kind):
            raise DataError(f"{file}: column '{name}' is of type {kind}, not text; write it as strings")
    return columns


def _is_text(kind: pa.DataType) -> bool:
    """Whether values of this type are strings or null."""
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(test(kind) for test in tests)


def _rows(file: Path, batch: pa.RecordBatch, before: int) -> list[dict[str, Any]]:
    """The rows of a batch; `before` rows precede it. Parquet does not check that strings are UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            for number, value in enumerate(column, start=before + 1):
                try:
                    value.as_py()
                except UnicodeDecodeError as error:
                    byte = error.object[error.start]
                    raise DataError(
                        f"{file} row {number}: column '{name}': byte {byte:#04x} is not UTF-8; write it as UTF-8"
                    ) from None
        raise


def _line(error: Exception) -> str:
    """The first line of a library's message."""
    return str(error).partition("\n")[0]
