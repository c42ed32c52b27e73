"""A run as a task uses it, in processes that get signals."""

import dataclasses
import multiprocessing
import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from sheeprlhf.engine import checkpoint
from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.engine.optim import build_optimizer
from sheeprlhf.engine.run import noted_signals, open_run
from sheeprlhf.engine.step import update
from sheeprlhf.structure.data import LocalDataConfig
from sheeprlhf.structure.model import TinyConfig
from sheeprlhf.structure.run import AdamWConfig, FabricConfig, TrainConfig
from sheeprlhf.structure.task import SFTConfig
from sheeprlhf.utils.errors import CheckpointError, ConfigError, Interrupted
from sheeprlhf.utils.processes import STOP_SIGNALS, die_with_parent, ignored, noted_stop, reliable_sigint
from tests.unit.engine.toy import NEEDS_FSDP2, Net, micro_batch, on_ranks, seed_all, toy_loss

SECRET = "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"


def make_cfg(async_checkpoints=False, **values):
    return TrainConfig(
        task=SFTConfig(keep_checkpoints=2, async_checkpoints=async_checkpoints),
        model=TinyConfig(),
        data=LocalDataConfig(train_file=f"https://me:pw@host/{SECRET}.jsonl"),
        fabric=FabricConfig(),
        optim=AdamWConfig(),
        **values,
    )


def begin(fabric, run):
    """Start training: from here on signals are noted."""
    net = Net(dropout=0.2)
    return run.restore(*fabric.setup(net, build_optimizer(AdamWConfig(), (net.parameters(), 1e-2))))


def train(fabric, run_dir, steps, **options):
    """The loop of a task, as its author writes it."""
    seed_all(0)
    net = Net(dropout=0.2)
    module, optimizer = fabric.setup(net, build_optimizer(AdamWConfig(), (net.parameters(), 1e-2)))
    with open_run(fabric, make_cfg(**options), run_dir) as run:
        state = run.restore(module, optimizer)
        run.begin_progress(state.step, steps)
        while state.step < steps:
            micros = [micro_batch(4 * state.step, 4 * state.step + 1), micro_batch(4 * state.step + 2)]
            metrics = update(fabric, module, optimizer, micros, toy_loss, max_grad_norm=1.0)
            state.step += 1
            run.log(metrics, state.step)
            run.log_text("sample", f"{SECRET} at {state.step}", state.step)
            run.show_progress(state.step, f"loss {metrics['loss']:.4f}", metrics["items"])
            if state.step == steps:
                run.save()
    return state.step


@pytest.mark.parametrize("fails", [False, True])
def test_the_end_of_a_run_waits_for_the_checkpoint_in_the_background(fails, tmp_path, monkeypatch):
    fabric = make_fabric(FabricConfig())
    fabric.launch()
    write = checkpoint._write

    def slow(*given):
        time.sleep(0.3)
        if fails:
            raise CheckpointError("no space")
        write(*given)

    monkeypatch.setattr(checkpoint, "_write", slow)
    with pytest.raises(CheckpointError) if fails else nullcontext():
        train(fabric, tmp_path, 3, async_checkpoints=True)
    assert (tmp_path / "checkpoints/step-3").exists() is not fails


def test_a_whole_run(tmp_path, capsys):
    fabric = make_fabric(FabricConfig())
    fabric.launch()
    assert train(fabric, tmp_path, 3) == 3
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith("events")} == {
        ".lock",
        "config.yaml",
        "metrics.csv",
        "samples",
        "checkpoints",
    }
    text = (tmp_path / "config.yaml").read_text()
    saved = yaml.safe_load(text)
    assert saved["task"]["token_budget"] == SFTConfig().token_budget
    assert saved["data"]["train_file"] == "https://<redacted>@host/<redacted>.jsonl"
    assert SECRET not in text
    assert "&" not in text  # no aliases: our reader refuses them
    assert (tmp_path / "config.yaml").stat().st_mode & 0o777 == 0o600
    errors = capsys.readouterr().err
    assert "starting at step 0" in errors
    assert "step 3/3  loss" in errors


