"""A chat template writes the same text on every day."""

import random
from datetime import datetime

import pytest
from transformers.utils import chat_template_utils

from sheeprlhf.config.validate import _data_problems
from sheeprlhf.structure.data import DocstringsConfig
from sheeprlhf.utils.rendering import fixed_arguments, render_chat
from tests.unit.data.toy import TEMPLATE, byte_tokenizer

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
