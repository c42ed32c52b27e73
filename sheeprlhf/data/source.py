"""Locate a dataset's files: embedded, your own files, a local folder in the hub's layout, or the hub.

A hub dataset is first a folder of files (its snapshot at one commit), then goes the way of a local folder. Files are
taken by a list of allowed endings: no script, no archive, no guessing by a library.
"""

import hashlib
import itertools
import os
import re
from pathlib import Path
from typing import Any

from sheeprlhf.config.path_checks import (
    COMPRESSIONS,
    KINDS,
    data_files,
    file_kind,
    files_below,
    is_hub_id,
    split_of_name,
    unread_files,
)
from sheeprlhf.data.progress import progress_bar
from sheeprlhf.security.files import real_file
from sheeprlhf.structure.data import DataConfig, LocalDataConfig
from sheeprlhf.utils.errors import ConfigError, DataError
from sheeprlhf.utils.home import expand_home
from sheeprlhf.utils.hub import EMBEDDED, embedded_folder, why_offline

SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})\.\w+")

Files = dict[str, list[Path]]


def locate(cfg: DataConfig) -> Files:
    """The files of each split of a dataset; "train" is always there.

    Raises:
        DataError: if there are none, naming the key to set.
    """
    if isinstance(cfg, LocalDataConfig):
        named = {"train": cfg.train_file, "validation": cfg.validation_file, "test": cfg.test_file}
        return {split: _own_files(split, name) for split, name in named.items() if name is not None}
    name = cfg.dataset_name
    if not name:
        raise DataError("data.dataset_name is null; give a hub id (owner/name) or a local folder")
    if name.startswith(EMBEDDED):
        return files_of_folder(embedded_folder(name))
    folder = expand_home(name)
    if os.path.isfile(folder):
        raise DataError(f"data.dataset_name={name} is a file; use data=local data.train_file={name}")
    if os.path.isdir(folder):
        return _inside(folder, files_of_folder(folder))
    if "/" not in name or not is_hub_id(name):
        raise DataError(f"data.dataset_name={name} is neither a folder nor a hub id (owner/name): give one of them")
    folder = snapshot(name, cfg.revision)
    return _inside(folder, files_of_folder(folder))


def _inside(folder: Path, files: Files) -> Files:
    """Files of an untrusted folder; links out of it are rejected: they could bring another file into training."""
    for file in itertools.chain.from_iterable(files.values()):
        try:
            real_file(file, folder)
        except OSError as error:
            raise DataError(str(error)) from None
    return files


def content_hash(files: Files, *, progress: bool = False) -> str:
    """SHA-256 over the splits and the bytes of their files, whatever the files are called.

    Raises:
        DataError: if a file cannot be read.
    """
    total = hashlib.sha256()
    size = sum(file.stat().st_size for split in files.values() for file in split)
    with progress_bar("reading data", size, shown=progress, unit="B", unit_scale=True, leave=False) as bar:
        for split in sorted(files):
            for file in files[split]:
                digest = hashlib.sha256()
                try:
                    with file.open("rb") as stream:
                        while part := stream.read(2**20):
                            digest.update(part)
                            bar.update(len(part))
                except OSError as error:
                    raise DataError(f"{file} cannot be read: {error.strerror}; fix it or give another file") from None
                total.update(f"{split}{''.join(file_kind(file) or ())}{digest.hexdigest()}".encode())
    return total.hexdigest()


def _own_files(split: str, value: Any) -> list[Path]:
    """The files that the user named."""
    try:
        files = data_files(f"data.{split}_file", value)
    except ConfigError as error:
        raise DataError(str(error)) from None
    _check_shards(files)
    return files


def left_out_note(cfg: DataConfig) -> str | None:
    """A sentence about files of the dataset's folders that are not read; None if there are none."""
    left: list[Path] = []
    if isinstance(cfg, LocalDataConfig):
        for value in (cfg.train_file, cfg.validation_file, cfg.test_file):
            left += [] if value is None else unread_files(value)
    elif os.path.isdir(folder := expand_home(str(cfg.dataset_name))):
        read = {file for files in files_of_folder(folder).values() for file in files}
        left += [file for file in files_below(folder) if (file_kind(file) or ("",))[0] in KINDS and file not in read]
    if not left:
        return None
    names = ", ".join(file.name for file in left[:5]) + (", ..." if len(left) > 5 else "")
    return f"files that are not read: {len(left)} ({names})"


def files_of_folder(folder: Path) -> Files:
    """The files of each split in a folder of the hub's layout, its sub-folders included.

    A split is named by a word of the file's path (`train.jsonl`, `data/test-00000-of-00001.parquet`, `dev/a.csv`);
    files without such a word are training rows if no file has one.

    Raises:
        DataError: if there is no readable file, no training file, or a shard is missing.
    """
    readable = [(file, of[0]) for file in files_below(folder) if (of := file_kind(file))]
    kinds = {kind: [file for file, of_file in readable if of_file == kind] for kind in KINDS}
    kind = next((kind for kind in KINDS if any(split_of_name(file, folder) for file in kinds[kind])), None)
    kind = kind or next((kind for kind in KINDS if kinds[kind]), KINDS[0])
    files = kinds[kind]
    if not files:
        raise DataError(
            f"{folder}: no file that ends in {', '.join(KINDS)}; data.dataset_name needs a folder with some"
        )
    if not any(split_of_name(f, folder) for f in files):
        return {"train": files}
    splits: Files = {}
    for file in files:
        if split := split_of_name(file, folder):
            splits.setdefault(split, []).append(file)
    if "train" not in splits:
        names = ", ".join(str(f.relative_to(folder)) for f in files[:5])
        raise DataError(f"{folder}: no file is named for the training split ({names}); name one train{kind}")
    _check_shards([file for split in splits.values() for file in split])
    return splits


def _check_shards(files: list[Path]) -> None:
    """Refuse a folder where some of `name-00000-of-00003.parquet` are missing, as after a broken download."""
    shards: dict[tuple[Path, str, int], int] = {}
    for file in files:
        if match := SHARD.fullmatch(file.name):
            key = (file.parent, match[1], int(match[2]))
            shards[key] = shards.get(key, 0) + 1
    for (parent, name, expected), count in shards.items():
        if count != expected:
            raise DataError(f"{parent}: {count} of the {expected} files {name}-*-of-* are there; fetch the others")


def snapshot(name: str, revision: str | None) -> Path:
    """The folder of a hub dataset in the hub's cache, fetched if need be.

    Raises:
        DataError: within five seconds if it is not cached and the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [f"*{kind}{end}" for kind in KINDS for end in ("", *COMPRESSIONS)]
    offline = why_offline()
    try:
        return Path(
            snapshot_download(
                name, repo_type="dataset", revision=revision, allow_patterns=patterns, local_files_only=bool(offline)
            )
        )
    except LocalEntryNotFoundError:
        raise DataError(
            f"{offline or 'the hub lacks its files'} and dataset {name} is not in the local cache; give a local "
            "folder: data.dataset_name=<folder>, or use data=docstrings, which needs no network"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "?"
        raise DataError(
            f"the hub answers {status} for dataset {name}"
            + (f" at revision {revision}" if revision else "")
            + "; check data.dataset_name and data.revision (a gated dataset needs `hf auth login`)"
        ) from None
    except OSError as error:
        raise DataError(f"dataset {name} could not be fetched: {error}; try again or give a local folder") from None
