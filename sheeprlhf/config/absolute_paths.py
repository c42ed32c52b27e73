"""Paths of a configuration as absolute ones, so that what a run records means the same from every directory.

Hub ids, names, and paths where nothing is yet stay as they were given.
"""

import glob
import os
from collections.abc import Callable
from typing import Any

from sheeprlhf.config.memory_advice import changed
from sheeprlhf.config.path_checks import is_template_file
from sheeprlhf.config.registry import options
from sheeprlhf.structure.run import RootConfig
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.home import expand_home, home_problem


def _is_data(path: str) -> bool:
    return os.path.exists(path) or (glob.has_magic(path) and bool(glob.glob(path, recursive=True)))


_KINDS: dict[str, Callable[[str], bool]] = {
    **dict.fromkeys(("model.repo_name", "data.dataset_name", "reward.folder"), os.path.isdir),  # else a hub id
    **dict.fromkeys(
        ("task.sft_experiment_dir", "task.rm_experiment_dir", "task.against"), os.path.isdir
    ),  # else a word
    **dict.fromkeys(("experiment_dir", "resume_from"), os.path.isdir),
    **dict.fromkeys(("data.train_file", "data.validation_file", "data.test_file"), _is_data),
    "model.chat_template": lambda path: is_template_file(path) and os.path.isfile(path),
    **dict.fromkeys(("data.cache_dir", "root_dir"), lambda _: True),  # made where they are missing
}


def absolute_value(key: str, value: Any) -> Any:
    """The value of an option; an absolute path if the option names a file or folder that is here.

    Args:
        key: dotted name of the option.
        value: as it was given.
    """
    if isinstance(value, list):
        return [absolute_value(key, entry) for entry in value]
    if key not in _KINDS or not isinstance(value, str) or not value:
        return value
    path = expand_home(value)
    return str(path.absolute()) if _KINDS[key](str(path)) else value


def with_absolute_paths(config: RootConfig) -> RootConfig:
    """The configuration with all paths absolute.

    Raises:
        ConfigError: some lie in home directories that are not known.
    """
    found = {option.key: option.value for option in options(config) if option.key in _KINDS}
    problems = [home_problem(key, path) for key, value in found.items() for path in _paths(value)]
    if any(problems):
        raise ConfigError(*filter(None, problems))
    change = {key: absolute_value(key, value) for key, value in found.items()}
    change = {key: value for key, value in change.items() if value != found[key]}
    if not change:
        return config
    new: RootConfig = changed(config, change)
    new.lock()
    return new


def _paths(value: Any) -> list[str]:
    return [path for path in (value if isinstance(value, list) else [value]) if isinstance(path, str)]


def absolute_words(words: list[str]) -> list[str]:
    """Words of a command line, `key=value`, with all paths absolute that stand there without quotes."""
    found = []
    for word in words:
        key, equals, value = word.partition("=")
        found.append(f"{key}={absolute_value(key, value)}" if equals else word)
    return found
