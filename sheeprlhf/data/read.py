"""Rows of jsonl, json, csv and parquet files as one stream of batches."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sheeprlhf.data.parquet import open_parquet, read_parquet
from sheeprlhf.data.rows import COLUMNS
from sheeprlhf.data.textfile import PlacedRows, count_lines, read_csv, read_json, read_jsonl
from sheeprlhf.utils.errors import DataError

BATCH_ROWS = 1000
BATCH_CHARS = 2 * 2**20  # tokenising takes about 200 bytes of memory for each
READERS: dict[str, Callable[[Path], PlacedRows]] = {  # all but parquet's, which is told what to read
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
}


class Row(NamedTuple):
    """One row of a source file.

    Attributes:
        number: the row's number in its split, from 0.
        place: where it stands, for messages: "pairs.jsonl line 3".
        values: those of its columns that are read.
        others: names of its other columns.
    """

    number: int
    place: str
    values: dict[str, Any]
    others: tuple[str, ...] = ()


def read_batches(
    files: list[Path], limit: int | None, size: int = BATCH_ROWS, *, more: Sequence[str] = ()
) -> Iterator[list[Row]]:
    """The rows of a split in batches, in the files' order.

    Args:
        files: files of one split, of any readable kind.
        limit: most rows; None reads all.
        size: most rows of a batch; it also ends when its texts reach `BATCH_CHARS`.
        more: names of columns to read besides `COLUMNS`.

    Raises:
        DataError: for what cannot be read, naming file and line.
    """
    columns = (*COLUMNS, *more)
    batch: list[Row] = []
    number = chars = 0
    for file in files:
        if number == limit:
            break
        before = number
        kind = file.suffix.lower()
        for place, values in read_parquet(file, columns) if kind == ".parquet" else READERS[kind](file):
            known = {name: values[name] for name in columns if name in values}
            others = tuple(name for name in values if name not in known)
            batch.append(Row(number, f"{file.name} {place}", known, others))
            number += 1
            chars += sum(len(value) for value in known.values() if isinstance(value, str))
            if len(batch) == size or chars >= BATCH_CHARS:
                yield batch
                batch, chars = [], 0
            if number == limit:
                break
        if number == before:
            raise DataError(f"{file}: there are no rows in this file; give a file with rows or remove it")
    if batch:
        yield batch


def count_rows(files: list[Path], limit: int | None) -> int | None:
    """About how many rows `read_batches` will give, for a progress bar; None if only reading them would tell.

    Raises:
        DataError: if a parquet file is none.
    """
    total = 0
    for file in files:
        kind = file.suffix.lower()
        if kind == ".json":
            return None
        total += open_parquet(file).metadata.num_rows if kind == ".parquet" else count_lines(file) - (kind == ".csv")
    return total if limit is None else min(total, limit)
