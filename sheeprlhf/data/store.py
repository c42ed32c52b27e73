"""Tokenised splits on disk: Arrow files that are memory-mapped; of unpaired data also with mismatched responses."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from sheeprlhf.data.example import Example
from sheeprlhf.data.rows import decode_columns
from sheeprlhf.data.tokenize import TokenRow
from sheeprlhf.security.json_records import DIGESTS as DIGESTS_SCHEMA
from sheeprlhf.security.json_records import PREPARED, load_json
from sheeprlhf.utils import home
from sheeprlhf.utils.errors import DataError, RecordError
from sheeprlhf.utils.output import create_file

T = TypeVar("T")
R = TypeVar("R")
REPORT = "report.json"
DIGESTS = "digests.json"
SCHEMA = pa.schema(
    [
        ("row_id", pa.int64()),
        ("tokens", pa.list_(pa.int32())),
        ("sizes", pa.list_(pa.int32())),
        ("margin", pa.float32()),
        ("desirable", pa.int8()),
        ("columns", pa.string()),
        ("runs", pa.list_(pa.int32())),  # lengths of the runs of trained and untrained response tokens; empty: all
    ]
)


class SplitWriter:
    """Writes one split's rows, batch by batch."""

    def __init__(self, file: Path) -> None:
        """Begin an Arrow file."""
        self._sink = pa.OSFile(str(file), "wb")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)

    def write(self, rows: Sequence[TokenRow]) -> None:
        """Append rows; one of unpaired data becomes a row for each of its responses."""
        rows = [single for row in rows for single in _singles(row)]
        numbers = np.array([row.number for row in rows], np.int64)
        tokens, sizes = [row.tokens for row in rows], [np.asarray(row.sizes, dtype=np.int32) for row in rows]
        margins = _column(np.array([row.margin for row in rows], np.float32), pa.float32())
        desirable = _column(np.array([all(row.desirable) for row in rows], np.int8), pa.int8())
        columns = [_column(numbers, pa.int64()), _lists(tokens), _lists(sizes), margins, desirable, _texts(rows)]
        columns.append(_lists([_runs(row.trained) for row in rows]))
        self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))

    def close(self) -> None:
        """Write the footer."""
        self._writer.close()
        self._sink.close()


def _singles(row: TokenRow) -> list[TokenRow]:
    """A row of unpaired data with two responses as two rows; any other row as it is."""
    if len(row.desirable) < 2:
        return [row]
    prompt, *responses = np.split(row.tokens, np.cumsum(row.sizes)[:-1])
    masks = [None] * len(responses) if row.trained is None else np.split(row.trained, np.cumsum(row.sizes[1:])[:-1])
    return [
        row._replace(
            tokens=np.concatenate([prompt, response]),
            sizes=(len(prompt), len(response)),
            desirable=(label,),
            trained=trained,
        )
        for response, label, trained in zip(responses, row.desirable, masks, strict=True)
    ]


def _runs(trained: np.ndarray | None) -> np.ndarray:
    """Lengths of the runs of True and False in turn, the first of True; empty if there is no False."""
    if trained is None or trained.all():
        return np.empty(0, np.int32)
    return np.diff(np.flatnonzero(np.diff(trained, prepend=True, append=not trained[-1])), prepend=0).astype(np.int32)


def _lists(arrays: Sequence[np.ndarray]) -> pa.ListArray:
    """A column of int32 lists."""
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(_column(offsets, pa.int32()), _column(np.concatenate(arrays), pa.int32()))


def _texts(rows: Sequence[TokenRow]) -> pa.StringArray:
    """The columns that are stored with the tokens, JSON text."""
    texts = [row.columns.encode() for row in rows]
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    return pa.StringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(b"".join(texts)))


