"""Rows of jsonl, json, csv and parquet files as one stream of batches; every error names the file and the line or item.

Files of text are read here and not by a library: only a reader that sees the lines can name the bad one, a type guessed
from the first chunk cannot reject a later row, and no second copy is written. Compressed files are unpacked while they
are read, with a bound on what they unpack to. Parquet states its columns and types, so most mistakes show before a row
is read.
"""

import bz2
import csv
import gzip
import io
import itertools
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from sheeprlhf.config.path_checks import KINDS, TEXT, file_kind
from sheeprlhf.data.layout import RowLayout
from sheeprlhf.data.rows import COLUMNS, CONVERSATION_COLUMNS, TEXT_COLUMNS, column_advice, printable
from sheeprlhf.data.source import WHOLE, Part
from sheeprlhf.utils.errors import DataError

MAX_LINE = 16 * 2**20  # bytes; a longer line is a damaged file, or one that is not made of lines
FREE_UNPACKED = 64 * 2**20  # bytes that any file may unpack to
MAX_UNPACKED = 200  # for each byte of the file: text does not shrink to a two-hundredth
MAX_JSON = 512 * 2**20  # bytes; the text of a JSON array is read at once
ROW_COLUMNS = {*COLUMNS, *CONVERSATION_COLUMNS, "conversations", "completion", "instruction", "question", "text"}
_MARKS = {",": "commas", "\t": "tabs"}
_SPACE = re.compile(r"[ \t\r\n]*")
_END = object()

PlacedRows = Iterator[tuple[str, dict[str, Any]]]


def read_jsonl(file: Path, part: Part = WHOLE) -> PlacedRows:
    """One JSON object a line, of the lines that begin in `part`; empty lines are skipped."""
    for number, line in _lines(file, part):
        if line.isspace():
            continue
        place = f"{file} line {number}"
        if number == 1 and line.strip() in (b"[", b"{"):
            raise DataError(f"{place}: JSON over several lines; write one row a line, or let the name end in .json")
        text = _decode(line, file, number).rstrip()
        with _placed(place):
            value = _DECODER.decode(text)
        yield f"line {number}", _object(value, place)


def read_text(file: Path, part: Part = WHOLE) -> PlacedRows:
    """One text a line, of the lines that begin in `part`; empty lines are skipped."""
    for number, line in _lines(file, part):
        text = _decode(line, file, number).rstrip("\r\n")
        if text.strip():
            yield f"line {number}", {"text": text}


def read_json(file: Path) -> PlacedRows:
    """One array of objects, alone or in an object around it; any other file is read line by line."""
    with open_data(file) as stream:
        lines = (line for line in iter(lambda: stream.readline(MAX_LINE + 1), b"") if not line.isspace())
        first = next(lines, b"").removeprefix(b"\xef\xbb\xbf").lstrip()
        alone = next(lines, None) is None
    if first.startswith(b"{") and len(first) <= MAX_LINE and (alone or not _ends(first)):
        yield from _rows_in_object(file)
    elif first.startswith(b"["):
        text = _text_of(file)
        yield from _placed_items(file, _items(text, text.index("[")), "item")
    else:
        yield from read_jsonl(file)


def _text_of(file: Path) -> str:
    """The text of a JSON file. Raises DataError if it is too large to be read at once."""
    with open_data(file) as stream:
        data = stream.read(MAX_JSON + 1)
    if len(data) > MAX_JSON:
        raise DataError(f"{file}: larger than {MAX_JSON >> 20} MiB; write it as .jsonl, which is read line by line")
    return _decode(data, file, 1)


def _ends(line: bytes) -> bool:
    """True if a line that begins a JSON value also contains its end, or a mistake before it."""
    text = line.decode(errors="replace").rstrip()
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos < len(text)
    except (ValueError, RecursionError):
        return True
    return True


def _rows_in_object(file: Path) -> PlacedRows:
    """The list of objects in a JSON file that is one object; the object itself if it is a row."""
    with _placed(f"{file}"):
        value = _DECODER.decode(_text_of(file).strip())
    lists = [
        name
        for name, entry in value.items()
        if isinstance(entry, list) and entry and all(isinstance(row, dict) for row in entry)
    ]
    of_rows = set(value) & ROW_COLUMNS
    if of_rows and all(map(_is_column, (value[name] for name in of_rows))):
        advice = "write one object for each row (by pandas: to_json(path, orient='records'))"
        raise DataError(f"{file}: one JSON object with a list for each column, {printable(value)}; {advice}")
    if of_rows:
        yield "item 1", value
    elif len(lists) == 1:
        yield from _placed_items(file, iter(value[lists[0]]), f"{printable(lists)} item")
    else:
        has = f"lists of objects as {printable(lists)}" if lists else f"no list of objects, only {printable(value)}"
        raise DataError(
            f"{file}: one JSON object with {has}; write the rows as a list, "
            '[{"prompt": ..., "response": ...}, ...], or one a line'
        )


