"""Rewards whose best answers are known, for `reward.path=tests.support.rewards:<name>`."""

import string


def bandit(prompts: list[str], responses: list[str]) -> list[float]:
    """Sixteen arms: an ASCII character pays its code modulo 16, from 0 to 1; anything else nothing."""
    return [ord(response[0]) % 16 / 15 if response[:1].isascii() and response else 0.0 for response in responses]


def letters(prompts: list[str], responses: list[str]) -> list[float]:
    """The share of characters that are small letters; 26 of 260 tokens are."""
    return [sum(c in string.ascii_lowercase for c in response) / max(1, len(response)) for response in responses]


def letter_tokens(responses: list[str], completion_ids: list[list[int]]) -> list[list[float]]:
    """Rewards of tokens of `byte_tokenizer`: a quarter for each small letter."""
    return [[0.25 * (64 <= token <= 89) for token in ids] for ids in completion_ids]


def small_or_capital(responses: list[str], completion_ids: list[list[int]]) -> list[float]:
    """The share of small letters in a response that a digit ended, of capitals in one that was cut.

    Of tokens of `byte_tokenizer`, as above.
    """
    ended = [15 <= ids[-1] <= 24 for ids in completion_ids]
    wanted = [string.ascii_lowercase if of_digit else string.ascii_uppercase for of_digit in ended]
    return [sum(c in right for c in text) / max(1, len(text)) for text, right in zip(responses, wanted, strict=True)]


def spread(prompts: list[str], responses: list[str]) -> list[float]:
    """Another number for nearly every response."""
    return [sum((i + 1) * ord(c) % 97 for i, c in enumerate(response)) % 53 / 53 for response in responses]


def raises(prompts: list[str], responses: list[str]) -> list[float]:
    """A mistake of a user."""
    raise KeyError("no such thing")


def by_answer(completions: list[str], answer: list[str], meta: list[dict[str, int]], **columns: list[object]) -> list:
    """Asks for the columns of its file; fails where an entry is not that of the prompt's row."""
    prompts = columns["prompts"]
    for prompt, right, one in zip(prompts, answer, meta, strict=True):
        if f"{right}?" not in str(prompt) or one != {"level": int(right), "tags": [None, "a"]}:
            raise ValueError(f"{prompt!r} has answer {right!r} and meta {one!r}")
        one["level"] = -1  # which no other entry may notice
    return [float(right in text) for text, right in zip(completions, answer, strict=True)]


async def slow_answer(responses: list[str], answer: list[str]) -> list[float]:
    """The same, awaited."""
    return [float(right in text) for text, right in zip(responses, answer, strict=True)]
