"""Trainings and evaluations from Python: the commands `train` and `eval`, with results and exceptions. No torch."""

import csv
import os
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sheeprlhf.apps.arguments import ParsedArgs
from sheeprlhf.config.command_words import option_word
from sheeprlhf.config.compose import Job, Source, compose_job
from sheeprlhf.config.overrides import quote_texts
from sheeprlhf.launch import launch
from sheeprlhf.security.json_records import RESULT, load_json
from sheeprlhf.utils.errors import ConfigError, Interrupted, SheepError
from sheeprlhf.utils.processes import STOP_SIGNALS, just_interrupted, noted_stop, reliable_sigint

Overrides = Sequence[str] | Mapping[str, Any]


class TrainingRun(NamedTuple):
    """A finished training."""

    directory: Path  # the run directory
    final: Path  # the folder that `from_pretrained` and `load_policy` load
    metrics: dict[str, list[tuple[int, float]]]  # for each logged name its (step, value) pairs, in order


def train(overrides: Overrides = ()) -> TrainingRun:
    """Run the command `train` in this process; with several devices, in processes of their own.

    Ctrl-C, or a notebook's interrupt, raises `Interrupted`, between the first and the last step after saving a
    checkpoint; the same call with `resume=true` continues.

    Args:
        overrides: options as on the command line, `["task=sft", "optim.lr=1e-4"]`, or `{"optim.lr": 1e-4}`.

    Raises:
        SheepError: `ConfigError`, `DataError` and so on: the same messages as on the command line.
    """
    with _interruptible():
        directory = _run("train", overrides)
        return TrainingRun(directory, directory / "final", _read_metrics(directory / "metrics.csv"))


def evaluate(overrides: Overrides = ()) -> dict[str, Any]:
    """Run the command `eval`; the result is also saved below the run's `eval/`, or below `output_dir` without a run.

    Args:
        overrides: options as on the command line, such as `["task=perplexity", f"experiment_dir={run.directory}"]`.

    Returns:
        The content of the result's JSON file.

    Raises:
        SheepError: the same messages as on the command line.
    """
    with _interruptible():
        return load_json(_run("eval", overrides), RESULT)


def as_words(overrides: Overrides) -> list[str]:
    """The options as words that Hydra reads: a mapping, or words as they are typed on the command line."""
    if isinstance(overrides, Mapping):
        return [option_word(key, value) for key, value in overrides.items()]
    return [quote_texts(word) for word in overrides]


def compose(verb: str, words: list[str]) -> Job:
    """Compose and check a command. Raises ConfigError with every problem."""
    hydra = [word for word in words if re.match(r"[+~]*hydra\b", word) and not word.startswith("hydra.run.dir=")]
    if hydra:
        raise ConfigError(f"{hydra[0]}: options of Hydra other than hydra.run.dir work on the command line only")
    return compose_job(Source(verb), words)


def _run(verb: str, overrides: Overrides) -> Path:
    """Run a job; returns the run directory of a training, or the result file of an evaluation."""
    words = as_words(overrides)
    job = compose(verb, words)
    with _restored_environment():
        code, output = launch(verb, ParsedArgs(words, {}), job, in_sweep=True)
    if code - 128 in STOP_SIGNALS:  # in processes of its own
        raise Interrupted(code - 128, saved=False)
    if code or output is None:
        raise SheepError(f"{verb} ended without a result, with exit code {code}; its message is above")
    return output


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise `Interrupted` for a signal wherever it comes; a second Ctrl-C stays KeyboardInterrupt."""
    with reliable_sigint(owns_process=False) as interrupts:
        try:
            yield
        except KeyboardInterrupt:
            if noted_stop():
                raise
            raise Interrupted(signal.SIGINT, saved=False) from None
        except Exception as error:
            if just_interrupted() and not isinstance(error, Interrupted):
                raise Interrupted(signal.SIGINT, saved=False) from error
            raise
        if signum := noted_stop() or interrupts.last:
            raise Interrupted(signum)


@contextmanager
def _restored_environment() -> Iterator[None]:
    """Undo a job's changes of environment variables, such as HF_HUB_OFFLINE."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    metrics: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for step, name, value, _ in list(csv.reader(file))[1:]:
            metrics.setdefault(name, []).append((int(step), float(value)))
    return metrics
