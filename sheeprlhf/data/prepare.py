"""Raw rows become tokenised splits on disk, once for each combination of data, options and tokenizer.

How data flows: `source` finds the files, `read` streams their rows, the dataset's `format_row` makes text of a row,
`tokenize` makes ids of it, and here each row goes to its split. What was dropped or cut is in the report. A mixture
(`data=mix`) takes rows of several prepared datasets. With `data.streaming`, a `Stream` prepares the training rows shard
by shard while the run trains.
"""

import copy
import dataclasses
import hashlib
import inspect
import json
import re
import signal
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sheeprlhf.config.registry import datasets_of
from sheeprlhf.data import source, store
from sheeprlhf.data.layout import RowLayout
from sheeprlhf.data.mixture import name_in_mixture, numbered_parts, write_mixture
from sheeprlhf.data.read import Row, count_rows, read_batches
from sheeprlhf.data.report import (
    DUPLICATE,
    SPLITS,
    Report,
    SplitCount,
    available_columns,
    check_ids,
    check_refused,
    check_targets,
    preparation_notes,
    rows_kept,
    why_none_left,
)
from sheeprlhf.data.rows import STEPS, printable
from sheeprlhf.data.source import download, progress_bar, release
from sheeprlhf.data.store import SplitWriter, TokenizedSplit, in_order
from sheeprlhf.data.tokenize import RowTokenizer, TokenRow
from sheeprlhf.structure.data import DataConfig, KeptColumns, LayoutDataConfig, MixDataConfig
from sheeprlhf.utils.errors import DataError, Notify, SheepError
from sheeprlhf.utils.output import create_file, discard, locked, written_folder
from sheeprlhf.utils.processes import SAVE_SIGNAL, STOP_SIGNALS, BoundToThis, spawn_context, start_bound
from sheeprlhf.utils.rendering import fixed_arguments

FEWEST_FREQUENT = 4  # rows; with fewer, a prompt that has most of them says nothing
FORMAT_VERSION = 18  # raise it whenever the code makes other rows, or another report, of the same input
_ROWS_TO_JUDGE = 1_000  # before preparing ends early since the chat template refuses most of them
NOTHING_KEPT = KeptColumns()
_PREFERENCES = ("train", "reward")
TRAINING_SPLITS = {
    "sft": ("train",),
    "preference": _PREFERENCES,
    "unpaired": _PREFERENCES,
    "rewarded": _PREFERENCES,
    "stepwise": _PREFERENCES,
    "prompts": ("train",),
}  # one must have rows
NOT_IN_FINGERPRINT = (
    *("cache_dir", "num_proc", "shuffle", "dataset_name", "revision", "subset", "split"),
    *("train_file", "validation_file", "test_file", "streaming", "shard_size", "keep_shards"),
    "step_separator",  # but of rows with steps
)
_worker: list[tuple[RowTokenizer, Event]] = []  # in a pool's process: its tokenizer, sent once, and whether to stop


