"""A chat template writes the same text on every day, and the text of a response is the text that was encoded."""

import random
from datetime import datetime
from typing import Any

import numpy as np
import pytest
from transformers.utils import chat_template_utils

from sheeprlhf.config.validate import _data_problems
from sheeprlhf.data.tokenize import PairEncoder
from sheeprlhf.rollout.engines import StopStrings
from sheeprlhf.structure.data import DocstringsConfig
from sheeprlhf.utils.rendering import fixed_arguments, render_chat
from sheeprlhf.utils.vocabulary import ResponseDecoder
from tests.unit.data.toy import TEMPLATE, byte_tokenizer, piece_tokenizer

DATED = "{% macro day() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}[{{ day() }}]" + TEMPLATE
LLAMA = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "none" %}{%- endif %}'
    "{%- endif %}"
    "[{{ date_string }}]" + TEMPLATE
)
USER = {"role": "user", "content": "hi"}


class Tomorrow(datetime):
    """A clock that is wrong."""

    @classmethod
    def now(cls, tz: object = None) -> datetime:
        return datetime(2031, 5, 7)


@pytest.mark.parametrize("template", [DATED, LLAMA])
@pytest.mark.parametrize(("given", "shown"), [(None, "26 Jul 2024"), ({"strftime_now": "2025-03-01"}, "01 Mar 2025")])
def test_the_date_is_the_given_one(
    template: str, given: dict[str, str] | None, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer(template=template)
    text = render_chat(tokenizer, [USER], given, ask=True)
    assert text.startswith(f"[{shown}]")
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert render_chat(tokenizer, [USER], given, ask=True) == text
    assert fixed_arguments(tokenizer, given) == (given or {"strftime_now": "2024-07-26"})


def test_a_template_may_be_given_its_date_by_its_own_variable() -> None:
    tokenizer = byte_tokenizer(template=LLAMA)
    assert render_chat(tokenizer, [USER], {"date_string": "today"}).startswith("[today]")


def test_random_choices_are_fixed_and_the_generator_goes_on() -> None:
    tokenizer = byte_tokenizer(template="{{ range(100000) | random }}" + TEMPLATE)
    random.seed(5)
    expected = random.random()
    random.seed(5)
    texts = {render_chat(tokenizer, [USER]) for _ in range(3)}
    assert len(texts) == 1
    assert random.random() == expected


@pytest.mark.parametrize("date", ["tomorrow", "2025-3-1", "2025-02-30", 20250301])
def test_what_is_no_date_is_refused_with_its_option(date: object) -> None:
    [problem] = _data_problems(DocstringsConfig(template_args={"strftime_now": date}))
    assert "data.template_args" in problem and "strftime_now=" in problem
    assert "2025-03-01" in problem


FAMILIES = {
    **{prefix: lambda prefix=prefix: piece_tokenizer(prefix) for prefix in ("prepend", "first", "always", "none")},
    "bytes": lambda: byte_tokenizer(bos=True),
}
TEXTS = (" the cat", "the cat", "\nthe cat", "a", " a. the dog", "at", ": 7")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_response_decodes_to_the_text_that_was_encoded(family: str) -> None:
    tokenizer: Any = FAMILIES[family]()
    [pair] = PairEncoder(tokenizer)(["ask: the cat"], [TEXTS], control_tokens=False)
    decode, stop = ResponseDecoder(tokenizer), StopStrings([" dog"], tokenizer)
    for text, ids in zip(TEXTS, pair.responses, strict=True):
        assert decode(ids) == text
        assert stop.text(np.array([*ids, tokenizer.eos_token_id])) == text.partition(" dog")[0]
    assert decode([]) == ""


def test_a_message_has_no_space_that_the_template_writes() -> None:
    tokenizer = piece_tokenizer("prepend")
    [pair] = PairEncoder(tokenizer)(["ask"], [[" the cat"]], control_tokens=False)
    assert StopStrings([], tokenizer, as_message=True).text(np.array(pair.responses[0])) == "the cat"
