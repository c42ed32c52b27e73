"""Experiment trackers: Weights & Biases, MLflow, trackio. Each is optional; one that fails is left out."""

import os
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from sheeprlhf.config.registry import config_to_dict, leaves
from sheeprlhf.engine.rundir import add_to_run, read_run
from sheeprlhf.security.redaction import code_block, redact, redact_text
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.utils.errors import Notify
from sheeprlhf.utils.modes import isolated_rng

_PARAMS_OF_A_BATCH = 100  # most that MLflow accepts
_LONGEST_PARAM = 6000  # characters, as above


class Tracker(Protocol):
    """Destination of the metrics and samples of a run; rank zero only."""

    run_id: str  # names the tracker's run; given again, that run continues

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log numbers of one step; several calls may have the same step."""

    def log_text(self, tag: str, text: str, step: int) -> None:
        """Log a sample text of one step."""

    def close(self, finished: bool) -> None:
        """Send what is left, and end the tracker's run."""


class WandbTracker:
    """Weights & Biases. WANDB_MODE=offline writes to ./wandb, or $WANDB_DIR, without a network."""

    def __init__(self, project: str, name: str, config: dict[str, Any], run_id: str | None) -> None:
        import wandb

        self._html, self.run_id = wandb.Html, run_id or secrets.token_hex(4)
        quiet = {"console": "off", "disable_git": True, "disable_code": True, "x_disable_meta": True, "silent": True}
        settings = wandb.Settings(**quiet, init_timeout=30)  # of the command line and machine, nothing is sent
        self._run = wandb.init(
            project=project, name=name, config=config, id=self.run_id, resume="allow", settings=settings
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log numbers of one step."""
        self._run.log(metrics, step=step)

    def log_text(self, tag: str, text: str, step: int) -> None:
        """Log a text as an HTML block that shows it as it is."""
        self._run.log({tag: self._html(code_block(text), inject=False)}, step=step)

    def close(self, finished: bool) -> None:
        """Send what is left; an exit code of 1 marks a run that was stopped."""
        self._run.finish(exit_code=0 if finished else 1)


class MlflowTracker:
    """MLflow, at MLFLOW_TRACKING_URI or in its default store; texts are artifacts."""

    def __init__(self, project: str, name: str, config: dict[str, Any], run_id: str | None) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # a server that is gone does not stall the run
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, MlflowClient()
        if run_id is not None:
            self.run_id = run_id
            self._client.update_run(run_id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(project)
        experiment_id = self._client.create_experiment(project) if experiment is None else experiment.experiment_id
        self.run_id = self._client.create_run(experiment_id, run_name=name).info.run_id
        params = [Param(key, str(value)[:_LONGEST_PARAM]) for key, value in leaves(config)]
        for first in range(0, len(params), _PARAMS_OF_A_BATCH):
            self._client.log_batch(self.run_id, params=params[first : first + _PARAMS_OF_A_BATCH])

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log numbers of one step."""
        now = int(time.time() * 1000)
        self._client.log_batch(self.run_id, [self._metric(tag, value, now, step) for tag, value in metrics.items()])

    def log_text(self, tag: str, text: str, step: int) -> None:
        """Log a text as the artifact <tag>/step-<n>.txt."""
        self._client.log_text(self.run_id, text, f"{tag}/step-{step}.txt")

    def close(self, finished: bool) -> None:
        """End the run as finished or killed."""
        self._client.set_terminated(self.run_id, "FINISHED" if finished else "KILLED")


class TrackioTracker:
    """Trackio: a local database in $TRACKIO_DIR, or the Space of TRACKIO_SPACE_ID."""

    def __init__(self, project: str, name: str, config: dict[str, Any], run_id: str | None) -> None:
        import trackio

        self._markdown, self.run_id = trackio.Markdown, run_id or f"{name}-{secrets.token_hex(4)}"
        self._run = trackio.init(
            project, self.run_id, config=config, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log numbers of one step."""
        self._run.log(metrics, step=step)

    def log_text(self, tag: str, text: str, step: int) -> None:
        """Log a text as a block that shows it as it is."""
        self._run.log({tag: self._markdown(code_block(text))}, step=step)

    def close(self, finished: bool) -> None:
        """Write what is left."""
        with redirect_stdout(sys.stderr):
            self._run.finish()


TRACKERS: dict[str, Callable[[str, str, dict[str, Any], str | None], Tracker]] = {
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
    "trackio": TrackioTracker,
}
_PROJECT_VARIABLES = {"wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME", "trackio": "TRACKIO_PROJECT"}


def open_trackers(cfg: TrainConfig, run_dir: Path, say: Notify) -> dict[str, Tracker]:
    """Rank zero only: open the trackers of `log`, with their runs of before; report those that fail."""
    config: dict[str, Any] = redact(config_to_dict(cfg))
    title = redact_text("-".join([cfg.task.config_name, cfg.data.config_name, cfg.model.config_name, cfg.run_name]))
    ids, opened = dict(read_run(run_dir).get("trackers", {})), {}
    for tracker in [name for name in cfg.log if name in TRACKERS]:
        project = cfg.log_project or os.environ.get(_PROJECT_VARIABLES[tracker]) or "sheeprlhf"
        try:
            with redirect_stdout(sys.stderr), isolated_rng():
                opened[tracker] = TRACKERS[tracker](project, title, config, ids.get(tracker))
            ids[tracker] = opened[tracker].run_id
        except Exception as error:
            say(f"warning: log={tracker} cannot be opened, and training continues without it: {error}")
    if opened:
        add_to_run(run_dir, trackers=ids)
    return opened
