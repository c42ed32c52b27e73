"""Parameters of a reward function: those that get the texts, and those that get columns of the data. Bound by name."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from sheeprlhf.utils.errors import ConfigError

PROMPTS = "prompts"
RESPONSES = ("responses", "completions")  # two names of the same texts
TEXTS = (PROMPTS, *RESPONSES)
_SHOWN = 120  # characters of a signature in a message


class Signature(NamedTuple):
    """Parameters of a reward function by name.

    Attributes:
        texts: those that get prompts or responses.
        columns: those that get a column of the data, each with whether it is required.
        every_column: it also takes all other columns (`**columns`).
        positional: parameters that can only be passed by position, in order; they are among the others.
        reserved: names that are never passed: arguments that a `functools.partial` has bound.
    """

    texts: tuple[str, ...]
    columns: dict[str, bool]
    every_column: bool
    positional: tuple[str, ...] = ()
    reserved: frozenset[str] = frozenset()

    def missing(self, available: Collection[str]) -> str | None:
        """Return the first required column that is not available; None if all are."""
        return next((name for name, required in self.columns.items() if required and name not in available), None)

    def arguments(
        self, prompts: list[str], responses: list[str], columns: Mapping[str, list[Any]]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return the positional and the keyword arguments of a call; each list is a copy.

        Args:
            prompts: one for each response.
            responses: the texts to score.
            columns: the available columns by name, one entry for each response.
        """
        of_text = {PROMPTS: prompts, **dict.fromkeys(RESPONSES, responses)}
        given: dict[str, Any] = {name: list(of_text[name]) for name in self.texts}
        wanted = list(columns) if self.every_column else list(self.columns)
        given |= {
            name: list(columns[name])
            for name in wanted
            if name in columns and name not in TEXTS and name not in self.reserved
        }
        positional = []
        for name in self.positional:
            if name not in given:  # an optional column that the data lacks: so are all that follow
                break
            positional.append(given.pop(name))
        return positional, {name: value for name, value in given.items() if name not in self.positional}


def signature_of(name: str, function: Callable[..., Any]) -> Signature:
    """Return the parameters of a reward function: a function, a method, a partial or an object with `__call__`.

    Args:
        name: how the configuration names it, for messages.
        function: the callable; a decorated one shows the signature that `functools.wraps` has kept.

    Raises:
        ConfigError: it cannot be called as a reward function.
    """
    plain = name.rpartition(":")[2].rpartition(".")[2]
    expected = f"write def {plain}(prompts, responses, **columns), or name the columns that it needs"
    if inspect.isclass(function):
        raise ConfigError(f"reward {name} is a class: give the name of a function or of an instance of it")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise ConfigError(
            f"reward {name} has no readable signature, and arguments are passed by name: wrap it: {expected}"
        ) from None
    parameters = list(signature.parameters.values())
    passed = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    every = any(p.kind is p.VAR_KEYWORD for p in parameters)
    rest = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    reserved = frozenset(function.keywords) if isinstance(function, functools.partial) else frozenset()
    texts = tuple(p.name for p in passed if p.name in TEXTS and p.name not in reserved)
    shown = str(signature) if len(str(signature)) <= _SHOWN else f"{str(signature)[:_SHOWN]}..."
    if rest and every and not passed:
        raise ConfigError(
            f"reward {name} takes {shown}: arguments are passed by name, and this does not tell which: {expected}; "
            "a decorator keeps the signature with functools.wraps"
        )
    if not any(text in RESPONSES for text in texts) and not every:
        raise ConfigError(
            f"reward {name} takes {shown}, and arguments are passed by name: no parameter is called responses (or "
            f"completions): {expected}"
        )
    if every:
        unnamed = (PROMPTS,) if any(text in RESPONSES for text in texts) else TEXTS
        texts += tuple(text for text in unnamed if text not in texts and text not in reserved)
    columns = {p.name: p.default is p.empty for p in passed if p.name not in (*TEXTS, *reserved)}
    positional = tuple(p.name for p in passed if p.kind is p.POSITIONAL_ONLY)
    return Signature(texts, columns, every, positional, reserved)
