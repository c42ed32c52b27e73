"""Full, small and read-only disks, odd names, and places that a run cannot use: refused before a model loads.

Twenty more sizes, where no file may grow beyond one, are in tests/unit/engine/test_checkpoint.py.
"""

import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.optim import Optimizer

from sheeprlhf.cli import run
from sheeprlhf.engine.checkpoint import TrainState, save_checkpoint
from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.engine.manifest import verify_manifest, write_folder
from sheeprlhf.engine.optim import build_optimizer
from sheeprlhf.structure.run import AdamWConfig, FabricConfig
from sheeprlhf.task.loop import TrainLoop
from sheeprlhf.utils.errors import CheckpointError
from tests.support.jobs import JobServer
from tests.support.machines import fill, read_only, small_disk
from tests.support.models import ModelFolder, byte_tokenizer
from tests.support.runs import exit_code, result_of, train, train_words, write_rows

LIMIT = """
import resource, signal
import sheeprlhf.task.loop as loop
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
update, steps = loop.update, iter(range(1000))
def limited(*words, **options):
    if next(steps) == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))
    return update(*words, **options)
loop.update = limited
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint(server: JobServer, tmp_path: Path, model_folder: ModelFolder) -> None:
    """A file may not grow beyond 60,000 bytes from the sixth step on: the save at the next one fails."""
    data, model = write_rows(tmp_path / "rows.jsonl"), model_folder()
    run_dir = tmp_path / "run"
    words = train_words(model, data, run_dir, "task.max_num_steps=12")
    job = server.start(words, tmp_path / "log", LIMIT.format(size=60_000))
    assert job.wait() == 1, job.text()
    text = job.text()
    assert f"cannot write {run_dir / 'checkpoints' / 'step-8'}" in text
    assert "bytes are needed" in text and "are free" in text and "Traceback" not in text
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-4"]
    verify_manifest(run_dir / "checkpoints" / "step-4")
    assert server.start([*words, "resume=true"], tmp_path / "log").wait() == 0  # there is space again
    whole = train(model, data, tmp_path / "whole", "task.max_num_steps=12")
    assert result_of(run_dir, 12) == result_of(whole, 12)


def test_a_run_whose_first_file_finds_no_room(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before its task begins, and in a command that has no run."""
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        fill(disk)
        for words, name in (
            (words_of(model_folder(), tmp_path, f"hydra.run.dir={disk / 'run'}"), "run/"),
            (["pipeline", "experiment=quickstart", f"root_dir={disk}"], "pipeline.json"),
        ):
            assert exit_code(words) == 1
            message = capsys.readouterr().err
            assert f"cannot write {disk}" in message and name in message and "bytes are free" in message
            assert "unexpectedly" not in message


def test_a_tokenizer_that_finds_no_room(tmp_path: Path) -> None:
    """The library of tokenizers raises no OSError: a folder of `final/` or `export` is named all the same."""
    tokenizer = byte_tokenizer().backend_tokenizer
    with pytest.raises(CheckpointError, match=str(tmp_path / "final")) as raised:
        write_folder(tmp_path / "final", lambda new: tokenizer.save("/dev/full"))
    assert "bytes are needed" not in str(raised.value)  # nobody knows how many
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_records_that_find_no_room_are_named(server: JobServer, tmp_path: Path, model_folder: ModelFolder) -> None:
    """The next save is far away: what is written at each step notices first."""
    run_dir = tmp_path / "run"
    never = ["task.save_interval=24", "task.eval_interval=24"]
    words = train_words(model_folder(), write_rows(tmp_path / "rows.jsonl"), run_dir, *never)
    job = server.start(words, tmp_path / "log", LIMIT.format(size=6000))
    assert job.wait() == 1, job.text()
    text = job.text()
    assert f"cannot write {run_dir}" in text and "bytes are free" in text and f"resume_from={run_dir}" in text
    assert "Traceback" not in text and not (run_dir / "error.log").exists()


def test_an_odd_name_of_a_run_directory(tmp_path: Path, model_folder: ModelFolder) -> None:
    name, data = "it's a=b, h\u00e9llo \u7f8a", write_rows(tmp_path / "rows.jsonl", 12)
    quoted = "'" + name.replace("'", "\\'") + "'"
    words = train_words(model_folder(), data, tmp_path, "task.max_num_steps=1", "task.num_sample_prompts=0")
    words = [word for word in words if not word.startswith("hydra.run.dir")]
    run([*words, f"run_name={quoted}", f"root_dir='{tmp_path}/odd =,root'"])
    found = list((tmp_path / "odd =,root").rglob("run.json"))
    assert [path.parent.name for path in found] == [name]
    assert (found[0].parent / "final" / "model.safetensors").is_file()
    run(["eval", "task=perplexity", f"experiment_dir='{str(found[0].parent).replace(chr(39), chr(92) + chr(39))}'"])