class SeenDigests:
    """The digests met so far, in sorted runs, each more than twice as long as the next, so that there are few.

    Two different rows share 64 bits with a chance of about 3e-8 in a million rows, 3e-4 in a hundred million.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self._runs: list[np.ndarray] = []

    def add(self, digests_N: np.ndarray) -> np.ndarray:
        """Remember digests_N, (N,) uint64; return (N,) bool, True where an equal digest came before."""
        seen_N = np.ones(len(digests_N), bool)
        seen_N[np.unique(digests_N, return_index=True)[1]] = False
        for run in self._runs:
            places_N = np.searchsorted(run, digests_N).clip(max=len(run) - 1)
            seen_N |= run[places_N] == digests_N
        if not seen_N.all():
            self._runs.append(np.sort(digests_N[~seen_N]))
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            shorter = self._runs.pop()
            self._runs[-1] = np.sort(np.concatenate([self._runs[-1], shorter]), kind="stable")
        return seen_N


class FrequentPrompts(NamedTuple):
    """The prompts that have half of the training rows or more, at most two."""

    shares: frozenset[tuple[float, float]]  # of each prompt, as `split_shares` makes them
    rows: tuple[int, ...]  # rows of each prompt
    total: int  # all training rows

    def notes(self, *, divided: bool) -> list[str]:
        """Notes for the user; `divided` tells that the rows of such a prompt are divided among the splits."""
        if not self.shares:
            return []
        one, fix = len(self.rows) == 1, "give rows with other prompts"
        which = f"all {self.total:,}" if self.rows == (self.total,) else f"{sum(self.rows):,} of {self.total:,}"
        if divided:
            fix = (
                "each of these rows goes to a split by its whole content, so validation and test have prompts of "
                "training: give files of other prompts for them, or data.validation_split=0 data.test_split=0"
            )
        return [f"{which} rows have the same {'prompt' if one else 'two prompts'}; {fix}"]


class PreparedData(NamedTuple):
    """A dataset ready to train on."""

    splits: dict[str, TokenizedSplit]  # those of "train", "reward", "validation" and "test" that have rows
    report: Report  # what was read, kept, dropped and cut (see `data.report`)
    fingerprint: str  # hex digest of all that the splits depend on
    folder: Path  # where the splits are stored


def prepare_data(
    cfg: DataConfig,
    tokenizer: Any,
    *,
    kind: str,
    say: Notify,
    progress: bool,
    kept: KeptColumns = NOTHING_KEPT,
    shard: int = 0,
) -> PreparedData:
    """Any rank, any number of processes at once: the first prepares, the others wait and read what it made.

    What was prepared before is verified by its digests; a folder that is damaged is prepared again.

    Args:
        cfg: the data options.
        tokenizer: the model's tokenizer.
        kind: "sft": one response, the row's `response`, else its `chosen`; "preference": chosen and rejected;
            "unpaired": a response and whether it is desirable, two of such rows from a pair; "rewarded": the same, and
            its reward; "stepwise": a response in steps, each with a label, which is column `labels`; "prompts": as
            "sft", but a row without a response is kept.
        say: prints a line for the user.
        progress: show a bar (rank zero).
        kept: columns of the files to store with the tokens, for reward functions; those that the files have.
        shard: with `data.streaming`, the number of the shard of the training rows: see `Stream`.

    Raises:
        DataError: if the data cannot be read, or no training row is left.
    """
    how: dict[str, Any] = {"kind": kind, "progress": progress, "kept": kept}
    if isinstance(cfg, MixDataConfig):
        parts = [prepare_data(part, tokenizer, **how, say=say) for part in datasets_of(cfg)]
        plan = _plan_mixture(cfg, parts, kind, kept)
    else:
        plan = _plan_files(cfg, tokenizer, **how, shard=shard)
    name = re.sub(r"[^A-Za-z0-9_-]", "_", cfg.config_name)
    folder = store.cache_root(cfg.cache_dir) / f"{name}-{plan.fingerprint[:16]}"
    if not folder.exists() or store.find_damage(folder):
        try:
            with locked(folder, say):
                if not _is_whole(folder, say):  # another process may have made it while this one waited
                    with written_folder(folder) as temporary:  # the folder appears when it is complete
                        plan.build(temporary)
                        store.write_digests(temporary)
        except OSError as error:
            raise DataError(f"{folder} cannot be made: {error}; free space, or set data.cache_dir") from None
    report = store.read_report(folder)
    there = [split for split in report["splits"] if rows_kept(report, split)]
    splits = {split: TokenizedSplit(folder / f"{split}.arrow") for split in there}
    largest_id = max(tokenizer.get_vocab().values())
    for split, rows in splits.items():
        check_targets(split, rows, cfg)
        check_ids(split, rows, largest_id)
        rows.columns = tuple(name for name in available_columns(report, split) if kept.every or name in kept.names)
        if kind == "stepwise":
            rows.columns = STEPS[1:]
    if isinstance(cfg, MixDataConfig):
        names = [{"name": name_in_mixture(given)} for given in cfg.mix]
        report = report | {"mix": [part | name for part, name in zip(report["mix"], names, strict=True)]}
    report = {**report, "notes": [*report["notes"], *plan.notes]}
    return PreparedData(splits, report, plan.fingerprint, folder)


class _Plan(NamedTuple):
    """The preparation of a dataset."""

    fingerprint: str  # hex digest of all that the splits depend on
    build: Callable[[Path], None]  # writes them and their report into an empty folder
    notes: Sequence[str] = ()  # on this dataset, whose prepared rows may be those of another one


def _plan_mixture(cfg: MixDataConfig, parts: Sequence[PreparedData], kind: str, kept: KeptColumns) -> _Plan:
    """Plan the mixture of prepared datasets."""
    weights = [given.get("weight") for given in cfg.mix]
    of_parts = [*weights, *(part.fingerprint for part in parts)]
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, of_parts]).encode()).hexdigest()
    pairs = [(weight, part.splits, part.report) for weight, part in zip(weights, parts, strict=True)]
    return _Plan(digest, partial(write_mixture, numbered_parts(pairs), name=cfg.config_name, kind=kind, kept=kept))


def _plan_files(cfg: DataConfig, tokenizer: Any, *, kind: str, progress: bool, kept: KeptColumns, shard: int) -> _Plan:
    """Find the files of a dataset, and plan their preparation; with `data.streaming`, that of one shard."""
    files, part = source.locate(cfg), source.WHOLE
    notes = list(filter(None, [source.left_out_note(cfg, files)]))
    if isinstance(cfg, LayoutDataConfig) and cfg.streaming:
        shards = source.shards_of(cfg, files)
        notes += source.notes_on_shards(cfg, shards)
        chosen = shards[shard % len(shards)]
        part = chosen.part
        cfg, files = source.options_of_shard(cfg, files, chosen, first=chosen == shards[0])
        if source.streams_from_hub(cfg):
            download(cfg, [file for of_split in files.values() for file in of_split])
    tokenize = RowTokenizer(cfg, tokenizer, kind)
    digest = fingerprint(cfg, tokenize, source.content_hash(files, part, progress=progress), kept)
    return _Plan(digest, partial(_build, _Reading(cfg, files, part, kept, progress), tokenize), notes)


def _is_whole(folder: Path, say: Notify) -> bool:
    """True if a folder is prepared and undamaged; removes, under its lock, a damaged one. Raises DataError."""
    if not folder.exists():
        return False
    damage = store.find_damage(folder)
    if not damage:
        return True
    try:
        discard(folder)
    except FileExistsError as error:
        raise DataError(f"{folder} is no prepared dataset ({damage}; {error}); move it or set data.cache_dir") from None
    say(f"prepared data {folder}: {damage}; preparing it again")
    return False


def fingerprint(cfg: DataConfig, tokenize: RowTokenizer, content: str, kept: KeptColumns = NOTHING_KEPT) -> str:
    """Digest of all that the prepared rows depend on; paths and names of files count by the digest of their content."""
    tokenizer = tokenize.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pieces = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    for changed_by_calls in ("truncation", "padding"):
        pieces.pop(changed_by_calls, None)
    options = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in NOT_IN_FINGERPRINT}
    parts = {
        "version": FORMAT_VERSION,
        "kind": tokenize.kind,
        "row_format": [cfg.row_format, inspect.getsource(import_module(cfg.row_format.partition(":")[0]))],
        "options": options,
        "content": content,
        "tokenizer": pieces,
        "special": [tokenize.ids.bos, tokenize.ids.ends, tokenize.ids.texts],
        "chat_template": getattr(tokenizer, "chat_template", None),
        "template_args": fixed_arguments(tokenizer, cfg.template_args),
    }
    if tokenize.kind == "stepwise":
        parts["step_separator"] = getattr(cfg, "step_separator", None)
    if kept != NOTHING_KEPT:
        parts["kept"] = [sorted(kept.names), kept.every]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class _Reading(NamedTuple):
    """The files of a dataset, and how they are read."""

    cfg: DataConfig
    files: source.Files
    part: source.Part  # of the training files
    kept: KeptColumns  # columns that are stored with the tokens
    progress: bool  # show a bar

    @property
    def cuts_training_rows(self) -> bool:
        """True if some of the training rows go to another split."""
        cfg = self.cfg
        shares = {"validation": cfg.validation_split, "test": cfg.test_split, "reward": cfg.reward_model_split}
        return any(share for split, share in shares.items() if split not in self.files)


def _build(reading: _Reading, tokenize: RowTokenizer, folder: Path) -> None:
    """Read, tokenise and write all splits and their report into an empty folder."""
    cfg, native = reading.cfg, set(reading.files)
    written = _write_splits(reading, tokenize, folder)
    frequent = written.frequent_prompts()
    if frequent.shares and reading.cuts_training_rows:
        for file in folder.glob("*.arrow"):
            file.unlink()
        divided = copy.copy(tokenize)
        divided.divided = frequent.shares
        written = _write_splits(reading, divided, folder)
    counts, layout = written.counts, written.layout
    arrow = {split: folder / f"{split}.arrow" for split in counts}
    parts = {
        split: counts[split].report(TokenizedSplit(arrow[split]) if arrow[split].exists() else None)
        for split in SPLITS
        if split in counts
    }
    report: Report = {"name": cfg.config_name, "kind": tokenize.kind, "splits": parts, "notes": []}
    report["columns"] = {
        "layouts": {f"{kind}: {printable(of)}": rows for (kind, of), rows in layout.layouts.most_common()},
        "read_as": dict(layout.sources.most_common()),
        "numbers_as_text": dict(layout.numbers.most_common()),
        "not_read": dict(layout.unread.most_common()),
    }
    report["available_columns"] = written.available
    if any(part["templated_rows"] for part in parts.values()):
        report["template_args"] = fixed_arguments(tokenize.tokenizer, cfg.template_args)
    on_frequent = frequent.notes(divided=reading.cuts_training_rows)
    report["notes"] = list(preparation_notes(report, cfg, tokenize.tokenizer, on_frequent, layout.undesirable))
    if not any(rows_kept(report, split) for split in TRAINING_SPLITS[tokenize.kind]):
        raise DataError(why_none_left(report, native, cfg))
    create_file(folder, store.REPORT, json.dumps(report, indent=1).encode())


class _Written(NamedTuple):
    """The splits of one pass over the files."""

    counts: dict[str, SplitCount]  # of each split
    layout: RowLayout  # of the rows
    # for each training row that is kept, the shares of its prompt, one after the other; no subscript at run time before
    # Python 3.12
    prompts: "array[float]"
    available: dict[str, list[str]]  # names of all columns of the rows that came from each split's files

    def frequent_prompts(self) -> FrequentPrompts:
        """The prompts that have half of the training rows or more."""
        shares, rows = np.unique(np.array(self.prompts).reshape(-1, 2), axis=0, return_counts=True)
        total = len(self.prompts) // 2
        is_frequent = (rows >= FEWEST_FREQUENT) & (2 * rows >= total)
        found = [(float(first), float(second)) for first, second in shares[is_frequent]]
        return FrequentPrompts(frozenset(found), tuple(rows[is_frequent].tolist()), total)


def _write_splits(reading: _Reading, tokenize: RowTokenizer, folder: Path) -> _Written:
    """Read and tokenise all rows, and write each to the file of its split."""
    cfg, shown = reading.cfg, reading.progress
    written = _Written({}, RowLayout(cfg, tokenize.kind, kept=reading.kept), array("d"), {})
    writers: dict[str, SplitWriter] = {}
    for origin, files in reading.files.items():
        seen = SeenDigests()
        part = reading.part if origin == "train" else source.WHOLE
        total = count_rows(files, cfg.num_samples, part) if shown else None
        with progress_bar(f"preparing {origin}", total, shown=shown, unit=" rows") as bar:
            read = read_batches(files, cfg.num_samples, layout=written.layout, part=part)
            for rows in _tokenized(tokenize, read, cfg.num_proc):
                of_split = _count(rows, cfg, origin, set(reading.files), seen, written.counts)
                for split, kept_rows in of_split.items():
                    if split not in writers:
                        writers[split] = SplitWriter(folder / f"{split}.arrow")
                    writers[split].write(kept_rows)
                    if origin == "train":
                        firsts = [row for row in kept_rows if not row.is_text or not row.is_further]
                        written.prompts.extend(share for row in firsts for share in row.shares)
                bar.update(len(rows))
                check_refused(written.counts, at_least=_ROWS_TO_JUDGE)
            bar.total = bar.n  # the total was an estimate
        written.available[origin] = list(written.layout.available)
        written.layout.available.clear()
    check_refused(written.counts)
    written.layout.check_seen()
    for writer in writers.values():
        writer.close()
    return written


def _count(
    rows: list[TokenRow],
    cfg: DataConfig,
    origin: str,
    native: set[str],
    seen: SeenDigests,
    counts: dict[str, SplitCount],
) -> dict[str, list[TokenRow]]:
    """Give each row to its split; count it, and leave out what equals a row before it."""
    kept: dict[str, list[TokenRow]] = {}
    repeated = iter(seen.add(np.array([row.digest for row in rows if row.dropped is None], np.uint64)).tolist())
    for row in rows:
        split = origin if origin != "train" else choose_split(row.shares, cfg, native)
        duplicate = row.dropped is None and next(repeated)
        dropped = DUPLICATE if duplicate and cfg.remove_same_inputs else row.dropped
        if split not in counts:
            counts[split] = SplitCount()
        counts[split].add(row, dropped, duplicate)
        if dropped is None:
            kept.setdefault(split, []).append(row)
    return kept


def choose_split(shares: tuple[float, float], cfg: DataConfig, native: set[str]) -> str:
    """The split of a training row by its shares, which equal prompts have in common; `native` splits are not cut."""
    test = 0.0 if "test" in native else cfg.test_split
    validation = 0.0 if "validation" in native else cfg.validation_split
    if shares[0] < test:
        return "test"
    if shares[0] < test + validation:
        return "validation"
    return "reward" if shares[1] < cfg.reward_model_split else "train"


def _tokenized(tokenize: RowTokenizer, batches: Iterator[list[Row]], num_proc: int) -> Iterator[list[TokenRow]]:
    """Tokenise batches in order, with several processes if asked; never more than a few batches are in memory."""
    if num_proc == 1:
        yield from map(tokenize, batches)
        return
    context = spawn_context(f"data.num_proc={num_proc}")
    with signals_held_back():
        stop = context.Event()  # starts a process that keeps account of such things
    pool = ProcessPoolExecutor(num_proc, context, start_bound, (BoundToThis(), _start_worker, tokenize, stop))

    def submit(batch: list[Row]) -> Future[list[TokenRow]]:
        with signals_held_back():
            return pool.submit(_work, batch)

    try:
        yield from in_order(map(submit, batches), 2 * num_proc)
    finally:
        stop.set()  # killed in the middle of an answer, a process would leave the pool waiting for the rest of it
        pool.shutdown(cancel_futures=True)


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Processes started inside see none of the signals to all, except SIGTERM, by which their pool ends them."""
    held_back = {*STOP_SIGNALS, SAVE_SIGNAL} - {signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held_back)
    try:
        resource_tracker.ensure_running()  # its own start lets Ctrl-C, which it ignores, through again
        signal.pthread_sigmask(signal.SIG_BLOCK, held_back)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(tokenize: RowTokenizer, stop: Event) -> None:
    """In a new process: keep the tokenizer."""
    _worker[:] = [(tokenize, stop)]


