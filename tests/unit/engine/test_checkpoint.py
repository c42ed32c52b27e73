"""Checkpoints: what is saved, what is kept, and every kind of damage is noticed before anything is loaded."""

import dataclasses
import json
import os
import random
import resource
import shutil
import threading
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sheeprlhf.engine import checkpoint
from sheeprlhf.engine.checkpoint import (
    BackgroundSaver,
    TrainState,
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    read_state,
    restore_latest,
    save_checkpoint,
)
from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.engine.manifest import MANIFEST, read_manifest, verify_manifest, write_folder, write_manifest
from sheeprlhf.engine.optim import build_optimizer
from sheeprlhf.engine.step import update
from sheeprlhf.structure.run import AdamWConfig, FabricConfig
from sheeprlhf.utils.errors import CheckpointError, UnsafePathError
from sheeprlhf.utils.output import MARKER, sweep_scratch
from tests.unit.engine.toy import Net, micro_batch, toy_loss


def set_up(net=None, **optimizer_options):
    fabric = make_fabric(FabricConfig())
    fabric.launch()
    net = net or Net(dropout=0.2)
    module, optimizer = fabric.setup(net, build_optimizer(AdamWConfig(**optimizer_options), (net.parameters(), 1e-2)))
    update(fabric, module, optimizer, [micro_batch(0, 1)], toy_loss, max_grad_norm=1.0)
    return fabric, module, optimizer


def save(run_dir, step, setup=None, *, best_step=None, keep=9, config_hash="h", say=pytest.fail):
    fabric, module, optimizer = setup or set_up()
    state = TrainState(step=step, best_step=best_step)
    return save_checkpoint(fabric, run_dir, state, module, optimizer, config_hash=config_hash, keep=keep, say=say)


def steps(run_dir):
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").iterdir())


def test_what_is_saved(tmp_path):
    folder = save(tmp_path, 7)
    names = {"model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", MANIFEST}
    assert {path.name for path in folder.iterdir()} == names
    trainable = {"first.weight", "first.bias", "second.weight", "second.bias"}  # no frozen one, the tied one once
    assert set(load_file(folder / "model.safetensors")) == trainable | {"scale"}
    expected = {f"{key}/{name}" for name in trainable for key in ("exp_avg", "exp_avg_sq", "step")}
    assert set(load_file(folder / "optimizer.safetensors")) == expected
    manifest = verify_manifest(folder)
    assert (manifest["step"], manifest["world_size"], manifest["config_hash"]) == (7, 1, "h")
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_save_in_the_background_has_the_state_of_its_start(tmp_path, monkeypatch):
    fabric, module, optimizer = set_up()
    (tmp_path / "ours").mkdir(), (tmp_path / "expected").mkdir()
    background, writes = BackgroundSaver(fabric), threading.Event()
    options = {"config_hash": "h", "keep": 9}
    for step in (1, 2):  # the second uses the memory of the first again
        monkeypatch.setattr(checkpoint, "_is_saved", lambda *_: False)
        save_checkpoint(fabric, tmp_path / "expected", TrainState(step), module, optimizer, **options)
        monkeypatch.setattr(checkpoint, "_is_saved", lambda *_: not writes.wait(60))
        state = TrainState(step)
        folder = save_checkpoint(fabric, tmp_path / "ours", state, module, optimizer, **options, background=background)
        rng = torch.get_rng_state()
        update(fabric, module, optimizer, [micro_batch(step, 7)], toy_loss, max_grad_norm=1.0)
        state.step, state.extra["later"] = 99, 1
        assert not folder.exists()
        writes.set()
        background.wait()
        writes.clear()
        for path in (tmp_path / "expected/checkpoints" / folder.name).iterdir():
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
        torch.set_rng_state(rng)


