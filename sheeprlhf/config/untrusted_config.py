"""Find what a composed configuration may not take from a file: names of code, and values of the environment.

The files themselves are checked before, by `config_files`; both before any value is resolved.
"""

import re
from collections.abc import Iterator
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from sheeprlhf.config.overrides import quote_list_items
from sheeprlhf.structure.reward import is_users_own

_FUNCTIONS = ("reward.path", "reward.terms")
_TRUST = "model.library_cfg.trust_remote_code"
_RESOLVER = re.compile(r"\$\{\s*(?!now\b)[\w.]+\s*:")


def content_problems(base: DictConfig, parsed: list[Override]) -> list[str]:
    """Forbidden content of configuration files: model code, user functions, or values from the environment."""
    problems = []
    given = {override.key_or_group for override in parsed}
    if OmegaConf.select(base, "words", default=None) and "words" not in given:
        problems.append("words is set by a file: only the command line may; a recipe has stages and common")
    trusted = OmegaConf.select(base, _TRUST, default=False)
    if trusted and _TRUST not in given:
        problems.append(f"{_TRUST}=true is set by a file: only the command line may; give it there")
    for key, text in _leaves(OmegaConf.to_container(base, resolve=False), ""):
        if not isinstance(text, str):
            continue
        if key in _FUNCTIONS and key not in given and is_users_own(text.rpartition("*")[2]):
            problems.append(f"{key} names the function {text} in a file: only the command line may; give it there")
        if _RESOLVER.search(text):
            problems.append(f"{key}={text} asks for something outside the configuration: write the value instead")
    return problems


def word_problem(word: str) -> str | None:
    """Return what a file that writes this word of a command line may not say, as for options; None if it may."""
    if word.startswith("-"):
        allowed = word in ("-m", "--multirun")
        return None if allowed else f"{word} is a flag in a file: only the command line may give it"
    try:
        override = OverridesParser.create().parse_override(quote_list_items(word))
        key, value = override.key_or_group, override.value()
        if override.is_sweep_override():
            value = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else str(value)
    except (HydraException, ValueError):
        return None  # reported when its stage is checked
    if re.split(r"[./@]", key)[0] == "hydra" or override.package is not None:
        return f"{key} is set by a file: only the command line may set it"
    for inner, leaf in _leaves(value, key):
        text = str(leaf)
        if inner == _TRUST:
            return f"{inner} is set by a file: only the command line may set it"
        if inner in _FUNCTIONS and is_users_own(text.rpartition("*")[2]):
            return f"{inner} names the function {text} in a file: only the command line may; give it there"
        if "${" in text:
            return f"{inner} has an interpolation in a file: write the value instead"
    return None


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value, prefix)
    else:
        yield prefix, node
