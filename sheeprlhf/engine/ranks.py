"""Roll call of a run's processes: they meet before the first collective, and name missing ranks when one fails.

A failed collective says that a connection broke or that time is up, not which rank is gone. So each rank has a thread
that answers the others, whatever its main thread waits for. The addresses are exchanged through torch's store.
"""

import hmac
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed import DistError, PrefixStore, Store, TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from sheeprlhf.engine.optim import by_mesh
from sheeprlhf.utils.errors import ConfigError, MissingRanksError, first_of
from sheeprlhf.utils.launchers import launched
from sheeprlhf.utils.lightning import ChildProcessObserver, DDPStrategy, Fabric, ModelParallelStrategy
from sheeprlhf.utils.processes import ignored, seconds_since_start

ALL_RANKS = "all_ranks"  # the mesh of all processes of a copy of the weights, with tensor-parallel groups
_JOIN_SECONDS = 20.0  # for ranks that a launcher starts, at least: they import at different speeds
_START_SECONDS = 120.0  # for ranks that this process starts, at least
_BATCH_SCRIPT_SECONDS = 15.0  # after its start, a SLURM task without a step gives up waiting for others
_NOTICE_SECONDS = 10.0
_ANSWER_SECONDS = 5.0
_LEAVE_SECONDS = 15.0  # for the main thread to end by itself, before its process is ended
_MAX_LINE = 1 << 16
_SHOWN = 8


class Peer(NamedTuple):
    """Address and description of one rank, as the others see it."""

    host: str
    port: int
    name: str


class RollCall:
    """One rank's answers to the others, and its questions; `peers` has every rank, in order, after `begin`."""

    def __init__(self, rank: int, *, local: bool) -> None:
        """Listen at a free port; with `local`, only to processes of this machine."""
        everywhere = not local and socket.has_dualstack_ipv6()
        self._server = socket.create_server(
            ("127.0.0.1" if local else "", 0),
            family=socket.AF_INET6 if everywhere else socket.AF_INET,
            dualstack_ipv6=everywhere,
            backlog=1024,
        )
        self.port = self._server.getsockname()[1]
        self.peers: list[Peer] = []
        self._rank, self._token, self._verdict = rank, "", ""
        self._lock, self._is_closed = threading.Lock(), False
        self._last_call: threading.Timer | None = None

    def begin(self, peers: list[Peer], token: str) -> None:
        """Start answering every process that knows the run's token."""
        self.peers, self._token = peers, token
        threading.Thread(target=self._serve, name="roll-call", daemon=True).start()

    def close(self) -> None:
        """Stop answering."""
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        with self._lock:  # a question may be in the middle of its answer
            self._is_closed = True
            if self._last_call is not None:
                self._last_call.cancel()

    def explain(self, error: BaseException, timeout: float) -> str:
        """Describe a failed collective: the missing ranks, found now or reported by the first rank that noticed."""
        if not self._verdict:
            others = [rank for rank in range(len(self.peers)) if rank != self._rank]
            with ThreadPoolExecutor(min(len(others), 256)) as pool:
                states = dict(zip(others, pool.map(self._ask, others), strict=True))
                if not self._verdict:
                    self._verdict = self._describe({r: s for r, s in states.items() if s}, error, timeout)
                list(pool.map(self._ask, [rank for rank, state in states.items() if not state]))
        return self._verdict

    def _describe(self, missing: dict[int, str], error: BaseException, timeout: float) -> str:
        if not missing:
            return (
                f"all {len(self.peers)} ranks are running, but one did not take part in a collective within "
                f"fabric.timeout={timeout:g} s ({str(error).splitlines()[0][:200]}): give a longer fabric.timeout"
            )
        lines = [f"rank {rank} ({self.peers[rank].name}) {state}" for rank, state in missing.items()]
        advice = "see its own output, check its machine and the network, then give the same command with resume=true"
        return f"{len(missing)} of {len(self.peers)} ranks missing: {first_of(lines, _SHOWN, '; ')}: {advice}"

    def _ask(self, rank: int) -> str:
        """Tell a rank the verdict, if there is one; the result is empty if it answers, else what is wrong."""
        peer = self.peers[rank]
        try:
            with socket.create_connection((peer.host, peer.port), timeout=_ANSWER_SECONDS) as connection:
                message = {"token": self._token, "verdict": self._verdict}
                connection.sendall(json.dumps(message).encode() + b"\n")
                if connection.makefile("rb").readline(_MAX_LINE).strip() != f"rank {rank}".encode():
                    return "has ended"
        except (ConnectionRefusedError, ConnectionResetError, BrokenPipeError):
            return "has ended"
        except OSError:
            return f"does not answer at {peer.host}"
        return ""

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:  # closed
                return
            with connection, suppress(OSError, ValueError, AttributeError):
                connection.settimeout(_ANSWER_SECONDS)
                message = json.loads(connection.makefile("rb").readline(_MAX_LINE))
                if not hmac.compare_digest(str(message.get("token")).encode(), self._token.encode()):
                    continue
                with self._lock:
                    if message.get("verdict") and not self._verdict and not self._is_closed:
                        self._verdict = str(message["verdict"])
                        self._last_call = _end_after(_LEAVE_SECONDS, self._verdict)
                connection.sendall(f"rank {self._rank}\n".encode())


