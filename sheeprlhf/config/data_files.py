"""Files of rows that the user names: one file, a folder, a pattern, or a list of these."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sheeprlhf.config.option_checks import near_path
from sheeprlhf.config.shell import shell_word
from sheeprlhf.security.files import real_file
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.home import expand_home

KINDS = (
    ".parquet",
    ".jsonl",
    ".ndjson",
    ".json",
    ".csv",
    ".tsv",
)  # of several kinds in a hub folder, the first is read
TEXT = ".txt"  # of the user's own files alone; in a folder beside files of rows, it is a note about them
COMPRESSIONS = (".gz", ".bz2", ".zst")  # of one file of text, not archives
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "valid1": "validation",  # openai_summarize_comparisons has valid1 and valid2, which is left out
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
}
_ENDINGS = f"{', '.join((*KINDS, TEXT))} (but for .parquet also with {', '.join(COMPRESSIONS)} behind)"


def file_kind(file: Path) -> tuple[str, str] | None:
    """The kind of a file of rows and its compression ("" for none), by the ending of its name; None for other files."""
    name = file.name.lower()
    compression = next((end for end in COMPRESSIONS if name.endswith(end)), "")
    kind = Path(name.removesuffix(compression)).suffix
    if kind not in (*KINDS, TEXT) or (compression and kind == ".parquet"):
        return None
    return kind, compression


def split_of_name(file: Path, folder: Path) -> str | None:
    """The split that a file's path below a folder names, None if it names none."""
    stem = str(file.relative_to(folder)).lower()
    return next((SPLIT_WORDS[word] for word in re.split(r"[^a-z0-9]+", stem) if word in SPLIT_WORDS), None)


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and its sub-folders, hidden ones left out, in order."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def readable_files(files: Sequence[Path]) -> list[Path]:
    """Those files of a folder that are read: files of rows, else files of text."""
    kinds = {file: kind[0] for file in files if (kind := file_kind(file))}
    rows = [file for file, kind in kinds.items() if kind != TEXT]
    return rows or list(kinds)


def data_files(key: str, value: Any) -> list[Path]:
    """The files that an option names, in order.

    A folder gives all files in it that can be read, a pattern those that match.

    Args:
        key: the option, for messages.
        value: a path or a pattern, or a list of these.

    Raises:
        ConfigError: a file is missing or cannot be read, or a folder or a pattern mixes splits.
    """
    names = value if isinstance(value, list | tuple) else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{key}={value} must be a file, a folder or a pattern, or a list of these")
    found: dict[str, Path] = {}
    for name in names:
        for file in _files_of(key, name):
            real = os.path.realpath(file)
            if real in found:
                raise ConfigError(f"{key} names {file} twice: remove one")
            found[real] = file
    return list(found.values())


def unread_files(value: Any) -> list[Path]:
    """Files in the folders of an option that are not read."""
    folders = [expand_home(name) for name in (value if isinstance(value, list | tuple) else [value])]
    files = {folder: files_below(folder) for folder in folders if folder.is_dir()}
    return [file for found in files.values() for file in found if file not in readable_files(found)]


def _files_of(key: str, name: str) -> list[Path]:
    path = expand_home(name)
    if path.is_dir():
        files = readable_files(files_below(path))
        if not files:
            raise ConfigError(f"{key}={name} is a folder without a file that ends in {_ENDINGS}: give another one")
        _check_links(files, path)
        _check_splits(key, name, files, path)
    elif not os.path.lexists(path) and glob.has_magic(str(path)):
        files = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(match)]
        if not files:
            raise ConfigError(f"{key}={name} matches no file: give another pattern (from {Path.cwd()})")
        root = Path(*_fixed_parts(path.parts))
        _check_links(files, root)
        _check_splits(key, name, files, root)
    else:
        files = [path]
    for file in files:
        problem = _file_problem(key, str(file) if path.is_dir() or len(files) > 1 else name, file)
        if problem:
            raise ConfigError(problem)
    return files


def _fixed_parts(parts: Sequence[str]) -> Iterator[str]:
    """The parts of a pattern's path before the first that has a wildcard."""
    for part in parts[:-1]:
        if glob.has_magic(part):
            return
        yield part


def _file_problem(key: str, name: str, file: Path) -> str | None:
    """Problem of one file."""
    did = did_you_mean(key, str(file))
    parts = name.split(",")
    if not os.path.lexists(file) and len(parts) > 1 and all(expand_home(part).exists() for part in parts):
        return f"{key}={name} is not a file: give a list, {shell_word(key, parts)}"
    if file_kind(file) is None:
        bare = next((end for end in COMPRESSIONS if file.name.lower().endswith(end)), None)
        if bare:
            return (
                f"{key}={name} does not say what is in it: rename it so that it ends in .jsonl{bare} or in another of "
                f"{', '.join(KINDS[1:])} before {bare}"
            )
        return f"{key}={name} has an unknown ending: {did}give one that ends in {_ENDINGS}"
    if not os.path.isfile(file):
        return f"{key}={name} is not a file: {did}give the path of an existing one (from {Path.cwd()})"
    if not os.access(file, os.R_OK):
        return f"{key}={name} cannot be read: change its permissions or give another file"
    return None


def did_you_mean(key: str, file: str) -> str:
    """The beginning of a message about a missing file that has a near name; empty if none has."""
    near = None if os.path.lexists(file) else near_path(file)
    return f"did you mean {key}={near}? Else " if near else ""


def _check_links(files: Sequence[Path], folder: Path) -> None:
    """Raise ConfigError for a link out of a folder: it could bring any other file into training."""
    for file in files:
        try:
            real_file(file, folder)
        except OSError as error:
            raise ConfigError(str(error)) from None


def _check_splits(key: str, name: str, files: Sequence[Path], folder: Path) -> None:
    """Raise ConfigError if a folder or a pattern has files of more than one split, of which some are for tests."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(split_of_name(file, folder) or "train", []).append(file)
    if len(splits) == 1:
        return
    order = [split for split in ("train", "validation", "test") if split in splits]
    options = [shell_word(f"data.{split}_file", [str(file) for file in splits[split]]) for split in order]
    raise ConfigError(
        f"{key}={name} has files that are named for several splits ({', '.join(order)}): give each its own files, "
        + " ".join(options)
    )
