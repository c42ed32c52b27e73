"""Rows of jsonl, json, csv and parquet files as one stream of batches."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sheeprlhf.config.path_checks import KINDS, TEXT, file_kind
from sheeprlhf.data.layout import RowLayout
from sheeprlhf.data.parquet import count_values, open_parquet, read_parquet
from sheeprlhf.data.textfile import PlacedRows, count_lines, is_compressed, read_csv, read_json, read_jsonl, read_text
from sheeprlhf.utils.errors import DataError

BATCH_ROWS = 1000
BATCH_CHARS = 2 * 2**20  # tokenising takes about 200 bytes of memory for each
READERS: dict[str, Callable[[Path], PlacedRows]] = {  # all but parquet's, which is told what to read
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    TEXT: read_text,
    ".tsv": partial(read_csv, separator="\t"),
}


class Row(NamedTuple):
    """One row of a source file.

    Attributes:
        number: the row's number in its split, from 0.
        place: its position, for messages: "pairs.jsonl line 3".
        values: those of its columns that are read.
        others: names of its other columns that have a value.
        kept: columns that are stored with the tokens.
    """

    number: int
    place: str
    values: dict[str, Any]
    others: tuple[str, ...] = ()
    kept: dict[str, Any] | None = None


def read_batches(
    files: list[Path], limit: int | None, size: int = BATCH_ROWS, *, layout: RowLayout
) -> Iterator[list[Row]]:
    """The rows of a split in batches, in the files' order.

    Args:
        files: files of one split, of any readable kind.
        limit: most rows; None reads all.
        size: most rows of a batch; it also ends when its texts reach `BATCH_CHARS`.
        layout: takes the columns out of the rows, and counts those that are not read.

    Raises:
        DataError: for what cannot be read, naming file and line.
    """
    batch: list[Row] = []
    number = chars = 0
    for file in files:
        if number == limit:
            break
        before = number
        left_out = _count_left_out(file, limit and limit - number, layout)
        rows = read_parquet(file, _columns(file, layout)) if _is_parquet(file) else READERS[_kind(file)](file)
        for place, values in rows:
            try:
                known, others = layout(values)
            except DataError as error:
                raise DataError(f"{file.name} {place}: {error}") from None
            kept = layout.kept_of(values) or None
            batch.append(Row(number, f"{file.name} {place}", known, (*others, *left_out), kept))
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


def _kind(file: Path) -> str:
    kind = file_kind(file)
    if kind is None:
        raise DataError(f"{file}: its ending says nothing that can be read; give one of {', '.join(KINDS)}")
    return kind[0]


def _columns(file: Path, layout: RowLayout) -> tuple[str, ...]:
    """The columns to read of a parquet file."""
    return layout.columns_of(open_parquet(file).schema_arrow.names)


def _is_parquet(file: Path) -> bool:
    return _kind(file) == ".parquet"


def _count_left_out(file: Path, limit: int | None, layout: RowLayout) -> tuple[str, ...]:
    """Count the columns that are never read of a file whose columns are read one by one; their names."""
    if not _is_parquet(file):
        return ()
    counts = {name: rows for name, rows in count_values(file, _columns(file, layout)).items() if rows}
    try:
        layout.count_columns({name: rows if limit is None else min(rows, limit) for name, rows in counts.items()})
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    return tuple(counts)


def count_rows(files: list[Path], limit: int | None) -> int | None:
    """About how many rows `read_batches` will give, for a progress bar; None if only reading them would tell.

    Raises:
        DataError: if a parquet file is none.
    """
    total = 0
    for file in files:
        kind = _kind(file)
        if kind == ".json" or is_compressed(file):
            return None
        header = kind in (".csv", ".tsv")
        total += open_parquet(file).metadata.num_rows if kind == ".parquet" else count_lines(file) - header
    return total if limit is None else min(total, limit)
