"""Reward functions: find one by name, bind its parameters by name, call it, check its scores and report its errors."""

import asyncio
import functools
import inspect
import math
import os
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import closing
from pkgutil import resolve_name
from typing import Any, NamedTuple

from sheeprlhf.config.reward_checks import source_problems
from sheeprlhf.reward import functions
from sheeprlhf.reward.score import ModelScores, Texts
from sheeprlhf.security.user_calls import (
    Arguments,
    Failure,
    FunctionCaller,
    TimedOutError,
    describe_exception,
    import_function,
    is_async,
)
from sheeprlhf.structure.reward import BUILTINS, JUDGE, BuiltinOptionsConfig, RewardSourceConfig
from sheeprlhf.utils.errors import ConfigError, RewardError

PROMPTS = "prompts"
RESPONSES = ("responses", "completions")  # two names of the same texts
TEXTS = (PROMPTS, *RESPONSES)
TOKENS = "completion_ids"  # the tokens of the responses, for functions that name it
_SHOWN = 200  # characters of a text in a message
_SHOWN_SIGNATURE = 120
_SECONDS_OF_SEARCH = 5.0  # for the text at which a function raises
_IDS = ": these token ids are not passed to reward functions; take the texts, or completion_ids"
_TRAINER = ": it is an argument of TRL's trainer, which is not passed: give the parameter a default value"
_FIXES = {
    "reference": ": it is the row's own response, so give every row one, or choose another reward",
    "episode_reward": ": give rollout.environment",
    **dict.fromkeys(("trainer_state", "log_extra", "log_metric"), _TRAINER),
    **dict.fromkeys(("prompt_ids", "completions_ids", "prompts_ids"), _IDS),
}


class Signature(NamedTuple):
    """Parameters of a reward function by name."""

    texts: tuple[str, ...]  # those that get prompts or responses
    columns: dict[str, bool]  # those that get a column of the data, each with whether it is required
    every_column: bool  # it also takes all other columns (`**columns`)
    positional: tuple[str, ...] = ()  # parameters that can only be passed by position, in order
    reserved: frozenset[str] = frozenset()  # names never passed: arguments bound by a `functools.partial`

    def missing(self, available: Collection[str]) -> str | None:
        """Return the first required column that is not available; None if all are."""
        return next((name for name, required in self.columns.items() if required and name not in available), None)

    def arguments(self, scored: Texts) -> Arguments:
        """Return the positional and the keyword arguments of a call; each list is a copy."""
        columns, ids = scored.columns, [list(one) for one in scored.completion_ids]
        texts: dict[str, list[Any]] = {
            PROMPTS: scored.prompts,
            **dict.fromkeys(RESPONSES, scored.responses),
            TOKENS: ids,
        }
        values: dict[str, Any] = {name: list(texts[name]) for name in self.texts}
        values |= {
            name: list(columns[name])
            for name in (columns if self.every_column else self.columns)
            if name in columns and name not in (*TEXTS, TOKENS) and name not in self.reserved
        }
        positional = []
        for name in self.positional:
            if name not in values:  # an optional column that the data lacks: so are all that follow
                break
            positional.append(values.pop(name))
        return positional, {name: value for name, value in values.items() if name not in self.positional}


def signature_of(name: str, function: Callable[..., Any]) -> Signature:
    """The parameters of a reward function, method, partial or callable object. Raises ConfigError for others."""
    plain = name.rpartition(":")[2].rpartition(".")[2]
    expected = f"write def {plain}(prompts, responses, **columns), or name the columns that it needs"
    if inspect.isclass(function):
        raise ConfigError(f"reward {name} is a class: give the name of a function or of an instance of it")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise ConfigError(f"reward {name} has no signature for arguments by name: wrap it: {expected}") from None
    parameters = list(signature.parameters.values())
    passed = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    every = any(p.kind is p.VAR_KEYWORD for p in parameters)
    rest = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    reserved = frozenset(function.keywords) if isinstance(function, functools.partial) else frozenset()
    texts = tuple(p.name for p in passed if p.name in (*TEXTS, TOKENS) and p.name not in reserved)
    shown = str(signature)
    shown = shown if len(shown) <= _SHOWN_SIGNATURE else f"{shown[:_SHOWN_SIGNATURE]}..."
    if rest and every and not passed:
        raise ConfigError(
            f"reward {name} takes {shown}: arguments are passed by name, and this does not tell which: {expected}; "
            "a decorator keeps the signature with functools.wraps"
        )
    if not any(text in RESPONSES for text in texts) and not every:
        advice = f"no parameter is called responses (or completions): {expected}"
        raise ConfigError(f"reward {name} takes {shown}, and arguments are passed by name: {advice}")
    if every:
        unnamed = (PROMPTS,) if any(text in RESPONSES for text in texts) else TEXTS
        texts += tuple(text for text in unnamed if text not in texts and text not in reserved)
    columns = {p.name: p.default is p.empty for p in passed if p.name not in (*TEXTS, TOKENS, *reserved)}
    positional = tuple(p.name for p in passed if p.kind is p.POSITIONAL_ONLY)
    return Signature(texts, columns, every, positional, reserved)


