"""Locate a dataset's files: embedded, your own files, a local folder in the hub's layout, or the hub.

A hub dataset is first a folder of files (its snapshot at one commit), then goes the way of a local folder. Files are
taken by a list of allowed endings: no script, no archive, no guessing by a library.

With `data.streaming` the files of a hub dataset are downloaded one by one. Its folder has a placeholder for each,
without content but of the size of the file, so that files are chosen by their names as in any other folder. `download`
replaces placeholders, `release` makes them again.
"""

import glob
import hashlib
import itertools
import math
import os
import re
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NamedTuple, TypeGuard

from tqdm.auto import tqdm

from sheeprlhf.config.path_checks import (
    COMPRESSIONS,
    KINDS,
    SPLIT_WORDS,
    TEXT,
    data_files,
    dataset_problem,
    file_kind,
    files_below,
    split_of_name,
    unread_files,
)
from sheeprlhf.data.rows import printable
from sheeprlhf.structure.data import DataConfig, HubDataConfig, LayoutDataConfig, LocalDataConfig
from sheeprlhf.utils.errors import ConfigError, DataError
from sheeprlhf.utils.home import EMBEDDED, embedded_folder, expand_home, why_offline
from sheeprlhf.utils.output import make_folders, read_small, real_file

QUIET_SECONDS = 1.0  # what is done sooner shows nothing
LOG_SECONDS = 5.0  # between two lines in a file, where none overwrites the last one
SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})\.\w+")
CARD = "README.md"  # begins with the subsets of a dataset and their files
MAX_CARD = 4 * 2**20  # bytes
SPLITTABLE = (".jsonl", ".ndjson", TEXT, ".parquet")
Files = dict[str, list[Path]]


def progress_bar(label: str, total: int | None, *, shown: bool, **options: Any) -> tqdm:
    """A bar for a `with` block; `total` may be an estimate, or None where only the end would tell."""
    seldom = {} if sys.stderr.isatty() else {"mininterval": LOG_SECONDS}
    return tqdm(desc=label, total=total, disable=not shown, delay=QUIET_SECONDS, **seldom, **options)


class Part(NamedTuple):
    """One of `total` parts of a file of about equal size; its number counts from 0."""

    number: int
    total: int

    def cut(self, size: int) -> tuple[int, int]:
        """Begin and end of the part of `size` bytes or rows."""
        return size * self.number // self.total, size * (self.number + 1) // self.total


WHOLE = Part(0, 1)


class Shard(NamedTuple):
    """A file of the training rows, or a part of a large one."""

    file: Path
    part: Part

    def __str__(self) -> str:
        """The name for messages."""
        if self.part == WHOLE:
            return self.file.name
        begin, _ = self.part.cut(self.file.stat().st_size)
        after = f", lines counted from byte {begin:,}" if begin and self.file.suffix.lower() != ".parquet" else ""
        return f"{self.file.name} (part {self.part.number + 1} of {self.part.total}{after})"


def locate(cfg: DataConfig) -> Files:
    """The files of each split of a dataset, always of train. Raises DataError, naming the key, if there are none."""
    if isinstance(cfg, LocalDataConfig):
        named = {"train": cfg.train_file, "validation": cfg.validation_file, "test": cfg.test_file}
        return {split: _own_files(split, name) for split, name in named.items() if name is not None}
    folder = _folder(cfg)
    if isinstance(cfg, HubDataConfig):
        return choose_splits(_inside(folder, splits_of_subset(folder, cfg.subset)), cfg.split)
    return _inside(folder, files_of_folder(folder))


def shards_of(cfg: LayoutDataConfig, files: Files) -> list[Shard]:
    """The shards of the training rows in their order, by the names and sizes of the files only."""
    shards = []
    for file in files["train"]:
        kind, compression = file_kind(file) or ("", "")
        count = 1
        if cfg.shard_size is not None and kind in SPLITTABLE and not compression:
            count = max(1, math.ceil(file.stat().st_size / (cfg.shard_size * 2**20)))
        shards += [Shard(file, Part(number, count)) for number in range(count)]
    return shards


