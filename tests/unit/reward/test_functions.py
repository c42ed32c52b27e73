"""The built-in rewards against scores worked out by hand."""

import inspect
import math

import pytest

from sheeprlhf.reward import functions
from sheeprlhf.reward.functions import repeated_share
from sheeprlhf.reward.score import penalty
from sheeprlhf.structure.reward import BUILTINS, AutoRewardConfig

SUMMARIES = {
    "Return the value.": 1.0,
    "Parse a list of names into a list of ids.": 1.0,  # one of 9 runs of three words repeats
    "Set the value.": 1.0,
    "Returns the value.": 0.0,  # third person
    "The value.": 0.0,
    "Set of values.": 0.0,  # a noun
    "Return the value": 0.0,  # no full stop
    "Return the value..": 0.0,
    "Return the value...": 0.0,
    "Return the value!": 0.0,
    "Return the value.\n": 0.0,  # more than the line
    "Return the value.\nArgs: none.": 0.0,
    "Return the value\u2028or not.": 0.0,
    " Return the value.": 0.0,
    "Return the value. Raise an error.": 0.0,  # another sentence
    "Return the value! Raise an error.": 0.0,
    "Return it.": 0.0,  # too short
    "Return.": 0.0,
    "": 0.0,
    ".": 0.0,
    "Return return return return.": 0.0,  # again and again
    "Return return the value.": 0.0,
    "Return the value value.": 0.0,
    "Return it return it return it.": 0.0,  # 2 of 5 runs repeat
    "Return the value and the value and the value.": 0.0,  # 3 of 8
}


@pytest.mark.parametrize("text", SUMMARIES)
def test_imperative(text):
    assert functions.imperative(["def f():"], [text]) == [SUMMARIES[text]]


def test_imperative_agrees_with_the_embedded_pairs():
    from pyarrow import parquet

    from sheeprlhf.utils.home import embedded_folder

    rows = parquet.read_table(embedded_folder("embedded:docstrings") / "test.parquet").to_pylist()
    chosen = functions.imperative([], [row["chosen"] for row in rows])
    assert sum(chosen) >= len(rows) - 1  # one author wrote "Rules rules."
    assert sum(functions.imperative([], [row["rejected"] for row in rows])) == 0


@pytest.mark.parametrize(
    ("text", "unit", "expected"),
    [
        ("a b c d", "words", 1.0),
        ("a b", "words", 0.5),
        ("a b c d e f g h", "words", 0.5),
        ("", "words", 0.0),
        (" \n", "words", 0.0),
        ("abcd", "characters", 1.0),
        ("a b c", "characters", 0.8),
        ("abcd", "words", 0.25),
    ],
)
def test_length(text, unit, expected):
    assert functions.length([""], [text], target_length=4, length_unit=unit) == [expected]


def test_regex():
    texts = ["Return it", "It will Return", "", "return"]
    assert functions.regex([""] * 4, texts, pattern=r"^Return\b") == [1.0, 0.0, 0.0, 0.0]
    assert functions.regex([""] * 4, texts, pattern=r"(?i)return$") == [0.0, 1.0, 0.0, 1.0]


def test_rouge():
    # in order: the cat on mat, 4 words of 6 and 6; 2 of 2 and 4: precision 1, recall 1/2; nothing in common
    responses = ["The cat sat on the mat.", "parse it", "returns values"]
    references = ["the cat lay on a mat", "parse it and return", "return value"]
    assert functions.rouge([""] * 3, responses, reference=references) == pytest.approx([2 / 3, 2 / 3, 0.0], abs=1e-12)


def test_sentiment():
    pytest.importorskip("vaderSentiment")
    good = 1.9 / math.sqrt(1.9**2 + 15)  # the lexicon has 1.9 for "good"; alpha is 15 (Hutto and Gilbert 2014)
    scores = functions.sentiment([""] * 3, ["good", "The table is made of wood.", "This is awful."])
    assert scores[:2] == [round(good, 4), 0.0] and scores[2] < -0.3


@pytest.mark.parametrize("name", BUILTINS)
def test_a_built_in_names_its_options_and_columns(name):
    parameters = inspect.signature(getattr(functions, name)).parameters
    assert list(parameters)[:2] == ["prompts", "responses"]
    required = {key for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY and p.default is p.empty}
    assert required == {*BUILTINS[name].needs, *BUILTINS[name].columns}


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("one two", 0.0),
        ("one two three", 0.0),
        ("a b c a b c", 1 / 4),  # abc bca cab abc
        ("The the THE the the", 2 / 3),
        ("a.....", 2 / 4),  # a.. ... ... ...: the full stop is a word
        ("x_1 y2 x_1 y2 x_1", 1 / 3),
    ],
)
def test_the_share_of_repeated_runs_of_three_words(text, share):
    assert repeated_share(text) == pytest.approx(share, abs=1e-15)


@pytest.mark.parametrize(
    ("options", "response", "finished", "num_tokens", "lost"),
    [
        ({}, "a a a a a a", False, 0, 0.0),
        ({"missing_eos_penalty": 1.5}, "a", False, 9, 1.5),
        ({"missing_eos_penalty": 1.5}, "a", True, 9, 0.0),
        ({"min_response_length": 3}, "a", True, 2, 1.0),
        ({"min_response_length": 3, "short_penalty": 0.5}, "a", True, 2, 0.5),
        ({"min_response_length": 3, "short_penalty": 0.5}, "a", True, 3, 0.0),
        ({"overlong_buffer": 4}, "a", True, 16, 0.0),  # at most 20 tokens: nothing up to 16, then a quarter for each
        ({"overlong_buffer": 4}, "a", True, 3, 0.0),
        ({"overlong_buffer": 4}, "a", True, 17, 0.25),
        ({"overlong_buffer": 4}, "a", True, 19, 0.75),
        ({"overlong_buffer": 4}, "a", False, 20, 1.0),
        ({"ngram_repetition_penalty": 2.0}, "a b c a b c", True, 9, 0.5),
        ({"ngram_repetition_penalty": 2.0}, "a b c d", True, 9, 0.0),
        (
            {"missing_eos_penalty": 1.0, "min_response_length": 9, "ngram_repetition_penalty": 2.0},
            *("a b c a b c", False, 6, 1.0 + 1.0 + 0.5),
        ),
    ],
)
def test_each_penalty(options, response, finished, num_tokens, lost):
    cfg = AutoRewardConfig(**options)
    found = penalty(cfg, response, finished=finished, num_tokens=num_tokens, max_tokens=20)
    assert found == pytest.approx(lost, abs=1e-15)
