"""Every file of the corpus is loaded under watch. `python -m tests.security.corpus` prints the table of SECURITY.md."""

import gc
import importlib.metadata
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from sheeprlhf.utils.errors import SheepError
from tests.security import config_files, folders, texts
from tests.security.guard import watched
from tests.support.models import make_model_folder

Attempt = Callable[[], object]
KINDS: dict[str, Callable[[Path, Path], Iterator[tuple[str, Attempt]]]] = {
    "damaged model folders": lambda place, sentinels: folders.spoilt_models(_good(place), place, sentinels),
    "pickles": lambda place, sentinels: folders.pickles(_good(place), place, sentinels),
    "chat templates": texts.templates,
    "adapter configurations": texts.adapters,
    "saved configurations that name a target": texts.saved_configs,
    "datasets": texts.datasets,
    "configuration files and stages of pipelines": config_files.attempts,
}


class Tally(NamedTuple):
    """What trying one kind of files came to.

    Attributes:
        tried: files.
        accepted: names of those that were not refused by a message of ours, with what happened instead.
        code_run: names of payloads that ran.
        programs: those that were started.
        sockets: those that were opened.
        left: paths that appeared in the current directory.
        seconds: of the processor.
        memory: bytes by which the process's peak has grown.
    """

    tried: int
    accepted: list[str]
    code_run: list[str]
    programs: list[str]
    sockets: list[str]
    left: list[str]
    seconds: float
    memory: int


def try_all(kind: str, place: Path) -> Tally:
    """Load each file of a kind, in an empty current directory.

    Args:
        kind: one of `KINDS`.
        place: an empty folder for the files.
    """
    here, empty = Path.cwd(), place / "empty"
    for folder in (empty, place / "files"):
        folder.mkdir()
    os.chdir(empty)
    accepted, tried = [], 0
    try:
        with watched(place / "sentinels") as watch:
            gc.collect()
            before, start = _peak(), time.process_time()
            for name, attempt in KINDS[kind](place / "files", watch.sentinels):
                tried += 1
                try:
                    attempt()
                    accepted.append(f"{name}: accepted")
                except SheepError as error:
                    if len(str(error)) > 1000 or any(ord(letter) < 32 and letter != "\n" for letter in str(error)):
                        accepted.append(f"{name}: {str(error)[:200]!r}")
                except Exception as error:
                    accepted.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            spent, grown = time.process_time() - start, _peak() - before
            left = [path.name for path in empty.iterdir()]
            return Tally(tried, accepted, watch.code_run(), watch.programs, watch.sockets, left, spent, grown)
    finally:
        os.chdir(here)


def _good(place: Path) -> Path:
    return make_model_folder(place / "good", "llama")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main() -> int:
    """Print a line for each kind; the exit code tells whether anything ran or was accepted."""
    bad = 0
    print("| files | tried | refused | code run | programs started | sockets opened |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            tally = try_all(kind, Path(folder))
        refused = tally.tried - len(tally.accepted)
        counts = (tally.tried, refused, len(tally.code_run), len(tally.programs), len(tally.sockets))
        print(f"| {kind} | {' | '.join(map(str, counts))} |", flush=True)
        for line in (*tally.accepted, *tally.code_run, *tally.programs, *tally.sockets, *tally.left):
            bad += 1
            print(f"  {line}", file=sys.stderr)
    names = ("torch", "transformers", "peft", "safetensors", "datasets", "pyarrow", "hydra-core", "jinja2")
    print(f"\n{time.strftime('%Y-%m-%d')}: Python {sys.version.split()[0]}", end="")
    print("".join(f", {name} {importlib.metadata.version(name)}" for name in names))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
