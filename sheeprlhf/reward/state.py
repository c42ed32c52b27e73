"""Signs that a reward function keeps state between calls. Checkpoints do not hold it, so a resumed run differs.

Read from the function's code without calling it. What a helper in another module keeps is not seen.
"""

import dis
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

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
_SHOWN = 3  # signs in a message
_LOADS = ("LOAD_METHOD", "LOAD_ATTR")


def signs_of_state(function: Callable[..., Any]) -> list[str]:
    """Return what suggests that calls depend on earlier calls, or on unseeded random numbers; empty if nothing does."""
    return list(dict.fromkeys(_of_callable(function, set())))


def state_warning(name: str, function: Callable[..., Any]) -> str | None:
    """Return the line that warns of a stateful function; None if there is no sign of state.

    Args:
        name: how the configuration names it.
        function: the user's callable.
    """
    signs = signs_of_state(function)
    if not signs:
        return None
    shown = ", ".join(signs[:_SHOWN]) + (f" and {len(signs) - _SHOWN} more" if len(signs) > _SHOWN else "")
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
