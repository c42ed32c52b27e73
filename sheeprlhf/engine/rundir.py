"""The directory of a run: its place, owner, lock and status, which run.json has. Imports no torch."""

import fcntl
import json
import os
import re
import shutil
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from sheeprlhf.config.command_words import command, hydra_value, option_word
from sheeprlhf.config.path_checks import absolute_words
from sheeprlhf.config.registry import NOT_IN_HASH, PERFORMANCE_ONLY_OPTIONS, choices, config_to_dict, leaves
from sheeprlhf.config.run_lookup import (
    REPORT_FILE,
    RUN_FILE,
    START,
    find_runs,
    next_order,
    order_of,
    read_run,
    read_run_config,
)
from sheeprlhf.engine.manifest import verify_manifest, write_folder, write_manifest
from sheeprlhf.security.json_records import RUN, STATE, damaged, load_json
from sheeprlhf.security.redaction import redact, redact_command
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.utils.errors import CheckpointError, ConfigError, RunInUseError, UnsafePathError, first_of
from sheeprlhf.utils.output import (
    link_problems,
    lock,
    make_folder,
    make_private,
    open_file,
    open_lock_file,
    real_file,
    write_file,
)

CONFIG_FILE = "config.yaml"
LOCK_FILE = ".lock"
_FILES = (  # that a run writes; besides, TensorBoard's have names of their own
    *(RUN_FILE, CONFIG_FILE, REPORT_FILE, LOCK_FILE, "metrics.csv", "error.log", "best_of_n.json", "final", "dataset"),
)
_FOLDERS = (  # in which it replaces and deletes
    *("checkpoints", "samples", "parts", "rollouts", "rollout_weights", "server_rollouts"),
)
_LENGTH = {"task.max_num_steps", "task.epochs"}  # options that extend a finished run
_SHOWN = 8  # changed options in a message
_WAITS = (0.01, 0.02, 0.04, 0.08)  # seconds; who only looks needs microseconds
_NAME = re.compile(r"[^/\x00-\x1f\x7f]{1,200}")


class RunPlace(NamedTuple):
    """Directory of a run."""

    dir: Path  # the run directory; it exists
    resumed: bool  # it was there before: training continues from its newest checkpoint, if it has one
    note: str  # one line for the user


def choose_run_dir(cfg: TrainConfig, config_hash: str, *, given: str | None = None) -> RunPlace:
    """Rank zero only, before the launch: find the run to continue with, or make its directory. Raises ConfigError."""
    existing = _existing_run(cfg, config_hash, given)
    if existing is not None:
        return existing
    if given is not None:
        folder = Path(given)
        _make_dir(folder, "hydra.run.dir", exist_ok=True)
        note = "resume=true found no run there: a fresh start in" if cfg.resume else ""
    else:
        *groups, run_name = _folder_names(cfg)
        folder = make_unique_dir(Path(cfg.root_dir, *groups, time.strftime("%Y-%m-%d_%H-%M-%S")), run_name)
        note = f"resume=true found no unfinished run of this configuration under {cfg.root_dir}: a fresh start in"
        note = note if cfg.resume else ""
    earlier = _extended_run(cfg, config_hash)
    if earlier is None:
        return _start(folder, cfg, config_hash, note)
    step, damages = _take_checkpoints(earlier, folder, config_hash)
    fixed = cfg.optim.schedule == "constant" and not cfg.task.lr_warmup_ratio
    plan = "" if fixed else f" (optim.schedule={cfg.optim.schedule}: from there on that of the longer run)"
    place = _start(folder, cfg, config_hash, f"going on after step {step} of {earlier}{damages}{plan} in")
    fingerprint = read_run(earlier).get("data_fingerprint")
    if fingerprint is not None:
        add_to_run(folder, data_fingerprint=fingerprint)
    return place


def _extended_run(cfg: TrainConfig, config_hash: str) -> Path | None:
    """The finished run of `resume_from`, if this job differs from it by more steps or epochs only; else None."""
    folder = Path(cfg.resume_from or "")
    info = {} if cfg.resume_from is None else read_run(folder)
    if info.get("status") != "finished" or info.get("config_hash") == config_hash:
        return None
    changed = {key: (was, now) for key, was, now in changed_options(cfg, folder) if key not in PERFORMANCE_ONLY_OPTIONS}
    most, (before, epochs) = cfg.task.max_num_steps, changed.get("task.epochs", (1, 1))
    longer = not info.get("stopped_early") and (most is None or most > info.get("step", 0)) and epochs >= before
    return folder if changed and changed.keys() <= _LENGTH and longer else None