def notes_on_shards(cfg: LayoutDataConfig, shards: list[Shard]) -> list[str]:
    """Sentences about the rows that the report does not contain, and about large files that are not split."""
    notes = [f"this report is of {shards[0]} only: {len(shards) - 1} other shards are prepared during training"]
    limit = math.inf if cfg.shard_size is None else cfg.shard_size * 2**20
    whole = [shard.file for shard in shards if shard.part == WHOLE and shard.file.stat().st_size > limit]
    if whole:
        advice = f"write them as {', '.join(SPLITTABLE)} without compression"
        notes.append(f"{len(whole)} files are larger than data.shard_size and not split ({whole[0].name}): {advice}")
    return notes


def options_of_shard(
    cfg: LayoutDataConfig, files: Files, shard: Shard, *, first: bool
) -> tuple[LayoutDataConfig, Files]:
    """Options and files of one shard; the first has the other splits, which are cut from each shard."""
    train = {"train": [shard.file]}
    if first:
        return cfg, files | train
    validation = 0.0 if "validation" in files else cfg.validation_split
    test = 0.0 if "test" in files else cfg.test_split
    return replace(cfg, validation_split=validation, test_split=test), train


def _folder(cfg: DataConfig, *, cached: bool = False) -> Path:
    """The folder of `data.dataset_name`; a snapshot of the hub, unless `cached`, is fetched. Raises DataError."""
    if problem := dataset_problem(cfg.dataset_name):
        raise DataError(problem)
    name = str(cfg.dataset_name)
    if name.startswith(EMBEDDED):
        return embedded_folder(name)
    folder = expand_home(name)
    if os.path.isdir(folder):
        return folder
    if streams_from_hub(cfg):
        return listed_folder(cfg, CARD)
    patterns = [f"*{kind}{end}" for kind in _kinds(cfg) for end in ("", *COMPRESSIONS)]
    if isinstance(cfg, HubDataConfig):  # only its subset: all files may be larger than the disk
        inside, of_splits = _subset(snapshot(name, cfg.revision, [CARD], cached=cached), cfg.subset)
        named = [str(PurePath(inside, pattern)) for of_split in of_splits.values() for pattern in of_split]
        named += [pattern.replace("**/", "") for pattern in named] or ([f"{inside}/*"] if inside else [])
        patterns = [CARD, *(named or patterns)]
    return snapshot(name, cfg.revision, patterns, cached=cached)


def streams_from_hub(cfg: DataConfig) -> TypeGuard[HubDataConfig]:
    """True if the files are downloaded one by one, while the run trains."""
    return isinstance(cfg, HubDataConfig) and cfg.streaming and not os.path.isdir(expand_home(str(cfg.dataset_name)))


def _kinds(cfg: DataConfig) -> tuple[str, ...]:
    """The kinds of files in a folder of the hub's layout that are read."""
    return (*KINDS, TEXT) if isinstance(cfg, HubDataConfig) else KINDS


def splits_of_subset(folder: Path, subset: str | None) -> Files:
    """The files of all splits of a subset, found as by `datasets.load_dataset`. Raises DataError."""
    from datasets.data_files import DataFilesDict, get_data_patterns

    inside, patterns = _subset(folder, subset)
    base = glob.escape(str((folder / inside).absolute()))
    try:
        patterns = patterns or get_data_patterns(base)
        found = DataFilesDict.from_patterns(patterns, base_path=base, allowed_extensions=[*KINDS, TEXT])
    except (OSError, ValueError):
        found = DataFilesDict()
    kinds = {file: kind[0] for files in found.values() for file in files if (kind := file_kind(Path(file)))}
    if not kinds:
        raise DataError(
            f"{folder / inside}: no file that ends in {', '.join((*KINDS, TEXT))}; check data.dataset_name and "
            "data.subset; if Python code makes the dataset, data.revision=refs/convert/parquet may have its rows"
        )
    [(usual, _)] = Counter(kinds.values()).most_common(1)
    splits = {str(split): [Path(file) for file in files if kinds.get(file) == usual] for split, files in found.items()}
    splits = {split: files for split, files in splits.items() if files}
    for files in splits.values():
        _check_shards(files)
    return splits


