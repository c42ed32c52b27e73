"""From a source's name to its function: built-ins by name, the user's own by dotted path."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from sheeprlhf.reward import functions
from sheeprlhf.reward.call import RewardFunction, said_by
from sheeprlhf.structure.reward import BUILTINS, BuiltinOptionsConfig, RewardSourceConfig
from sheeprlhf.structure.reward_checks import source_problems
from sheeprlhf.structure.user_code import parse_path
from sheeprlhf.utils.errors import ConfigError


def load_function(source: str, cfg: RewardSourceConfig) -> RewardFunction:
    """A built-in with its options, or the user's function.

    Args:
        source: a built-in's name, or `package.module:function`.
        cfg: valid; has the options.

    Raises:
        ConfigError: there is no such function, or its module cannot be imported.
    """
    problems = list(source_problems("reward: ", source))
    if problems:
        raise ConfigError(*problems)
    if source not in BUILTINS:
        folder = os.getcwd()
        return RewardFunction(source, _import(source, folder), around=lambda: importable_from(folder))
    function: Callable[..., Any] = getattr(functions, source)
    if source == "length":
        assert isinstance(cfg, BuiltinOptionsConfig)
        function = partial(function, target_length=cfg.target_length, length_unit=cfg.length_unit)
    elif source == "regex":
        assert isinstance(cfg, BuiltinOptionsConfig)
        function = partial(function, pattern=cfg.pattern)
    return RewardFunction(source, function)


@contextmanager
def importable_from(folder: str) -> Iterator[None]:
    """Inside, modules of the folder can be imported, after all others: none of them hides an installed one.

    That is the current directory, where users keep their own module; it is on the path only while their code is
    imported and called, so that no file that happens to lie there is ever imported for anything else.
    """
    sys.path.append(folder)
    try:
        yield
    finally:
        with suppress(ValueError):  # their code may have removed it
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]


def _import(source: str, folder: str) -> Callable[..., Any]:
    module, name = parse_path(source)
    try:
        with importable_from(folder):
            function = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ConfigError(f"reward: {source} cannot be imported: {said_by(error)}") from error
    if not callable(function):
        raise ConfigError(f"reward: {source} is no function ({type(function).__name__}): give the name of one")
    found: Callable[..., Any] = function
    return found