def test_say_shows_no_secret_and_no_control_characters(tmp_path, capsys):
    fabric = make_fabric(FabricConfig())
    fabric.launch()
    with open_run(fabric, make_cfg(), tmp_path) as run:
        run.say(f"token {SECRET}\x1b[31m")
    assert capsys.readouterr().err == "token <redacted>\n"


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_handlers_are_restored(tmp_path, signum):
    fabric = make_fabric(FabricConfig())
    fabric.launch()
    before = [signal.getsignal(s) for s in (*STOP_SIGNALS, signal.SIGUSR1)]
    with open_run(fabric, make_cfg(), tmp_path) as run:
        assert [signal.getsignal(s) for s in (*STOP_SIGNALS, signal.SIGUSR1)] == before
        begin(fabric, run)
        assert run.stop_signal() is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert [run.stop_signal(), run.stop_signal()] == [signal.SIGUSR1, None]
        os.kill(os.getpid(), signum)
        assert [run.stop_signal(), run.stop_signal()] == [signum, signum]
    assert [signal.getsignal(s) for s in (*STOP_SIGNALS, signal.SIGUSR1)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_that_came_too_late_for_a_run_ends_its_sweep(tmp_path):
    fabric = make_fabric(FabricConfig())
    fabric.launch()
    with reliable_sigint(), ignored(signal.SIGHUP):
        with open_run(fabric, make_cfg(), tmp_path) as run:
            begin(fabric, run)
            os.kill(os.getpid(), signal.SIGHUP)
            assert run.stop_signal() is None
            assert noted_stop() == 0
            os.kill(os.getpid(), signal.SIGUSR2)
        assert noted_stop() == signal.SIGUSR2
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher's next one changes nothing


def stop_on_ranks(fabric, run_dir):
    """A terminal's Ctrl-C reaches all ranks; rank 1 gets SIGUSR1 besides."""
    with open_run(fabric, make_cfg(), run_dir) as run:
        begin(fabric, run)
        found = [run.stop_signal()]
        if fabric.global_rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        found += [run.stop_signal(), run.stop_signal()]
        os.kill(os.getpid(), signal.SIGINT)
        found.append(run.stop_signal())
        try:
            run.stop(signal.SIGINT)
        except (Interrupted, SystemExit) as error:
            return found, type(error).__name__


def test_ranks_agree_on_a_signal_and_only_rank_zero_reports_it(tmp_path):
    found = [None, int(signal.SIGUSR1), None, int(signal.SIGINT)]
    assert on_ranks(2, stop_on_ranks, tmp_path) == [(found, "Interrupted"), (found, "SystemExit")]


def test_who_was_started_by_a_process_that_is_gone_ends_too():
    process = multiprocessing.get_context("forkserver").Process(
        target=die_with_parent, args=(os.getpid(),), daemon=True
    )
    process.start()  # by the fork server, not by this process
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"strategy": "fsdp2", "precision": "64-true"}, "does not work here", marks=NEEDS_FSDP2),
        ({"strategy": "nonsense"}, "does not work here"),
        ({"accelerator": "cuda", "devices": "64"}, "does not work here"),
    ],
)
def test_fabrics_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        make_fabric(dataclasses.replace(FabricConfig(), **options))


def test_speed_and_time_left_count_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two steps of 6 s with 600 tokens each, of 5, begun at step 1: 100 tokens/s, and 12 s are left after step 3."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    fabric = make_fabric(FabricConfig())
    with open_run(fabric, make_cfg(), tmp_path) as run:
        run.begin(1)
        now[0] += 77.0  # checks before the first step
        run.begin_progress(1, 5)
        for step in (2, 3):
            now[0] += 6.0
            run.show_progress(step, "loss 0.1", 600)
    line = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("step 3/5"))
    assert "100 tokens/s" in line and "0:12 left" in line


def test_a_second_interrupt_outside_of_the_command_line_raises_and_keeps_the_process() -> None:
    with noted_signals(is_rank_zero=True) as flags:
        signal.raise_signal(signal.SIGINT)
        assert flags.stop_pending() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        time.sleep(0.2)  # a thread watches the signals too
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def test_few_compiled_kernels_are_kept_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed rows come in hundreds of lengths, and oneDNN keeps kernels for each: gigabytes in a long bf16 run."""
    monkeypatch.setenv(CAPACITY, "7")
    make_fabric(FabricConfig())
    assert os.environ[CAPACITY] == "7"
    monkeypatch.delenv(CAPACITY)
    make_fabric(FabricConfig())
    assert 0 < int(os.environ[CAPACITY]) < 1024