@pytest.mark.parametrize("key", ["root_dir", "hydra.run.dir"])
def test_a_place_that_cannot_be_written_is_refused_before_the_model_loads(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model does not exist either: both are said at once, and nothing is looked for behind them."""
    file = tmp_path / "file"
    file.write_text("not a folder")
    places = [file, file / "below"]
    if os.geteuid() != 0:
        (tmp_path / "read-only").mkdir(mode=0o500)
        places.append(tmp_path / "read-only" / "below")
    for place in places:
        words = train_words(tmp_path / "no model", write_rows(tmp_path / "rows.jsonl", 12), tmp_path)
        words = [word for word in words if not word.startswith("hydra.run.dir")]
        assert exit_code([*words, f"{key}={place}"]) == 2
        message = capsys.readouterr().err
        assert f"{key}={place}" in message and "Traceback" not in message
        assert "no model" in message


SHORT = ["task.max_num_steps=1", "task.num_sample_prompts=0", "task.epochs=1"]


def words_of(model: Path, folder: Path, *place: str) -> list[str]:
    words = train_words(model, write_rows(folder / "rows.jsonl", 12), folder, *SHORT)
    return [*(word for word in words if not word.startswith("hydra.run.dir=")), *place]


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: ModelFolder, tmp_path: Path
) -> Callable[..., str]:
    """A function (words about places) -> the message with which a run is refused before its model loads."""

    def no_model(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(TrainLoop, "load_policy", no_model)

    def message(*place: str) -> str:
        capsys.readouterr()  # what came before
        assert exit_code(words_of(model_folder(), tmp_path, *place)) == 2
        printed = capsys.readouterr().err
        assert "Traceback" not in printed and len(printed.splitlines()) <= 5
        return printed

    return message


@pytest.mark.parametrize("key", ["root_dir", "hydra.run.dir", "data.cache_dir"])
def test_a_read_only_place(key: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    place = tmp_path / "read-only"
    place.mkdir()
    more = [f"hydra.run.dir={tmp_path / 'run'}"] if key == "data.cache_dir" else []
    with read_only(place):
        assert f"{key}={place}" in refused(f"{key}={place}", *more)


def test_a_run_on_a_disk_that_became_read_only(
    tmp_path: Path, refused: Callable[..., str], model_folder: ModelFolder
) -> None:
    place = tmp_path / "run"
    assert exit_code(words_of(model_folder(), tmp_path, f"hydra.run.dir={place}")) != 0
    with read_only(place):
        for words in ([f"hydra.run.dir={place}", "resume=true"], [f"resume_from={place}"]):
            assert f"{place}" in refused(*words)


def test_a_working_directory_that_is_gone(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "working directory" in refused(f"hydra.run.dir={tmp_path / 'run'}")


STEP = 64 << 10
TOO_SMALL = (-20, -15, -10, -5, -2, -1)  # steps below what two checkpoints need
ENOUGH = (1, 3)


@cache
def trained() -> tuple[Fabric, nn.Module, Optimizer]:
    """One step of a model whose checkpoint has about 1.6 MB."""
    fabric = make_fabric(FabricConfig())
    fabric.launch()
    net = nn.Linear(370, 370)
    module, optimizer = fabric.setup(net, build_optimizer(AdamWConfig(), (net.parameters(), 1e-3)))
    fabric.backward(module(torch.ones(1, 370)).square().sum())
    optimizer.step()
    return fabric, module, optimizer


def save(run_dir: Path, step: int) -> Path:
    fabric, module, optimizer = trained()
    state = TrainState(step=step)
    return save_checkpoint(fabric, run_dir, state, module, optimizer, config_hash="h", keep=9)


def pages(folder: Path) -> int:
    """Bytes that a folder's files take on a file system of pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.iterdir())


@pytest.mark.parametrize("steps", [*TOO_SMALL, *ENOUGH])
def test_a_disk_that_is_too_small_or_just_enough(steps: int, tmp_path: Path) -> None:
    (tmp_path / "measured").mkdir()
    needed = pages(save(tmp_path / "measured", 1))
    assert needed > -min(TOO_SMALL) * STEP  # the first one always fits
    with small_disk(tmp_path / "disk", 2 * needed + steps * STEP) as run_dir:
        first = save(run_dir, 1)
        if steps > 0:
            verify_manifest(save(run_dir, 2))
        else:
            expected = r"cannot write .*disk/checkpoints/step-2: .*: about [\d,]+ bytes are needed, [\d,]+ are free"
            with pytest.raises(CheckpointError, match=expected.replace(": about", "; about")) as raised:
                save(run_dir, 2)
            assert raised.value.exit_code == 1
            assert [path.name for path in first.parent.iterdir()] == ["step-1"]
        verify_manifest(first)


def test_a_checkpoint_needs_no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a temporary file")

    for name in ("mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory"):
        monkeypatch.setattr(tempfile, name, refuse)
    with small_disk(tmp_path / "full", 64 << 10) as full:
        fill(full)
        monkeypatch.setenv("TMPDIR", str(full))
        (tmp_path / "run").mkdir()
        assert "model.safetensors" in verify_manifest(save(tmp_path / "run", 1))["files"]
