"""A training run in its directory: saved configuration, records, progress, signals and checkpoints, on all machines."""

import hashlib
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
import yaml
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from sheeprlhf.config.command_words import hydra_value
from sheeprlhf.config.registry import PERFORMANCE_ONLY_OPTIONS, config_hash, config_to_dict
from sheeprlhf.engine.checkpoint import (
    NOT_THE_SAME,
    BackgroundSaver,
    TrainState,
    can_save_in_background,
    restore_latest,
    save_checkpoint,
    saved_steps,
)
from sheeprlhf.engine.manifest import MANIFEST
from sheeprlhf.engine.metrics import MetricWriter
from sheeprlhf.engine.rundir import CONFIG_FILE, RunLock, changed_options, discard_unused
from sheeprlhf.engine.trackers import open_trackers
from sheeprlhf.security.redaction import plain_text, redact, redact_text
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.utils.errors import USERS_MISTAKE, ConfigError, Interrupted, NonFiniteError, Notify, SheepError
from sheeprlhf.utils.lightning import Fabric, gather_objects
from sheeprlhf.utils.memory import peak_memory
from sheeprlhf.utils.output import write_file
from sheeprlhf.utils.processes import (
    SAVE_SIGNAL,
    STOP_SIGNALS,
    die_with_parent,
    handled,
    handles_interrupts,
    note_stop,
    watched_signals,
)

ON_CUDA = (
    "on CUDA some sums are added in an order that varies: the same run again, or resumed, comes out alike, but not bit "
    "for bit the same; torch_deterministic=true makes it so, and slower"
)
_SECONDS_BETWEEN_LINES = 10.0
_SIGNALS = (*STOP_SIGNALS, SAVE_SIGNAL)  # the order in which they count when several came
_SECONDS_TO_APPEAR = 3.0  # network file systems may be late


