"""Training rows that are prepared shard by shard while the run trains (`data.streaming`)."""

import hashlib
import json
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from sheeprlhf.data import source
from sheeprlhf.data.hub_files import release
from sheeprlhf.data.prepare import NOTHING_KEPT, PreparedData, prepare_data, signals_held_back
from sheeprlhf.structure.data import DataConfig, KeptColumns, LayoutDataConfig
from sheeprlhf.utils.errors import DataError, Notify, SheepError
from sheeprlhf.utils.output import discard, locked
from sheeprlhf.utils.processes import BoundToThis


class Stream:
    """The shards of the training rows, in their order and from the first again after the last. Any rank.

    Args:
        cfg: the data options.
        tokenizer: the model's.
        kind: as for `prepare_data`.
        say: prints a line for the user.
        leads: this process prepares the next shard ahead and deletes prepared shards; one process of each machine.
        kept: as for `prepare_data`.
    """

    def __init__(
        self,
        cfg: LayoutDataConfig,
        tokenizer: Any,
        *,
        kind: str,
        say: Notify,
        leads: bool,
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
        """The rows of shard `number`, which `extra`, the additional numbers of a checkpoint, names from now on.

        Args:
            number: counted from 0 and on after the last shard.
            extra: changed in place.
            begins_at: steps before the shard.

        Raises:
            DataError: the shard cannot be used, or is not that of the checkpoint.
        """
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
                self._ahead = get_context("spawn").Process(target=_prepare, args=arguments)
                self._ahead.start()

    def close(self, *, wait: bool = False) -> None:
        """End the process that prepares ahead, or wait until it has ended."""
        if self._ahead is not None:
            if not wait:
                self._ahead.terminate()
            self._ahead.join()
            self._ahead = None


def stream_of(cfg: DataConfig, tokenizer: Any, **how: Any) -> Stream | None:
    """The stream of a dataset with `data.streaming`; None for any other. Arguments as of `Stream`."""
    return Stream(cfg, tokenizer, **how) if isinstance(cfg, LayoutDataConfig) and cfg.streaming else None


def _prepare(_: BoundToThis | None, cfg: LayoutDataConfig, tokenizer: Any, how: dict[str, Any], number: int) -> None:
    with suppress(SheepError):
        prepare_data(cfg, tokenizer, **how, say=lambda _: None, shard=number)