def _work(batch: list[Row]) -> list[TokenRow]:
    """Tokenise one batch in a pool's process; after `stop`, the rest of the queue is skipped."""
    [(tokenize, stop)] = _worker
    return [] if stop.is_set() else tokenize(batch)


class Stream:
    """The shards of the training rows, in their order and from the first again after the last. Any rank."""

    def __init__(
        self,
        cfg: LayoutDataConfig,
        tokenizer: Any,
        *,
        kind: str,
        say: Notify,
        leads: bool,  # prepares the next shard ahead and deletes prepared ones; one process of each machine
        kept: KeptColumns = NOTHING_KEPT,
    ) -> None:
        self._cfg, self._tokenizer, self._say, self._leads = cfg, tokenizer, say, leads
        self._how: dict[str, Any] = {"kind": kind, "kept": kept, "progress": False}
        self._shards = source.shards_of(cfg, source.locate(cfg))
        self._prepared: list[Path] = []
        self._ahead: SpawnProcess | None = None

    def __len__(self) -> int:
        """Number of shards."""
        return len(self._shards)

    def fingerprint(self, first: PreparedData) -> str:
        """Digest of the first shard, all options, and the names, sizes and parts of all files, not of their content."""
        shards = [(shard.file.name, shard.file.stat().st_size, shard.part) for shard in self._shards]
        return hashlib.sha256(json.dumps([first.fingerprint, shards]).encode()).hexdigest()

    def open_shard(self, number: int, extra: dict[str, Any], **begins_at: int) -> PreparedData:
        """Rows of shard `number` (any, counted on); `extra` then names it. Raises DataError if it is not as before."""
        data = self.prepare(number)
        digest = int(data.fingerprint[:12], 16)
        if extra.get("shard") == number and extra["shard_digest"] != digest:
            raise DataError(
                f"shard {number % len(self) + 1} of the training rows, {self._shards[number % len(self)]}, is not that "
                "of the checkpoint: put the file back"
            )
        extra |= {"shard": number, "shard_digest": digest, **begins_at}
        return data

    def prepare(self, number: int) -> PreparedData:
        """The rows of shard `number`; deletes the oldest shard but the first beyond `keep_shards`. Raises DataError."""
        self.close(wait=True)
        shard, before = self._shards[number % len(self)], self._shards[(number - 1) % len(self)]
        if self._leads and number and before.file != shard.file and source.streams_from_hub(self._cfg):
            release(before.file)  # all processes have prepared it
        self._say(f"training on {shard}, shard {number % len(self) + 1} of {len(self)}")
        try:
            data = prepare_data(self._cfg, self._tokenizer, **self._how, say=self._say, shard=number)
        except DataError as error:
            raise DataError(f"{shard}: {error}") from None
        keep = self._cfg.keep_shards
        if self._leads and number % len(self) and keep is not None and len(self) > keep:
            self._prepared.append(data.folder)
            while len(self._prepared) > keep - 1:  # the next one is prepared ahead
                with locked(oldest := self._prepared.pop(0), self._say), suppress(FileNotFoundError):
                    discard(oldest)
        return data

    def prepare_ahead(self, number: int) -> None:
        """Prepare shard `number` in a process that ends with this one; `prepare` reports what goes wrong."""
        if self._leads:
            arguments = (BoundToThis(), self._cfg, self._tokenizer, self._how, number)
            with signals_held_back():
                self._ahead = spawn_context("data.streaming=true").Process(target=_prepare, args=arguments)
                self._ahead.start()

    def close(self, *, wait: bool = False) -> None:
        """End the process that prepares ahead, or wait until it has ended."""
        if self._ahead is not None:
            if not wait:
                self._ahead.terminate()
            self._ahead.join()
            self._ahead = None