def _take_checkpoints(earlier: Path, folder: Path, config_hash: str) -> tuple[int, str]:
    """Copy newest and best whole checkpoint and metrics into a new run. Raises SheepError if there is none.

    Returns the step of the newest, and a text that names damaged ones, which may be empty.
    """
    manifests, damages = {}, ""
    for path in (earlier / "checkpoints").glob("step-*"):
        if path.name[5:].isdigit():
            try:
                manifests[int(path.name[5:])] = verify_manifest(path)
            except (CheckpointError, OSError) as error:
                damages += f" (left out: {error})"
    if not manifests:
        raise ConfigError(f"resume_from={earlier} has no checkpoint to continue from{damages}: start another run")
    newest = max(manifests)
    best = load_json(earlier / "checkpoints" / f"step-{newest}" / "state.json", STATE).get("best_step")
    make_folder(folder, "checkpoints")
    for step, manifest in manifests.items():
        source = earlier / "checkpoints" / f"step-{step}"
        if step not in (newest, best):
            continue

        def fill(scratch: Path, source: Path = source, manifest: dict[str, Any] = manifest) -> None:
            for name in manifest["files"]:
                shutil.copyfile(source / name, scratch / name)
            facts = {key: value for key, value in manifest.items() if key not in ("format", "files")}
            write_manifest(scratch, facts | {"config_hash": config_hash})

        write_folder(folder / "checkpoints" / source.name, fill)
    metrics = earlier / "metrics.csv"
    if metrics.is_file():
        write_file(folder, metrics.name, real_file(metrics, earlier).read_bytes())
    return newest, damages


def check_existing_run(cfg: TrainConfig, config_hash: str, given: str | None) -> None:
    """Rank zero only, before anything is loaded: reject a run directory as `choose_run_dir` would."""
    if _existing_run(cfg, config_hash, given) is None and given is None:
        _folder_names(cfg)


def _folder_names(cfg: TrainConfig) -> list[str]:
    """Names of data, model, task and run, each of which becomes a folder."""
    names = {
        "data.config_name": cfg.data.config_name,
        "model.config_name": cfg.model.config_name,
        "task.config_name": cfg.task.config_name,
        "run_name": cfg.run_name,
    }
    for key, name in names.items():
        if not _NAME.fullmatch(name) or name in (".", ".."):
            raise ConfigError(f"{key}={name!r} cannot name a folder; use up to 200 characters without '/'")
    return list(names.values())


def _existing_run(cfg: TrainConfig, config_hash: str, given: str | None) -> RunPlace | None:
    """The run that the command line names, if there is one. Arguments as of `choose_run_dir`."""
    if cfg.resume_from is not None and _extended_run(cfg, config_hash) is None:
        return _resume(Path(cfg.resume_from), cfg, config_hash, key="resume_from")
    if given is None:
        return _unfinished_run(cfg, config_hash) if cfg.resume else None
    if not (Path(given) / RUN_FILE).is_file():
        _check_unused(Path(given))
        return None
    if cfg.resume:
        return _resume(Path(given), cfg, config_hash, key="hydra.run.dir")
    raise ConfigError(f"hydra.run.dir={given} holds a run already; add resume=true, or choose another directory")


def _unfinished_run(cfg: TrainConfig, config_hash: str) -> RunPlace | None:
    """The newest unfinished run of this configuration below the root directory."""
    unfinished = [run for run in find_runs(cfg.root_dir) if run.info.get("status") != "finished"]
    same = [run.dir for run in unfinished if run.info.get("config_hash") == config_hash]
    if not same:
        return None
    _check_usable(same[0], "resume=true")
    others = f" (the newest of {len(same)} unfinished ones)" if len(same) > 1 else ""
    return RunPlace(same[0], True, f"going on with {same[0]}{others}")