class RewardFunction:
    """A reward function, called with the arguments of its signature. Raises ConfigError for another signature.

    `of_tokens` are the rewards of each response's tokens of the newest call; None if it gave scores of responses.
    """

    def __init__(
        self,
        name: str,  # in the configuration
        function: Callable[..., Any],  # takes `prompts`, `responses` or `completions`, and columns
        *,
        folder: str | None = None,  # importable during each call
        guarded: bool = True,  # turn exceptions into `RewardError`; a model's errors have advice already
        num_workers: int = 0,  # calls at once, with one response each: tasks (async) or processes; 0: one call with all
        timeout: float | None = None,  # seconds of an asynchronous call, or of a call in a process; None: no limit
    ) -> None:
        self.name, self.function = name, function
        self._guarded, self._num_workers = guarded, num_workers
        self._caller = FunctionCaller(name, function, folder, num_workers, timeout)
        self.signature = signature_of(name, function)
        self.of_tokens: list[list[float]] | None = None

    @property
    def failures(self) -> int | None:
        """Responses of the newest call that a judge gave no score; None for another function."""
        return getattr(self.function, "failures", None) if self.name == JUDGE else None

    def missing_column(self, columns: Collection[str], rows: str = "the data") -> str | None:
        """A message about a required column that is not among these; None if the function can be called."""
        missing = self.signature.missing(columns)
        if missing is None:
            return None
        names = [name[:40] if name[:40].isprintable() else ascii(name[:40]) for name in columns]
        available = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "none"
        fix = _FIXES.get(missing, "")
        return f"reward {self.name} needs a column {missing!r} of {rows}; there is {available}{fix}"

    def __call__(self, texts: Texts) -> list[float]:
        """Return one finite score for each response. Raises RewardError, which shows prompt and response."""
        missing, self.of_tokens = self.missing_column(texts.columns), None
        if missing is not None:
            raise RewardError(missing)
        scores = self._scores_of_each(texts) if self._num_workers else self._scores_of_all(texts)
        if self.of_tokens is not None and len(self.of_tokens) != len(scores):
            raise RewardError(
                f"reward {self.name} returned numbers for the tokens of {len(self.of_tokens)} of {len(scores)} "
                "responses: give back a number for each response, or a list for each"
            )
        return scores

    def _scores_of_all(self, texts: Texts) -> list[float]:
        try:
            returned = self._caller.call(self.signature.arguments(texts))
        except TimedOutError as error:
            raise RewardError(f"reward {self.name} {error}") from error
        except (Exception, asyncio.CancelledError) as error:
            if not self._guarded:
                raise
            raise RewardError(self._error_message(error, texts)) from error
        return self._check_scores(returned, texts)

    def _scores_of_each(self, texts: Texts) -> list[float]:
        """Call the function with one response at a time, several at once; scores are in the order of the responses."""
        rows = [_row_of(texts, row) for row in range(len(texts.responses))]
        arguments = [self.signature.arguments(row) for row in rows]
        scores: list[float] = []
        with closing(self._caller.call_each(arguments)) as results:
            for number, (row, result) in enumerate(zip(rows, results, strict=True), 1):
                if isinstance(result, Failure):
                    place = f"for response {number} of {len(rows)}"
                    raise RewardError(f"reward {self.name} {result.message}, {place}\n{_show(row, 0)}")
                scores += self._check_scores(result, row)
        return scores

    def _check_scores(self, returned: Any, texts: Texts) -> list[float]:
        count = len(texts.responses)
        if hasattr(returned, "tolist"):  # numpy, torch
            returned = returned.tolist()
        if isinstance(returned, str | bytes | Mapping) or not isinstance(returned, Iterable):
            kind = "None" if returned is None else f"a {type(returned).__name__}"
            raise RewardError(f"reward {self.name} returned {kind}: give back a list of {count} numbers")
        values = list(returned)
        if len(values) != count:
            raise RewardError(f"reward {self.name} returned {len(values)} scores for {count} responses: give one each")
        scores: list[float] = []
        for row, value in enumerate(values):
            value = value.tolist() if hasattr(value, "tolist") else value
            if isinstance(value, list | tuple) and texts.completion_ids:
                value = self._sum_of_tokens(list(value), texts, row)
            score = _as_float(value)
            if score is None or not math.isfinite(score):
                reason = "which is not a number" if score is None else "which is not finite"
                if value is None:
                    reason += " (give one to each response, for example 0.0 where the function does not apply)"
                raise RewardError(
                    f"reward {self.name} returned {_shorten(value)}, {reason}, for response {row + 1} of {count}\n"
                    f"{_show(texts, row)}"
                )
            scores.append(score)
        return scores

    def _sum_of_tokens(self, values: list[Any], texts: Texts, row: int) -> float:
        """Keep the rewards of a response's tokens; return their sum."""
        numbers, count = [_as_float(value) for value in values], len(texts.completion_ids[row])
        finite = [number for number in numbers if number is not None and math.isfinite(number)]
        if len(finite) != count or len(numbers) != count:
            raise RewardError(
                f"reward {self.name} returned {len(finite)} finite numbers of {len(numbers)} for the {count} tokens of "
                f"response {row + 1}: give back one for each of its completion_ids\n{_show(texts, row)}"
            )
        self.of_tokens = [*(self.of_tokens or []), finite]
        return math.fsum(finite)

    def _error_message(self, error: BaseException, texts: Texts) -> str:
        code = getattr(inspect.unwrap(self.function), "__code__", None)
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
        place = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
        message = f"reward {self.name} raised {describe_exception(error)}{place}"
        if isinstance(error, TypeError) and "string indices" in str(error):  # completion[0]["content"]
            message += f": {', '.join(self.signature.texts)} are texts, not lists of messages"
        row = self._row_that_raises(type(error), texts)
        if row is not None:
            return f"{message}\n{_show(texts, row)}"
        if not texts.responses:
            return message
        first = f"no response alone was found to raise it; the first of the {len(texts.responses)}:"
        return f"{message}\n{first}\n{_show(texts, 0)}"

    def _row_that_raises(self, kind: type[BaseException], texts: Texts) -> int | None:
        """Return the first response with which alone the function raises the same; None if none is found in time."""
        end = time.monotonic() + _SECONDS_OF_SEARCH
        for row in range(len(texts.responses)):
            if time.monotonic() > end:
                return None
            try:
                self._caller.call(self.signature.arguments(_row_of(texts, row)))
            except kind:
                return row
            except Exception:
                continue
        return None


