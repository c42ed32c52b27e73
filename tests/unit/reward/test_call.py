"""A function of the user's: found, called with what it takes, and each of its mistakes told with the text."""

import math
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sheeprlhf.reward import call
from sheeprlhf.reward.call import RewardFunction, load_term
from sheeprlhf.reward.score import CombinedReward, Texts, build_reward, check_columns
from sheeprlhf.structure.reward import AutoRewardConfig, FunctionRewardConfig, ListRewardConfig
from sheeprlhf.utils.errors import ConfigError, RewardError, SheepError

TEXTS = Texts(
    ["one", "two", "three"], ["1", "2\x1b[31m", "x" * 500], [True] * 3, [1] * 3, {"reference": ["a", "b", "c"]}
)
OWN = """
from my_helper_{name} import HALF

def brevity(prompts, responses, reference):
    import my_late_{name}
    assert reference == ["a", "b", "c"]
    return [HALF * len(response) for response in responses]

def strict(prompts, responses):
    return [1.0 / len(prompt.strip("t")) for prompt in prompts]

number = 3
"""


def said_by(function: Callable[..., Any], texts: Texts = TEXTS) -> list[str]:
    with pytest.raises(RewardError) as caught:
        RewardFunction("my.reward", function)(texts)
    assert isinstance(caught.value, SheepError) and str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    return str(caught.value).splitlines()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of a module in the current directory that imports others from there, one while it is called."""
    name = f"m{abs(hash(request.node.name))}"
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"my_rewards_{name}.py").write_text(OWN.format(name=name))
    (tmp_path / f"my_helper_{name}.py").write_text("HALF = 0.5\n")
    (tmp_path / f"my_late_{name}.py").write_text("")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    return f"my_rewards_{name}"


@pytest.mark.parametrize("sign", [":", "."])
def test_a_module_of_the_current_directory(own, sign):
    before = list(sys.path)
    function = load_term(f"{own}{sign}brevity", AutoRewardConfig())
    assert sys.path == before
    assert function(TEXTS) == [0.5, 3.0, 250.0]
    assert sys.path == before


def test_a_module_of_the_path_comes_first(own, tmp_path, monkeypatch):
    (tmp_path / "on_path").mkdir()
    (tmp_path / "on_path" / f"{own}.py").write_text("def brevity(prompts, responses): return [7.0 for _ in prompts]\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "on_path")])
    assert load_term(f"{own}:brevity", AutoRewardConfig())(TEXTS) == [7.0] * 3


def test_the_path_is_clean_after_an_error_too(own, tmp_path):
    (tmp_path / "my_broken.py").write_text("def f(): ...\nraise OSError('no such\\nluck')\n")
    before = list(sys.path)
    with pytest.raises(ConfigError, match="my_broken"):
        load_term("my_broken:f", AutoRewardConfig())
    with pytest.raises(ConfigError, match=r"is not a function \(int\)"):
        load_term(f"{own}:number", AutoRewardConfig())
    with pytest.raises(ConfigError, match=r"did you mean reward: .*:brevity"):
        load_term(f"{own}:brevty", AutoRewardConfig())
    assert sys.path == before


def test_an_exception_names_the_function_the_line_and_the_text(own):
    function = load_term(f"{own}:strict", AutoRewardConfig())
    texts = TEXTS._replace(prompts=["one", "t", "three"])
    with pytest.raises(RewardError) as caught:
        function(texts)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"reward {own}:strict raised ZeroDivisionError: float division by zero (")
    assert lines[0].endswith(f"{own}.py, line 10)")
    assert lines[1:] == ["prompt: 't'", "response: '2\\x1b[31m'"]
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_exception_that_no_text_raises_alone():
    def together(prompts, responses):
        if len(prompts) > 1:
            raise ValueError("a\nb\x1b[31m" + "x" * 1000)
        return [1.0]

    lines = said_by(together)
    assert lines[0].startswith(f"reward my.reward raised ValueError: a b?[31m{'x' * 392} (")
    assert lines[1:] == [
        "no response alone was found to raise it; the first of the 3:",
        "prompt: 'one'",
        "response: '1'",
    ]


def test_the_search_for_the_text_ends(monkeypatch):
    calls = []
    monkeypatch.setattr(call, "_SECONDS_OF_SEARCH", -1.0)

    def slow(prompts, responses):
        calls.append(prompts)
        raise TimeoutError

    assert said_by(slow)[0].startswith("reward my.reward raised TimeoutError: no message (")
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("returned", "parts"),
    [
        *((None, ["None"]), ("123", ["str"]), ({"a": 1, "b": 2, "c": 3}, ["dict"])),
        *((1.0, ["float"]), (np.float64(1), ["float"]), ([1.0], ["1 scores"]), ([1.0] * 4, ["4 scores"])),
        ([1.0, float("nan"), 2.0], ["nan", "response 2 of 3", "prompt: 'two'", "response: '2\\x1b[31m'"]),
        (np.array([-np.inf, 1, 1]), ["-inf", "response 1 of 3", "prompt: 'one'", "response: '1'"]),
        (["1.0", 1.0, 1.0], ["'1.0'", "response 1 of 3"]),
        ([1.0, None, 1.0], ["None", "response 2 of 3"]),
        (torch.ones(3, 2), ["[1.0, 1.0]", "response 1 of 3"]),
    ],
    ids=str,
)
def test_what_is_no_list_of_finite_numbers(returned, parts):
    message = "\n".join(said_by(lambda prompts, responses: returned))
    assert [part for part in ("my.reward", *parts) if part not in message] == []


def test_a_long_text_is_shortened():
    lines = said_by(lambda prompts, responses: [1.0, 1.0, 1j])
    assert lines[2] == f"response: '{'x' * 99} ... {'x' * 99}'"


@pytest.mark.parametrize(
    "returned", [[1, True, 2.5], (1, 1, 2.5), np.array([1, 1, 2.5]), torch.tensor([1, 1, 2.5], requires_grad=True)]
)
def test_any_kind_of_numbers_will_do(returned):
    scores = RewardFunction("f", lambda prompts, responses: returned)(TEXTS)
    assert scores == [1.0, 1.0, 2.5] and {type(score) for score in scores} == {float}


def test_a_function_gets_the_columns_that_it_takes():
    def all_of_them(prompts, responses, **columns):
        return [float(list(columns) == ["reference", "style"])] * 3

    def one(prompts, responses, style=None):
        return [float(style == ["x", "y", "z"])] * 3

    def none(prompts, responses):
        return [1.0] * 3

    def another(prompts, responses, label): ...

    def keeps_not(prompts, responses, reference):
        prompts.clear(), responses.clear(), reference.clear()
        return [1.0] * 3

    texts = TEXTS._replace(columns={"reference": ["a", "b", "c"], "style": ["x", "y", "z"]})
    for function in (all_of_them, one, none, keeps_not):
        assert RewardFunction("f", function)(texts) == [1.0] * 3
    assert texts.prompts == TEXTS.prompts and texts.columns["reference"] == ["a", "b", "c"]
    assert said_by(another, texts) == ["reward my.reward needs a column 'label' of the data; there is reference, style"]


def test_functions_for_lists_of_messages_and_arguments_of_a_trainer_are_explained():
    def of_messages(completions, **columns):
        return [len(completion[0]["content"]) for completion in completions]

    def of_trainer(completions, trainer_state):
        return [0.0 for _ in completions]

    assert "completions, prompts are texts" in said_by(of_messages)[0]
    assert "default value" in said_by(of_trainer)[0]


def test_a_models_own_errors_pass_and_its_scores_are_checked():
    def out_of_memory(prompts, responses):
        raise MemoryError("out")

    with pytest.raises(MemoryError):
        build_reward(AutoRewardConfig(), {"model": out_of_memory}, default=None, max_tokens=64)(TEXTS)
    with pytest.raises(RewardError, match="nan"):
        build_reward(AutoRewardConfig(), {"model": lambda p, r: [float("nan")] * 3}, default=None, max_tokens=64)(TEXTS)


def test_a_built_in_without_its_column():
    scorer = build_reward(FunctionRewardConfig(path="rouge"), None, default=None, max_tokens=64)
    needs = "reward rouge needs a column 'reference' of the data; there is none: it is the row's own response"
    with pytest.raises(RewardError, match=needs):
        scorer(TEXTS._replace(columns={}))


def test_columns_are_checked_before_anything_is_loaded():
    """Of the functions that the configuration chooses, the dataset's rule too; a model needs no column."""
    cfg = ListRewardConfig(terms=["model", "0.5*rouge", "imperative"])
    check_columns(cfg, ("reference",), default=None)
    check_columns(AutoRewardConfig(), (), default="imperative")
    check_columns(AutoRewardConfig(), (), default=None)
    for chosen, default in ((cfg, None), (AutoRewardConfig(), "rouge")):
        with pytest.raises(ConfigError, match="'reference'"):
            check_columns(chosen, (), default=default)