class Run:
    """The run of a training task: records, checkpoints, signals. Made by `open_run`; all ranks may call every method.

    Attributes:
        dir: the run directory.
        cfg: the run's configuration.
        planned_memory: bytes that a step needs at most by plan, None without a plan.
    """

    def __init__(self, fabric: Fabric, cfg: TrainConfig, run_dir: Path, stack: ExitStack) -> None:
        """Set up the run without writing; `stack` ends with it."""
        self.dir, self.cfg = run_dir, cfg
        self.planned_memory: int | None = None
        self._fabric = fabric
        self._config_hash = config_hash(cfg)
        self._keep = cfg.task.keep_checkpoints
        self._background: BackgroundSaver | None = None
        self._stack = stack
        self._signals: SignalFlags | None = None
        self._writer: MetricWriter | None = None
        self._progress: Progress | None = None
        self._state = TrainState()
        self._trained: tuple[nn.Module, Optimizer] | None = None  # what checkpoints hold
        self._said: set[str] = set()
        self._tokens, self._tokens_since = 0.0, time.monotonic()
        self._counted_at = 0  # the step with which the number of skipped steps was last logged

    def say(self, text: str) -> None:
        """Print a line on rank zero; it does not break the progress bar, and shows no secret."""
        if self._fabric.is_global_zero:
            tqdm.write(redact_text(plain_text(text)), file=sys.stderr)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    def restore(self, module: nn.Module, optimizer: Optimizer) -> TrainState:
        """All ranks, once, before the first log: continue from the newest good checkpoint, or start at step 0.

        Later checkpoints hold the same module and optimizer, and the state that is returned.
        """
        self._trained = module, optimizer
        state = restore_latest(self._fabric, self.dir, module, optimizer, config_hash=self._config_hash, say=self.say)
        self._state = state or TrainState()
        if self.cfg.task.async_checkpoints:
            if can_save_in_background(self._fabric, self.dir, module):
                self._background = BackgroundSaver(self._fabric)
            else:
                self.say(
                    "task.async_checkpoints=true is ignored: not all ranks see the run directory, or weights are cut "
                    "other than by rows and columns"
                )
        self.begin(self._state.step)
        return self._state

    def begin(self, step: int) -> None:
        """All ranks, instead of `restore`, for a run without checkpoints: continue after `step`, 0 for a new run."""
        self._signals = self._stack.enter_context(noted_signals(self._fabric.is_global_zero))
        self.say(f"going on after step {step}" if step else "starting at step 0")
        if self._fabric.is_global_zero:
            trackers, events = open_trackers(self.cfg, self.dir, self.say), "tensorboard" in self.cfg.log
            self._writer = MetricWriter(self.dir, step, tensorboard=events, trackers=trackers, say=self.say)

    def skip_step(self, error: NonFiniteError) -> None:
        """All ranks: leave out a step and count it. Raises NonFiniteError after `task.max_skipped_steps`."""
        state, most = self._state, self.cfg.task.max_skipped_steps
        if state.skipped_steps >= most:
            raise error
        state.skipped_steps += 1
        self.say(f"left out a step, {state.skipped_steps} of at most {most}: {error}")

    def save(self) -> Path:
        """All ranks: write the checkpoint of the state's step; validate before, so that it knows the best step.

        With `task.async_checkpoints` it is written in the background, after the one before.
        """
        assert self._trained is not None
        return save_checkpoint(
            self._fabric,
            self.dir,
            self._state,
            *self._trained,
            config_hash=self._config_hash,
            keep=self._keep,
            say=self._say_once,
            background=self._background,
        )

    @contextmanager
    def saved_at(self, *errors: type[SheepError]) -> Iterator[None]:
        """All ranks, between two steps: save if the block raises one of `errors` on a rank; all ranks raise it.

        A signal to stop that came before replaces it.
        """
        own = None
        try:
            yield
        except errors as error:
            own = error
        raised = [error for error in gather_objects(self._fabric, own) if error is not None]
        if not raised:
            return
        problem = own or raised[0]
        if self._state.step:
            self.save()
            self.finish_saving()
            problem.add_note(f"the state of step {self._state.step} is saved: resume=true continues")
        signum = self.stop_signal()
        if signum in STOP_SIGNALS:
            self.stop(signum)
        raise problem

    def finish_saving(self) -> None:
        """All ranks: wait for the checkpoint that is written in the background; raises its error."""
        if self._background is not None:
            self._background.wait()

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Numbers of one step to all records, on rank zero; after a skipped step, with the count of skipped ones."""
        if self._state.skipped_steps and self._counted_at != step:
            metrics = metrics | {"train/skipped_steps": float(self._state.skipped_steps)}
            self._counted_at = step
        if self._writer is not None:
            self._writer.log(metrics, step)

    def log_text(self, tag: str, text: str, step: int) -> None:
        """A sample text of one step: to samples/step-<n>.txt and TensorBoard, on rank zero."""
        if self._writer is not None:
            self._writer.log_text(tag, text, step)

    def begin_progress(self, step: int, total: int) -> None:
        """Begin to measure the steps from `step` to `total`: call it right before the first of them."""
        self._tokens, self._tokens_since = 0.0, time.monotonic()
        if self._fabric.is_global_zero:
            self._progress = Progress(total, step)

    def show_progress(self, step: int, what: str, amount: float) -> None:
        """All ranks: `step` steps and `amount` more tokens are done; `what`: "loss 0.1234"."""
        self._tokens += amount
        if self._progress is not None:
            self._progress.show(step, what, amount)

    def peak_memory(self) -> int | None:
        """Bytes that this process has needed at most; on CUDA, of the GPU."""
        device = self._fabric.device
        return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_memory()

    def usage(self) -> dict[str, float]:
        """Return tokens per second of all ranks since the last call, pauses included, and rank zero's peak memory."""
        now, peak = time.monotonic(), self.peak_memory()
        speed = self._tokens / max(now - self._tokens_since, 1e-9)
        self._tokens, self._tokens_since = 0.0, now
        return {"time/tokens_per_second": speed} | ({} if peak is None else {"memory/peak_gb": peak / 1e9})

    def stop_signal(self) -> int | None:
        """All ranks, after each step: SIGTERM or SIGINT: save and `stop`; SIGUSR1: save and continue; else None."""
        return self._signals.agreed(self._fabric) if self._signals is not None else None

    def has_stop_signal(self) -> bool:
        """Return True if this rank has received a signal to stop."""
        return self._signals is not None and self._signals.stop_pending() != 0

    def stop(self, signum: int) -> NoReturn:
        """All ranks, after saving: rank zero reports the signal, the others end quietly, so that it is not killed."""
        self._fabric.barrier()
        if self._fabric.is_global_zero:
            raise Interrupted(signum)
        raise SystemExit(0)

    def end_step(self, *, save: bool, last: bool) -> None:
        """All ranks, after each step: save if asked, signalled or best. Raises Interrupted at a signal to stop."""
        signum = self.stop_signal()
        if save or signum or self._state.best_step == self._state.step:
            self.save()
        if signum:
            self.finish_saving()
        if signum in STOP_SIGNALS and not last:
            self.stop(signum)

    def close(self, finished: bool = True) -> None:
        """End the bar, the saves and the records; `finished` is False if an error or a signal ends the run."""
        if self._progress is not None:
            self._progress.close()
        try:
            self.finish_saving()
        except Exception as error:
            if finished:
                raise
            self.say(str(error))
        finally:
            if self._writer is not None:
                self._writer.close(finished)