def _row_of(texts: Texts, row: int) -> Texts:
    """Return one response alone."""
    return texts._replace(
        prompts=texts.prompts[row : row + 1],
        responses=texts.responses[row : row + 1],
        columns={name: values[row : row + 1] for name, values in texts.columns.items()},
        completion_ids=texts.completion_ids[row : row + 1],
    )


def load_term(source: str, cfg: RewardSourceConfig, model_scores: ModelScores | None = None) -> RewardFunction:
    """Load a reward model, the judge, a built-in or the user's function. Raises ConfigError if there is none."""
    if model_scores is not None:

        def model(prompts: list[str], responses: list[str]) -> list[float]:
            return model_scores(prompts, responses)

        return RewardFunction(source, model, guarded=False)
    problems = [] if source == JUDGE else list(source_problems("reward: ", source))
    if problems:
        raise ConfigError(*problems)
    if source == JUDGE:
        judge = resolve_name("sheeprlhf.reward.judge:Judge")  # slow to import
        return RewardFunction(JUDGE, judge(cfg), guarded=False)
    if source not in BUILTINS:
        folder, num_workers = os.getcwd(), getattr(cfg, "num_workers", 0)
        own, timeout = import_function(source, folder), getattr(cfg, "timeout", None)
        if timeout is not None and not num_workers and not is_async(own):
            raise ConfigError(
                f"reward.timeout={timeout:g} cannot stop {source}, a plain function in the training process: give "
                "reward.num_workers=1 or more"
            )
        return RewardFunction(source, own, folder=folder, num_workers=num_workers, timeout=timeout)
    function: Callable[..., Any] = getattr(functions, source)
    if source in ("length", "regex"):
        assert isinstance(cfg, BuiltinOptionsConfig)
        names = ("target_length", "length_unit") if source == "length" else ("pattern",)
        function = functools.partial(function, **{name: getattr(cfg, name) for name in names})
    return RewardFunction(source, function)


def _as_float(value: Any) -> float | None:
    if isinstance(value, str | bytes | bytearray):  # float() reads them
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _show(texts: Texts, row: int) -> str:
    return f"prompt: {_shorten(texts.prompts[row])}\nresponse: {_shorten(texts.responses[row])}"


def _shorten(value: Any) -> str:
    """Return a value on one line, without control characters; of a long one the beginning and the end."""
    text = repr(value)
    half = _SHOWN // 2
    return text if len(text) <= _SHOWN else f"{text[:half]} ... {text[-half:]}"