def _end_after(seconds: float, text: str) -> threading.Timer:
    """End this process with exit code 1, even if its main thread is blocked, unless the timer is cancelled."""

    def end() -> None:
        os.write(2, f"sheeprlhf cannot continue:\n  - {text}\n".encode(errors="replace"))
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


@contextmanager
def _connected(strategy: Any) -> Iterator[None]:
    """All ranks, around the set-up of a strategy: find all ranks, then make the process group, if there is none yet."""
    strategy._set_world_ranks()
    if torch.distributed.is_initialized():  # by an earlier Fabric of this process
        yield
        return
    seconds = strategy._timeout.total_seconds()
    watchdog = _end_after(
        max(seconds, _START_SECONDS) + 2 * max(seconds, _JOIN_SECONDS) + _LEAVE_SECONDS,
        "the ranks could not be connected: the network broke while they were",
    )
    try:
        strategy.roll_call, strategy.store = join_ranks(strategy, seconds)
        torch.distributed.init_process_group(
            strategy._get_process_group_backend(),
            store=strategy.store,
            rank=strategy.global_rank,
            world_size=strategy.world_size,
            timeout=strategy._timeout,
            device_id=None if strategy.root_device.type == "cpu" else strategy.root_device,
        )
        yield
    finally:
        watchdog.cancel()


class JoiningDDP(DDPStrategy):
    """DDP whose ranks know each other: `roll_call` is set when they have been found."""

    roll_call: RollCall | None = None
    store: Store | None = None

    def _setup_distributed(self) -> None:
        """All ranks: called by Fabric in `launch`."""
        with _connected(self):
            super()._setup_distributed()


class JoiningModelParallel(ModelParallelStrategy):
    """FSDP2 whose ranks know each other; with several `replicas`, weights are cut up within each of these groups."""

    roll_call: RollCall | None = None
    store: Store | None = None
    replicas = tensor_parallel = 1

    def _setup_distributed(self) -> None:
        """All ranks: called by Fabric in `launch`."""
        with _connected(self):
            super()._setup_distributed()

    def setup_environment(self) -> None:
        """All ranks: called by Fabric in `launch`; torch gives the mesh's groups a time limit of their own."""
        super().setup_environment()
        if self.replicas > 1:
            self._device_mesh = make_mesh(self.root_device.type, self.world_size, self.replicas, self.tensor_parallel)
        set_timeout = torch.distributed.distributed_c10d._set_pg_timeout
        meshes = meshes_of(self.device_mesh)
        for group in [group for mesh in (self.device_mesh, *meshes) for group in mesh.get_all_groups()]:
            set_timeout(cast(timedelta, self._timeout), group)

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float | int,
        norm_type: float | int = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """All ranks: called by Fabric; with tensor parallelism, gradients are on several meshes."""
        if self.tensor_parallel == 1:
            return super().clip_gradients_norm(module, optimizer, max_norm, norm_type, error_if_nonfinite)
        self.precision.unscale_gradients(optimizer)
        lists = by_mesh(p for p in self.precision.main_params(optimizer) if p.grad is not None)
        norms = [get_total_norm([cast(Tensor, p.grad) for p in some], norm_type) for some in lists]
        norm = get_total_norm([one.full_tensor() if isinstance(one, DTensor) else one for one in norms], norm_type)
        for some in lists:
            clip_grads_with_norm_(some, max_norm, norm)
        return norm


