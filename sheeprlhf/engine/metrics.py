"""Records of a run, by rank zero; after a resume, those beyond the checkpoint's step are removed."""

import csv
import io
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sheeprlhf.engine.trackers import Tracker
from sheeprlhf.security.redaction import code_block, csv_cell, plain_text, redact_text
from sheeprlhf.utils.errors import Notify
from sheeprlhf.utils.output import create_file, make_folder, open_append, safe_path, write_file

CSV_FILE = "metrics.csv"
_COLUMNS = ("step", "tag", "value", "wall_time")
_EVENT_FILE = re.compile(r"events\.out\.tfevents\.([0-9]{1,100})\..*", re.DOTALL)
_SAMPLE_HEAD = "--- "  # the first line of a file of samples begins so
_SAMPLE_FILE = re.compile(r"step-(\d+)\.txt")


class MetricWriter:
    """Rank zero only: appends to the run's records; what a call wrote survives a kill after it."""

    def __init__(
        self,
        run_dir: Path,
        start_step: int = 0,
        *,
        tensorboard: bool = True,
        trackers: Mapping[str, Tracker] = MappingProxyType({}),
        say: Notify = print,
    ) -> None:
        self._run_dir, samples = run_dir, safe_path(run_dir, "samples")
        self._trackers, self._say = dict(trackers), say
        last_step = start_step if start_step > 0 else -1
        self._sent = _truncate_csv(run_dir, last_step)
        for path in samples.iterdir() if samples.is_dir() else ():
            match = _SAMPLE_FILE.fullmatch(path.name)
            if match and int(match[1]) > last_step and _is_sample(path):
                path.unlink()
        self._file = open_append(run_dir, CSV_FILE)
        self._csv = csv.writer(self._file)
        self._events = EventFile(run_dir, purge_step=last_step + 1) if tensorboard else None

    def log(self, metrics: dict[str, float], step: int) -> None:
        """One row and one point per metric."""
        now = time.time()
        for tag, value in metrics.items():
            self._csv.writerow((step, csv_cell(tag), repr(float(value)), f"{now:.3f}"))
            if self._events is not None:
                self._events.add_scalar(tag, value, step, now)
        self._file.flush()
        if self._events is not None:
            self._events.flush()
        new = {tag: float(value) for tag, value in metrics.items() if (str(step), csv_cell(tag)) not in self._sent}
        if new:
            self._send(lambda tracker: tracker.log(new, step))

    def log_text(self, tag: str, text: str, step: int) -> None:
        """A sample: in TensorBoard as a block that no markup leaves, and as plain text in samples/step-<n>.txt."""
        make_folder(self._run_dir, "samples")
        with open_append(self._run_dir, f"samples/step-{step}.txt") as file:
            file.write(f"{_SAMPLE_HEAD}{tag}\n{redact_text(plain_text(text))}\n")
        if self._events is not None:
            self._events.add_text(tag, code_block(redact_text(text)), step, time.time())
            self._events.flush()
        self._send(lambda tracker: tracker.log_text(tag, redact_text(plain_text(text)), step))

    def close(self, finished: bool = True) -> None:
        """Close the files and trackers; `finished` is False for a run that was stopped."""
        self._file.close()
        if self._events is not None:
            self._events.close()
        self._send(lambda tracker: tracker.close(finished))

    def _send(self, send: Callable[[Tracker], None]) -> None:
        """Call every tracker; one that fails is reported, and left out from now on."""
        for name, tracker in list(self._trackers.items()):
            try:
                send(tracker)
            except Exception as error:
                del self._trackers[name]
                self._say(f"warning: log={name} failed, and training continues without it: {error}")


class EventFile:
    """Points for TensorBoard, in a file whose name sorts after those of earlier processes, whatever the clock says."""

    def __init__(self, run_dir: Path, purge_step: int) -> None:
        """Make the file in `run_dir`; points of earlier files from `purge_step` on are taken back."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # slow to import, and needed only here
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        stamps = [match[1] for path in run_dir.iterdir() if (match := _EVENT_FILE.fullmatch(path.name))]
        name = f"events.out.tfevents.{_next_stamp(stamps, time.time())}.{socket.gethostname()}.{os.getpid()}.0"
        self._event, self._summary = Event, summary
        create_file(run_dir, name)
        self._file = open_append(run_dir, name)
        self._records = RecordWriter(self._file.buffer)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._write(Event(wall_time=time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def add_scalar(self, tag: str, value: float, step: int, wall_time: float) -> None:
        """Append a number."""
        self._write(self._event(wall_time=wall_time, step=step, summary=self._summary.scalar(tag, value)))

    def add_text(self, tag: str, text: str, step: int, wall_time: float) -> None:
        """Append a text."""
        self._write(self._event(wall_time=wall_time, step=step, summary=self._summary.text(tag, text)))

    def flush(self) -> None:
        """Hand everything to the system, which keeps it even if this process is killed."""
        self._records.flush()

    def close(self) -> None:
        """Close the file; `flush` has reported a full disk."""
        with suppress(OSError):
            self._file.close()

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())


def _next_stamp(stamps: list[str], now: float) -> str:
    """The time in a new file's name: `now`, or what sorts after all stamps of earlier files."""
    stamp, last = f"{max(int(now), 0):010d}", max(stamps, default="")
    if stamp <= last:
        stamp = f"{int(last) + 1:0{len(last)}d}"
    return stamp if stamp > last else f"{last}0"


def _is_sample(path: Path) -> bool:
    """True if `log_text` wrote this file; a user may have added others."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_SAMPLE_HEAD)) == _SAMPLE_HEAD.encode()


def _truncate_csv(run_dir: Path, last_step: int) -> set[tuple[str, str]]:
    """Keep the complete rows up to a step; a new file gets its header. Returns step and tag of the rows removed."""
    rows, path = [], safe_path(run_dir, CSV_FILE)
    if path.is_file():
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = [row for row in csv.reader(file) if len(row) == len(_COLUMNS) and row[0].isdigit()]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([_COLUMNS, *(row for row in rows if int(row[0]) <= last_step)])
    write_file(run_dir, CSV_FILE, text.getvalue().encode(errors="replace"))
    return {(row[0], row[1]) for row in rows if int(row[0]) > last_step}
