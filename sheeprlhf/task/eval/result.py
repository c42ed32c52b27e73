"""Output of an evaluation: a table on the screen, and a JSON file in the run."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table

import sheeprlhf
from sheeprlhf.security.json_records import load_json
from sheeprlhf.security.record_schemas import RESULT
from sheeprlhf.structure.run import EvalConfig
from sheeprlhf.utils.errors import ConfigError, RecordError
from sheeprlhf.utils.lightning import Fabric
from sheeprlhf.utils.output import write_file


def save_result(
    fabric: Fabric,
    cfg: EvalConfig,
    name: str,
    numbers: Mapping[str, Any],
    *,
    table: Table | None = None,
    shown: Mapping[str, Any] | None = None,
    rows: Iterable[Mapping[str, Any]] = (),
    weights: str | None = None,
    more: Mapping[str, Callable[[], bytes]] = MappingProxyType({}),
    draw: Callable[[], bytes],
    always_draw: bool = False,
) -> None:
    """All ranks; rank zero prints the numbers and writes `<name>-<weights>.json`, newest over older.

    Args:
        fabric: tells rank zero from the others.
        cfg: the evaluation.
        name: of the file.
        numbers: the results, for JSON.
        table: how to print them; by default one number a line.
        shown: those of them that are printed; by default all.
        rows: what the numbers were made of, kept in `<name>-<weights>.jsonl`.
        weights: of what; by default those that were evaluated.
        more: makes further files, by their ending.
        draw: makes `<name>-<weights>.png`, if asked for one.
        always_draw: also if not asked.

    Raises:
        ConfigError: the folder cannot be written.
    """
    if not fabric.is_global_zero:
        return
    assert cfg.model is not None and cfg.data is not None
    if cfg.experiment_dir is not None:
        root, usual = Path(cfg.experiment_dir), cfg.task.model_name
        folder = root / "eval"
    else:
        root, usual = Path(cfg.output_dir), cfg.model.config_name
        folder = root
    weights = usual if weights is None else weights
    record = {
        **numbers,
        "task": cfg.task.config_name,
        "split": cfg.task.data_split,
        "data": cfg.data.config_name,
        "model": cfg.model.repo_name,
        "weights": weights,
        "experiment_dir": cfg.experiment_dir,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(max([time.time(), *_times(folder)]))),
        "version": sheeprlhf.__version__,
    }
    lines = [json.dumps(row) + "\n" for row in rows]
    files = {folder / f"{name}-{weights}.jsonl": "".join(lines).encode()} if lines else {}
    files |= {folder / f"{name}-{weights}.{ending}": make() for ending, make in more.items()}
    if cfg.plot or always_draw:
        files[folder / f"{name}-{weights}.png"] = draw()
    files[folder / f"{name}-{weights}.json"] = json.dumps(record, indent=1).encode()  # last: the rest is there then
    for path, content in files.items():
        _write(root, path, content)
    if table is None:
        table = Table("metric", "value")
        for key, value in (numbers if shown is None else shown).items():
            table.add_row(key, cell(value))
    table.title = f"{cfg.task.config_name} of {weights} on {cfg.data.config_name}/{cfg.task.data_split}"
    Console().print(table)
    print("\n".join(f"saved: {path}" for path in files))


def _times(folder: Path) -> Iterator[float]:
    """A second after each result of a folder: the newest result has the latest time even if the clock moved back."""
    for path in folder.glob("*.json"):
        with suppress(RecordError, ValueError, OverflowError, OSError):
            yield datetime.fromisoformat(load_json(path, RESULT).get("time", "")).timestamp() + 1


def cell(value: Any) -> str:
    """A number, or the two ends of an interval, for people to read."""
    if isinstance(value, list):
        return " to ".join(map(cell, value))
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def _write(root: Path, path: Path, content: bytes) -> None:
    try:
        write_file(root, str(path.relative_to(root)), content)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; check permissions and free space") from error