def test_the_next_save_reports_the_error_of_the_one_in_the_background(tmp_path):
    fabric, module, optimizer = set_up()
    background = BackgroundSaver(fabric)
    options = {"config_hash": "h", "keep": 9, "background": background}
    (tmp_path / "checkpoints").write_text("in the way")
    save_checkpoint(fabric, tmp_path, TrainState(1), module, optimizer, **options)
    with pytest.raises(CheckpointError, match="checkpoints"):
        save_checkpoint(fabric, tmp_path, TrainState(2), module, optimizer, **options)
    (tmp_path / "checkpoints").unlink()
    save_checkpoint(fabric, tmp_path, TrainState(3), module, optimizer, **options)
    background.wait()
    assert steps(tmp_path) == [3]


MOMENTS = {"reward_count": 4, "reward_mean": -0.5, "reward_m2": 0.0}


def write_state(folder, content):
    """Make a state.json part of an intact checkpoint."""
    (folder / "state.json").write_text(content if isinstance(content, str) else json.dumps(content))
    manifest = read_manifest(folder)
    del manifest["files"], manifest["format"]
    (folder / MANIFEST).unlink()
    write_manifest(folder, manifest)


def test_state_round_trip_is_exact(tmp_path):
    state = TrainState(3, 10**12, 0.1 + 0.2, 2, {"kl_coeff": 0.2, **MOMENTS}, 4)
    folder = save(tmp_path, 3)
    write_state(folder, state.to_json())
    assert read_state(folder) == state
    content = json.loads(state.to_json())
    del content["skipped_steps"]  # of an earlier version
    write_state(folder, content)
    assert read_state(folder) == dataclasses.replace(state, skipped_steps=0)


def odd_states():
    """Each field of a state.json in ways that it cannot be, and its name."""
    usual = json.loads(TrainState(3, 9, 0.5, 2, {"kl_coeff": 0.2, **MOMENTS}).to_json())
    wrong = {
        "step": (2, 4, -3, 3.0, True, "3", None, 10**30),
        "items_seen": (-1, 1.5, None, 10**30),
        "best_metric": ("low", [1], True, float("nan"), float("inf")),
        "best_step": (4, -1, 2.0, "2", None),
        "skipped_steps": (-1, None, "0"),
        "extra": (None, [], 1, "x"),
    }
    for field, values in wrong.items():
        yield from ((f"field {field}" if value not in (2, 4) else "", usual | {field: value}) for value in values)
        if field != "skipped_steps":
            yield f"field {field} ", {key: usual[key] for key in usual if key != field}
    for name, value in (
        ("kl_coeff", "x"),
        ("kl_coeff", -1),
        ("reward_count", 0.5),
        ("reward_m2", -1.0),
        ("kl_coeff", []),
    ):
        yield f"extra.{name} ", usual | {"extra": usual["extra"] | {name: value}}
    yield "extra.reward_m2 ", usual | {"extra": {"reward_count": 1, "reward_mean": 0.0}}
    yield "field other ", usual | {"other": 1}
    text = json.dumps(usual)
    yield from (("state.json", odd) for odd in (text[:-2], "", "[]", "3", "[" * 10_000, text.replace("0.5", "1e400")))
    yield "field step ", text[:-1] + ', "step": 3}'


def test_a_state_that_cannot_be_right_falls_back_to_the_checkpoint_before(tmp_path):
    before, folder = save(tmp_path, 1), save(tmp_path, 3)
    for field, odd in odd_states():
        write_state(folder, odd)
        messages = []
        assert latest_checkpoint(tmp_path, messages.append) == before, odd
        [line] = messages
        assert field in line and str(folder) in line, (field, line)


