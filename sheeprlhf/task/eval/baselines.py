"""Trivial baselines: ROUGE shows no progress of a model that does not beat them."""

import re
from collections.abc import Sequence

_DEFINED = re.compile(r"^\s*(?:async\s+)?(?:class|def)\s+(\w+)", re.MULTILINE)
_PART = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")


def baseline_responses(prompts: Sequence[str], references: Sequence[str]) -> dict[str, list[str]]:
    """The answers of each baseline to the prompts, by the baseline's name.

    Args:
        prompts: the prompts' texts.
        references: the references' texts; only their mean length in words is used.

    Returns:
        `lead`: the prompt's first words, as many as the references have on average; `copy`: the prompt; and, where most
        prompts define a Python function or class, `names`: the words of the names that they define.
    """
    num_words = max(1, round(sum(len(text.split()) for text in references) / len(references)))
    answers = {"lead": [" ".join(prompt.split()[:num_words]) for prompt in prompts], "copy": list(prompts)}
    if 2 * sum(_DEFINED.search(prompt) is not None for prompt in prompts) > len(prompts):
        answers["names"] = [" ".join(name_words(prompt)) for prompt in prompts]
    return answers


def name_words(prompt: str) -> list[str]:
    """The words of the names that a text's `class` and `def` lines define, in order: `def to_JSON(x)` -> to JSON."""
    return [word for name in _DEFINED.findall(prompt) for word in split_name(name)]


def split_name(name: str) -> list[str]:
    """The words of an identifier: `_read_HTTPHeader2` -> read HTTP Header 2."""
    return _PART.findall(name)
