"""Training rows that are prepared file by file while the run trains (`data.streaming`)."""

import hashlib
import json
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from sheeprlhf.data import source
from sheeprlhf.data.hub_files import release
from sheeprlhf.data.prepare import PreparedData, prepare_data, signals_held_back
from sheeprlhf.structure.data import LayoutDataConfig
from sheeprlhf.utils.errors import DataError, Notify, SheepError
from sheeprlhf.utils.output import discard, locked
from sheeprlhf.utils.processes import BoundToThis


class Stream:
    """The files of the training rows, in their order and from the first again after the last. Any rank.

    Args:
        cfg: the data options.
        tokenizer: the model's.
        kind: as for `prepare_data`.
        say: prints a line for the user.
        leads: this process prepares the next file ahead and deletes prepared files; one process of each machine.
    """

    def __init__(self, cfg: LayoutDataConfig, tokenizer: Any, *, kind: str, say: Notify, leads: bool) -> None:
        self._cfg, self._tokenizer, self._kind, self._say, self._leads = cfg, tokenizer, kind, say, leads
        self._files = source.locate(cfg)["train"]
        self._prepared: list[Path] = []
        self._ahead: SpawnProcess | None = None

    def __len__(self) -> int:
        """Number of files."""
        return len(self._files)

    def fingerprint(self, first: PreparedData) -> str:
        """Digest of the first file, all options, and the names and sizes of all files; their content is not read."""
        files = [(file.name, file.stat().st_size) for file in self._files]
        return hashlib.sha256(json.dumps([first.fingerprint, files]).encode()).hexdigest()

    def prepare(self, number: int) -> PreparedData:
        """The rows of file `number`, prepared now unless they are; deletes the oldest of more than `keep_shards`.

        The first file stays, as the validation rows are stored with it.

        Raises:
            DataError: the file cannot be used; names it.
        """
        self.close(wait=True)
        file = self._files[number % len(self)]
        if self._leads and number and len(self) > 1 and source.streams_from_hub(self._cfg):
            release(self._files[(number - 1) % len(self)])  # all processes have prepared it
        self._say(f"training on {file.name}, file {number % len(self) + 1} of {len(self)}")
        try:
            data = prepare_data(
                self._cfg, self._tokenizer, kind=self._kind, say=self._say, progress=False, shard=number
            )
        except DataError as error:
            raise DataError(f"{file.name}: {error}") from None
        keep = self._cfg.keep_shards
        if self._leads and number % len(self) and keep is not None and len(self) > keep:
            self._prepared.append(data.folder)
            while len(self._prepared) > keep - 1:  # the next one is prepared ahead
                with locked(oldest := self._prepared.pop(0), self._say), suppress(FileNotFoundError):
                    discard(oldest)
        return data

    def prepare_ahead(self, number: int) -> None:
        """Prepare file `number` in a process that ends with this one; `prepare` reports what goes wrong."""
        if self._leads:
            arguments = (BoundToThis(), self._cfg, self._tokenizer, self._kind, number)
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


def _prepare(_: BoundToThis | None, cfg: LayoutDataConfig, tokenizer: Any, kind: str, number: int) -> None:
    with suppress(SheepError):
        prepare_data(cfg, tokenizer, kind=kind, say=lambda _: None, progress=False, shard=number)
