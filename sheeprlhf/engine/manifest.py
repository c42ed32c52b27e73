"""Folders that appear whole by a rename of a scratch folder, and the manifest that proves it. Imports no torch."""

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sheeprlhf.security.json_records import MANIFEST as SCHEMA
from sheeprlhf.security.json_records import load_json
from sheeprlhf.utils.errors import CheckpointError, RecordError
from sheeprlhf.utils.output import create_file, fsync, is_disk_error, make_private, open_file, scratch_folder

MANIFEST = "MANIFEST.json"
FORMAT_VERSION = 1
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")


def write_folder(
    target: Path,
    writer: Callable[[Path], None],
    *,
    num_bytes: int = 0,
    advice: str = "Free space or choose another disk with root_dir=<folder>, then continue with resume=true",
) -> None:
    """One process: make folder `target`, whole or not at all; an empty one is replaced. Raises CheckpointError."""
    try:
        with scratch_folder(target) as scratch:
            new = scratch / "new"
            new.mkdir()
            writer(new)
            for path in [*sorted(new.rglob("*"), reverse=True), new]:
                make_private(path)
                fsync(path)
            if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
                target.rmdir()
            elif os.path.lexists(target) and not remove_folder(target):
                raise CheckpointError(f"{target} is there already and was not written by this program: move it")
            os.rename(new, target)
            fsync(target.parent)
    except BaseException as error:
        if is_disk_error(error):
            free = shutil.disk_usage(target.parent).free if target.parent.is_dir() else 0
            needed = (
                f"about {num_bytes:,} bytes are needed, {free:,} are free" if num_bytes else f"{free:,} bytes are free"
            )
            raise CheckpointError(f"cannot write {target}: {error}; {needed}. {advice}") from error
        raise


def remove_folder(folder: Path) -> bool:
    """Remove a folder that `is_ours`, at once or not at all; False if it is not, and stays."""
    if not is_ours(folder):
        return False
    with scratch_folder(folder) as scratch:
        os.rename(folder, scratch / folder.name)
    return True


def is_ours(folder: Path) -> bool:
    """True if the manifest of a folder proves that this program wrote every file in it."""
    try:
        known = {MANIFEST, *read_manifest(folder)["files"]}
        with os.scandir(folder) as entries:
            return all(entry.name in known and entry.is_file(follow_symlinks=False) for entry in entries)
    except (CheckpointError, OSError):
        return False


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write MANIFEST.json, last of all files: `facts`, and size and SHA-256 of every file in `folder`."""
    files = {}
    for path in sorted(folder.iterdir()):
        fsync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    content = {"format": FORMAT_VERSION, **facts, "files": files}
    content["sha256"] = _sha256_of_json(content)
    create_file(folder, MANIFEST, json.dumps(content, indent=1, sort_keys=True).encode())


def verify_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose every file is as written. Raises CheckpointError that names the file."""
    content = read_manifest(folder)
    found = {path.name for path in folder.iterdir()} - {MANIFEST}
    for name in sorted(found ^ set(content["files"])):
        raise CheckpointError(f"{folder / name} is {'not part of the checkpoint' if name in found else 'missing'}")
    for name, expected in sorted(content["files"].items()):
        path = folder / name
        status = os.lstat(path)
        if not _FILE_NAME.fullmatch(name) or not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a plain file; it will not be opened")
        if status.st_size != expected["size"]:
            raise CheckpointError(f"{path} has {status.st_size} bytes instead of {expected['size']}")
        if _sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path} is damaged: its SHA-256 differs from the manifest's")
    return content


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest only, checked against its own SHA-256; the files are not looked at."""
    path = folder / MANIFEST
    if not os.path.lexists(path) or folder.is_symlink():
        raise CheckpointError(f"{folder} is not a checkpoint: no {MANIFEST}")
    if path.is_symlink():
        raise CheckpointError(f"{path} is a link; it will not be opened")
    try:
        content = load_json(path, SCHEMA)
    except RecordError as error:
        raise CheckpointError(str(error)) from error
    if content.pop("sha256") != _sha256_of_json(content):
        raise CheckpointError(f"{path} is damaged: its own SHA-256 differs")
    if content["format"] != FORMAT_VERSION:
        raise CheckpointError(f"{folder} has format {content['format']}; use the version of sheeprlhf that wrote it")
    return content


def _sha256(path: Path) -> str:
    with open(open_file(path, os.O_RDONLY), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of_json(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
