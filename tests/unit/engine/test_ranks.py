"""Who is missing, asked of listeners in this process, and while ranks are awaited."""

import contextlib
import json
import random
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sheeprlhf.engine.ranks as ranks
from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.engine.ranks import Peer, RollCall, join_ranks, missing_ranks_named
from sheeprlhf.structure.run import FabricConfig
from sheeprlhf.utils.errors import ConfigError, MissingRanksError
from tests.unit.engine.toy import FORK, NEEDS_FSDP2, on_ranks, train_toy, train_toy_on

BROKEN = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RollCall]]:
    """Three ranks that know each other."""
    monkeypatch.setattr(ranks, "_ANSWER_SECONDS", 0.3)
    made = [RollCall(rank, local=True) for rank in range(3)]
    peers = [Peer("127.0.0.1", call.port, f"process {rank}") for rank, call in enumerate(made)]
    for call in made:
        call.begin(peers, "secret")
    yield made
    for call in made:
        call.close()


def test_the_rank_that_has_ended_is_named_and_the_others_hear_of_it(calls: list[RollCall]) -> None:
    calls[1].close()
    printed = calls[0].explain(BROKEN, 9)
    assert "rank 1 (process 1) has ended" in printed
    calls[0].close()  # who fails later does not blame those that have left since
    assert calls[2].explain(BROKEN, 9) == printed


def test_a_rank_that_hangs_is_named(calls: list[RollCall]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        calls[0].peers[2] = Peer("127.0.0.1", silent.getsockname()[1], "process 2")
        assert "rank 2 (process 2) does not answer" in calls[0].explain(BROKEN, 9)


def test_ranks_that_are_all_there_are_too_slow(calls: list[RollCall]) -> None:
    printed = calls[0].explain(BROKEN, 9)
    assert "missing" not in printed and "fabric.timeout=9" in printed


def test_strangers_are_not_heard(calls: list[RollCall]) -> None:
    with socket.create_connection(("127.0.0.1", calls[0].port), timeout=5) as connection:
        connection.sendall(json.dumps({"token": "guess", "verdict": "stop"}).encode() + b"\n")
        assert connection.recv(100) == b""
    assert "stop" not in calls[0].explain(BROKEN, 9)


class Strategy:
    """What `join_ranks` asks of Fabric's strategy."""

    num_nodes = 1

    def __init__(self, rank: int, world_size: int, port: int) -> None:
        self.global_rank, self.world_size = rank, world_size
        self.cluster_environment = SimpleNamespace(main_address=socket.gethostname(), main_port=port)
        self._launcher = None


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def join(world_size: int, coming: list[int]) -> dict[int, Any]:
    """Each rank that comes: its error, or its roll call and store."""
    port, results = free_port(), dict[int, Any]()

    def one(rank: int) -> None:
        try:
            results[rank] = join_ranks(Strategy(rank, world_size, port), 0.5)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in coming]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_ranks_find_each_other() -> None:
    found = join(3, [0, 1, 2])
    for call, _ in found.values():
        assert [peer.host for peer in call.peers] == ["127.0.0.1"] * 3  # where they listen, whatever MASTER_ADDR is
    assert "missing" not in found[2][0].explain(BROKEN, 9)
    for call, _ in found.values():
        call.close()


def test_those_that_do_not_come_are_named_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_JOIN_SECONDS", 1.0)
    found = join(4, [0, 2])
    assert all(isinstance(error, MissingRanksError) for error in found.values())
    assert all("ranks 1, 3 of 4" in str(error) for error in found.values())


@pytest.mark.parametrize("in_step", [True, False])
def test_a_batch_script_without_srun_does_not_wait_long(monkeypatch: pytest.MonkeyPatch, in_step: bool) -> None:
    variables = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    for name, value in (variables | ({"SLURM_STEP_NUM_TASKS": "2"} if in_step else {})).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "_BATCH_SCRIPT_SECONDS", 0.2)
    monkeypatch.setattr(ranks, "seconds_since_start", lambda: 0.0)
    monkeypatch.setattr(ranks, "_JOIN_SECONDS", 1.0)
    error = join(2, [0])[0]
    assert isinstance(error, MissingRanksError if in_step else ConfigError)
    assert ("srun" in str(error)) == (not in_step) and "rank 1 of 2" in str(error)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=NEEDS_FSDP2)])
def test_the_time_limit_reaches_the_strategy(strategy: str) -> None:
    fabric = make_fabric(FabricConfig(devices="2", strategy=strategy, timeout=77))
    assert fabric.strategy._timeout == timedelta(seconds=77)


