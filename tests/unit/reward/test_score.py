"""Weighted sums, running normalisation against numpy, and the order of normalising, clipping and penalties."""

import functools
import itertools
import json
import random
import re
from collections.abc import Callable
from random import random as draw
from typing import Any

import numpy as np
import pytest

from sheeprlhf.reward import functions
from sheeprlhf.reward.score import RunningMoments, Texts, build_reward, state_warnings
from sheeprlhf.security.user_calls import signs_of_state, state_warning
from sheeprlhf.structure.reward import (
    BUILTINS,
    AutoRewardConfig,
    FunctionRewardConfig,
    ListRewardConfig,
    ModelRewardConfig,
    RewardSourceConfig,
)
from sheeprlhf.utils.errors import ConfigError
from tests.support import rewards


def texts_of(*responses: str, finished: bool = True, **columns: list[str]) -> Texts:
    count = len(responses)
    return Texts(["prompt"] * count, list(responses), [finished] * count, [len(r) for r in responses], columns)


def lengths(prompts: list[str], responses: list[str]) -> list[float]:
    """A stand-in for a reward model."""
    return [float(len(response)) for response in responses]


MODELS = {"model": lengths}


def scored(cfg: RewardSourceConfig, texts: Texts, default: str | None = None) -> list[float]:
    return build_reward(cfg, MODELS, default=default, max_tokens=64)(texts)


def test_a_weighted_sum():
    cfg = ListRewardConfig(terms=["model", "0.5*length", "-2*regex"], target_length=4, pattern="b")
    texts = texts_of("a b c d", "a c", "")
    scorer = build_reward(cfg, MODELS, default=None, max_tokens=64)
    # 7 + 0.5 * 1 - 2 * 1; 3 + 0.5 * 2 / 4 - 0; 0
    assert scorer(texts) == pytest.approx([5.5, 3.25, 0.0], abs=1e-12)
    raw = scorer.raw(texts)
    assert raw.total == scorer(texts)
    assert raw.by_term == {"model": [7.0, 3.0, 0.0], "length": [1.0, 0.5, 0.0], "regex": [1.0, 0.0, 0.0]}


@pytest.mark.parametrize(
    ("combine", "expected"),
    [("sum", [6.0, 0.0]), ("min", [1.0, -2.0]), ("uncertainty", [2.0 - 0.5 * 2 / 3, 0.0 - 0.5 * 8 / 3])],
)
def test_an_ensemble_of_reward_models(combine: str, expected: list[float]):
    """Scores (1, 2, 3) and (0, 2, -2), and the population variance; a term that is no model is added."""
    scores = {"model": [1.0, 0.0], "model:a": [2.0, 2.0], "model:b": [3.0, -2.0]}
    models = {name: lambda *_, name=name: scores[name] for name in scores}
    cfg = ListRewardConfig(terms=[*scores, "10*regex"], pattern="b", combine=combine, uncertainty_coeff=0.5)
    found = build_reward(cfg, models, default=None, max_tokens=64)(texts_of("a", "b"))
    assert found == pytest.approx([expected[0], expected[1] + 10.0], abs=1e-12)


def test_each_source():
    texts = texts_of("Return the value.", "Returns it.")
    assert scored(FunctionRewardConfig(), texts) == [1.0, 0.0]
    assert scored(AutoRewardConfig(), texts, default="imperative") == [1.0, 0.0]
    assert scored(AutoRewardConfig(), texts) == scored(ModelRewardConfig(), texts, "imperative") == [17.0, 11.0]
    assert scored(FunctionRewardConfig(path="length", target_length=17, length_unit="characters"), texts)[0] == 1.0


def test_a_model_that_is_needed_and_missing():
    with pytest.raises(ConfigError, match=r"task\.rm_experiment_dir"):
        build_reward(AutoRewardConfig(), None, default=None, max_tokens=64)
    build_reward(AutoRewardConfig(), None, default="imperative", max_tokens=64)


def test_columns_reach_the_function():
    texts = texts_of("parse it", reference=["parse it"])
    assert scored(FunctionRewardConfig(path="rouge"), texts) == [1.0]