def _is_column(value: Any) -> bool:
    """True if a value is the column of many rows: a list, or an object that has them by their numbers."""
    entries = list(value.values()) if isinstance(value, dict) and all(map(str.isdecimal, value)) else value
    return isinstance(entries, list) and bool(entries) and not any(isinstance(one, list | dict) for one in entries)


def _placed_items(file: Path, items: Iterator[Any], word: str) -> PlacedRows:
    for number in count(1):
        place = f"{file} {word} {number}"
        with _placed(place):
            value = next(items, _END)
        if value is _END:
            return
        yield f"{word} {number}", _object(value, place)


def read_csv(file: Path, *, separator: str = ",") -> PlacedRows:
    """Values separated by commas or another mark, with a header line; every value is text."""
    csv.field_size_limit(MAX_LINE)  # the module's own limit, 128 KiB, is shorter than real prompts
    decoded = (_decode(line, file, number) for number, line in _lines(file))
    reader = csv.reader(decoded, strict=True, delimiter=separator)
    header: list[str] = []
    kind = "csv" if separator == "," else "tsv"
    begin = 1  # the first line of a row: one open quote can make it a long one
    try:
        for values in reader:
            if values and not header:
                header = _header(values, f"{file} line {begin}", separator)
            elif values and len(values) != len(header):
                raise DataError(
                    f"{file} line {begin}: {len(values)} values for the header's {len(header)} columns; put text with "
                    f"{_MARKS[separator]}, quotes or line ends in double quotes"
                )
            elif values:
                yield f"line {begin}", dict(zip(header, values, strict=True))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file} line {begin}: malformed {kind}: {error}; fix the row that begins there") from None


def count_lines(file: Path) -> int:
    """The number of line ends."""
    with open_data(file) as stream:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(2**20), b""))


def lines_of_part(file: Path, part: Part) -> tuple[int, int]:
    """The place of the first line that begins in a part of a file that is not compressed, and the end of its last."""
    found = []
    with file.open("rb") as stream:
        for place in part.cut(file.stat().st_size):
            stream.seek(max(place - 1, 0))
            while place and (rest := stream.readline(2**20)) and not rest.endswith(b"\n"):
                pass
            found.append(stream.tell())
    return found[0], found[1]


def _lines(file: Path, part: Part = WHOLE) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, or those that begin in a part of it, with their numbers, from 1."""
    begin, end = (0, math.inf) if part == WHOLE else lines_of_part(file, part)
    with open_data(file) as stream:
        if begin:
            stream.seek(begin)
        for number in count(1):
            line = stream.readline(MAX_LINE + 1) if begin < end else b""
            begin += len(line)
            if not line:
                return
            if len(line) > MAX_LINE:
                raise DataError(f"{file} line {number}: longer than {MAX_LINE >> 20} MiB; write one row a line")
            yield number, line


def _decode(data: bytes, file: Path, line: int) -> str:
    """Text of UTF-8 bytes, a byte order mark at a file's start removed."""
    if line == 1 and data.startswith((b"\x1f\x8b", b"BZh", b"\x28\xb5\x2f\xfd")):
        raise DataError(f"{file}: the file is compressed; let its name end in .gz, .bz2 or .zst")
    if line == 1 and (data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4]):
        raise DataError(f"{file}: the file is UTF-16, or not text; save it as UTF-8")
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise DataError(f"{file} line {line}: byte {data[error.start]:#04x} is not UTF-8; save it as UTF-8") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, each key once: which of two values is meant cannot be known."""
    values = dict(pairs)
    if len(values) != len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise DataError(f"key '{printable([twice])}' appears twice; keep one")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


@contextmanager
def _placed(place: str) -> Iterator[None]:
    """Turn an error of the JSON decoder into one that names file and position."""
    try:
        yield
    except json.JSONDecodeError as error:
        line = f" of line {error.lineno}" if error.lineno > 1 else ""
        raise DataError(f"{place}: malformed JSON at character {error.colno}{line}: {error.msg}; fix it") from None
    except RecursionError:
        raise DataError(f"{place}: JSON nested too deeply; fix it") from None
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    except ValueError:  # Python refuses to read a number of more than 4,300 digits
        raise DataError(f"{place}: a number with too many digits; shorten it or write it as text") from None


def _items(text: str, start: int) -> Iterator[Any]:
    """The values of a JSON array, one after the other: reading it at once would not tell which one is bad."""
    at = _skip_space(text, start + 1)
    more = not text.startswith("]", at)
    while more:
        value, at = _DECODER.raw_decode(text, at)
        yield value
        at = _skip_space(text, at)
        more = text.startswith(",", at)
        at = _skip_space(text, at + 1) if more else at
    if not text.startswith("]", at):
        raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    end = _skip_space(text, at + 1)
    if end < len(text):
        raise json.JSONDecodeError("Extra data behind the array", text, end)


def _skip_space(text: str, at: int) -> int:
    """The first place from `at` on that is not white space."""
    match = _SPACE.match(text, at)
    return at if match is None else match.end()


def _object(value: Any, place: str) -> dict[str, Any]:
    """The value, which must be an object."""
    if isinstance(value, dict):
        return value
    hint = "; a file with an array of rows must end in .json" if isinstance(value, list) and "line" in place else ""
    raise DataError(f'{place}: a row must be an object such as {{"prompt": ..., "response": ...}}{hint}')


def _header(names: list[str], place: str, separator: str) -> list[str]:
    """The names of a csv file's columns, checked."""
    if twice := [name for name, times in Counter(names).items() if name and times > 1]:
        raise DataError(f"{place}: a column name appears twice: {printable(twice)}; keep one")
    other = next((mark for mark in ",;\t|" if mark in names[0]), None)
    if len(names) == 1 and other:
        ending = {",": ", or let the name end in .csv", "\t": ", or let the name end in .tsv"}.get(other, "")
        raise DataError(f"{place}: columns are separated by {other!r}; separate them by {_MARKS[separator]}{ending}")
    return names