def _column(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """A column of numbers. `pa.array` would import pandas, which takes half a second."""
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


class TokenizedSplit:
    """One split, memory-mapped: rows are read from the disk when they are asked for.

    Attributes:
        file: the Arrow file.
        lengths: (rows,) int32, tokens of a row, prompt and all responses.
        sizes: (rows, 1 + K) int32, tokens of the prompt and of each response; -1 for those that a row has fewer.
        desirable: (rows,) bool, False for unpaired data whose response is to become less likely.
        unanswered: how many rows have no response.
        columns: names of the columns that each row has next to its tokens.
    """

    def __init__(self, file: Path) -> None:
        """Open an Arrow file that `SplitWriter` made. Raises DataError if the file is damaged."""
        try:
            table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: damaged ({error}); delete the folder {file.parent} and start again") from None
        self.file = file
        # not to_numpy(), which would import pandas
        self._tokens = [np.from_dlpack(chunk.values) for chunk in table["tokens"].chunks]
        self._offsets = [np.from_dlpack(chunk.offsets) for chunk in table["tokens"].chunks]
        self._first_rows = np.cumsum([0, *(len(offsets) - 1 for offsets in self._offsets)])
        self._row_ids = [np.from_dlpack(chunk) for chunk in table["row_id"].chunks]
        self._margins = [np.from_dlpack(chunk) for chunk in table["margin"].chunks]
        self._columns = table["columns"].chunks
        self._runs: list[np.ndarray] = [np.from_dlpack(chunk.values) for chunk in table["runs"].chunks]
        self._run_offsets: list[np.ndarray] = [np.from_dlpack(chunk.offsets) for chunk in table["runs"].chunks]
        self.columns: tuple[str, ...] = ()
        self.desirable = np.concatenate([np.from_dlpack(chunk).astype(bool) for chunk in table["desirable"].chunks])
        self.sizes = self._stored_sizes = _matrix(table["sizes"], len(table))
        self.lengths: np.ndarray = self.sizes.clip(0).sum(axis=1, dtype=np.int32)
        self.unanswered = int((self.sizes[:, 1:] < 0).all(axis=1).sum())

    def largest_id(self) -> int:
        """The largest token id; a negative one, as no tokenizer makes it, counts as the largest of 32 bits."""
        return max(int(tokens.view(np.uint32).max(initial=0)) for tokens in self._tokens)

    def num_untrained(self) -> int:
        """Tokens of all responses that count in no loss over tokens."""
        total = 0
        for runs, offsets in zip(self._runs, self._run_offsets, strict=True):
            firsts = np.repeat(offsets[:-1], np.diff(offsets).astype(np.int64))
            place = np.arange(len(runs)) - firsts  # in the runs of its row
            total += int(runs[place % 2 == 1].sum())
        return total

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    def example(self, index: int) -> Example:
        """Row `index`; its arrays are views of the file."""
        chunk, row = self._place(index)
        start = self._offsets[chunk][row]
        parts = []
        for size in self._stored_sizes[index].tolist():
            if size >= 0:
                parts.append(self._tokens[chunk][start : start + size])
                start += size
        number, margin = int(self._row_ids[chunk][row]), float(self._margins[chunk][row])
        runs = self._runs[chunk][self._run_offsets[chunk][row] : self._run_offsets[chunk][row + 1]]
        trained = np.repeat(np.arange(len(runs)) % 2 == 0, runs) if len(runs) else None
        example = Example(number, parts[0], tuple(parts[1:]), margin, bool(self.desirable[index]), trained=trained)
        if not self.columns:
            return example
        stored = decode_columns(self._columns[chunk][row].as_py())
        return example._replace(columns={name: stored.get(name) for name in self.columns})

    def token_row(self, index: int) -> TokenRow:
        """Row `index` as `SplitWriter` takes it."""
        chunk, row = self._place(index)
        example = self.example(index)
        return TokenRow(
            number=example.row_id,
            shares=(0.0, 0.0),
            tokens=np.concatenate([example.prompt_ids, *example.responses]),
            sizes=(len(example.prompt_ids), *map(len, example.responses)),
            margin=example.margin,
            desirable=(example.desirable,),
            columns=self._columns[chunk][row].as_py(),
            trained=example.trained,
        )

    def _place(self, index: int) -> tuple[int, int]:
        """The chunk of row `index`, and its place in the chunk."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a split of {len(self)} rows")
        chunk = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        return chunk, index - int(self._first_rows[chunk])

    def examples(self, indices: Sequence[int]) -> list[Example]:
        """Rows by index, in the order asked for."""
        return [self.example(int(index)) for index in indices]


def _matrix(column: pa.ChunkedArray, num_rows: int) -> np.ndarray:
    """(rows, most entries of a row) int32 of a column of lists, -1 where a row has fewer."""
    counts = np.concatenate([np.diff(np.from_dlpack(chunk.offsets)) for chunk in column.chunks])
    values = np.concatenate([np.from_dlpack(chunk.values) for chunk in column.chunks])
    matrix = np.full((num_rows, int(counts.max())), -1, dtype=np.int32)
    matrix[np.arange(matrix.shape[1]) < counts[:, None]] = values
    return matrix


def cache_root(cache_dir: str | None) -> Path:
    """Folder of prepared data."""
    return home.cache_root(cache_dir) / "data"


def write_digests(folder: Path) -> None:
    """Note the SHA-256 of each file of a prepared folder, for `find_damage`."""
    digests = {path.name: _digest(path) for path in _digested(folder)}
    create_file(folder, DIGESTS, json.dumps(digests, indent=1).encode())


def find_damage(folder: Path) -> str:
    """The problem of a prepared folder: a file that is missing or has changed; empty if it is complete."""
    try:
        digests = load_json(folder / DIGESTS, DIGESTS_SCHEMA)
        if REPORT not in digests or {path.name for path in _digested(folder)} - digests.keys():
            return f"{DIGESTS} is missing or damaged"
        damaged = next((f"{name} is damaged" for name, known in digests.items() if _digest(folder / name) != known), "")
        if not damaged:
            read_report(folder)
        return damaged
    except OSError as error:
        return f"{Path(str(error.filename)).name} cannot be read ({error.strerror})"
    except ValueError as error:
        return f"{Path(error.file).name if isinstance(error, RecordError) else DIGESTS} is damaged"


def _digested(folder: Path) -> list[Path]:
    """The files of a prepared folder whose digests are noted."""
    return [path for path in sorted(folder.iterdir()) if path.suffix in (".arrow", ".json") and path.name != DIGESTS]


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a prepared folder that is whole."""
    return load_json(folder / REPORT, PREPARED)


class MismatchedSplit(TokenizedSplit):
    """The rows of a split of unpaired data, each with the response of another row, cut to the room behind its prompt.

    KTO estimates its KL divergence from them.

    Who goes with whom depends on the rows and their order only, never on a step or a rank, so that the reference's
    log-probabilities of these pairs are computed once.
    """

    def __init__(self, file: Path, longest: int) -> None:
        """Open the split's file; `longest` is the most tokens of a row. Raises DataError if it is damaged."""
        super().__init__(file)
        prompts = (super(MismatchedSplit, self).example(row).prompt_ids for row in range(len(self)))
        digests = (blake2b(ids.tobytes(), digest_size=8).digest() for ids in prompts)
        prompts_N = np.frombuffer(b"".join(digests), np.uint64)  # 64 bits of each prompt
        # there is no other prompt, and the responses are not mismatched
        self.has_one_prompt = bool((prompts_N == prompts_N[0]).all())
        self.partners = mismatched_rows(prompts_N)  # (rows,) int64, the row that lends its response
        num_prompt, num_response = self.sizes[:, 0], self.sizes[self.partners, 1]
        self.sizes = np.stack([num_prompt, np.minimum(num_response, longest - num_prompt)], axis=1)
        self.lengths = self.sizes.sum(axis=1, dtype=np.int32)

    def example(self, index: int) -> Example:
        """Row `index` with the response of its partner; its label stays its own."""
        own = super().example(index)
        partner, length = super().example(int(self.partners[index])), self.sizes[index, 1]
        trained = None if partner.trained is None else partner.trained[:length]
        return own._replace(responses=(partner.responses[0][:length],), trained=trained)


def mismatched_rows(prompts_N: np.ndarray) -> np.ndarray:
    """For each row another row, with another prompt; prompts_N, (N,), has equal numbers where prompts are equal.

    That is the row as many places ahead, counted around the end, as the longest run of one prompt has rows: the two
    responses of a pair, which stand side by side, go to two different rows, and every response is lent once. Where
    that row has the same prompt again, the first of the next run is taken. A split of one prompt has no such rows;
    each gets the next.

    Returns:
        (N,) int64 rows.
    """
    rows_N = np.arange(len(prompts_N))
    starts = np.flatnonzero(prompts_N != np.roll(prompts_N, 1))  # rows that begin a run
    if not len(starts):
        return np.roll(rows_N, -1)
    longest_run = int(np.diff([*starts, starts[0] + len(rows_N)]).max())
    partners_N = (rows_N + longest_run) % len(rows_N)
    next_start_N = starts[np.searchsorted(starts, rows_N, side="right") % len(starts)]
    same_N = prompts_N[partners_N] == prompts_N
    partners_N[same_N] = next_start_N[partners_N[same_N]]
    return partners_N


def load_ahead(load: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """`load(item)` for every item, in order, by threads a few items ahead; without workers, when it is asked for."""
    if workers == 0:
        yield from map(load, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="load-ahead")
    try:
        yield from in_order((pool.submit(load, item) for item in items), 2 * workers)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def in_order(futures: Iterable[Future[R]], ahead: int) -> Iterator[R]:
    """The results of futures in their order; at most `ahead` more are submitted than are asked for."""
    waiting: deque[Future[R]] = deque()
    for future in futures:
        waiting.append(future)
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