def test_clipping_comes_before_penalties():
    cfg = ModelRewardConfig(clip=2.0, missing_eos_penalty=1.0)
    assert scored(cfg, texts_of("abcdefg", "a", finished=False)) == [1.0, 0.0]
    assert scored(ListRewardConfig(terms=["-1*model"], clip=2.0), texts_of("abcdefg", "a")) == [-2.0, -1.0]


def test_penalties_are_not_normalised():
    cfg = ModelRewardConfig(normalize=True, missing_eos_penalty=3.0)
    assert scored(cfg, texts_of("a", "abc", finished=False)) == pytest.approx([-1.0 - 3.0, 1.0 - 3.0], abs=1e-12)


def test_clipping_comes_after_normalising():
    cfg = ModelRewardConfig(normalize=True, clip=0.5)
    assert scored(cfg, texts_of("a", "abc")) == [-0.5, 0.5]


def test_running_moments_are_numpys_over_all_batches():
    rng = np.random.default_rng(0)
    cfg = ModelRewardConfig(normalize=True)
    scorer = build_reward(cfg, {"model": lambda prompts, responses: given}, default=None, max_tokens=64)
    seen: list[float] = []
    for size in (1, 7, 2, 40, 3):
        given = (1e3 + 5 * rng.standard_normal(size)).tolist()
        seen += given
        final = scorer(texts_of(*"x" * size))
        assert scorer.moments.count == len(seen)
        assert scorer.moments.mean == pytest.approx(np.mean(seen), rel=1e-14)
        assert scorer.moments.deviation == pytest.approx(np.std(seen), rel=1e-12, abs=1e-12)
        expected = (np.array(given) - np.mean(seen)) / max(np.std(seen), 1e-8)
        assert final == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_resumed_run_has_the_same_bits():
    rng = np.random.default_rng(1)
    batches = [rng.standard_normal(9).tolist() for _ in range(6)]

    def run(split: int | None) -> list[list[float]]:
        scorer, out = (build_reward(ModelRewardConfig(normalize=True), MODELS, default=None, max_tokens=64), [])
        for step, batch in enumerate(batches):
            if step == split:
                saved = json.loads(json.dumps(scorer.moments.to_dict()))
                scorer = build_reward(ModelRewardConfig(normalize=True), MODELS, default=None, max_tokens=64)
                scorer.moments = RunningMoments(**saved)
            out.append(scorer.shape(batch, texts_of(*"x" * 9)))
        return out

    assert run(None) == run(3) != run(None)[::-1]


def test_equal_scores_and_no_scores():
    scorer = build_reward(ModelRewardConfig(normalize=True), MODELS, default=None, max_tokens=64)
    assert scorer(texts_of()) == [] and scorer.moments.count == 0
    assert scorer(texts_of("abc", "abc")) == [0.0, 0.0]
    assert build_reward(ModelRewardConfig(), MODELS, default=None, max_tokens=64)(texts_of()) == []


def test_asking_alone_teaches_the_moments_nothing():
    scorer = build_reward(ModelRewardConfig(normalize=True), MODELS, default=None, max_tokens=64)
    texts = texts_of("a", "abc")
    scorer(texts)
    before = scorer.moments.to_dict()
    scorer.raw(texts)
    assert scorer.moments.to_dict() == before == {"count": 2, "mean": 2.0, "m2": 2.0}


def test_one_rank_may_score_for_all():
    cfg = ModelRewardConfig(normalize=True, missing_eos_penalty=1.0)
    first, other = (build_reward(cfg, MODELS, default=None, max_tokens=64) for _ in range(2))
    texts = texts_of("a", "abc", finished=False)
    assert first(texts) == other.shape(first.raw(texts).total, texts)
    assert first.moments.to_dict() == other.moments.to_dict()


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
def test_state_is_reported_in_one_line(function: Callable[..., Any], sign: str) -> None:
    printed = state_warning("my:f", function)
    assert printed is not None and "\n" not in printed
    assert "my:f" in printed and sign in printed


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