def open_data(file: Path) -> BinaryIO:
    """The bytes of a file, unpacked if its name ends in .gz, .bz2 or .zst."""
    kind = file_kind(file)
    if kind is None or not kind[1]:
        return file.open("rb")
    return cast(BinaryIO, io.BufferedReader(_Unpacked(file, kind[1]), 2**16))


class _Unpacked(io.RawIOBase):
    """Decompressed bytes of a file. Raises DataError while reading a damaged file, or far more than its size."""

    def __init__(self, file: Path, compression: str) -> None:
        super().__init__()
        self._file = file
        self._left = max(FREE_UNPACKED, MAX_UNPACKED * file.stat().st_size)
        self._stream: Any
        if compression == ".gz":
            self._stream = gzip.GzipFile(file)
        elif compression == ".bz2":
            self._stream = bz2.BZ2File(file)
        else:
            self._stream = pa.CompressedInputStream(pa.OSFile(str(file)), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
            raise DataError(f"{self._file}: damaged, or not what its name says ({error}); write it again") from None
        self._left -= len(data)
        if self._left < 0:
            raise DataError(f"{self._file}: unpacks to more than {MAX_UNPACKED} times its size: give another file")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


MAX_RATIO, MAX_ROWS = 1000, 50  # of parquet, for each byte of the file: text does not shrink to a thousandth
FREE_ROWS = 2**20  # of any parquet file
BUFFER = 2**20  # bytes read at once from a column, which may be as large as the file


def read_parquet(file: Path, known: Sequence[str] = COLUMNS, part: Part = WHOLE) -> PlacedRows:
    """The known columns, streamed; any other is None. Raises DataError if it is damaged, or a column is not text."""
    schema = open_parquet(file).schema_arrow
    columns = _known_columns(file, schema, known)
    others = dict.fromkeys(name for name in schema.names if name not in columns)
    number, _ = part.cut(open_parquet(file).metadata.num_rows)
    try:
        for values in _rows(file, columns, part):
            number += 1
            yield f"row {number}", values | others
    except UnicodeDecodeError:
        raise DataError(_not_utf8(file, columns)) from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} after row {number}: damaged parquet: {_line(error)}; write it again") from None


def count_values(file: Path, known: Sequence[str]) -> dict[str, int]:
    """Rows with a value in each column that is not known, by statistics; all rows without them, or for lists."""
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


def _groups_of(facts: pq.FileMetaData, part: Part) -> dict[int, int]:
    """The row groups that have rows of a part, each with the number of its first row in the file."""
    begin, end = part.cut(facts.num_rows)
    sizes = [facts.row_group(number).num_rows for number in range(facts.num_row_groups)]
    places = itertools.pairwise(itertools.accumulate(sizes, initial=0))
    return {number: first for number, (first, after) in enumerate(places) if first < end and after > begin}


def _rows(file: Path, columns: list[str], part: Part) -> Iterator[dict[str, Any]]:
    """The rows of a part, decoded in batches; empty row groups and metadata of other programs are not read."""
    parquet = open_parquet(file)
    begin, end = part.cut(parquet.metadata.num_rows)
    groups = _groups_of(parquet.metadata, part)
    place = next(iter(groups.values()), 0)
    for batch in parquet.iter_batches(BATCH_ROWS, row_groups=list(groups), columns=columns):
        first = min(max(begin - place, 0), batch.num_rows)
        for row in batch.slice(first, max(end - place - first, 0)).to_pylist():
            yield {name: row[name] for name in columns}
        place += batch.num_rows


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose nested objects lack their null keys: in parquet all objects of a column have the keys of each."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(one) for key, one in value.items() if one is not None}
        return [without(one) for one in value] if isinstance(value, list) else value

    return {name: without(value) for name, value in row.items()}


