"""What a run leaves to look at: metrics.csv, TensorBoard events and sample texts. Rank zero only writes.

After a resume everything beyond the checkpoint's step is taken back, so that each (tag, step) is there once.
"""

import csv
import io
import re
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from sheeprlhf.engine.redact import code_block, csv_cell, plain_text, redact_text
from sheeprlhf.utils.files import make_private
from sheeprlhf.utils.output import make_folder, open_append, safe_path, write_file

CSV_FILE = "metrics.csv"
_COLUMNS = ("step", "tag", "value", "wall_time")
_SAMPLE_HEAD = "--- "  # the first line of a file of samples begins so
_SAMPLE_FILE = re.compile(r"step-(\d+)\.txt")


class MetricWriter:
    """Rank zero only: appends to the run's records; what a call wrote survives a kill after it."""

    def __init__(self, run_dir: Path, start_step: int = 0) -> None:
        """Open the records of `run_dir`. Entries beyond `start_step` (0: all) are a killed process's: they go."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and needed only here

        self._run_dir, samples = run_dir, safe_path(run_dir, "samples")
        last_step = start_step if start_step > 0 else -1
        _truncate_csv(run_dir, last_step)
        for path in samples.iterdir() if samples.is_dir() else ():
            match = _SAMPLE_FILE.fullmatch(path.name)
            if match and int(match[1]) > last_step and _is_sample(path):
                path.unlink()
        self._file = open_append(run_dir, CSV_FILE)
        self._csv = csv.writer(self._file)
        suffix = f".{uuid.uuid4().hex}"  # no file, and no link, can have this name before
        self._tensorboard = SummaryWriter(str(run_dir), purge_step=last_step + 1, filename_suffix=suffix)
        for path in run_dir.glob(f"*{suffix}"):
            make_private(path)
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
        make_folder(self._run_dir, "samples")
        with open_append(self._run_dir, f"samples/step-{step}.txt") as file:
            file.write(f"{_SAMPLE_HEAD}{tag}\n{redact_text(plain_text(text))}\n")
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


def _is_sample(path: Path) -> bool:
    """Whether `log_text` wrote a file; a user may have put another one beside those."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_SAMPLE_HEAD)) == _SAMPLE_HEAD.encode()


def _truncate_csv(run_dir: Path, last_step: int) -> None:
    """Keep the complete rows up to a step; a new file gets its header."""
    rows, path = [], safe_path(run_dir, CSV_FILE)
    if path.is_file():
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = [row for row in csv.reader(file) if len(row) == len(_COLUMNS) and row[0].isdigit()]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([_COLUMNS, *(row for row in rows if int(row[0]) <= last_step)])
    write_file(run_dir, CSV_FILE, text.getvalue().encode(errors="replace"))
