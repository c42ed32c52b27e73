"""The inflection rules: hand-written sentences, and a round trip over the whole verb list."""

import pytest

from sheeprlhf.reward.inflect import (
    NOUN_LIKE_VERBS,
    VERBS,
    style_of,
    third_person,
)
from tools.inflect import has_second_verb, to_imperative, to_third_person

BOTH_FORMS = [
    ("Return the value.", "Returns the value."),
    ("Do not return a value.", "Does not return a value."),
    ("Have a look at the file.", "Has a look at the file."),
    ("Try to parse the line.", "Tries to parse the line."),
    ("Pass the value on.", "Passes the value on."),
    ("Apply the patch.", "Applies the patch."),
    ("Destroy it.", "Destroys it."),
    ("Display the menu.", "Displays the menu."),
    ("Fix the seed.", "Fixes the seed."),
    ("Push the commit.", "Pushes the commit."),
    ("Watch the folder.", "Watches the folder."),
    ("Undo the last change.", "Undoes the last change."),
    ("Compute x, y and z.", "Computes x, y and z."),
    ("Set up the logger.", "Sets up the logger."),
    ("return the value.", "returns the value."),
    ("Initialize.", "Initializes."),
]


@pytest.mark.parametrize(("imperative", "third"), BOTH_FORMS)
def test_hand_written_sentences(imperative: str, third: str) -> None:
    assert (style_of(imperative), style_of(third)) == ("imperative", "third_person")
    assert to_third_person(imperative) == to_third_person(third) == third
    assert to_imperative(imperative) == to_imperative(third) == imperative


@pytest.mark.parametrize(
    "sentence",
    [
        "Class for all readers.",
        "Tests for the parser.",
        "Settings of the application.",
        "Set of the values.",
        "Sets of values.",
        "List objects of a bucket.",
        "Filter for the log.",
        "Process group of the ranks.",
        "Filter that is run first.",
        "Return value of the call.",
        "Return type.",
        "Results of the run.",
        "Parameters of the model.",
        "Exit.",
        "A value.",
        "The value that returns.",
        "True if the value is set.",
        "Get/set the value.",
        "Return-free function here.",
        "`Return` the value.",
        "RETURN the value.",
        "",
        " Return the value.",
    ],
)
def test_other_sentences_are_left_alone(sentence: str) -> None:
    assert style_of(sentence) == "other"
    assert to_imperative(sentence) is None
    assert to_third_person(sentence) is None


def test_every_verb_goes_there_and_back() -> None:
    thirds = set()
    for verb in sorted(VERBS | NOUN_LIKE_VERBS):
        imperative = f"{verb.capitalize()} the first of them."
        third = to_third_person(imperative)
        assert third is not None
        assert third.split()[1:] == imperative.split()[1:]
        assert third != imperative
        assert to_imperative(third) == imperative
        assert (style_of(imperative), style_of(third)) == ("imperative", "third_person")
        thirds.add(third)
    assert len(thirds) == len(VERBS) + len(NOUN_LIKE_VERBS)


def test_no_third_person_is_a_base_form() -> None:
    verbs = VERBS | NOUN_LIKE_VERBS
    assert verbs.isdisjoint({third_person(verb) for verb in verbs})
    assert VERBS.isdisjoint(NOUN_LIKE_VERBS)
    assert all(verb.isascii() and verb.islower() and verb.isalpha() for verb in verbs)


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Parse the file and return its lines.", True),
        ("Parses the file, and then returns its lines.", True),
        ("Parse the file and optionally return its lines.", True),
        ("Add or update the entry.", True),
        ("Get/set the value.", True),
        ("Return the rows and columns.", False),
        ("Return an object that wraps the file.", False),
        ("Return the value.", False),
    ],
)
def test_second_verb(sentence: str, expected: bool) -> None:
    assert has_second_verb(sentence) is expected