def open_parquet(file: Path) -> pq.ParquetFile:
    """The file, its footer read. Raises DataError if it is none, or says that it holds far more than its size."""
    try:
        parquet, size = pq.ParquetFile(file, buffer_size=BUFFER), file.stat().st_size
        facts = parquet.metadata
        unpacked = sum(facts.row_group(number).total_byte_size for number in range(facts.num_row_groups))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not a readable parquet file ({_line(error)}); fetch or write it again") from None
    limits = (("bytes", unpacked, FREE_UNPACKED, MAX_RATIO), ("rows", facts.num_rows, FREE_ROWS, MAX_ROWS))
    for what, number, free, ratio in limits:
        if number > max(free, ratio * size):
            raise DataError(f"{file}: {number:,} {what} in a file of {size:,} bytes: give another file")
    return parquet


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


BATCH_ROWS = 1000
BATCH_CHARS = 2 * 2**20  # tokenising takes about 200 bytes of memory for each
READERS: dict[str, Callable[..., PlacedRows]] = {  # all but parquet's, which takes the columns to read
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    TEXT: read_text,
    ".tsv": partial(read_csv, separator="\t"),
}


class Row(NamedTuple):
    """One row of a source file."""

    number: int  # the row's number in its split, from 0
    place: str  # its position, for messages: "pairs.jsonl line 3"
    values: dict[str, Any]  # those of its columns that are read
    others: tuple[str, ...] = ()  # names of its other columns that have a value
    kept: dict[str, Any] | None = None  # columns that are stored with the tokens


def read_batches(
    files: list[Path], limit: int | None, size: int = BATCH_ROWS, *, layout: RowLayout, part: Part = WHOLE
) -> Iterator[list[Row]]:
    """The rows of a split in batches, in the files' order. Raises DataError, which names file and line."""
    batch: list[Row] = []
    number = chars = 0
    for file in files:
        if number == limit:
            break
        before = number
        left_out = _count_left_out(file, limit and limit - number, layout)
        options = {} if part == WHOLE else {"part": part}
        is_parquet = _is_parquet(file)
        read = partial(read_parquet, known=_columns(file, layout)) if is_parquet else READERS[_kind(file)]
        for place, values in read(file, **options):
            try:
                known, others = layout(_without_nulls(values) if is_parquet else values)
            except DataError as error:
                raise DataError(f"{file.name} {place}: {error}") from None
            kept = (
                dict(values)
                if layout.kept.every
                else {name: values[name] for name in layout.kept.names if name in values}
            )
            batch.append(Row(number, f"{file.name} {place}", known, (*others, *left_out), kept or None))
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


def part_bytes(file: Path, part: Part) -> list[tuple[int, int]]:
    """Begin and end of the pieces of a file that its part depends on; of parquet, all behind the last row group too."""
    if not _is_parquet(file):
        return [lines_of_part(file, part)]
    facts, size = open_parquet(file).metadata, file.stat().st_size
    places = []
    for group in (facts.row_group(number) for number in range(facts.num_row_groups)):
        columns = [group.column(number) for number in range(group.num_columns)]
        pages = [page for one in columns for page in (one.dictionary_page_offset, one.data_page_offset) if page]
        places.append((min(pages), min(pages) + sum(one.total_compressed_size for one in columns)))
    return [*(places[number] for number in _groups_of(facts, part)), (max((end for _, end in places), default=0), size)]


def _kind(file: Path) -> str:
    kind = file_kind(file)
    if kind is None:
        raise DataError(f"{file}: its ending says nothing that can be read; give one of {', '.join(KINDS)}")
    return kind[0]


def _columns(file: Path, layout: RowLayout) -> tuple[str, ...]:
    """The columns to read of a parquet file."""
    names = open_parquet(file).schema_arrow.names if layout.kept.every else ()
    return tuple(dict.fromkeys([*layout.columns, *names]))


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


def count_rows(files: list[Path], limit: int | None, part: Part = WHOLE) -> int | None:
    """About how many rows `read_batches` gives; None if only reading tells. Raises DataError for bad parquet."""
    total = 0
    for file in files:
        kind, compression = file_kind(file) or (_kind(file), "")
        if kind == ".json" or compression:
            return None
        header = kind in (".csv", ".tsv")
        total += open_parquet(file).metadata.num_rows if kind == ".parquet" else count_lines(file) - header
    total //= part.total
    return total if limit is None else min(total, limit)
