"""The same summary in the other form, imperative or third-person (see `sheeprlhf/reward/inflect.py`)."""

import re

from sheeprlhf.reward.inflect import BASE_OF, FIRST_WORD, THIRD_OF, first_verb

_LATER = re.compile(r"(?:\b(?:and|or|then|but|also)\b|[,/])\s*(?:[A-Za-z]+ly\s+)?(?=([A-Za-z]+))")


def to_imperative(sentence: str) -> str | None:
    """Return the sentence with its first word in the imperative; None if its style is ``other``."""
    style, verb = first_verb(sentence)
    return None if style == "other" else _replace_first(sentence, verb)


def to_third_person(sentence: str) -> str | None:
    """Return the sentence with its first word in the third person; None if its style is ``other``."""
    style, verb = first_verb(sentence)
    return None if style == "other" else _replace_first(sentence, THIRD_OF[verb])


def has_second_verb(sentence: str) -> bool:
    """Say if a later verb, behind a conjunction or a comma, would have to change with the first one."""
    return any(word.lower() in THIRD_OF or word.lower() in BASE_OF for word in _LATER.findall(sentence))


def _replace_first(sentence: str, word: str) -> str:
    match = FIRST_WORD.match(sentence)
    if match is None:
        raise ValueError(f"sentence={sentence!r} begins with no word; check style_of(sentence) first")
    word = word.capitalize() if match.group(1)[0].isupper() else word
    return word + sentence[match.end() :]
