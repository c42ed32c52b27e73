"""What a configuration file may not do, for it may come from a stranger: call or name code, or read the environment.

Both are looked for in the composed configuration before any value is resolved.
"""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra import compose
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from sheeprlhf.structure.reward import is_users_own
from sheeprlhf.utils.files import read_small

_MAX_BYTES = 1_000_000
_MAX_ENTRIES = 100_000

_FUNCTIONS = ("reward.path", "reward.terms")
_TRUST = "model.library_cfg.trust_remote_code"
_MAY_DIFFER = {"run", "sweep", "mode", "verbose", "output_subdir", "job", "overrides", "runtime", "searchpath"}
_RESOLVER = re.compile(r"\$\{\s*(?!now\b)[\w.]+\s*:")


def size_problems(directory: Path) -> Iterator[str]:
    """Files of a configuration folder that are too large for one, as they are or with their aliases written out.

    Hydra writes them out, and a short file can describe a billion entries.

    Args:
        directory: of groups and recipes, which Hydra finds up to four folders deep.
    """
    for depth in range(5):
        for path in sorted(directory.glob("*/" * depth + "*.yaml")):
            try:
                tree = yaml.compose(read_small(path, _MAX_BYTES), Loader=yaml.SafeLoader)
                too_large = tree is not None and _size(tree, {}) > _MAX_ENTRIES
            except yaml.YAMLError:
                continue  # Hydra tells, if it is chosen
            except (OSError, RecursionError) as error:
                yield f"{path} is no configuration ({error}): remove it from --config-dir"
                continue
            if too_large:
                yield f"{path} has more than {_MAX_ENTRIES} entries with its aliases written out: remove it"


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """The number of entries of a tree that has some parts in several places."""
    if id(node) not in known:
        known[id(node)] = _MAX_ENTRIES  # if it is part of itself
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            parts = [part for entry in node.value for part in entry]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def hydra_problems(verb: str, base: DictConfig, words: list[str]) -> list[str]:
    """A recipe sets options; what Hydra itself calls (callbacks, launchers, loggers) only the command line may set.

    Args:
        verb: which of our configurations `base` was composed from.
        base: the composed configuration, with Hydra's part.
        words: overrides with which our own files alone compose, and those of the command line that are for Hydra.
    """
    plain = _plain_hydra(verb, tuple(words))
    asked: Any = OmegaConf.to_container(base.hydra, resolve=False)
    changed = [str(key) for key in asked if key not in _MAY_DIFFER and asked[key] != plain.get(key)]
    changed += ["job.env_set"] if asked["job"]["env_set"] != plain["job"]["env_set"] else []
    for key in ("run", "sweep"):
        if asked[key] != plain[key] and any(_RESOLVER.search(text) for _, text in _texts(asked[key], "")):
            changed.append(f"{key}.dir")
    return [
        f"hydra.{key} is set by a file, which could run code or tell a secret: only the command line may set it"
        for key in changed
    ]


@functools.cache
def _plain_hydra(verb: str, words: tuple[str, ...]) -> dict[str, Any]:
    """Hydra's own configuration as our files and these words of the command line make it."""
    plain: Any = OmegaConf.to_container(compose(verb, list(words), return_hydra_config=True).hydra, resolve=False)
    return plain


def content_problems(base: DictConfig, parsed: list[Override]) -> list[str]:
    """What a file may not say: run a model's code or a function of somebody's, or read the environment."""
    problems = []
    given = {override.key_or_group for override in parsed}
    if OmegaConf.select(base, "words", default=None) and "words" not in given:
        problems.append("words is set by a file: only the command line may; a recipe has stages and common")
    trusted = OmegaConf.select(base, _TRUST, default=False)
    if trusted and _TRUST not in given:
        problems.append(f"{_TRUST}=true is set by a file: only the command line may; give it there")
    for key, text in _texts(OmegaConf.to_container(base, resolve=False), ""):
        if key in _FUNCTIONS and key not in given and is_users_own(text.rpartition("*")[2]):
            problems.append(f"{key} names the function {text} in a file: only the command line may; give it there")
        if _RESOLVER.search(text):
            problems.append(f"{key}={text} asks for something outside the configuration: write the value instead")
    return problems


def word_problem(word: str) -> str | None:
    """What a file that writes this word of a command line may not say, as for options; None if it may."""
    key, _, value = word.partition("=")
    key = key.lstrip("+~")
    if word.startswith("-") and word not in ("-m", "--multirun"):
        return f"{word} is a flag in a file: only the command line may give it"
    if key.split(".")[0].split("/")[0] == "hydra" or key == _TRUST:
        return f"{key} is set by a file: only the command line may set it"
    if key in _FUNCTIONS and any(is_users_own(term.rpartition("*")[2]) for term in value.strip("[]").split(",")):
        return f"{key} names the function {value} in a file: only the command line may; give it there"
    return None


def _texts(node: Any, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _texts(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list):
        for value in node:
            yield from _texts(value, prefix)
    elif isinstance(node, str):
        yield prefix, node
