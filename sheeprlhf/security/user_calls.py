"""Import and call a function of the user, in this process, in tasks or in processes, and look for state in it.

Signs of state: checkpoints do not hold what a function keeps between calls, so a resumed run differs. They are read
from the function's code without calling it. What a helper in another module keeps is not seen.
"""

import asyncio
import dis
import functools
import inspect
import os
import re
import signal
import sys
import traceback
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from enum import Enum
from functools import partial
from pkgutil import resolve_name
from typing import Any, NamedTuple

from sheeprlhf.utils.errors import ConfigError, RewardError
from sheeprlhf.utils.processes import BoundToThis, ignore_interrupts, run_coroutine, spawn_context, start_bound

Arguments = tuple[list[Any], dict[str, Any]]  # of a call, by position and by name
_SHOWN_MESSAGE = 400  # characters of an exception's message
# Signs of state:
_FIXED = (
    *(int, float, complex, bool, str, bytes, type(None), type(Ellipsis), range, frozenset, re.Pattern, Enum, type),
    *(types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial),
)  # nothing in them changes, or it is looked at by itself
_CONTAINERS = (dict, list, set, bytearray)
_CHANGING = {  # methods that change a container
    *("append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "popleft", "appendleft"),
    *("remove", "discard", "clear", "sort", "reverse", "subtract", "rotate"),
}
_SEEDED = {"seed", "Random", "RandomState", "default_rng", "Generator", "PRNGKey", "manual_seed"}
_RANDOM_MODULES = ("random", "secrets", "numpy.random")
_DRAWS = {"rand", "randn", "randint", "randperm", "multinomial", "bernoulli", "normal", "random"}  # of numpy and torch
_SHOWN_SIGNS = 3  # in a message
_LOADS = ("LOAD_METHOD", "LOAD_ATTR")


@contextmanager
def importable_from(folder: str | None) -> Iterator[None]:
    """Add the folder to the end of the import path within the block: no module of it hides an installed one."""
    if folder is None:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        with suppress(ValueError):  # their code may have removed it
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]


def import_function(source: str, folder: str, given: str = "reward: ") -> Callable[..., Any]:
    """Import a function or a class by its dotted path. Raises ConfigError, whose message begins with `given`."""
    try:
        with importable_from(folder):
            function: Callable[..., Any] = resolve_name(source)
    except Exception as error:
        raise ConfigError(f"{given}{source} cannot be imported: {describe_exception(error)}") from error
    if not callable(function):
        raise ConfigError(f"{given}{source} is not a function ({type(function).__name__}): give the name of one")
    return function


def is_async(function: Callable[..., Any]) -> bool:
    """True for an `async def` function, and for an object or a decorated function that calls one."""
    plain = inspect.unwrap(function)
    return inspect.iscoroutinefunction(plain) or inspect.iscoroutinefunction(type(plain).__call__)


def describe_exception(error: BaseException) -> str:
    """Return type and message of an exception on one line, without control characters, of limited length."""
    words = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {''.join(c if c.isprintable() else '?' for c in words[:_SHOWN_MESSAGE])}"


class TimedOutError(Exception):
    """A call took longer than its limit."""


