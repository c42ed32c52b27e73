"""Files of bad data and their answers: what the table in `bad_data` is made of."""

import csv
import io
import json
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

Rows = list[dict[str, Any]]
GOOD = {"prompt": "say hi", "response": "hello"}
PAIR = {"prompt": "say hi", "chosen": "hello", "rejected": "go away"}
AT = {"jsonl": ("line", 1), "json": ("item", 1), "csv": ("line", 2), "parquet": ("row", 1)}  # of the first row


class Bad(NamedTuple):
    """A file and its answer: an error that has all of `says`; with `counts`, a report whose table has them."""

    variant: str
    file: str
    content: bytes | Callable[[], bytes]
    says: tuple[str, ...]
    counts: dict[str, int] | None = None
    task: str = "sft"
    options: Mapping[str, Any] = MappingProxyType({})
    ignored: str = ""  # text that the tokenizer makes no token of


def jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: Rows) -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list({name: None for row in rows for name in row}))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def parquet(rows: Rows) -> bytes:
    return parquet_of(pa.Table.from_pylist(rows))


def parquet_of(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return stream.getvalue()


WRITERS: dict[str, Callable[[Rows], bytes]] = {
    "jsonl": jsonl,
    "json": lambda rows: json.dumps(rows, indent=1).encode(),
    "csv": as_csv,
    "parquet": parquet,
}


def one(name: str, content: bytes | Callable[[], bytes], *says: str, note: str = "", **more: Any) -> Bad:
    """A file of one format; "@" in `says` is its name."""
    printed = tuple(text.replace("@", f"rows.{name}") for text in says)
    return Bad(f"{name} {note}".strip(), f"rows.{name}", content, printed, **more)


def each(rows: Rows, *says: str, formats: tuple[str, ...] = tuple(WRITERS), **more: Any) -> list[Bad]:
    """The rows in a file of each format; "@" in `says` is the place of the last one."""
    cases = []
    for name in formats:
        what, first = AT[name]
        messages = [text.replace("@", f"@ {what} {first + len(rows) - 1}") for text in says]
        cases.append(one(name, partial(WRITERS[name], rows), *messages, **more))
    return cases


def text_files(change: Callable[[bytes], bytes], *says: str, **more: Any) -> list[Bad]:
    """Two good rows in a file of each text format, its bytes changed."""
    rows = [GOOD, GOOD | {"prompt": "p"}]
    return [one(name, change(WRITERS[name](rows)), *says, **more) for name in ("jsonl", "json", "csv")]


def long_line(head: bytes) -> bytes:
    return head + b"x" * 50_000_000


def long_text(name: str) -> bytes:
    return WRITERS[name]([GOOD, GOOD | {"response": "x" * 50_000_000}])


def long_quote() -> bytes:
    return b'prompt,response\na,b\n"' + (b"x" * 999 + b"\n") * 20_000
