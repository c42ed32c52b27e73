"""Real runs as processes of their own, to be killed or signalled: cheap starts from a fork server, and cold ones."""

import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRELOADED = (
    "sheeprlhf.task.train.sft",
    "sheeprlhf.task.train.dpo",
    "sheeprlhf.task.train.ppo",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
    "peft",
    "torch.utils.tensorboard",
)
_SITE = """
import sheeprlhf.launch as launch
task = launch._run_task
def patched(*words):
    import patch_of_the_test
    task(*words)
launch._run_task = patched
"""
_SERVER = "from tests.support.jobs import serve; serve()"


class Job:
    """A started command; its output goes to `log`."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log = pid, log

    def poll(self) -> int | None:
        """The exit code, minus the signal for a killed process; None while it runs."""
        raise AssertionError("a subclass knows")

    def kill(self, signum: int = signal.SIGKILL) -> None:
        os.kill(self.pid, signum)

    def wait(self, timeout: float = 180.0) -> int:
        """The exit code; a job that hangs is killed and fails the test."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"still running after {timeout} s:\n{self.text()}")
            time.sleep(0.005)
        return code

    def wait_for(self, text: str, timeout: float = 180.0) -> None:
        """Return when the output contains `text`."""
        deadline = time.monotonic() + timeout
        while text not in self.text():
            assert self.poll() is None, f"ended before it said {text!r}:\n{self.text()}"
            assert time.monotonic() < deadline, f"never said {text!r}:\n{self.text()}"
            time.sleep(0.002)

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def group(self) -> list[int]:
        """The processes that are alive of its group, which it has begun."""
        alive = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(group) == self.pid and state != "Z":
                alive.append(int(path.parent.name))
        return sorted(alive)

    def assert_all_gone(self, timeout: float = 10.0) -> None:
        """No process of its group is left, or will be soon."""
        deadline = time.monotonic() + timeout
        while self.group() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.group() == []


def site(folder: Path, patch: str) -> str:
    """A PYTHONPATH with which every process of a cold job runs `patch` after its imports, before its task."""
    folder.mkdir()
    (folder / "patch_of_the_test.py").write_text(patch)
    (folder / "sitecustomize.py").write_text(_SITE)
    return f"{folder}:{ROOT}"


class ColdJob(Job):
    """`python sheeprlhf.py ...`, in a process group of its own; `before` is put before the command."""

    def __init__(self, words: list[str], log: Path, *, before: Sequence[str] = (), **environment: str) -> None:
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [*before, sys.executable, str(ROOT / "sheeprlhf.py"), *words],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=log.parent,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        super().__init__(self._process.pid, log)

    def poll(self) -> int | None:
        return self._process.poll()


class WarmJob(Job):
    """The same from a process that has imported torch and transformers and used neither."""

    def __init__(self, server: "JobServer", pid: int, log: Path) -> None:
        super().__init__(pid, log)
        self._server = server
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._server.ask(poll=self.pid)
        return self._code


class RanksJob(Job):
    """One job of several processes, started as by a launcher; `poll` and `log` tell of rank zero."""

    def __init__(
        self, server: "JobServer", words: list[str], log: Path, processes: int, setup: str, **environment: str
    ) -> None:
        words = [*words, f"fabric.devices={processes}"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        self.ranks = [
            server.start(
                words,
                log if not rank else log.with_name(f"{log.name}.{rank}"),
                setup,
                LOCAL_RANK=str(rank),
                **where,
                **environment,
            )
            for rank in range(processes)
        ]
        super().__init__(self.ranks[0].pid, log)

    def poll(self) -> int | None:
        """Rank zero's exit code, when all have ended."""
        codes = [rank.poll() for rank in self.ranks]
        return None if None in codes else codes[0]

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """All that are alive."""
        for rank in self.ranks:
            if rank.poll() is None:
                rank.kill(signum)

    def texts(self) -> str:
        """The output of all ranks."""
        return "".join(rank.text() for rank in self.ranks)

    def strike(self, rng: random.Random, *, at_once: bool) -> bool:
        """Kill -9 all at once, or one process, and soon the others, as launchers do; False if they ended before."""
        victims = self.ranks if at_once else [rng.choice(self.ranks)]
        for rank in victims:
            if rank.poll() is None:
                rank.kill()
        time.sleep(rng.uniform(0, 1))
        self.kill()
        self.wait()
        return any(rank.wait() == -signal.SIGKILL for rank in victims)


class JobServer:
    """A `with` block: `start(words, log)` forks a job."""

    def __enter__(self) -> "JobServer":
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, **request: object) -> int | None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, words: list[str], log: Path, setup: str = "", **environment: str) -> WarmJob:
        """Run a command line; `setup` is Python executed before it, in the job."""
        cache = os.environ.get("SHEEPRLHF_CACHE", str(log.parent / "cache"))
        environment = {"SHEEPRLHF_CACHE": cache, **environment}
        pid = self.ask(words=words, log=str(log), setup=setup, environment=environment)
        assert pid is not None
        return WarmJob(self, pid, log)

    def start_ranks(self, words: list[str], log: Path, processes: int, setup: str = "", **environment: str) -> RanksJob:
        """Run a command line on several processes; further arguments as of `start`."""
        return RanksJob(self, words, log, processes, setup, **environment)


def serve() -> None:
    """The server: forks a job per request, or says how one ended."""
    for module in PRELOADED:
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer:
                _become_job(**request)
        print(json.dumps(answer), flush=True)


def _become_job(words: list[str], log: str, setup: str, environment: dict[str, str]) -> None:
    """In the forked process: never returns."""
    from sheeprlhf.cli import run

    code: object = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin = os.fdopen(0, closefd=False)  # the server has read from the one before
        os.environ |= environment
        os.chdir(Path(log).parent)
        exec(setup, {})
        sys.argv = [sys.argv[0], *words]
        run()  # as the program itself does
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except KeyboardInterrupt:  # after `run` was done
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
