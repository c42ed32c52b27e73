"""Rows of jsonl, json and csv files, streamed; every error names the file and the line or item.

They are read here and not by a library: only a reader that sees the lines can name the bad one, a type guessed from the
first chunk cannot reject a later row, and no second copy is written. Compressed files are unpacked while they are read,
with a bound on what they unpack to.
"""

import bz2
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from sheeprlhf.config.path_checks import file_kind
from sheeprlhf.data.rows import COLUMNS, CONVERSATION_COLUMNS, printable
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


def read_jsonl(file: Path) -> PlacedRows:
    """One JSON object a line; empty lines are skipped."""
    for number, line in _lines(file):
        if line.isspace():
            continue
        place = f"{file} line {number}"
        if number == 1 and line.strip() in (b"[", b"{"):
            raise DataError(f"{place}: JSON over several lines; write one row a line, or let the name end in .json")
        text = _decode(line, file, number).rstrip()
        with _placed(place):
            value = _DECODER.decode(text)
        yield f"line {number}", _object(value, place)


def read_text(file: Path) -> PlacedRows:
    """One text a line; empty lines are skipped."""
    for number, line in _lines(file):
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
    """The text of a JSON file.

    Raises:
        DataError: it is too large to be read at once.
    """
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
    if set(value) & ROW_COLUMNS:
        yield "item 1", value
    elif len(lists) == 1:
        yield from _placed_items(file, iter(value[lists[0]]), f"{printable(lists)} item")
    else:
        has = f"lists of objects as {printable(lists)}" if lists else f"no list of objects, only {printable(value)}"
        raise DataError(
            f"{file}: one JSON object with {has}; write the rows as a list, "
            '[{"prompt": ..., "response": ...}, ...], or one a line'
        )


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
    reader = csv.reader(
        (_decode(line, file, number) for number, line in _lines(file)), strict=True, delimiter=separator
    )
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


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers, from 1."""
    with open_data(file) as stream:
        for number in count(1):
            line = stream.readline(MAX_LINE + 1)
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
    twice = [name for name, times in Counter(names).items() if name and times > 1]
    if twice:
        raise DataError(f"{place}: a column name appears twice: {printable(twice)}; keep one")
    other = next((mark for mark in ",;\t|" if mark in names[0]), None)
    if len(names) == 1 and other:
        ending = {",": ", or let the name end in .csv", "\t": ", or let the name end in .tsv"}.get(other, "")
        raise DataError(
            f"{place}: the columns are separated by {other!r}; separate them by {_MARKS[separator]}{ending}"
        )
    return names


def open_data(file: Path) -> BinaryIO:
    """The bytes of a file, unpacked if its name ends in .gz, .bz2 or .zst."""
    kind = file_kind(file)
    if kind is None or not kind[1]:
        return file.open("rb")
    return cast(BinaryIO, io.BufferedReader(_Unpacked(file, kind[1]), 2**16))


def is_compressed(file: Path) -> bool:
    """True if a file is decompressed while it is read."""
    kind = file_kind(file)
    return kind is not None and bool(kind[1])


class _Unpacked(io.RawIOBase):
    """Decompressed bytes of a file.

    Raises:
        DataError: while reading, if the file is damaged, or holds far more than its size.
    """

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
            raise DataError(
                f"{self._file}: damaged, or not compressed as its name says ({error}); fetch or write it again"
            ) from None
        self._left -= len(data)
        if self._left < 0:
            raise DataError(
                f"{self._file}: unpacks to more than {MAX_UNPACKED} times its size: this is not text; give another file"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()