def ids_of(completion_ids: list[list[int]], responses: list[str]) -> list[list[float]]:
    """Tens of the token ids, and the length of the response at its last token."""
    return [
        [*(x / 10 for x in ids[:-1]), float(len(text))] for ids, text in zip(completion_ids, responses, strict=True)
    ]


IDS = Texts(["p"] * 2, ["abc", "d"], [True] * 2, [2, 1], {}, [[10, 20, 0], [30, 0]])


def test_rewards_of_tokens() -> None:
    """A list for each response: the score is its sum; in a weighted sum, tokens have their share of it."""
    function = RewardFunction("my.reward", ids_of)
    assert function(IDS) == pytest.approx([6.0, 4.0])
    assert function.of_tokens == [[1.0, 2.0, 3.0], [3.0, 1.0]]

    async def one(completion_ids: list[list[int]], responses: list[str]) -> list[list[float]]:
        return ids_of(completion_ids, responses)

    alone = RewardFunction("my.reward", one, num_workers=2)
    assert alone(IDS) == function(IDS) and alone.of_tokens == function.of_tokens
    terms = [(2.0, RewardFunction("my.reward", ids_of)), (1.0, RewardFunction("one", lambda responses: [1.0] * 2))]
    raw = CombinedReward(AutoRewardConfig(), terms, 8).raw(IDS)
    assert raw.total == pytest.approx([13.0, 9.0]) and raw.of_tokens == [[2.0, 4.0, 6.0], [6.0, 2.0]]
    assert CombinedReward(AutoRewardConfig(), terms[1:], 8).raw(IDS).of_tokens is None


@pytest.mark.parametrize(
    "wrong", [[[1.0, 2.0], [1.0, 2.0]], [[1.0] * 3, 2.0], [1.0, [1.0] * 2], [[1.0, math.nan, 1.0], [1.0] * 2]]
)
def test_mistakes_in_rewards_of_tokens(wrong: Any) -> None:
    assert said_by(lambda responses: wrong, IDS)[0].startswith("reward my.reward returned")