def choose_splits(splits: Files, name: str | None) -> Files:
    """The files of `name` (null: train, or the only split), and of validation and test. Raises DataError."""
    chosen = name or ("train" if len(splits) > 1 else next(iter(splits)))
    if chosen not in splits:
        raise DataError(f"data.split={name or 'null'}: there is no split {chosen}; give one of {', '.join(splits)}")
    files = {"train": splits[chosen]}
    for other, of_other in splits.items():
        role = split_of_name(Path(other), Path())
        if other != chosen and role in ("validation", "test") and _without_role(other) == _without_role(chosen):
            files.setdefault(role, of_other)
    return files


def _without_role(split: str) -> list[str]:
    """The words of a split's name, without the one that names its use: sft of train_sft and test_sft."""
    return [word for word in re.split(r"[^a-z0-9]+", split.lower()) if word not in SPLIT_WORDS]


def _subset(folder: Path, subset: str | None) -> tuple[str, dict[str, list[str]]]:
    """A subset's folder below that of the dataset, and the patterns of its splits, if the card has them."""
    from datasets.data_files import sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    try:
        text = read_small(real_file(folder / CARD, folder), MAX_CARD).decode() if (folder / CARD).exists() else ""
        text = text if text.lstrip().startswith("---") else "---\n{}\n---\n"  # else a warning
        subsets = MetadataConfigs.from_dataset_card_data(DatasetCard(text, ignore_metadata_errors=True).data)
        name = subset or subsets.get_default_config_name() or ""
        config = subsets.get(name, {})
        inside = str(config.get("data_dir") or (subset if subset and not subsets else ""))
        patterns = sanitize_patterns(config["data_files"]) if config.get("data_files") else {}
    except Exception as error:  # of YAML, of the type of a field
        raise DataError(f"{folder / CARD} cannot be read ({str(error)[:200]}); fix it or remove it") from None
    if subsets and name not in subsets:
        raise DataError(f"data.subset={subset or 'null'} is not a subset here; give one of {printable(subsets)}")
    for pattern in (inside, *itertools.chain.from_iterable(patterns.values())):
        if PurePath(pattern).is_absolute() or ".." in PurePath(pattern).parts or "::" in pattern or "://" in pattern:
            raise DataError(f"{folder / CARD}: {printable([pattern])} lies outside of the dataset; remove it there")
    return inside, patterns


def _inside(folder: Path, files: Files) -> Files:
    """Files of an untrusted folder; links out of it are rejected: they could bring another file into training."""
    for file in itertools.chain.from_iterable(files.values()):
        try:
            real_file(file, folder)
        except OSError as error:
            raise DataError(str(error)) from None
    return files


def content_hash(files: Files, part: Part = WHOLE, *, progress: bool = False) -> str:
    """SHA-256 over splits and the bytes of their files, of training files those of `part`. Raises DataError."""
    from sheeprlhf.data.read import part_bytes  # imports this module

    total = hashlib.sha256(b"" if part == WHOLE else repr(part).encode())
    size = sum(file.stat().st_size for split in files.values() for file in split)
    with progress_bar("reading data", size, shown=progress, unit="B", unit_scale=True, leave=False) as bar:
        for split in sorted(files):
            for file in files[split]:
                digest = hashlib.sha256()
                try:
                    is_part = part != WHOLE and split == "train"
                    ranges = part_bytes(file, part) if is_part else [(0, file.stat().st_size)]
                    with file.open("rb") as stream:
                        for begin, end in ranges:
                            stream.seek(begin)
                            while chunk := stream.read(min(2**20, end - stream.tell())):
                                digest.update(chunk)
                                bar.update(len(chunk))
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


def left_out_note(cfg: DataConfig, files: Files) -> str | None:
    """A sentence about splits and files of the dataset's folders that are not read; None if there are none."""
    read = {file for of_split in files.values() for file in of_split}
    if isinstance(cfg, LocalDataConfig):
        left = [file for value in (cfg.train_file, cfg.validation_file, cfg.test_file) for file in unread_files(value)]
    elif isinstance(cfg, HubDataConfig):
        splits = splits_of_subset(_folder(cfg, cached=True), cfg.subset)
        left_splits = [split for split, of_split in splits.items() if not read.issuperset(of_split)]
        return f"splits that are not read: {printable(left_splits)}; data.split chooses one" if left_splits else None
    elif os.path.isdir(folder := expand_home(str(cfg.dataset_name))):
        left = [file for file in files_below(folder) if (file_kind(file) or ("",))[0] in KINDS and file not in read]
    else:
        return None
    if not left:
        return None
    names = ", ".join(file.name for file in left[:5]) + (", ..." if len(left) > 5 else "")
    return f"files that are not read: {len(left)} ({names})"


