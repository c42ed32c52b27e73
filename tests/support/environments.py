"""Environments of the tests; their processes import this module alone."""

import os
import time
from typing import Any


class Echo:
    """Environment of the tests: the argument `do` says what happens."""

    def reset(self, row: dict[str, Any]) -> None:
        self.seen = [row["prompt"]]
        if row.get("broken"):
            raise LookupError("no such row")

    def step(self, call: Any) -> Any:
        if call.arguments.get("do") == "raise":
            raise ValueError("wrong")
        if call.arguments.get("do") == "hang":
            time.sleep(60)
        if call.arguments.get("do") == "exit":
            os._exit(1)
        self.seen.append(call.name)
        return " ".join(self.seen), 0.25, call.arguments.get("do") == "end"

    def finish(self, answer: str) -> float:
        return 1.0 + len(answer)


class NeedsMore(Echo):
    """It cannot be constructed without an argument."""

    def __init__(self, limit: int) -> None:
        self.limit = limit


class Lengths:
    """A call returns its argument and the row's answer; an answer scores its share of vowels."""

    def reset(self, row: dict[str, Any]) -> None:
        self.row = row

    def step(self, call: Any) -> tuple[str, float, bool]:
        return f"{call.arguments['text']}{self.row['answer']}", 0.1, False

    def finish(self, answer: str) -> float:
        return sum(letter in "aeiou" for letter in answer) / max(len(answer), 1)


def calls_of_even_texts(text: str, form: str) -> list[Any]:
    """In the place of `episodes.parse_calls`: every message of an even number of characters is a call."""
    from sheeprlhf.rollout.environment_pool import Call

    return [] if len(text) % 2 else [Call("f", {"text": text[:2]})]