@contextmanager
def open_run(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> Iterator[Run]:
    """All ranks: the run is this job's until the block ends; one that is refused early goes. Raises SheepError."""
    with ExitStack() as stack:
        fresh = False
        if fabric.is_global_zero:
            stack.enter_context(RunLock(run_dir))
            fresh = _save_config(cfg, run_dir)
        elif fabric.local_rank > 0:
            die_with_parent()
        run = Run(fabric, cfg, run_dir, stack)
        stack.push(lambda kind, *_: run.close(finished=kind is None))
        if fabric.is_global_zero:
            for key, was, now in changed_options(cfg, run_dir):
                if key in PERFORMANCE_ONLY_OPTIONS:
                    values = f"{key} was {hydra_value(was)} and is {hydra_value(now)} now"
                    run.say(f"{values}: the run continues, {NOT_THE_SAME}")
            if fabric.device.type == "cuda" and not cfg.torch_deterministic:
                run.say(ON_CUDA)
        try:
            yield run
        except SheepError as error:
            if fresh and error.exit_code == USERS_MISTAKE and discard_unused(run_dir, Path(cfg.root_dir)):
                error.add_note("nothing was begun: the run directory is taken back")
            raise


def _save_config(cfg: TrainConfig, run_dir: Path) -> bool:
    """Rank zero only: config.yaml, complete and without secrets, for this user's eyes; False if the run has its own."""
    path = run_dir / CONFIG_FILE
    if path.exists():
        return False
    text = yaml.safe_dump(redact(config_to_dict(cfg)), sort_keys=False)
    try:
        write_file(run_dir, CONFIG_FILE, text.encode())
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another place with root_dir=") from error
    return True


class Progress:
    """Rank zero only: steps done, what came of them, speed and time left."""

    def __init__(self, total: int, start: int) -> None:
        """Begin at step `start` of `total`; speed is counted in tokens per second from now on."""
        self._total, self._start = total, start
        self._began = time.monotonic()
        self._amount = 0.0
        self._next_line = self._began + _SECONDS_BETWEEN_LINES
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, leave=True)

    def show(self, step: int, what: str, amount: float) -> None:
        """Step `step` is done, counted from 1, after `amount` more tokens; `what`: "loss 0.1234"."""
        self._amount += amount
        now = time.monotonic()
        speed = self._amount / max(now - self._began, 1e-9)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{what}, {speed:,.0f} tokens/s", refresh=False)
            self._bar.update(step - self._bar.n)
        elif now >= self._next_line or step == self._total:
            self._next_line = now + _SECONDS_BETWEEN_LINES
            left = (self._total - step) * (now - self._began) / max(step - self._start, 1)
            tqdm.write(
                f"step {step}/{self._total}  {what}  {speed:,.0f} tokens/s  "
                f"{int(left // 60)}:{int(left % 60):02d} left",
                file=sys.stderr,
            )

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