def make_mesh(device_type: str, world_size: int, replicas: int, tensor_parallel: int) -> DeviceMesh:
    """All ranks: the mesh of copies of the weights, if several; of processes that compute other rows; of groups."""
    sizes = {"data_parallel": world_size // replicas // tensor_parallel, "tensor_parallel": tensor_parallel}
    if replicas > 1:
        sizes = {"replicate": replicas, "shard": sizes["data_parallel"], "tensor_parallel": tensor_parallel}
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


class Meshes(NamedTuple):
    """Meshes of the strategy, which for FSDP2 have a second dimension if there are copies of the weights.

    Attributes:
        blocks: of processes that hold parts of the same share of the blocks.
        around: of processes that hold parts of the weights around the blocks.
        rows: of processes that compute other rows, flat.
    """

    blocks: DeviceMesh
    around: DeviceMesh
    rows: DeviceMesh


def meshes_of(mesh: DeviceMesh) -> Meshes:
    """All ranks: the parts of a mesh of `make_mesh`; torch keeps what this makes, for the next call."""
    copies = "replicate" in (mesh.mesh_dim_names or ())
    blocks = mesh["replicate", "shard"] if copies else mesh["data_parallel"]
    rows = blocks._flatten("data_parallel") if copies else blocks
    if mesh["tensor_parallel"].size() == 1:
        return Meshes(blocks, blocks, rows)
    if not copies:
        return Meshes(blocks, mesh._flatten(ALL_RANKS), rows)
    of_copy = mesh["shard", "tensor_parallel"]._flatten(ALL_RANKS)
    return Meshes(blocks, DeviceMesh._concatenate([mesh["replicate"], of_copy]), rows)


@contextmanager
def missing_ranks_named(fabric: Fabric) -> Iterator[None]:
    """All ranks, around all collectives: turn a failed one into a MissingRanksError that names the ranks."""
    strategy: Any = fabric.strategy
    try:
        yield
    except Exception as error:
        roll_call = getattr(strategy, "roll_call", None)
        if roll_call is None or not _is_of_collective(error):
            raise
        with ignored(signal.SIGTERM):  # launchers send it as soon as one rank has ended
            problem = roll_call.explain(error, strategy._timeout.total_seconds())
        raise MissingRanksError(problem) from error
    finally:
        if getattr(strategy, "roll_call", None) is not None:
            strategy.roll_call.close()


def _is_of_collective(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error)):
            return True
        error = error.__cause__
    return False


def join_ranks(strategy: Any, timeout: float) -> tuple[RollCall, Store]:
    """All ranks: wait until each is there, exchange addresses. Raises MissingRanksError and ConfigError."""
    environment, rank, world_size = strategy.cluster_environment, strategy.global_rank, strategy.world_size
    host, port = environment.main_address, environment.main_port
    children: list[subprocess.Popen[bytes]] = getattr(strategy._launcher, "procs", [])
    if children:
        setattr(ChildProcessObserver, "_terminate_all", _end_with_children)  # noqa: B010
    limit = max(timeout, _JOIN_SECONDS)
    store = _open_store(host, port, rank, limit)
    local = strategy.num_nodes == 1
    roll_call = RollCall(rank, local=local)
    address = "127.0.0.1" if local else _own_address(host, port)
    name = f"process {os.getpid()} on {socket.gethostname()}"
    store.set(f"rank/{rank}", json.dumps(Peer(address, roll_call.port, name)))
    if rank == 0:
        everyone: dict[str, Any] = {"missing": _wait_for_ranks(store, strategy, children, limit)}
        if not everyone["missing"]:
            peers = [json.loads(store.get(f"rank/{other}")) for other in range(world_size)]
            everyone |= {"peers": peers, "token": secrets.token_hex(16)}
        store.set("everyone", json.dumps(everyone))
        if everyone["missing"]:
            time.sleep(1)  # the store ends with this process: the others read it first
    else:
        everyone = _everyone(store, limit)
    if everyone["missing"]:
        _raise_missing(everyone["missing"], strategy, timeout)
    roll_call.begin([Peer(*peer) for peer in everyone["peers"]], everyone["token"])
    return roll_call, store