def _check_usable(folder: Path, key: str) -> None:
    """Raises ConfigError if a run cannot write, or if something that it would write or delete is a symbolic link."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}: {folder} is not writable; check its permissions")
    problems = link_problems(folder, _FILES, _FOLDERS)
    if problems:
        raise UnsafePathError(*problems)


def _check_unused(folder: Path) -> None:
    """Raises ConfigError if a run that starts in a directory could overwrite or delete something of the user's."""
    if not folder.is_dir():
        return
    _check_usable(folder, "hydra.run.dir")
    used = [name for name in (*_FILES, *_FOLDERS) if os.path.lexists(folder / name)]
    if not used:
        return
    try:
        read_run_config(str(folder))  # a run without its run.json continues
    except ConfigError:
        raise ConfigError(
            f"hydra.run.dir={folder} has {', '.join(used)}, which a run would replace, and no {CONFIG_FILE} of a run: "
            "move them, or choose another directory"
        ) from None


def changed_options(cfg: TrainConfig, run_dir: Path) -> list[tuple[str, Any, Any]]:
    """Options that the run's saved configuration has otherwise: key, value there, value in `cfg`; not its place."""
    saved: dict[str, Any] = {}
    with suppress(ConfigError):
        saved = dict(leaves(read_run_config(str(run_dir))))
    now = dict(leaves(redact(config_to_dict(cfg))))
    compared = [key for key in now if key in saved and (key not in NOT_IN_HASH or key in PERFORMANCE_ONLY_OPTIONS)]
    return [(key, saved[key], now[key]) for key in compared if saved[key] != now[key]]


def same_data(run_dir: Path, fingerprint: str) -> bool:
    """Rank zero only: whether the run trained on this data until now; of a new run it is noted."""
    info = read_run(run_dir)
    if "data_fingerprint" not in info:
        add_to_run(run_dir, data_fingerprint=fingerprint)
        return True
    return bool(info["data_fingerprint"] == fingerprint)


def _resume(folder: Path, cfg: TrainConfig, config_hash: str, *, key: str) -> RunPlace:
    info = read_run(folder)
    if not info:
        raise ConfigError(f"{key}={folder} is not a run directory: it has no {RUN_FILE}; `list runs` shows them")
    if "config_hash" not in info or "command" not in info:
        field = "command" if "config_hash" in info else "config_hash"
        raise damaged(folder / RUN_FILE, RUN, field, "is missing")
    if info["config_hash"] != config_hash:
        if info.get("status") == "finished":
            raise ConfigError(_finished_problem(folder, info, cfg, key))
        raise ConfigError(
            f"{key}={folder} belongs to another configuration: {_changes_text(changed_options(cfg, folder))}: "
            f"give the options in {folder / 'config.yaml'} "
            "(those of its command: " + " ".join(info.get("command", [])) + "), or start another run"
        )
    if info.get("status") == "finished":
        return RunPlace(folder, True, f"{folder} is finished: nothing is left to do")
    _check_usable(folder, key)
    return RunPlace(folder, True, f"going on with {folder}")


def _changes_text(changed: list[tuple[str, Any, Any]]) -> str:
    """The first of these options, with their values as on a command line."""
    lines = [f"{name} was {hydra_value(was)} and is {hydra_value(now)}" for name, was, now in changed]
    return first_of(lines, _SHOWN, "; ")


def _finished_problem(folder: Path, info: dict[str, Any], cfg: TrainConfig, key: str) -> str:
    """The reason that a finished run cannot continue with other options, and the command that trains its policy on."""
    changed = changed_options(cfg, folder)
    which = _changes_text(changed) or "those of another version of this program"
    problem = f"{key}={folder} is finished and does not continue with other options ({which})"
    task = choices("task", "train").get(str(info.get("task")))
    if getattr(task, "trains", None) != "policy" or not hasattr(task, "sft_experiment_dir"):
        return f"{problem}: start another run, without {key}"
    new = {name: now for name, _, now in changed} | {START: str(folder.absolute())}
    left_out = {"resume", "resume_from", "run_name", "hydra.run.dir", *new}
    words = [word for word in map(str, info.get("command", [])) if word.partition("=")[0] not in left_out]
    words += [option_word(name, value) for name, value in new.items()]
    return f"{problem}: train its weights further in a run of its own, {command(words)}"


