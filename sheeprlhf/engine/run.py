"""A training run in its directory: lock, saved configuration, records, messages, signals and checkpoints."""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

import yaml
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from sheeprlhf.config.registry import PERFORMANCE_ONLY_OPTIONS, config_hash, config_to_dict
from sheeprlhf.engine.checkpoint import NOT_THE_SAME, TrainState, restore_latest, save_checkpoint
from sheeprlhf.engine.metrics import MetricWriter
from sheeprlhf.engine.progress import Progress
from sheeprlhf.engine.rundir import CONFIG_FILE, changed_options, discard_unused
from sheeprlhf.engine.runlock import RunLock
from sheeprlhf.engine.signals import STOP_SIGNALS, SignalFlags, noted_signals
from sheeprlhf.security.redaction import plain_text, redact, redact_text
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.utils.errors import USERS_MISTAKE, ConfigError, Interrupted, NonFiniteError, SheepError
from sheeprlhf.utils.lightning import Fabric
from sheeprlhf.utils.output import write_file
from sheeprlhf.utils.processes import die_with_parent

ON_CUDA = (
    "on CUDA some sums are added in an order that varies: the same run again, or resumed, comes out alike, but not bit "
    "for bit the same; torch_deterministic=true makes it so, and slower"
)


class Run:
    """The run of a training task: records, checkpoints, signals. Made by `open_run`; all ranks may call every method.

    Attributes:
        dir: the run directory.
        cfg: the run's configuration.
        planned_memory: bytes that a step needs at most by plan, None if nobody planned.
    """

    def __init__(self, fabric: Fabric, cfg: TrainConfig, run_dir: Path, stack: ExitStack) -> None:
        """Set up the run without writing; `stack` ends with it."""
        self.dir, self.cfg = run_dir, cfg
        self.planned_memory: int | None = None
        self._fabric = fabric
        self._config_hash = config_hash(cfg)
        self._keep = cfg.task.keep_checkpoints
        self._stack = stack
        self._signals: SignalFlags | None = None
        self._writer: MetricWriter | None = None
        self._progress: Progress | None = None
        self._began, self._began_at_step = time.monotonic(), 0
        self._state = TrainState()
        self._said: set[str] = set()
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

        Weights, optimizer and random number generators become the checkpoint's; records beyond its step are removed.
        """
        state = restore_latest(self._fabric, self.dir, module, optimizer, config_hash=self._config_hash, say=self.say)
        self._state = state or TrainState()
        self.begin(self._state.step)
        return self._state

    def begin(self, step: int) -> None:
        """All ranks, instead of `restore`, for a run without checkpoints: go on after `step`, 0 for a new run."""
        self._began, self._began_at_step = time.monotonic(), step
        self.say(f"going on after step {step}" if step else "starting at step 0")
        if self._fabric.is_global_zero:
            self._writer = MetricWriter(self.dir, step)
        self._signals = self._stack.enter_context(noted_signals(self._fabric.is_global_zero))

    def skip_step(self, error: NonFiniteError) -> None:
        """All ranks: leave out the step that the error is of, and count it in the restored state.

        Raises:
            NonFiniteError: `task.max_skipped_steps` have been left out already.
        """
        state, most = self._state, self.cfg.task.max_skipped_steps
        if state.skipped_steps >= most:
            raise error
        state.skipped_steps += 1
        self.say(f"left out a step, {state.skipped_steps} of at most {most}: {error}")

    def save(self, state: TrainState, module: nn.Module, optimizer: Optimizer) -> Path:
        """All ranks: write checkpoints/step-<state.step>; validate before, so that it knows the best step."""
        return save_checkpoint(
            self._fabric,
            self.dir,
            state,
            module,
            optimizer,
            config_hash=self._config_hash,
            keep=self._keep,
            say=self._say_once,
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Numbers of one step: to metrics.csv and TensorBoard, on rank zero.

        From the first skipped step on, their number is beside them, once a step.
        """
        if self._state.skipped_steps and self._counted_at != step:
            metrics = metrics | {"train/skipped_steps": float(self._state.skipped_steps)}
            self._counted_at = step
        if self._writer is not None:
            self._writer.log(metrics, step)

    def log_text(self, tag: str, text: str, step: int) -> None:
        """A sample text of one step: to samples/step-<n>.txt and TensorBoard, on rank zero."""
        if self._writer is not None:
            self._writer.log_text(tag, text, step)

    def begin_progress(self, state: TrainState, total: int) -> None:
        """Begin to measure the steps from `state.step` to `total`: call it right before the first of them."""
        if self._fabric.is_global_zero:
            self._progress = Progress(total, state.step, "tokens")

    def show_progress(self, state: TrainState, total: int, what: str, amount: float) -> None:
        """The steps up to `state.step` of `total`, and `amount` more tokens on all ranks are done; `what` came of it.

        Without `begin_progress`, time is measured from `restore` on.
        """
        if self._fabric.is_global_zero:
            if self._progress is None:
                self._progress = Progress(total, self._began_at_step, "tokens", began=self._began)
            self._progress.show(state.step, what, amount)

    def stop_signal(self) -> int | None:
        """All ranks, after each step: SIGTERM or SIGINT: save and `stop`; SIGUSR1: save and go on; else None."""
        return self._signals.agreed(self._fabric) if self._signals is not None else None

    def stop(self, signum: int) -> NoReturn:
        """All ranks, after saving: rank zero reports the signal, the others end quietly, so that it is not killed."""
        self._fabric.barrier()
        if self._fabric.is_global_zero:
            raise Interrupted(signum)
        raise SystemExit(0)

    def end_step(
        self, state: TrainState, module: nn.Module, optimizer: Optimizer, *, save: bool, last: bool = False
    ) -> None:
        """All ranks, after each step and its validation: save if asked, at a signal and at the best step, then stop.

        Raises:
            Interrupted: on rank zero, at a signal to stop, unless this is the last step.
        """
        signum = self.stop_signal()
        if save or signum or state.best_step == state.step:
            self.save(state, module, optimizer)
        if signum in STOP_SIGNALS and not last:
            self.stop(signum)

    def close(self) -> None:
        """End the bar and the records."""
        if self._progress is not None:
            self._progress.close()
        if self._writer is not None:
            self._writer.close()


@contextmanager
def open_run(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> Iterator[Run]:
    """All ranks: the run is this job's until the block ends.

    Rank zero locks the directory and saves the configuration. A new run that is refused before it has recorded anything
    takes its directory with it, so that the same command can be given again with the mistake fixed.

    Raises:
        RunInUseError: another process works in this directory.
    """
    with ExitStack() as stack:
        fresh = False
        if fabric.is_global_zero:
            stack.enter_context(RunLock(run_dir))
            fresh = _save_config(cfg, run_dir)
        elif fabric.local_rank > 0:
            die_with_parent()
        run = Run(fabric, cfg, run_dir, stack)
        stack.callback(run.close)
        if fabric.is_global_zero:
            for key, was, now in changed_options(cfg, run_dir):
                if key in PERFORMANCE_ONLY_OPTIONS:
                    run.say(f"{key} was {was} and is {now} now: the run goes on, {NOT_THE_SAME}")
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
