"""Arguments of a reward function are bound by name, whatever kind of callable it is."""

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import pytest

from sheeprlhf.reward.call import RewardFunction, signature_of
from sheeprlhf.reward.score import Texts
from sheeprlhf.utils.errors import ConfigError, RewardError

COLUMNS = {"answer": ["1", "2"], "meta": [{"level": 1}, None], "scale": [7, 8]}
TEXTS = Texts(["p1", "p2"], ["r1", "r2"], [True] * 2, [1] * 2, COLUMNS)
P, R = TEXTS.prompts, TEXTS.responses
seen: list[dict[str, Any]] = []


def note(**arguments: Any) -> list[float]:
    seen.append(arguments)
    return [1.0, 2.0]


def usual(prompts, responses):
    return note(prompts=prompts, responses=responses)


def swapped(responses, prompts):
    return note(prompts=prompts, responses=responses)


def trl(completions, **kwargs):
    return note(completions=completions, **kwargs)


def trl_with_answer(prompts, completions, answer, **kwargs):
    return note(prompts=prompts, completions=completions, answer=answer, others=kwargs)


def both(responses, completions, meta):
    return note(responses=responses, completions=completions, meta=meta)


def only_by_position(responses, answer, /, prompts):
    return note(prompts=prompts, responses=responses, answer=answer)


def everything(**columns):
    return note(**columns)


def optional(*, completions, other=None, answer=()):
    return note(completions=completions, other=other, answer=answer)


def scaled(prompts, responses, scale, answer):
    return note(scale=scale, answer=answer)


async def slow(completions, answer):
    await asyncio.sleep(0)
    return note(completions=completions, answer=answer)


class Judge:
    def __call__(self, responses, meta):
        return note(responses=responses, meta=meta)

    def method(self, completions):
        return note(completions=completions)

    async def later(self, responses):
        return note(responses=responses)


def wrapped(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (usual, {"prompts": P, "responses": R}),
        (swapped, {"prompts": P, "responses": R}),
        (trl, {"completions": R, "prompts": P, **COLUMNS}),
        (
            trl_with_answer,
            {
                "prompts": P,
                "completions": R,
                "answer": COLUMNS["answer"],
                "others": {name: COLUMNS[name] for name in ("meta", "scale")},
            },
        ),
        (both, {"responses": R, "completions": R, "meta": COLUMNS["meta"]}),
        (only_by_position, {"prompts": P, "responses": R, "answer": COLUMNS["answer"]}),
        (everything, {"prompts": P, "responses": R, "completions": R, **COLUMNS}),
        (optional, {"completions": R, "other": None, "answer": COLUMNS["answer"]}),
        (lambda prompts, responses: note(prompts=prompts, responses=responses), {"prompts": P, "responses": R}),
        (functools.partial(scaled, scale=3), {"scale": 3, "answer": COLUMNS["answer"]}),
        (
            functools.partial(everything, scale=3),
            {"prompts": P, "responses": R, "completions": R, **COLUMNS, "scale": 3},
        ),
        (Judge(), {"responses": R, "meta": COLUMNS["meta"]}),
        (Judge().method, {"completions": R}),
        (Judge().later, {"responses": R}),
        (wrapped(swapped), {"prompts": P, "responses": R}),
        (slow, {"completions": R, "answer": COLUMNS["answer"]}),
        (wrapped(slow), {"completions": R, "answer": COLUMNS["answer"]}),
    ],
)
def test_arguments_are_bound_by_name(function: Callable[..., Any], expected: dict[str, Any]) -> None:
    seen.clear()
    reward = RewardFunction("my:f", function)
    assert reward(TEXTS) == [1.0, 2.0] and reward(TEXTS) == [1.0, 2.0]  # the event loop is there for each call
    assert seen == [expected, expected]


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda p, r: [], "(p, r)"),
        (lambda prompts, texts: [], "(prompts, texts)"),
        (lambda prompt, response: [], "(prompt, response)"),
        (lambda: [], "()"),
        (lambda *args: [], "(*args)"),
        (lambda *args, **kwargs: [], "(*args, **kwargs)"),
        (lambda a, b, /: [], "(a, b, /)"),
        (Judge, "class"),
        (max, "signature"),
        (functools.partial(usual, responses=[]), "(prompts"),
    ],
)
def test_other_signatures_are_refused_with_the_expected_one(function: Callable[..., Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RewardFunction("my:f", function)
    assert "my:f" in str(caught.value) and named in str(caught.value)
    assert named == "class" or "def f(prompts, responses, **columns)" in str(caught.value)


def test_a_required_column_that_is_missing() -> None:
    signature = signature_of("f", trl_with_answer)
    assert signature.missing(["answer"]) is None and signature.missing(["prompts", "completions"]) == "answer"
    assert signature_of("f", optional).missing([]) is None


def test_what_an_asynchronous_function_raises_is_reported_with_the_text() -> None:
    async def fails(responses):
        await asyncio.sleep(0)
        return [1.0 / (text != "r2") for text in responses]

    with pytest.raises(RewardError, match=r"my:f raised ZeroDivisionError(.|\n)*response: 'r2'"):
        RewardFunction("my:f", fails)(TEXTS)