def _start(folder: Path, cfg: TrainConfig, config_hash: str, note: str) -> RunPlace:
    now = time.time()
    info = {
        "status": "running",
        "config_hash": config_hash,
        "task": cfg.task.config_name,
        "model": cfg.model.config_name,
        "data": cfg.data.config_name,
        "run_name": cfg.run_name,
        "started": now,
        "order": next_order(now, (order_of(run.info) for run in find_runs(cfg.root_dir))),
        "finished": None,
        "command": redact_command(absolute_words(sys.argv[1:])),
    }
    _write_run(folder, info)
    return RunPlace(folder, False, f"{note or 'run directory:'} {folder}")


def make_unique_dir(parent: Path, name: str) -> Path:
    """Make a new directory: `name`, else `name-2`, `name-3`, ..."""
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        if _make_dir(folder, "root_dir", exist_ok=False):
            return folder
        number += 1


def discard_unused(run_dir: Path, root_dir: Path) -> bool:
    """Rank zero only: remove a directory below `root_dir` that has only what a start writes; False if it has more."""
    files = [run_dir / name for name in (REPORT_FILE, CONFIG_FILE, LOCK_FILE, RUN_FILE)]
    if not {path.name for path in run_dir.iterdir()} <= {path.name for path in files}:
        return False
    with suppress(OSError):
        for path in files:
            path.unlink(missing_ok=True)
        folder, root = run_dir.resolve(), root_dir.resolve()
        while root in folder.parents:
            folder.rmdir()
            folder = folder.parent
    return True


def _make_dir(folder: Path, key: str, *, exist_ok: bool) -> bool:
    """Make a directory for this user only; False if it was there and must not be."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=exist_ok)
        if not any(folder.iterdir()):
            make_private(folder)
    except OSError as error:
        if isinstance(error, FileExistsError) and folder.is_dir():
            return False
        advice = f"{error.strerror or error}; choose another place with root_dir=<folder>"
        raise ConfigError(f"{key}: cannot make the run directory {folder}: {advice}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}: the run directory {folder} is not writable; choose another with root_dir=<folder>")
    return True


def _write_run(run_dir: Path, info: dict[str, Any]) -> None:
    write_file(run_dir, RUN_FILE, json.dumps(info, indent=1).encode())


def add_to_run(run_dir: Path, **facts: Any) -> None:
    """Rank zero only: keep facts in run.json."""
    _write_run(run_dir, read_run(run_dir) | facts)


def mark_finished(run_dir: Path, **facts: Any) -> None:
    """Rank zero only: the run is complete; `facts` (results, ...) are kept in run.json."""
    add_to_run(run_dir, **facts, status="finished", finished=time.time())


def is_finished(run_dir: Path) -> bool:
    """True if the run is complete: its final weights are written."""
    return read_run(run_dir).get("status") == "finished"


def is_locked(run_dir: Path) -> bool:
    """True if another process holds the run's lock, seen by a lock that looks share for some microseconds."""
    try:
        descriptor = open_file(run_dir / LOCK_FILE, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        lock(descriptor, run_dir / LOCK_FILE, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _lock_for_good(descriptor: int, path: Path) -> None:
    """Take the lock only, if need be after those that only look."""
    for seconds in _WAITS:
        try:
            lock(descriptor, path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(seconds)
    lock(descriptor, path, fcntl.LOCK_EX | fcntl.LOCK_NB)


class RunLock:
    """Rank zero only: hold the run directory while the `with` block runs; the kernel frees it, however it ends."""

    def __init__(self, run_dir: Path) -> None:
        """Prepare the lock without taking it."""
        self._path = run_dir / LOCK_FILE
        self._descriptor: int | None = None

    def __enter__(self) -> "RunLock":
        """Take the lock. Raises RunInUseError, which names the process that holds it."""
        try:
            descriptor = open_lock_file(self._path.parent, self._path.name)
        except OSError as error:
            raise ConfigError(f"cannot lock the run directory {self._path.parent}: {error.strerror}") from error
        try:
            _lock_for_good(descriptor, self._path)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            message = f"{self._path.parent} is in use by {holder}; wait for it, or start another run without resume"
            raise RunInUseError(message) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._descriptor = descriptor
        # A forked worker that outlives us must not keep the lock.
        os.register_at_fork(after_in_child=self._close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Free the lock."""
        self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
