"""Who is missing, asked of listeners in this process, and while ranks are awaited."""

import json
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sheeprlhf.engine.ranks as ranks
from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.engine.ranks import Peer, RollCall, join_ranks, missing_ranks_named
from sheeprlhf.structure.fabric import FabricConfig
from sheeprlhf.utils.errors import ConfigError, MissingRanksError
from tests.unit.engine.toy import NEEDS_FSDP2

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
    told = calls[0].explain(BROKEN, 9)
    assert "1 of 3 ranks missing: rank 1 (process 1) has ended" in told
    calls[0].close()  # who fails later does not blame those that have left since
    assert calls[2].explain(BROKEN, 9) == told


def test_a_rank_that_hangs_is_named(calls: list[RollCall]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        calls[0].peers[2] = Peer("127.0.0.1", silent.getsockname()[1], "process 2")
        assert "1 of 3 ranks missing: rank 2 (process 2) does not answer" in calls[0].explain(BROKEN, 9)


def test_ranks_that_are_all_there_are_too_slow(calls: list[RollCall]) -> None:
    told = calls[0].explain(BROKEN, 9)
    assert "missing" not in told and "fabric.timeout=9" in told


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
    assert all("ranks 1, 3 of 4 did not start" in str(error) for error in found.values())


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
