"""Processes that hold the user's environments, one object for each episode, and end a call that takes too long.

An environment is a class: `reset(row)` begins an episode, `step(call)` answers a tool call, and the optional
`finish(answer)` scores the model's last message. This module imports no torch, so a process starts quickly.
"""

import json
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from sheeprlhf.rollout import tool_environments
from sheeprlhf.security.user_calls import describe_exception, import_function, importable_from
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.processes import BoundToThis, ignore_interrupts, spawn_context, start_bound

BUILTINS = {"calculator": tool_environments.Calculator, "python": tool_environments.PythonTests}
INVALID_CALL = "error: a call is a JSON object with a name and an object of arguments"
_SECONDS_TO_START = 120.0
_SECONDS_MORE = 2.0  # than the limit, for code that does not return to Python; then its process is killed


class Call(NamedTuple):
    """A tool call of the model: the tool's name and its arguments by name."""

    name: str
    arguments: dict[str, Any]


class Request(NamedTuple):
    """A call of an episode's environment.

    Attributes:
        episode: number of the episode, which decides the process.
        method: "reset", "step" or "finish".
        value: the row; a list of `Call`, or None for one that cannot be read; the text of the last message.
    """

    episode: int
    method: str
    value: Any


class Reply(NamedTuple):
    """Outcome of a request.

    Attributes:
        results: text of each call.
        reward: sum of the rewards.
        done: the environment ended the episode.
        error: why the episode failed; None if it did not.
    """

    results: tuple[str, ...] = ()
    reward: float = 0.0
    done: bool = False
    error: str | None = None


class EnvironmentPool:
    """Processes with the environments of many episodes, started when they are needed.

    Args:
        source: a built-in's name or `package.module:Class`.
        num_processes: at most so many calls run at once.
        timeout: seconds of a call; the episode has failed if it takes longer.
    """

    def __init__(self, source: str, num_processes: int, timeout: float) -> None:
        self._source, self._timeout = source, timeout
        self._processes: list[tuple[BaseProcess, Connection] | None] = [None] * num_processes
        self.tools: list[dict[str, Any]] = []  # schemas of the environment's tools, once a process runs

    def start(self) -> None:
        """Start the first process.

        Raises:
            ConfigError: the class cannot be imported or constructed.
        """
        self._connection(0)

    def run(self, requests: Sequence[Request]) -> list[Reply]:
        """Return the replies in the order of the requests, at most one for each episode."""
        replies: dict[int, Reply] = {}
        count = len(self._processes)
        queues = [deque(one for one in requests if one.episode % count == number) for number in range(count)]
        running: dict[int, tuple[int, float]] = {}  # by process: the episode, and when its time is over
        while len(replies) < len(requests):
            for number, queue in enumerate(queues):
                if queue and number not in running:
                    request = queue.popleft()
                    calls = len(request.value) if request.method == "step" else 1
                    end = time.monotonic() + self._timeout * calls + _SECONDS_MORE
                    with suppress(OSError):  # its process has ended: there is no reply
                        self._connection(number).send(request)
                    running[number] = (request.episode, end)
            numbers = {self._connection(number): number for number in running}
            left = min(end for _, end in running.values()) - time.monotonic()
            for connection in wait(list(numbers), max(left, 0.0)):
                assert isinstance(connection, Connection)
                episode, _ = running.pop(numbers[connection])
                try:
                    replies[episode] = connection.recv()
                except (EOFError, OSError):
                    self._kill(numbers[connection])
                    replies[episode] = Reply(error="its process ended (killed, out of memory, or its code ended it)")
            for number, (episode, end) in list(running.items()):
                if time.monotonic() >= end:
                    del running[number]
                    self._kill(number)
                    replies[episode] = Reply(error=f"it took longer than rollout.step_timeout={self._timeout:g} s")
        return [replies[one.episode] for one in requests]

    def close(self) -> None:
        """End the processes."""
        for number in range(len(self._processes)):
            self._kill(number)

    def _connection(self, number: int) -> Connection:
        """Return the connection to a process, which is started if there is none."""
        found = self._processes[number]
        if found is not None:
            return found[1]
        context = spawn_context(f"rollout.environment={self._source}")
        ours, theirs = context.Pipe()
        arguments = (BoundToThis(), _serve, theirs, self._source, os.getcwd(), self._timeout)
        process = context.Process(target=start_bound, args=arguments, daemon=True)
        process.start()
        theirs.close()
        self._processes[number] = (process, ours)
        started: list[dict[str, Any]] | str = f"rollout.environment={self._source}: its process does not start"
        with suppress(EOFError, OSError):
            started = ours.recv() if ours.poll(_SECONDS_TO_START) else started
        if isinstance(started, str):
            self._kill(number)
            raise ConfigError(started)
        self.tools = started
        return ours

    def _kill(self, number: int) -> None:
        found, self._processes[number] = self._processes[number], None
        if found is not None:
            process, connection = found
            process.kill()
            process.join()
            connection.close()