class SignalFlags:
    """Signals since the run began; a second Ctrl-C ends the process if it `exits`, else raises KeyboardInterrupt."""

    def __init__(self, *, exits: bool = True) -> None:
        self._pending: set[int] = set()
        self._interrupts, self._exits = 0, exits

    def note(self, signum: int, frame: FrameType | None = None) -> None:
        """Record a signal; a signal handler."""
        if signum == signal.SIGINT and signum in self._pending and not self._exits:
            raise KeyboardInterrupt
        self._pending.add(signum)

    def agreed(self, fabric: Fabric) -> int | None:
        """All ranks: the signal to act on, the same on every rank; a save request is returned once, a stop always."""
        came = [int(signum in self._pending) for signum in _SIGNALS]
        if fabric.world_size > 1:
            counts = torch.tensor(came, device=fabric.device)
            fabric.all_reduce(counts, reduce_op="sum")
            came = counts.tolist()
        signum = next((int(signum) for signum, count in zip(_SIGNALS, came, strict=True) if count), None)
        if signum == SAVE_SIGNAL:
            self._pending.discard(SAVE_SIGNAL)
        return signum

    def stop_pending(self) -> int:
        """The stop signal that this process received; 0 if there was none."""
        return next((int(signum) for signum in STOP_SIGNALS if signum in self._pending), 0)

    def exit_at_second_interrupt(self, signum: int) -> None:
        """Watch signals from a thread: the main thread may be where no handler runs."""
        self._interrupts += signum == signal.SIGINT
        if self._interrupts > 1 and self._exits:
            os._exit(128 + signal.SIGINT)
        if signum == signal.SIGINT:
            with suppress(OSError):  # the terminal may be gone
                os.write(2, b"\nstopping after this step; press Ctrl-C again to exit at once without saving\n")


@contextmanager
def noted_signals(is_rank_zero: bool) -> Iterator[SignalFlags]:
    """Record signals instead of ending the process; the old handlers are restored afterwards.

    A second Ctrl-C ends the process at once with exit status 130, and raises KeyboardInterrupt outside of the command
    line. Ranks above zero ignore Ctrl-C, which a terminal sends to all of them, and follow rank zero. SIGHUP stays
    ignored under nohup. Nothing changes in other threads than the main one: Python allows no handlers there.
    """
    flags = SignalFlags(exits=handles_interrupts())
    recorded = [signum for signum in _SIGNALS if is_rank_zero or signum != signal.SIGINT]
    ignored = [] if is_rank_zero else [signal.SIGINT]
    try:
        with (
            handled(recorded, flags.note),
            handled(ignored, signal.SIG_IGN),
            watched_signals(flags.exit_at_second_interrupt),
        ):
            yield flags
    finally:
        if flags.stop_pending():
            note_stop(flags.stop_pending())


def check_shared(fabric: Fabric, run_dir: Path, say: Notify) -> None:
    """All ranks: find machines without rank zero's run directory. Raises ConfigError if they need its checkpoints."""
    if getattr(fabric.strategy, "num_nodes", 1) == 1:
        return
    name = fabric.broadcast(f".seen-{secrets.token_hex(8)}")
    sign = run_dir / name
    try:
        if fabric.is_global_zero:
            write_file(run_dir, name, b"")
        fabric.barrier()
        views = gather_objects(fabric, (fabric.node_rank, _appears(sign), _checkpoints(run_dir)))
    finally:
        if fabric.is_global_zero:
            with suppress(OSError):
                sign.unlink()
    expected = views[0][2]
    blind = sorted({node for node, sees, _ in views if not sees})
    lacking = sorted({node for node, sees, checkpoints in views if not sees and checkpoints != expected})
    if expected and lacking:
        raise ConfigError(
            f"{_nodes(lacking)} not see the run directory {run_dir} of node 0. Every machine reads the checkpoint to "
            "continue, and there is none or another one: copy the directory to the same place on all machines, or move "
            "it to a file system that they share and give resume_from=<folder>"
        )
    if blind:
        say(
            f"{_nodes(blind)} not see the run directory {run_dir} of node 0: checkpoints are written on node 0 only. "
            "To continue after a stop, first copy the directory to the same place on all machines; with root_dir="
            "<folder of a shared file system> that is not needed"
        )


def _nodes(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers))
    return f"nodes {shown} do" if len(numbers) > 1 else f"node {shown} does"


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _checkpoints(run_dir: Path) -> str:
    """A digest of the manifests of all checkpoints; empty if there are none."""
    digest = hashlib.sha256()
    steps = saved_steps(run_dir / "checkpoints")
    for step in steps:
        with suppress(OSError):
            digest.update((run_dir / "checkpoints" / f"step-{step}" / MANIFEST).read_bytes())
    return digest.hexdigest() if steps else ""
