"""Signs of state in reward functions: those that keep some are told, plain ones are not."""

import functools
import itertools
import random
import re
from collections.abc import Callable
from random import random as draw
from typing import Any

import numpy as np
import pytest

from sheeprlhf.reward import functions
from sheeprlhf.reward.score import state_warnings
from sheeprlhf.security.user_calls import signs_of_state, state_warning
from sheeprlhf.structure.reward import BUILTINS, ListRewardConfig
from tests.support import rewards

COUNT = 0
HISTORY: list[str] = []
WEIGHTS = {"a": 1.0}
NUMBERS = itertools.count()
WORD = re.compile(r"\w+")


def stores_a_global(responses):
    global COUNT
    COUNT += 1
    return [float(COUNT)] * len(responses)


def changes_a_global(responses):
    HISTORY.append(responses[0])
    return [float(len(HISTORY))] * len(responses)


def writes_into_a_global(responses):
    for text in responses:
        WEIGHTS[text] = WEIGHTS.get(text, 0) + 1
    return [WEIGHTS[text] for text in responses]


def default_argument(responses, seen=[]):  # noqa: B006
    seen.extend(responses)
    return [float(len(seen))] * len(responses)


def counts(responses):
    return [float(next(NUMBERS)) for _ in responses]


def own_attribute(responses):
    own_attribute.calls = getattr(own_attribute, "calls", 0) + 1
    return [0.0 for _ in responses]


def unseeded(responses):
    return [random.random() for _ in responses]


def unseeded_name(responses):
    return [draw() for _ in responses]


def unseeded_numpy(responses):
    return np.random.rand(len(responses))


def by_a_helper(responses):
    return stores_a_global(responses)


def closure(kept: Any) -> Callable[..., Any]:
    def inner(responses):
        kept.append(len(responses))
        return [0.0 for _ in responses]

    return inner


def counter() -> Callable[..., Any]:
    count = 0

    def inner(responses):
        nonlocal count
        count += 1
        return [float(count) for _ in responses]

    return inner


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, responses):
        self.calls += 1
        return [float(self.calls) for _ in responses]


class Remembers:
    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    def score(self, responses):
        return [self.seen.setdefault(text, 0.0) for text in responses]


@pytest.mark.parametrize(
    ("function", "sign"),
    [
        (stores_a_global, "COUNT"),
        (changes_a_global, "HISTORY"),
        (writes_into_a_global, "WEIGHTS"),
        (default_argument, "list"),
        (counts, "NUMBERS"),
        (own_attribute, "own_attribute"),
        (unseeded, "random"),
        (unseeded_name, "draw"),
        (unseeded_numpy, "np"),
        (by_a_helper, "COUNT"),
        (closure([]), "kept"),
        (counter(), "count"),
        (Counter(), "calls"),
        (Remembers().score, "seen"),
        (functools.partial(closure([])), "kept"),
        (functools.partial(default_argument, seen=[]), "list"),
        (functools.wraps(stores_a_global)(lambda *args: stores_a_global(*args)), "COUNT"),
    ],
)
def test_state_is_told_in_one_line(function: Callable[..., Any], sign: str) -> None:
    told = state_warning("my:f", function)
    assert told is not None and "\n" not in told
    assert "my:f" in told and sign in told


def test_only_own_functions_are_looked_at_and_signs_are_few() -> None:
    cfg = ListRewardConfig(terms=["model", "imperative", f"{__name__}:stores_a_global", f"{__name__}:plain"])
    [line] = state_warnings(cfg, default=None)
    assert f"{__name__}:stores_a_global" in line

    def many(responses, a=[], b={}, c=set()):  # noqa: B006
        HISTORY.append("x")
        next(NUMBERS)
        return [0.0 for _ in responses]

    assert "2 more" in str(state_warning("f", many))


def plain(prompts, responses, answer=None, unit="words", known=("a", "b")):
    found = {}
    for text in responses:
        found[text] = len(WORD.findall(text))
    parts = []
    parts.append(sum(found.values()))
    return [float(WEIGHTS.get(text, 0.0) + found[text] + parts[0]) for text in responses]


def seeded(prompts, responses):
    return [random.Random(text).random() for text in responses]


def seeded_numpy(prompts, responses):
    return np.random.default_rng(0).random(len(responses))


class Weighted:
    """An object with settings that nothing changes."""

    def __init__(self) -> None:
        self.weight, self.names = 0.5, ("a", "b")

    def __call__(self, responses):
        total = [self.weight * len(text) for text in responses]
        total.reverse()
        return total


@pytest.mark.parametrize(
    "function",
    [
        plain,
        seeded,
        seeded_numpy,
        Weighted(),
        functools.partial(plain, unit="characters"),
        lambda responses: [plain([], [text])[0] for text in responses],
        *(getattr(functions, name) for name in BUILTINS),
        *(getattr(rewards, name) for name in ("bandit", "letters", "spread", "slow_answer")),
    ],
)
def test_a_plain_function_keeps_none(function: Callable[..., Any]) -> None:
    assert signs_of_state(function) == []
