"""Tokenised splits on disk: Arrow files that are memory-mapped, in a folder that appears whole or not at all."""

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sheeprlhf.data.example import Example
from sheeprlhf.data.tokenize import TokenRow
from sheeprlhf.utils.errors import DataError

MARKER = "MADE_BY_SHEEPRLHF"  # a folder without this file is not ours to delete
REPORT = "report.json"
SCHEMA = pa.schema([("row_id", pa.int64()), ("tokens", pa.list_(pa.int32())), ("sizes", pa.list_(pa.int32()))])


class SplitWriter:
    """Writes one split's rows, batch by batch."""

    def __init__(self, file: Path) -> None:
        """Make the Arrow file `file`."""
        self._sink = pa.OSFile(str(file), "wb")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)

    def write(self, rows: Sequence[TokenRow]) -> None:
        """Append rows."""
        tokens, sizes = [row.tokens for row in rows], [np.asarray(row.sizes, dtype=np.int32) for row in rows]
        columns = [pa.array([row.number for row in rows], pa.int64()), _lists(tokens), _lists(sizes)]
        self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))

    def close(self) -> None:
        """Write the footer."""
        self._writer.close()
        self._sink.close()


def _lists(arrays: Sequence[np.ndarray]) -> pa.ListArray:
    """A column of int32 lists."""
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))


class TokenizedSplit:
    """One split, memory-mapped: rows are read from the disk when they are asked for.

    Attributes:
        lengths: (rows,) int32, tokens of a row, prompt and all responses.
        sizes: (rows, 1 + K) int32, tokens of the prompt and of each response.
    """

    def __init__(self, file: Path) -> None:
        """Open an Arrow file that `SplitWriter` made.

        Raises:
            DataError: if the file is damaged.
        """
        try:
            table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: damaged ({error}); delete the folder {file.parent} and start again") from None
        self._tokens = [chunk.values.to_numpy() for chunk in table["tokens"].chunks]
        self._offsets = [chunk.offsets.to_numpy() for chunk in table["tokens"].chunks]
        self._first_rows = np.cumsum([0, *(len(offsets) - 1 for offsets in self._offsets)])
        self._row_ids = table["row_id"].to_numpy()
        self.sizes = table["sizes"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
        self.lengths: np.ndarray = self.sizes.sum(axis=1, dtype=np.int32)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    def example(self, index: int) -> Example:
        """Row `index`; its arrays are views of the file."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a split of {len(self)} rows")
        chunk = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        start = self._offsets[chunk][index - self._first_rows[chunk]]
        parts = []
        for size in self.sizes[index].tolist():
            parts.append(self._tokens[chunk][start : start + size])
            start += size
        return Example(int(self._row_ids[index]), parts[0], tuple(parts[1:]))

    def examples(self, indices: Sequence[int]) -> list[Example]:
        """Rows by index, in the order asked for."""
        return [self.example(int(index)) for index in indices]


def cache_root(cache_dir: str | None) -> Path:
    """Where prepared data is kept: the option, else $SHEEPRLHF_CACHE, else ~/.cache/sheeprlhf."""
    return Path(cache_dir or os.environ.get("SHEEPRLHF_CACHE") or "~/.cache/sheeprlhf").expanduser() / "data"


@contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a prepared folder; the system frees it when a process dies, however it dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is preparing {folder.name}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def written_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place when the block ends well. Call it under `locked`."""
    sweep(folder)
    temporary = folder.with_name(f".{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        (temporary / MARKER).touch()
        yield temporary
        for path in [*temporary.iterdir(), temporary]:
            _sync(path)
        os.rename(temporary, folder)
        _sync(folder.parent)
    except BaseException:
        _remove(temporary)
        raise


def sweep(folder: Path) -> None:
    """Remove what killed preparations of `folder` left behind; the lock says that none is at work."""
    for left in folder.parent.glob(f".{folder.name}.tmp-*"):
        _remove(left)


def _remove(folder: Path) -> None:
    """Delete a folder that we made; one without our marker only if it is empty, as after a kill before the marker."""
    if (folder / MARKER).is_file():
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _sync(path: Path) -> None:
    """Bring a file's or folder's bytes to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report of a prepared folder, None if there is no such folder.

    Raises:
        DataError: if something else stands at its place.
    """
    if not folder.exists():
        return None
    try:
        return json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is not a prepared dataset ({error}); remove it or set data.cache_dir") from None
