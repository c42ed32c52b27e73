"""Where the numbers of an evaluation go: to the screen, and into a JSON file beside the run."""

import json
import time
from pathlib import Path

from lightning.fabric import Fabric
from rich.console import Console
from rich.table import Table

import sheeprlhf
from sheeprlhf.structure.run import EvalConfig
from sheeprlhf.utils.errors import ConfigError


def save_result(fabric: Fabric, cfg: EvalConfig, name: str, numbers: dict[str, float | int]) -> None:
    """All ranks; rank zero prints the numbers and writes `<name>-<weights>.json`, newest over older.

    Raises:
        ConfigError: the folder cannot be written.
    """
    if not fabric.is_global_zero:
        return
    assert cfg.model is not None and cfg.data is not None
    if cfg.experiment_dir is not None:
        folder, weights = Path(cfg.experiment_dir) / "eval", cfg.task.model_name
    else:
        folder, weights = Path(cfg.output_dir), cfg.model.config_name
    record = {
        **numbers,
        "task": cfg.task.config_name,
        "split": cfg.task.data_split,
        "data": cfg.data.config_name,
        "model": cfg.model.repo_name,
        "weights": weights,
        "experiment_dir": cfg.experiment_dir,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "version": sheeprlhf.__version__,
    }
    path = folder / f"{name}-{weights}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(json.dumps(record, indent=1))
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; check permissions and free space") from error
    title = f"{cfg.task.config_name} of {weights} on {cfg.data.config_name}/{cfg.task.data_split}"
    table = Table("metric", "value", title=title)
    for key, value in numbers.items():
        table.add_row(key, f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
    Console().print(table)
    print(f"saved: {path}")