def prepare_training_data(
    cfg: DataConfig,
    tokenizer: Any,
    *,
    kind: str,
    say: Notify,
    progress: bool,
    leads: bool,
    kept: KeptColumns = NOTHING_KEPT,
) -> tuple[PreparedData, Stream | None]:
    """As `prepare_data`; with `data.streaming` the first shard, and the stream of all (arguments as of `Stream`)."""
    data = prepare_data(cfg, tokenizer, kind=kind, say=say, progress=progress, kept=kept)
    if not (isinstance(cfg, LayoutDataConfig) and cfg.streaming):
        return data, None
    stream = Stream(cfg, tokenizer, kind=kind, say=say, leads=leads, kept=kept)
    return data._replace(fingerprint=stream.fingerprint(data)), stream


def _prepare(_: BoundToThis | None, cfg: LayoutDataConfig, tokenizer: Any, how: dict[str, Any], number: int) -> None:
    with suppress(SheepError):
        prepare_data(cfg, tokenizer, **how, say=lambda _: None, shard=number)


def own_prompts(data: PreparedData, prepare: Callable[[], PreparedData]) -> dict[bytes, np.ndarray] | None:
    """Map prompts in the policy's tokens to those in the tokens and the chat template of a reward model.

    Args:
        data: the prompts in the policy's tokens.
        prepare: prepares them in those of the reward model.

    Returns:
        The ids by the bytes of the policy's ids; None if the rows have texts as prompts, which need no map.

    Raises:
        DataError: only some of the rows have messages, or a row is there for one of the tokenizers only.
    """
    reports = [data.report["splits"][name] for name in data.splits]
    templated = sum(report["templated_rows"] for report in reports)
    if not templated:
        return None
    if templated < sum(report["kept"] for report in reports):
        raise DataError("reward.template=chat: some rows have messages and others text: give rows of one kind")
    theirs = prepare()
    found = {}
    for name, rows in data.splits.items():
        other = theirs.splits.get(name)
        by_id = {} if other is None else {row.row_id: row.prompt_ids for row in other.examples(range(len(other)))}
        for row in rows.examples(range(len(rows))):
            if row.row_id not in by_id:
                raise DataError(
                    f"row {row.row_id} of the {name} split is there for the policy's tokenizer only, not for the "
                    "reward model's: give data.on_overflow=truncate_prompt data.minimum_response_length=1"
                )
            found[row.prompt_ids.tobytes()] = by_id[row.row_id]
    return found
