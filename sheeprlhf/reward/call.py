"""One reward function: called with what it asks for, its answer checked, its mistakes told in one message."""

import asyncio
import inspect
import math
import time
import traceback
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from sheeprlhf.reward.signature import signature_of
from sheeprlhf.utils.errors import RewardError

_SHOWN = 200  # characters of a text in a message
_SECONDS_OF_SEARCH = 5.0  # for the text at which a function raises
_IDS = ": token ids are not passed to reward functions; take the texts: responses"
_FIXES = {
    "reference": ": it is the row's own response, so give every row one, or choose another reward",
    **dict.fromkeys(("completion_ids", "prompt_ids", "completions_ids", "prompts_ids"), _IDS),
}


class Texts(NamedTuple):
    """Responses to score, in one order on all ranks.

    Attributes:
        prompts: one a response.
        responses: without end token and stop string.
        finished: an end token or a stop string ended the response; False if it was cut.
        num_tokens: tokens of each response, the end token not counted, those of a stop string counted.
        columns: more of each row by name, one entry for each response, for example {"answer": [...]}.
    """

    prompts: list[str]
    responses: list[str]
    finished: list[bool]
    num_tokens: list[int]
    columns: Mapping[str, list[Any]]


class RewardFunction:
    """A function of prompts and responses under its name.

    Args:
        name: how the configuration names it.
        function: called with the arguments that its signature names: `prompts`, `responses` or `completions`, and
            columns; an awaitable that it returns is awaited.
        around: entered for the time of each call.
        guarded: turn its exceptions into `RewardError`; not for a model, whose errors have advice of their own.

    Attributes:
        signature: its parameters.

    Raises:
        ConfigError: its signature is not that of a reward function.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
        guarded: bool = True,
    ) -> None:
        self.name, self.function = name, function
        self._around, self._guarded = around, guarded
        self.signature = signature_of(name, function)
        self._runner: asyncio.Runner | None = None

    def lacks(self, columns: Collection[str], rows: str = "the data") -> str | None:
        """What it asks for besides these columns, as a sentence; None if it can be called with them.

        Args:
            columns: names of the columns that there are.
            rows: of which rows, for the sentence.
        """
        lacking = self.signature.missing(columns)
        if lacking is None:
            return None
        have, fix = _listed(columns) or "none", _FIXES.get(lacking, "")
        return f"reward {self.name} needs a column {lacking!r} of {rows}; there is {have}{fix}"

    def __call__(self, texts: Texts) -> list[float]:
        """One finite score a response.

        Raises:
            RewardError: a column is missing; the function raises, or returns anything else. Names prompt and response.
        """
        lacking = self.lacks(texts.columns)
        if lacking is not None:
            raise RewardError(lacking)
        try:
            returned = self._call(texts.prompts, texts.responses, texts.columns)
        except (Exception, asyncio.CancelledError) as error:
            if not self._guarded:
                raise
            raise RewardError(self._raised(error, texts)) from error
        return self._checked(returned, texts)

    def _call(self, prompts: list[str], responses: list[str], columns: Mapping[str, list[Any]]) -> Any:
        """Call the function, and await the result of one that is asynchronous."""
        positional, by_name = self.signature.arguments(prompts, responses, columns)
        with self._around():
            returned = self.function(*positional, **by_name)
            if inspect.isawaitable(returned):
                if self._runner is None:  # one event loop for all calls: clients that the function keeps belong to it
                    self._runner = asyncio.Runner()
                return self._runner.run(_awaited(returned))
        return returned

    def _checked(self, returned: Any, texts: Texts) -> list[float]:
        count = len(texts.responses)
        if hasattr(returned, "tolist"):  # numpy, torch
            returned = returned.tolist()
        if isinstance(returned, str | bytes | Mapping) or not isinstance(returned, Iterable):
            raise RewardError(f"reward {self.name} returned {_kind(returned)}: give back a list of {count} numbers")
        values = list(returned)
        if len(values) != count:
            raise RewardError(
                f"reward {self.name} returned {len(values)} scores for {count} responses: give back one for each"
            )
        scores = [_number(value) for value in values]
        for row, (value, score) in enumerate(zip(values, scores, strict=True)):
            if score is None or not math.isfinite(score):
                what = "which is no number" if score is None else "which is not finite"
                if value is None:
                    what += " (give one to each response, for example 0.0 where the function does not apply)"
                raise RewardError(
                    f"reward {self.name} returned {_short(value)}, {what}, for response {row + 1} of {count}\n"
                    f"{_shown(texts, row)}"
                )
        return [score for score in scores if score is not None]

    def _raised(self, error: BaseException, texts: Texts) -> str:
        message = f"reward {self.name} raised {said_by(error)}{_place(error, self.function)}"
        row = self._row_that_raises(type(error), texts)
        if row is not None:
            return f"{message}\n{_shown(texts, row)}"
        if not texts.responses:
            return message
        first = f"no response alone was found to raise it; the first of the {len(texts.responses)}:"
        return f"{message}\n{first}\n{_shown(texts, 0)}"

    def _row_that_raises(self, kind: type[BaseException], texts: Texts) -> int | None:
        """The first response with which alone the function raises the same; None if none is found in a few seconds."""
        end = time.monotonic() + _SECONDS_OF_SEARCH
        for row, (prompt, response) in enumerate(zip(texts.prompts, texts.responses, strict=True)):
            if time.monotonic() > end:
                return None
            try:
                self._call([prompt], [response], {key: [values[row]] for key, values in texts.columns.items()})
            except kind:
                return row
            except Exception:
                continue
        return None


async def _awaited(returned: Awaitable[Any]) -> Any:
    """A coroutine of any awaitable."""
    return await returned


def _number(value: Any) -> float | None:
    if isinstance(value, str | bytes | bytearray):  # float() reads them
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def said_by(error: BaseException) -> str:
    """Kind and message of somebody's exception, on one line, without control characters, of limited length."""
    words = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {''.join(c if c.isprintable() else '?' for c in words[: 2 * _SHOWN])}"


def _place(error: BaseException, function: Callable[..., Any]) -> str:
    """Where in the user's file it happened, as far as its traceback tells."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""


def _listed(names: Collection[str]) -> str:
    """Names of columns for a message: a dozen at most, shortened, control characters escaped."""
    shown = [name[:40] if name[:40].isprintable() else ascii(name[:40]) for name in names]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


def _shown(texts: Texts, row: int) -> str:
    return f"prompt: {_short(texts.prompts[row])}\nresponse: {_short(texts.responses[row])}"


def _short(value: Any) -> str:
    """On one line, without control characters; of a long one the beginning and the end."""
    text = repr(value)
    half = _SHOWN // 2
    return text if len(text) <= _SHOWN else f"{text[:half]} ... {text[-half:]}"