def files_of_folder(folder: Path) -> Files:
    """The files of each split, named by a word of their paths, else train. Raises DataError for none or gaps."""
    readable = [(file, of[0]) for file in files_below(folder) if (of := file_kind(file))]
    kinds = {kind: [file for file, of_file in readable if of_file == kind] for kind in KINDS}
    kind = next((kind for kind in KINDS if any(split_of_name(file, folder) for file in kinds[kind])), None)
    kind = kind or next((kind for kind in KINDS if kinds[kind]), KINDS[0])
    files = kinds[kind]
    if not files:
        raise DataError(f"{folder}: no file that ends in {', '.join(KINDS)}: give another data.dataset_name")
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


def snapshot(name: str, revision: str | None, patterns: list[str], *, cached: bool = False) -> Path:
    """The folder of a hub dataset in the hub's cache, files fetched unless `cached`. Raises DataError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    offline = "" if cached else why_offline()
    try:
        return Path(
            snapshot_download(
                name,
                repo_type="dataset",
                revision=revision,
                allow_patterns=patterns,
                local_files_only=cached or bool(offline),
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


@cache
def _listing(name: str, revision: str | None) -> tuple[str, tuple[tuple[str, int], ...]]:
    """The commit of a dataset, and the paths and sizes of its files. Raises DataError, within 5 seconds if offline."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if offline := why_offline():
        raise DataError(f"{offline}: data.streaming=true downloads the files of dataset {name} one by one")
    try:
        info = HfApi().dataset_info(name, revision=revision, files_metadata=True)
    except (HfHubHTTPError, OSError) as error:
        advice = "check data.dataset_name and data.revision (a gated dataset needs `hf auth login`)"
        raise DataError(f"dataset {name} cannot be listed ({error}); {advice}") from None
    return str(info.sha), tuple((file.rfilename, file.size or 0) for file in info.siblings or ())


def listed_folder(cfg: HubDataConfig, card: str) -> Path:
    """The folder of a dataset with its card, and placeholders for other files. Raises DataError."""
    from sheeprlhf.data.store import cache_root  # imports torch

    commit, files = _listing(str(cfg.dataset_name), cfg.revision)
    folder = cache_root(cfg.cache_dir) / "hub" / f"{str(cfg.dataset_name).replace('/', '--')}-{commit}"
    make_folders(folder)
    for name, size in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not (file_kind(Path(name)) or name == card):
            continue
        make_folders((folder / name).parent)
        try:
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:  # another process made it, or it is downloaded
            continue
        os.truncate(descriptor, size)
        os.close(descriptor)
    if any(name == card for name, _ in files):
        download(cfg, [folder / card])
    return folder


def download(cfg: HubDataConfig, files: list[Path]) -> None:
    """Download placeholders of `listed_folder`; time stamps verify the others. Raises DataError if that fails."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    name = str(cfg.dataset_name)
    commit, _ = _listing(name, cfg.revision)
    folder = next(parent for parent in files[0].parents if parent.name.endswith(commit))
    for file in files:
        path = file.relative_to(folder).as_posix()
        try:
            hf_hub_download(name, path, repo_type="dataset", revision=commit, local_dir=folder)
        except (HfHubHTTPError, OSError) as error:
            raise DataError(f"{path} of dataset {name} cannot be downloaded: {error}; try again") from None


def release(file: Path) -> None:
    """Make a downloaded file a placeholder again."""
    size = file.stat().st_size
    folder = next(parent for parent in file.parents if (parent / ".cache").is_dir())
    record = folder / ".cache" / "huggingface" / "download" / f"{file.relative_to(folder)}.metadata"
    record.unlink(missing_ok=True)  # else the placeholder would count as the file
    with file.open("wb") as placeholder:
        placeholder.truncate(size)