def load_environment(source: str, folder: str) -> Callable[[], Any]:
    """Import a class with the methods `reset` and `step`.

    Raises:
        ConfigError: it cannot be imported, or does not have them.
    """
    found = BUILTINS[source] if source in BUILTINS else import_function(source, folder, "rollout.environment=")
    if not (hasattr(found, "reset") and hasattr(found, "step")):
        raise ConfigError(f"rollout.environment={source} is not a class with the methods reset(row) and step(call)")
    return found


def tool_schemas(environment: object) -> list[dict[str, Any]]:
    """Return the JSON schemas `tools` of an environment, those of the functions alone; empty if it has none."""
    schemas: list[dict[str, Any]] = json.loads(json.dumps(list(getattr(environment, "tools", None) or [])))
    functions = [schema.get("function", schema) for schema in schemas]
    return [{"name": str(function["name"]), **function} for function in functions]


def _serve(connection: Connection, source: str, folder: str, timeout: float) -> None:
    """Answer requests until the other end is closed; the environments are in this process."""
    ignore_interrupts()
    try:
        make = load_environment(source, folder)
        make()
        connection.send(tool_schemas(make))
    except Exception as error:
        named = isinstance(error, ConfigError)
        connection.send(str(error) if named else f"rollout.environment={source}: {describe_exception(error)}")
        return

    def too_slow(*_: object) -> None:
        raise TimeoutError(f"it took longer than rollout.step_timeout={timeout:g} s")

    signal.signal(signal.SIGALRM, too_slow)

    def limited(function: Callable[..., Any], *arguments: Any) -> Any:
        signal.setitimer(signal.ITIMER_REAL, timeout)
        try:
            return function(*arguments)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)

    environments: dict[int, Any] = {}
    with suppress(EOFError, OSError):
        while True:
            request = connection.recv()
            try:
                with importable_from(folder):
                    reply = _answer(environments, make, request, limited)
            except BaseException as error:
                environments.pop(request.episode, None)
                reply = Reply(error=describe_exception(error))
            connection.send(reply)


def _answer(
    environments: dict[int, Any], make: Callable[[], Any], request: Request, limited: Callable[..., Any]
) -> Reply:
    """Carry out a request in the environment of its episode."""
    episode, method, value = request
    if method == "reset":
        environments[episode] = limited(make)
        limited(environments[episode].reset, value)
        return Reply()
    if episode not in environments:
        raise RuntimeError("the process that held the episode was ended by another one")
    if method == "finish":
        finish = getattr(environments.pop(episode), "finish", None)
        return Reply(reward=0.0 if finish is None else _number(limited(finish, value)))
    results, reward = [], 0.0
    for call in value:
        if call is None:
            results.append(INVALID_CALL)
            continue
        result, gained, done = limited(environments[episode].step, call)
        results.append(str(result))
        reward += _number(gained)
        if done:
            del environments[episode]
            return Reply(tuple(results), reward, done=True)
    return Reply(tuple(results), reward)


def _number(value: Any) -> float:
    """Return a reward as a float. Raises ValueError if it is not finite."""
    reward = float(value)
    if not math.isfinite(reward):
        raise ValueError(f"the reward {reward} is not finite")
    return reward
