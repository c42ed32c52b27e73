"""What a run leaves to look at: metrics.csv, TensorBoard events and sample texts. Rank zero only writes.

After a resume everything beyond the checkpoint's step is taken back, so that each (tag, step) is there once.
"""

import csv
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sheeprlhf.engine.redact import code_block, csv_cell, plain_text, redact_text
from sheeprlhf.utils.files import fsync, removed_on_error

CSV_FILE = "metrics.csv"
_COLUMNS = ("step", "tag", "value", "wall_time")
_SAMPLE_FILE = re.compile(r"step-(\d+)\.txt")


class MetricWriter:
    """Rank zero only: appends to the run's records; what a call wrote survives a kill after it."""

    def __init__(self, run_dir: Path, start_step: int = 0) -> None:
        """Open the records of `run_dir`. Entries beyond `start_step` (0: all) are a killed process's: they go."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and needed only here

        self._samples = run_dir / "samples"
        last_step = start_step if start_step > 0 else -1
        _truncate_csv(run_dir / CSV_FILE, last_step)
        for path in self._samples.iterdir() if self._samples.is_dir() else ():
            match = _SAMPLE_FILE.fullmatch(path.name)
            if match and int(match[1]) > last_step:
                path.unlink()
        self._file = (run_dir / CSV_FILE).open("a", newline="")
        self._csv = csv.writer(self._file)
        self._tensorboard = SummaryWriter(str(run_dir), purge_step=last_step + 1)
        self._old_hook = threading.excepthook
        threading.excepthook = _quiet_about_tensorboard(self._old_hook)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """One row and one point per metric."""
        now = time.time()
        for tag, value in metrics.items():
            self._csv.writerow((step, csv_cell(tag), repr(float(value)), f"{now:.3f}"))
            self._tensorboard.add_scalar(tag, value, step, walltime=now)
        self._file.flush()
        self._tensorboard.flush()

    def log_text(self, tag: str, text: str, step: int) -> None:
        """A sample: in TensorBoard as a block that no markup leaves, and as plain text in samples/step-<n>.txt."""
        self._samples.mkdir(mode=0o700, exist_ok=True)
        with (self._samples / f"step-{step}.txt").open("a", encoding="utf-8", errors="replace") as file:
            file.write(f"--- {tag}\n{redact_text(plain_text(text))}\n")
        self._tensorboard.add_text(tag, code_block(redact_text(text)), step)
        self._tensorboard.flush()

    def close(self) -> None:
        """Nothing can be logged afterwards."""
        threading.excepthook = self._old_hook
        self._file.close()
        self._tensorboard.close()


def _quiet_about_tensorboard(hook: Callable[[threading.ExceptHookArgs], object]) -> Callable[..., object]:
    """The error of TensorBoard's thread, a full disk for one, is raised by the next call: no traceback beside that."""

    def told(of: threading.ExceptHookArgs) -> None:
        if not type(of.thread).__module__.startswith("tensorboard."):
            hook(of)

    return told


def _truncate_csv(path: Path, last_step: int) -> None:
    """Keep the complete rows up to a step; a new file gets its header."""
    rows = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = [row for row in csv.reader(file) if len(row) == len(_COLUMNS) and row[0].isdigit()]
    temporary = path.with_name(f"{path.name}.tmp")
    with removed_on_error(temporary):
        with temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([_COLUMNS, *(row for row in rows if int(row[0]) <= last_step)])
        fsync(temporary)
        os.replace(temporary, path)