def test_everything_is_restored(tmp_path):
    setup = set_up()
    folder = save(tmp_path, 1, setup)
    expected_random = torch.rand(4), random.random()
    fabric, module, optimizer = set_up()
    state = load_checkpoint(fabric, folder, module, optimizer, config_hash="h", say=print)
    assert (torch.rand(4).tolist(), random.random()) == (expected_random[0].tolist(), expected_random[1])
    assert state == TrainState(step=1)
    for a, b in zip(setup[1].parameters(), module.parameters(), strict=True):
        if a.requires_grad:
            assert torch.equal(a, b)
            for key, value in setup[2].state[a].items():
                assert torch.equal(value, optimizer.state[b][key])


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_weights_and_moments_that_are_not_finite_are_not_saved(tmp_path, bad):
    """The last optimizer step of a run may be the one that overflows, and no loss follows it."""
    for pick in (
        lambda module, optimizer: module.second.bias,
        lambda module, optimizer: optimizer.state[module.first.bias]["exp_avg_sq"],
    ):
        setup = set_up()
        module = setup[1].module
        before = save(tmp_path, 1, setup)
        with torch.no_grad():
            pick(module, setup[2])[0] = bad
        with pytest.raises(CheckpointError, match=r"(second|exp_avg_sq/first)\.bias .*step-2 "):
            save(tmp_path, 2, setup)
        assert steps(tmp_path) == [1] and list((tmp_path / "checkpoints").iterdir()) == [before]
    module.scale.fill_(bad)  # a buffer may be infinite: masks are
    with torch.no_grad():
        optimizer_state = pick(module, setup[2])
        optimizer_state[0] = 0.0
    save(tmp_path, 3, setup)
    assert steps(tmp_path) == [1, 3]


def test_newest_and_best_are_kept(tmp_path):
    setup = set_up()
    for step in range(1, 8):
        save(tmp_path, step, setup, best_step=2 if step >= 2 else None, keep=2)
    assert steps(tmp_path) == [2, 6, 7]
    assert find_checkpoint(tmp_path, "last", print).name == "step-7"
    assert find_checkpoint(tmp_path, "best", print).name == "step-2"
    assert find_checkpoint(tmp_path, "step-6", print).name == "step-6"
    for name in ("step-3", "final", "../x"):
        with pytest.raises(CheckpointError, match="there: step-7, step-6, step-2"):
            find_checkpoint(tmp_path, name, print)


def test_the_newest_is_never_pruned_for_a_damaged_later_one(tmp_path):
    setup = set_up()
    for step in (5, 6, 7):
        save(tmp_path, step, setup)
    (tmp_path / "checkpoints/step-6/state.json").write_text("x")
    (tmp_path / "checkpoints/step-7/state.json").unlink()
    assert latest_checkpoint(tmp_path, print).name == "step-5"
    save(tmp_path, 6, setup, keep=1)  # reached again after falling back to 5
    assert steps(tmp_path) == [6]
    verify_manifest(tmp_path / "checkpoints/step-6")


DAMAGES = {  # files that are cut, flipped or removed: tests/faults/test_damage.py
    "a link": lambda path: path.rename(path.with_name("x")) and path.symlink_to(path.with_name("x")),
    "a pipe": lambda path: path.unlink() or os.mkfifo(path),
    "a folder": lambda path: path.unlink() or path.mkdir(),
    "another's": lambda path: shutil.copy(path.parent.parent / "step-1" / path.name, path),
}


def verified(folder):
    verify_manifest(folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", MANIFEST]
)
def test_damage_is_noticed_and_the_one_before_is_taken(tmp_path, name, damage):
    for step in (1, 2, 3):
        save(tmp_path, step)
    folder = tmp_path / "checkpoints/step-3"
    DAMAGES[damage](folder / name)
    said: list[str] = []
    if name == MANIFEST and damage == "another's":  # whole, but its files are not these
        assert verify_manifest(tmp_path / "checkpoints/step-1")
    assert latest_checkpoint(tmp_path, said.append).name == "step-2"
    assert len(said) == 1
    assert name in said[0] or damage in ("a link", "another's")
    fabric, module, optimizer = set_up()
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(CheckpointError, match="step-3"):
        load_checkpoint(fabric, verified(folder), module, optimizer, config_hash="h", say=print)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_an_extra_file_or_a_renamed_folder_is_refused(tmp_path):
    folder = save(tmp_path, 3)
    (folder / "extra").touch()
    with pytest.raises(CheckpointError, match="extra"):
        verify_manifest(folder)
    (folder / "extra").unlink()
    renamed = folder.rename(folder.with_name("step-4"))
    fabric, module, optimizer = set_up()
    with pytest.raises(CheckpointError, match="holds step 3"):
        load_checkpoint(fabric, renamed, module, optimizer, config_hash="h", say=print)