def test_other_errors_and_lone_processes_pass(calls: list[RollCall]) -> None:
    fabric: Any = SimpleNamespace(strategy=SimpleNamespace(roll_call=calls[0], _timeout=timedelta(seconds=9)))
    with pytest.raises(ZeroDivisionError), missing_ranks_named(fabric):
        raise ZeroDivisionError
    fabric.strategy = SimpleNamespace()
    with pytest.raises(RuntimeError, match="closed by peer"), missing_ranks_named(fabric):
        raise BROKEN


def test_errors_of_collectives_name_the_missing(calls: list[RollCall]) -> None:
    fabric: Any = SimpleNamespace(strategy=SimpleNamespace(roll_call=calls[0], _timeout=timedelta(seconds=9)))
    calls[1].close()
    with pytest.raises(MissingRanksError, match="rank 1"), missing_ranks_named(fabric):
        raise torch.distributed.DistNetworkError("reset")


STEPS = 12


def final_bytes(run_dir, step):
    folder = run_dir / f"checkpoints/step-{step}"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "MANIFEST.json"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    train_toy(run_dir, STEPS, keep=STEPS)
    return run_dir


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_resume_at_every_step(tmp_path, uninterrupted, step):
    for k in range(1, step + 1):
        shutil.copytree(uninterrupted / f"checkpoints/step-{k}", tmp_path / f"checkpoints/step-{k}")
    state = train_toy(tmp_path, STEPS)
    assert state.step == STEPS
    assert final_bytes(tmp_path, STEPS) == final_bytes(uninterrupted, STEPS)


def test_evaluating_saving_and_stopping_consume_no_randomness(tmp_path, uninterrupted):
    train_toy(tmp_path, STEPS, save_every=5, stop_at=5)
    train_toy(tmp_path, STEPS, save_every=5, stop_at=11)  # the step beyond the checkpoint is computed again
    train_toy(tmp_path, STEPS, save_every=STEPS, evaluate_every=1000)
    ours, expected = final_bytes(tmp_path, STEPS), final_bytes(uninterrupted, STEPS)
    del ours["state.json"], expected["state.json"]  # has the best validation result
    assert ours == expected


def stop_at_3(fabric, run_dir, steps):
    train_toy_on(fabric, run_dir, steps, stop_at=3, in_background=True)


@pytest.mark.slow
def test_two_ranks_resume_bit_for_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    on_ranks(2, train_toy_on, whole, 6)
    on_ranks(2, stop_at_3, parts, 6)
    on_ranks(2, train_toy_on, parts, 6)
    assert final_bytes(parts, 6) == final_bytes(whole, 6)


def kill_campaign(run_dir, steps, kills, seed):
    """Kill -9 a training process `kills` times, half of them inside a save; then let it end. Returns aimed hits."""
    generator = random.Random(seed)
    hits = 0
    for number in range(kills):
        options = {"pause": 0.005, "in_background": number % 4 > 1}
        process = FORK.Process(target=train_toy, args=(run_dir, steps), kwargs=options, daemon=True)
        process.start()
        checkpoints = run_dir / "checkpoints"
        if number % 2:
            deadline = time.monotonic() + 20
            while process.is_alive() and time.monotonic() < deadline:
                with contextlib.suppress(OSError):
                    if any(".tmp." in path.name for path in checkpoints.iterdir()):
                        break
            time.sleep(generator.uniform(0, 0.006))
        else:
            time.sleep(generator.uniform(0.05, 0.6))
        process.kill()
        process.join()
        hits += any(path.name.endswith(f".tmp.{process.pid}") for path in run_dir.glob("checkpoints/*"))
    process = FORK.Process(target=train_toy, args=(run_dir, steps), daemon=True)
    process.start()
    process.join(600)  # on a busy machine early kills come before any progress, and all of it is left
    assert process.exitcode == 0
    return hits


@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.nightly)])
def test_killed_at_any_moment_nothing_is_lost(tmp_path, kills):
    steps = kills * 8
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    train_toy(whole, steps, save_every=steps)
    hits = kill_campaign(killed, steps, kills, seed=2026)
    print(f"kills {kills}, inside a save {hits}, lost 0, seed 2026")
    assert hits > 0
    assert final_bytes(killed, steps)["model.safetensors"] == final_bytes(whole, steps)["model.safetensors"]
    assert final_bytes(killed, steps) == final_bytes(whole, steps)
    assert not [path for path in (killed / "checkpoints").iterdir() if ".tmp." in path.name]
