"""Sweeps by launchers and sweepers of other packages; those tests are skipped where these are not installed."""

import importlib.metadata
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException

from sheeprlhf.apps.sweep import Outcome, Sweep, SweepLauncher, outcome, sweep_code
from sheeprlhf.config.untrusted_config import CheckedFolder, check_sources
from sheeprlhf.structure.task import SFTConfig
from tests.support.runs import exit_code

ROOT = Path(__file__).parents[3]
STUB = """
import os
from sheeprlhf.engine.rundir import mark_finished
from sheeprlhf.utils.errors import NonFiniteError

def train(fabric, config, run_dir):
    if config.seed == 98:
        os.kill(os.getpid(), 9)
    if config.seed == 99:
        raise NonFiniteError("loss of rows 3 is nan")
    fabric.barrier()
    if fabric.is_global_zero:
        metric = None if config.seed == 97 else 10 * fabric.world_size + (config.optim.lr - 0.5) ** 2
        mark_finished(run_dir, best_metric=metric)
"""
SITE = "from sheeprlhf.structure.task import SFTConfig\nSFTConfig.entry_point = 'stub_of_sweeps:train'\n"


def needs(package):
    missing = not list(importlib.metadata.distributions(name=package))
    return pytest.mark.skipif(missing, reason=f"{package} is missing")


@pytest.fixture
def home(monkeypatch, tmp_path):
    """An empty working directory, and a stub as the task: here, and in processes that are started."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "stub_of_sweeps.py").write_text(STUB)
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    (tmp_path / "home").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "stub_of_sweeps", raising=False)
    monkeypatch.setattr(SFTConfig, "entry_point", "stub_of_sweeps:train")
    for check in ("check_inputs_exist", "_check_weights"):
        monkeypatch.setattr(f"sheeprlhf.launch.{check}", lambda config: None)
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path


class Answers:
    """A launcher whose jobs have ended already."""

    def __init__(self, *answers):
        self.answers = answers

    def launch(self, job_overrides, initial_job_idx):
        if isinstance(self.answers[0], OSError):
            raise self.answers[0]
        status = [JobStatus.FAILED if isinstance(a, Exception) else JobStatus.COMPLETED for a in self.answers]
        return [JobReturn(status=s, _return_value=a) for s, a in zip(status, self.answers, strict=True)]


def ended(metric=math.nan, code=0, text=""):
    made = Outcome(metric)
    made.code, made.text = code, text
    return made


JOBS = (("seed=1",), ("seed=2",), ("seed=3",))


def test_a_failed_job_is_listed_and_does_not_end_a_plain_sweep(capsys):
    sweep = Sweep()
    launcher = SweepLauncher(Answers(ended(), ended(code=2, text="no model"), ValueError("boom")), sweep)
    returned = [job.return_value for job in launcher.launch(JOBS, 4)]
    assert [job.code for job in returned] == [0, 2, 1]
    assert sweep_code(sweep) == 2
    listed = capsys.readouterr().err
    for part in ("2 of 3", "job 5 (seed=2): exit code 2", "no model", "job 6 (seed=3): exit code 1", "boom"):
        assert part in listed


def test_a_sweeper_gets_results_and_failures(capsys):
    sweep = Sweep(optimises=True)
    first, second, third = SweepLauncher(Answers(ended(2.5), ended(), ended(1.0, 1)), sweep).launch(JOBS, 0)
    assert float(first.return_value) == 2.5
    for failed in (second, third):  # without a result; with an exit code
        with pytest.raises(CompactHydraException):
            _ = failed.return_value
    assert sweep_code(sweep) == 1
    assert "best: job 0" in capsys.readouterr().out


def test_the_result_of_a_job_is_that_of_its_own_run(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"started": 1.0, "status": "finished", "best_metric": 2.5}))
    assert outcome(0, "", tmp_path) == 2.5
    assert [math.isnan(outcome(*job)) for job in [(1, "no", tmp_path), (0, "", None)]] == [True, True]


@pytest.mark.parametrize(("highest", "best"), [(False, "job 1"), (True, "job 2")])
def test_the_best_result_is_the_lowest_loss_or_the_highest_objective(highest, best, capsys):
    sweep = Sweep(optimises=True, highest=highest)
    SweepLauncher(Answers(ended(2), ended(1), ended(3)), sweep).launch(JOBS, 0)
    assert sweep_code(sweep) == 0
    assert f"best: {best} " in capsys.readouterr().out


@pytest.mark.parametrize(("answer", "code"), [(ended(code=143), 143), (OSError("worker killed"), 1)])
def test_a_signal_or_a_lost_job_ends_the_sweep(answer, code):
    sweep = Sweep()
    with pytest.raises(SystemExit) as stop:
        SweepLauncher(Answers(answer, ended(), ended()), sweep).launch(JOBS, 0)
    assert stop.value.code == code
    assert sweep_code(sweep) == code


def test_workers_of_launchers_keep_the_checks_of_configuration_files():
    check_sources()
    Singleton.set_state(Singleton.get_state())  # what a worker gets
    assert SourcesRegistry.instance().resolve("file") is CheckedFolder


@pytest.mark.nightly
@needs("hydra-optuna-sweeper")
@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        ("optim.lr=interval(0.1,0.9) hydra.sweeper.n_trials=3", 0, "best: job"),
        ("optim.lr=0.5,0.7 hydra.sweeper.n_trials=2 hydra.sweeper.direction=maximize", 2, "direction=minimize"),
        ("optim.lr=0.5,0.7 hydra.sweeper.n_trials=2 seed=97", 1, "task.eval_interval"),
        ("optim.lr=0.5,0.7 hydra.sweeper.n_trials=2 seed=99", 1, "loss of rows 3 is nan"),
    ],
)
def test_optuna_optimises_the_best_validation_metric(words, code, named, home, capsys, monkeypatch):
    monkeypatch.setattr("logging.raiseExceptions", False)  # Optuna keeps the stream of the first test
    assert exit_code(f"train -m task=sft hydra/sweeper=optuna {words}") == code
    said = capsys.readouterr()
    assert named in said.out + said.err
    assert "Traceback" not in said.err
    if code == 0:
        metrics = [json.loads(path.read_text())["best_metric"] for path in home.rglob("run.json")]
        assert len(metrics) == 3
        assert f"{min(metrics):.6g}" in said.out.splitlines()[-1]
    assert [path.name for path in Path().iterdir()] == (["logs"] if code < 2 else [])


def in_a_process(home, *words):
    path = os.pathsep.join([str(home / "site"), str(ROOT)])
    return subprocess.run(
        [sys.executable, str(ROOT / "sheeprlhf.py"), "train", "-m", "task=sft", "optim.lr=0.5", *words],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.nightly
@needs("hydra-joblib-launcher")
def test_jobs_of_joblib_that_fail_or_are_killed(home):
    done = in_a_process(home, "seed=1,99", "hydra/launcher=joblib")
    assert done.returncode == 1
    assert "optim.lr=0.5" in done.stderr
    done = in_a_process(home, "seed=1,98", "hydra/launcher=joblib")
    assert done.returncode == 1
    assert "lost" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.nightly
@needs("hydra-submitit-launcher")
def test_jobs_of_submitit_train_on_two_processes(home):
    done = in_a_process(home, "seed=1,99", "fabric.devices=2", "hydra/launcher=submitit_local")
    assert done.returncode == 1
    assert "fabric.devices=2" in done.stderr
    found = {info["run_name"]: info for info in map(json.loads, (p.read_text() for p in home.rglob("run.json")))}
    assert found["default_0"]["best_metric"] == 20
    assert found["default_1"]["status"] != "finished"