def test_a_stranger_s_manifest_cannot_exhaust_us(tmp_path):
    folder = save(tmp_path, 3)
    for content in ("[" * 200_000, "null", "{}", '{"sha256": 1}', " " * (2 << 20)):
        (folder / MANIFEST).write_text(content)
        with pytest.raises(CheckpointError):
            verify_manifest(folder)


def edit_manifest(folder, **facts):
    from sheeprlhf.engine import manifest

    content = json.loads((folder / MANIFEST).read_text()) | facts
    content.pop("sha256")
    content["sha256"] = manifest._sha256_of_json(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def test_mismatches_are_refused_or_announced(tmp_path):
    fabric, module, optimizer = setup = set_up()
    folder = save(tmp_path, 3, setup)
    with pytest.raises(CheckpointError, match="another configuration"):
        load_checkpoint(fabric, folder, module, optimizer, config_hash="other", say=print)
    edit_manifest(folder, world_size=2, torch_threads=99)
    said: list[str] = []
    load_checkpoint(fabric, folder, module, optimizer, config_hash="h", say=said.append)
    assert [line.split(":")[0] for line in said] == [
        "world_size was 2 and is 1 now",
        f"torch_threads was 99 and is {torch.get_num_threads()} now",
    ]
    edit_manifest(folder, format=2)
    with pytest.raises(CheckpointError, match="format 2"):
        load_checkpoint(fabric, folder, module, optimizer, config_hash="h", say=print)


class Wider(Net):
    def __init__(self):
        super().__init__()
        self.second = nn.Linear(6, 2)


class Renamed(Net):
    def __init__(self):
        super().__init__()
        self.last = self.second
        del self.second
        self.__dict__["second"] = self.last


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Wider, r"second.weight is float32 \(1, 6\), this model has float32 \(2, 6\)"),
        (Renamed, "tensor last.bias is missing"),
        (lambda: Net().double(), "this model has float64"),
        (lambda: Net().requires_grad_(True), "tensor frozen.bias is missing"),
    ],
)
def test_another_model_is_refused_whole(tmp_path, other, message):
    folder = save(tmp_path, 3)
    fabric = make_fabric(FabricConfig())
    fabric.launch()
    net = other()
    module, optimizer = fabric.setup(net, build_optimizer(AdamWConfig(), (net.parameters(), 1e-2)))
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(fabric, folder, module, optimizer, config_hash="h", say=print)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_leftovers_of_dead_processes_are_swept_and_nothing_else(tmp_path):
    save(tmp_path, 1)
    checkpoints = tmp_path / "checkpoints"
    dead, alive, own = (f"step-9.0badcafe.tmp.{pid}" for pid in (4194999, os.getppid(), os.getpid()))
    for name in (dead, alive, own):
        (checkpoints / name / "new").mkdir(parents=True)
        (checkpoints / name / MARKER).touch()
    mine = ("my.tmp.d", "step-9.tmp.4194999", "x.0badcafe.tmp.4194999", "x.tmp.4194999", "step-0")
    for name in mine:  # of the user: no marker
        (checkpoints / name).mkdir()
        (checkpoints / name / "notes").touch()
    (tmp_path / "final.0badcafe.tmp.4194999").mkdir()  # killed before it had its marker
    (tmp_path / "empty.tmp.4194999").mkdir()  # of the user
    (tmp_path / "notes.0badcafe.tmp.4194999").touch()  # a file is not of ours
    (tmp_path / "link.0badcafe.tmp.4194999").symlink_to(checkpoints / alive)
    assert restore_latest(*set_up()[:1], tmp_path, *set_up()[1:], config_hash="h", say=print).step == 1
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoints", "empty.tmp.4194999", *(f"{n}.0badcafe.tmp.4194999" for n in ("notes", "link"))}
    said: list[str] = []
    save(tmp_path, 2, keep=1, say=said.append)
    assert {path.name for path in checkpoints.iterdir()} == {"step-2", alive, *mine}
    assert len(said) == 1 and "step-0" in said[0]
    sweep_scratch(tmp_path / "absent")