def _open_store(host: str, port: int, rank: int, limit: float) -> Store:
    """All ranks: the store that rank zero, or torchrun's agent, serves at `host` and `port`."""
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank == 0 and not of_agent:
        try:
            store = TCPStore(
                "127.0.0.1", port, is_master=True, wait_for_workers=False, multi_tenant=True,
                timeout=timedelta(seconds=limit),
            )  # fmt: skip
        except DistError as error:
            raise ConfigError(f"port {port} of {host} cannot be used ({error}): set MASTER_PORT to another") from None
    else:
        deadline = time.monotonic() + limit
        while True:
            try:
                socket.create_connection((host, port), timeout=2).close()
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise MissingRanksError(
                        f"rank 0 is missing: no process listens at {host}, port {port}, after {limit:g} s ({error}): "
                        "start it, or check MASTER_ADDR, MASTER_PORT and the network"
                    ) from None
                time.sleep(0.1)
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=limit))
    # The agent's store is the same after a restart, and still has addresses of processes that have ended.
    return PrefixStore(f"sheeprlhf/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0) if of_agent else 0}", store)


def _own_address(host: str, port: int) -> str:
    """The address at which other machines reach this one: the one from which it reaches rank zero's."""
    own = host
    with suppress(OSError):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing
            found = probe.getsockname()[0]
        if found != "::1" and not found.startswith("127."):  # else this is rank zero's machine
            own = found
    return own


def _wait_for_ranks(store: Store, strategy: Any, children: list[subprocess.Popen[bytes]], limit: float) -> list[int]:
    """Rank zero only: the ranks that have not come in time."""
    ranks = range(strategy.world_size)
    slurm = _batch_script_seconds() if not children else None
    began = time.monotonic()
    deadline = began + (max(limit, _START_SECONDS) if children else limit if slurm is None else min(slurm, limit))
    notice = began + _NOTICE_SECONDS
    while not store.check([f"rank/{rank}" for rank in ranks]):
        now = time.monotonic()
        missing = [rank for rank in ranks if not store.check([f"rank/{rank}"])]
        if children and min(missing, default=0) >= len(children) + 1:  # those that this process started have come
            deadline, children = now + limit, []
        if now > deadline or any(child.poll() is not None for child in children):
            return missing
        if now > notice:
            notice = deadline + 1
            print(f"waiting for {_listed(missing)} of {strategy.world_size}", file=sys.stderr, flush=True)
        time.sleep(0.05)
    return []


def _batch_script_seconds() -> float | None:
    """Seconds to wait for the other tasks of a SLURM job outside of a step (no srun); None otherwise."""
    found = launched()
    if found is None or found.sure:
        return None
    age = seconds_since_start()
    return max(_BATCH_SCRIPT_SECONDS - age, age / 2)


def _everyone(store: Store, limit: float) -> dict[str, Any]:
    """Ranks above zero: what rank zero has found."""
    deadline = time.monotonic() + 2 * limit  # rank zero may have come last
    try:
        while time.monotonic() < deadline:
            if store.check(["everyone"]):
                return dict(json.loads(store.get("everyone")))
            time.sleep(0.05)
    except DistError:
        pass
    return {"missing": [0]}


def _raise_missing(missing: list[int], strategy: Any, timeout: float) -> None:
    who = f"{_listed(missing)} of {strategy.world_size} did not start"
    tasks = os.environ.get("SLURM_NTASKS")
    if _batch_script_seconds() is not None:
        raise ConfigError(f"SLURM_NTASKS={tasks}, but {who}: put srun before the command, or give --ntasks=1")
    raise MissingRanksError(f"{who} within fabric.timeout={timeout:g} s: start the same command for each")


def _listed(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {first_of(list(map(str, ranks)), _SHOWN)}"


def _end_with_children(observer: Any) -> None:
    """In place of Lightning's SIGKILL: a child has ended, and the main thread gets time to say so itself."""
    children = observer._child_processes
    ended = [rank for rank, child in enumerate(children, start=1) if child.returncode]
    time.sleep(_ANSWER_SECONDS)
    for child in children:
        child.kill()
    os.write(2, f"sheeprlhf cannot continue:\n  - local {_listed(ended)} ended, see its own output\n".encode())
    os._exit(1)
