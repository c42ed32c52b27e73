"""Options that were renamed. Old names stay accepted on the command line, in YAML files and in saved configurations."""

import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from sheeprlhf.utils.launchers import is_rank_zero

RENAMED = {
    "task.gradient_clip_val": "task.max_grad_norm",
    "task.eval_iters": "task.max_eval_batches",
    "task.use_masked_targets": "task.completion_only_loss",
    "task.ppo_epochs": "task.num_iterations",
    "task.target_kl_coeff": "task.target_kl",
    "task.max_kl": "task.early_stop_kl",
    "task.truncated_value": "task.bootstrap_truncated",
    "reward.repetition_penalty": "reward.ngram_repetition_penalty",
    "reward.overlong_cache": "reward.overlong_buffer",
}
_DEPRECATED = {"task.max_kl", "task.truncated_value", "reward.repetition_penalty", "reward.overlong_cache"}
_TRUNCATED = {"terminal": "false", "bootstrap": "true"}  # values of task.truncated_value
_OLD_NAMES = {new: old for old, new in RENAMED.items()}


def current_word(word: str) -> str:
    """Return `key=value` of a command line with the current name of its option."""
    key, equals, value = word.partition("=")
    old = key.lstrip("+~")
    if old not in RENAMED:
        return word
    _deprecate(old)
    if old == "task.truncated_value":
        value = re.sub("terminal|bootstrap", lambda match: _TRUNCATED[match[0].lower()], value, flags=re.IGNORECASE)
    return f"{key.removesuffix(old)}{RENAMED[old]}{equals}{value}"


def original(key: str, value: Any) -> tuple[str, Any]:
    """Return an option and its value as they were before it was renamed, for hashes of configurations."""
    if key == "task.bootstrap_truncated":
        value = "bootstrap" if value else "terminal"
    return _OLD_NAMES.get(key, key), value


def twice_given(keys: list[str]) -> Iterator[str]:
    """Yield one problem for each option that is given by its old and its current name."""
    for old in sorted(RENAMED.keys() & set(keys)):
        if RENAMED[old] in keys:
            yield f"{old} is the old name of {RENAMED[old]}, and both are given: remove {old}"


def rename_keys(tree: dict[str, Any], group: str = "", *, deprecate: bool = False) -> list[str]:
    """Replace old names in a configuration, in place.

    Args:
        tree: a whole configuration, or one group of it.
        group: the group; empty for a whole configuration.
        deprecate: print a line for each deprecated name.

    Returns:
        Problems: options that are there by both names.
    """
    if not group:
        parts = [(name, tree[name]) for name in ("task", "reward") if isinstance(tree.get(name), dict)]
        return [problem for name, part in parts for problem in rename_keys(part, name, deprecate=deprecate)]
    problems = list(twice_given([f"{group}.{key}" for key in tree]))
    for key in [key for key in tree if f"{group}.{key}" in RENAMED]:
        old, value = f"{group}.{key}", tree.pop(key)
        if deprecate:
            _deprecate(old)
        if old == "task.truncated_value":
            value = str(value).lower() == "bootstrap"
        tree[RENAMED[old].rpartition(".")[2]] = value
    return problems


@lru_cache
def _deprecate(old: str) -> None:
    """Rank zero says that a name will go, once; names of the 2023 code stay."""
    if old in _DEPRECATED and is_rank_zero():
        print(f"warning: {old} is deprecated: write {RENAMED[old]}", file=sys.stderr)