class Failure(NamedTuple):
    """Message about an exception of one call."""

    message: str

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Describe an exception."""
        if isinstance(error, TimedOutError):
            return cls(str(error))
        frames = traceback.extract_tb(error.__traceback__)
        return cls(f"raised {describe_exception(error)} ({frames[-1].filename}, line {frames[-1].lineno})")


class FunctionCaller:
    """Calls a function of the user by its dotted path, in tasks or processes, for at most `timeout` seconds."""

    def __init__(
        self, name: str, function: Callable[..., Any], folder: str | None, num_workers: int, timeout: float | None
    ) -> None:
        self._name, self._function, self._folder = name, function, folder
        self._num_workers, self._timeout = num_workers, timeout
        self._pool: ProcessPoolExecutor | None = None
        self._runner: asyncio.Runner | None = None

    def call(self, arguments: Arguments) -> Any:
        """Call it once in this process. Raises TimedOutError if an asynchronous call took too long."""
        positional, by_name = arguments
        with importable_from(self._folder):
            returned = self._function(*positional, **by_name)
            return self._run(_await(returned, self._timeout)) if inspect.isawaitable(returned) else returned

    def call_each(self, arguments: list[Arguments]) -> Generator[Any, None, None]:
        """Yield the result of each call, or its `Failure`, in the order of the arguments."""
        with importable_from(self._folder):
            yield from self._in_tasks(arguments) if is_async(self._function) else self._in_processes(arguments)

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        if self._runner is None:  # one event loop for all calls: clients that the function keeps belong to it
            self._runner = asyncio.Runner()
        return run_coroutine(coroutine, self._runner.run)

    def _in_tasks(self, arguments: list[Arguments]) -> list[Any]:
        limit = asyncio.Semaphore(self._num_workers)

        async def call(positional: list[Any], by_name: dict[str, Any]) -> Any:
            async with limit:
                try:
                    return await _await(self._function(*positional, **by_name), self._timeout)
                except Exception as error:
                    return Failure.of(error)

        async def call_all() -> list[Any]:
            return await asyncio.gather(*(call(*one) for one in arguments))

        return list(self._run(call_all()))

    def _in_processes(self, arguments: list[Arguments]) -> Iterator[Any]:
        if self._pool is None:
            bound = (BoundToThis(), ignore_interrupts)
            context = spawn_context(f"reward.num_workers={self._num_workers}")
            self._pool = ProcessPoolExecutor(self._num_workers, context, start_bound, bound)
        try:
            yield from self._pool.map(partial(_call_in_process, self._name, os.getcwd(), self._timeout), arguments)
        except BrokenProcessPool:
            advice = "a process of reward.num_workers ended (killed, out of memory, or its code ended it): give fewer"
            raise RewardError(f"reward {self._name}: {advice}") from None


async def _await(returned: Awaitable[Any], timeout: float | None) -> Any:
    """Await within a number of seconds. Raises TimedOutError if it took longer."""
    limit = asyncio.timeout(timeout)
    try:
        async with limit:
            return await returned
    except TimeoutError:
        if limit.expired():
            raise _timed_out(timeout) from None
        raise


def _timed_out(timeout: float | None) -> TimedOutError:
    return TimedOutError(f"took longer than reward.timeout={timeout:g} s")


def _call_in_process(name: str, folder: str, timeout: float | None, arguments: Arguments) -> Any:
    """Call a function of the user in a process of a pool, and return its result as plain numbers, or `Failure`."""

    def stop(*_: object) -> None:
        raise _timed_out(timeout)

    signal.signal(signal.SIGALRM, stop)
    try:
        with importable_from(folder):
            function = import_function(name, folder)
            signal.setitimer(signal.ITIMER_REAL, timeout or 0.0)
            try:
                positional, by_name = arguments
                returned = function(*positional, **by_name)
                if inspect.isawaitable(returned):
                    returned = asyncio.run(_await(returned, None))
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0.0)
        if hasattr(returned, "tolist"):
            returned = returned.tolist()
        is_list = isinstance(returned, Iterable) and not isinstance(returned, str | bytes | Mapping)
        return [one.item() if hasattr(one, "item") else one for one in returned] if is_list else returned
    except BaseException as error:
        return Failure.of(error)


def signs_of_state(function: Callable[..., Any]) -> list[str]:
    """Return what suggests that calls depend on earlier calls, or on unseeded random numbers; empty if nothing does."""
    return list(dict.fromkeys(_of_callable(function, set())))


def state_warning(name: str, function: Callable[..., Any]) -> str | None:
    """Return the line that warns of signs of state in the function `name`; None if there are none."""
    signs = signs_of_state(function)
    if not signs:
        return None
    more = len(signs) - _SHOWN_SIGNS
    shown = ", ".join(signs[:_SHOWN_SIGNS]) + (f" and {more} more" if more > 0 else "")
    return (
        f"warning: reward {name} may score a text differently from call to call ({shown}): checkpoints do "
        "not hold what a function keeps, so a resumed run may not continue bit for bit; see docs/rewards.md"
    )


def _of_callable(function: Any, seen: set[int]) -> Iterator[str]:
    if id(function) in seen:
        return
    seen.add(id(function))
    if isinstance(function, functools.partial):
        bound = [*function.args, *function.keywords.values()]
        yield from (f"an argument of its partial is a {type(value).__name__}" for value in bound if _can_change(value))
        yield from _of_callable(function.func, seen)
    elif inspect.ismethod(function):
        yield from _of_callable(function.__func__, seen)
        yield from _of_object(function.__self__, seen)
    elif inspect.isfunction(function):
        yield from _of_function(function, seen)
    elif not isinstance(function, _FIXED):
        method = inspect.getattr_static(type(function), "__call__", None)
        yield from _of_object(function, seen)
        if inspect.isfunction(method):
            yield from _of_callable(method, seen)


def _of_object(owner: Any, seen: set[int]) -> Iterator[str]:
    """Attributes of an object that can change, or that its methods store."""
    if isinstance(owner, _FIXED) or -id(owner) in seen:
        return
    seen.add(-id(owner))
    for name, value in getattr(owner, "__dict__", {}).items():
        if _can_change(value):
            yield f"attribute {name} is a {type(value).__name__}"
    for name, method in inspect.getmembers(type(owner), inspect.isfunction):
        if name not in ("__init__", "__new__", "__setattr__"):
            stored = {step.argval for step in _steps(method.__code__) if step.opname in ("STORE_ATTR", "DELETE_ATTR")}
            yield from (f"{name} stores attribute {attribute}" for attribute in sorted(stored))


def _of_function(function: types.FunctionType, seen: set[int]) -> Iterator[str]:
    for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        if _can_change(value):
            yield f"a default argument is a {type(value).__name__}"
    own = {name: value for name, value in vars(function).items() if name != "__wrapped__"}
    yield from (f"function attribute {name}" for name in own if not name.startswith("__"))
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # not set yet
            continue
        if _can_change(value):
            yield f"the closure's {name} is a {type(value).__name__}"
        elif callable(value):
            yield from _of_callable(value, seen)
    yield from _of_code(function, seen)


def _of_code(function: types.FunctionType, seen: set[int]) -> Iterator[str]:
    """State that the code stores outside of a call, and random numbers that it draws."""
    steps = list(_steps(function.__code__))
    names = {str(step.argval) for step in steps}
    free = set(function.__code__.co_freevars)
    for step in steps:
        if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            yield f"global {step.argval} is stored"
        elif step.opname == "STORE_DEREF" and step.argval in free:
            yield f"nonlocal {step.argval} is stored"
    written = _written_into(steps)
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if step.opname not in ("LOAD_GLOBAL", "LOAD_NAME"):
            continue
        name, value = str(step.argval), function.__globals__.get(step.argval)
        after = str(following.argval) if following is not None and following.opname in _LOADS else ""
        stores = following is not None and following.opname == "STORE_ATTR"
        if _draws(value, after) and not names & _SEEDED:
            yield f"random numbers of {name} without a seed"
        elif stores and not isinstance(value, type):
            yield f"an attribute of {name} is stored"
        elif isinstance(value, _CONTAINERS) and (after in _CHANGING or name in written):
            yield f"global {name} is changed"
        elif isinstance(value, Iterator):
            yield f"global {name} is an iterator"
        elif inspect.isfunction(value) and value.__module__ == function.__module__:
            yield from _of_callable(value, seen)
        elif value is not None and type(value).__module__ == function.__module__ and not isinstance(value, type):
            yield from _of_object(value, seen)


def _written_into(steps: list[dis.Instruction]) -> set[str]:
    """Globals of which an entry is stored or deleted: `x[key] = ...`, `x[key] += ...`, `del x[key]`, of a plain key."""
    found = set()
    for container, key, *following in zip(steps, steps[1:], steps[2:], steps[3:], strict=False):
        stores = following[0].opname in ("STORE_SUBSCR", "DELETE_SUBSCR") or all(
            step.opname == "COPY" for step in following
        )
        if container.opname == "LOAD_GLOBAL" and key.opname.startswith("LOAD_") and stores:
            found.add(str(container.argval))
    return found


def _draws(value: Any, attribute: str) -> bool:
    """True if a global, or its attribute, gives random numbers."""
    module = value.__name__ if isinstance(value, types.ModuleType) else ""
    if module in _RANDOM_MODULES or (module == "numpy" and attribute == "random"):
        return attribute not in _SEEDED
    if module == "torch" and attribute in _DRAWS:
        return True
    owner = type(getattr(value, "__self__", value))
    return owner.__module__ in ("random", "numpy.random.mtrand", "numpy.random._generator") and callable(
        getattr(owner, "random", None)
    )


def _can_change(value: Any) -> bool:
    """True if a value may change during a call."""
    if isinstance(value, tuple):
        return any(_can_change(part) for part in value)
    return not isinstance(value, _FIXED)


def _steps(code: types.CodeType) -> Iterator[dis.Instruction]:
    """The instructions of a function and of those defined in it, without those that only support the interpreter."""
    yield from (step for step in dis.get_instructions(code) if step.opname not in ("PRECALL", "CACHE", "PUSH_NULL"))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _steps(constant)