def test_a_folder_in_the_way_that_is_not_ours_is_kept(tmp_path):
    (tmp_path / "checkpoints" / "step-3").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-3" / "model.safetensors").write_text("of the user")
    said: list[str] = []
    save(tmp_path, 3, say=said.append)
    assert "step-3.kept-1" in said[0]
    verify_manifest(tmp_path / "checkpoints" / "step-3")
    assert (tmp_path / "checkpoints" / "step-3.kept-1" / "model.safetensors").read_text() == "of the user"
    (tmp_path / "checkpoints" / "step-3" / "notes").write_text("of the user")  # beside our own files
    save(tmp_path, 4, keep=1, say=said.append)
    assert (tmp_path / "checkpoints" / "step-3" / "notes").exists()


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/step-2", "checkpoints/step-1"])
def test_nothing_is_deleted_or_written_through_a_link(tmp_path, place):
    save(tmp_path / "run", 1) if (tmp_path / "run").mkdir() is None else None
    path, elsewhere = tmp_path / "run" / place, tmp_path / "elsewhere"
    if path.exists():
        path.rename(elsewhere)
    else:
        save(tmp_path / "other", 2) if (tmp_path / "other").mkdir() is None else None
        (tmp_path / "other/checkpoints/step-2").rename(elsewhere)
    (elsewhere / "x.0badcafe.tmp.4194999").mkdir()
    path.symlink_to(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    with suppress(CheckpointError):
        save(tmp_path / "run", 2, keep=1, say=lambda _: None)
    with suppress(UnsafePathError):
        restore_latest(*set_up()[:1], tmp_path / "run", *set_up()[1:], config_hash="h", say=print)
    assert path.is_symlink() and sorted(elsewhere.rglob("*")) == before


SIZES = (0, 1, 50, 200, 700, 2000, 5000, 12_000)


@pytest.mark.parametrize("limit", SIZES)
def test_full_disk_leaves_the_earlier_ones_and_says_what_is_missing(tmp_path, limit):
    setup = set_up()
    save(tmp_path, 1, setup)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*step-2.* bytes are needed, .* are free"):
            save(tmp_path, 2, setup, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert steps(tmp_path) == [1]
    verify_manifest(tmp_path / "checkpoints/step-1")


def test_write_folder_replaces_whole_folders(tmp_path):
    target = tmp_path / "final"
    target.mkdir()
    umask = os.umask(0)
    write_folder(target, lambda folder: write_manifest(folder, {"a": 1}))
    write_folder(target, lambda folder: (folder / "b").write_text("2"))
    os.umask(umask)
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [oct(path.stat().st_mode & 0o777) for path in (target, target / "b")] == ["0o700", "0o600"]
    with pytest.raises(CheckpointError, match="move it"):  # nothing says that it is ours
        write_folder(target, lambda folder: (folder / "c").write_text("3"))
    assert [path.name for path in target.iterdir()] == ["b"]

    def fails(folder):
        (folder / "c").touch()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_folder(target, fails)
    assert [path.name for path in tmp_path.rglob("*")] == ["final", "b"]
