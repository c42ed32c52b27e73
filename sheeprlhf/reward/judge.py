"""Scores by a language model at an OpenAI-compatible server: prompts, requests with retries, and numbers in answers.

Each request holds the filled `reward.judge_prompt`, the model's name and the sampling options, and nothing else. The
key is read from the environment for each call; no message and no file contains it.
"""

import asyncio
import inspect
import math
import os
import re
import sys
from typing import Any
from urllib.parse import urlsplit

import httpx
from tqdm import tqdm

from sheeprlhf.config.option_checks import nearest
from sheeprlhf.security.redaction import HIDDEN, plain_text
from sheeprlhf.structure.reward import JUDGE_CALLS, JUDGE_TIMEOUT, JudgeOptionsConfig, judge_fields
from sheeprlhf.utils.errors import ConfigError, RewardError
from sheeprlhf.utils.http import (
    SHOWN,
    FailedRequestError,
    RejectedError,
    client,
    describe,
    is_local,
    parse_answer,
    request,
    request_until,
)
from sheeprlhf.utils.processes import run_coroutine

_SECONDS_OF_CHECK = 4.0


class Judge:
    """A reward function that asks a server; its parameters are the fields of the prompt template."""

    def __init__(self, cfg: JudgeOptionsConfig) -> None:
        assert cfg.url is not None
        self._cfg, self.failures = cfg, 0
        keyword = inspect.Parameter.KEYWORD_ONLY
        columns = [name for name in judge_fields(cfg.question()) if name not in ("prompt", "response")]
        names = ("prompts", "responses", *columns)
        self.__signature__ = inspect.Signature([inspect.Parameter(name, keyword) for name in names])

    def __call__(self, prompts: list[str], responses: list[str], **columns: list[Any]) -> list[float]:
        """Return a score for each response; the requests are concurrent, the order is that of the responses.

        Raises:
            RewardError: a request has failed and there is no `reward.judge_failure_score`, or all have.
        """
        fields = [
            {"prompt": prompt, "response": response} | {name: values[row] for name, values in columns.items()}
            for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        ]
        results = run_coroutine(self._scores([self._cfg.question().format(**one) for one in fields]))
        failed = [(row, result) for row, result in enumerate(results) if isinstance(result, FailedRequestError)]
        self.failures = len(failed)
        fallback = self._cfg.judge_failure_score
        if failed:
            row, reason = failed[0]
            problem = f"the judge at {self._cfg.url} gave no score for response {row + 1} of {len(results)}: {reason}"
            if fallback is None or len(failed) == len(results):
                fix = "; reward.judge_failure_score=<number> scores such responses instead" if fallback is None else ""
                raise RewardError(f"{problem}{fix}")
            count = f"{len(failed)} of {len(results)} responses get reward.judge_failure_score={fallback:g}"
            tqdm.write(plain_text(f"warning: {count}: {problem}"), file=sys.stderr)
        return [result if isinstance(result, float) else float(fallback or 0.0) for result in results]

    async def _scores(self, questions: list[str]) -> list[float | FailedRequestError]:
        """Ask all questions, at most `reward.num_workers` at a time; without a fallback the first failure ends it."""
        limit = asyncio.Semaphore(self._cfg.num_workers or JUDGE_CALLS)

        async def ask(server: httpx.AsyncClient, question: str) -> float | FailedRequestError | RewardError:
            async with limit:
                try:
                    return await self._score(server, question)
                except (FailedRequestError, RewardError) as error:
                    return error

        async with _client(self._cfg) as server:
            tasks = [asyncio.ensure_future(ask(server, question)) for question in questions]
            results: list[float | FailedRequestError] = []
            try:
                for task in tasks:
                    result = await task
                    if isinstance(result, RewardError):
                        raise result
                    results.append(result)
                    if isinstance(result, FailedRequestError) and self._cfg.judge_failure_score is None:
                        return [*results, *[0.0] * (len(tasks) - len(results))]
                return results
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _score(self, server: httpx.AsyncClient, question: str) -> float:
        """Ask one question.

        Raises:
            FailedRequestError: no answer after all retries, or no score in it.
            RewardError: the server rejects every request.
        """
        cfg, seconds = self._cfg, self._cfg.timeout or JUDGE_TIMEOUT
        body = {
            "model": cfg.judge_model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": cfg.judge_max_tokens,
        }
        try:
            return await request_until(
                server,
                f"{_base(cfg)}/chat/completions",
                body,
                lambda answer: parse_score(_message(answer), cfg),
                seconds=seconds,
                retries=cfg.judge_retries,
                show=self._shown,
                no_answer=f"no answer within reward.timeout={seconds:g} s",
            )
        except RejectedError as error:
            raise RewardError(f"the judge at {cfg.url}: {error}; {_advice(cfg, error.status)}") from None

    def _shown(self, content: bytes) -> str:
        """Return the beginning of a server's message, without the key if it repeats it."""
        text = " ".join(plain_text(content[: 4 * SHOWN].decode(errors="replace")).split())
        key = _key(self._cfg)
        return (text.replace(key, HIDDEN) if key else text)[:SHOWN] or "nothing"


def parse_score(answer: str, cfg: JudgeOptionsConfig) -> float:
    """Return the number that `reward.judge_pattern` finds behind the reasoning of an answer.

    Raises:
        ValueError: there is none, several different ones, or one outside of `reward.judge_range`.
    """
    text = answer.rpartition("</think>")[2]
    found = {match[match.re.groups] for match in re.finditer(cfg.judge_pattern, text)}
    shown = repr(" ".join(plain_text(text).split())[-SHOWN:])
    try:
        scores = {float(number) for number in found}
    except (TypeError, ValueError):
        raise ValueError(f"reward.judge_pattern finds {sorted(map(str, found))[:3]} in {shown}, not a number") from None
    if len(scores) != 1:
        raise ValueError(f"reward.judge_pattern finds {len(scores) or 'no'} numbers in {shown} instead of one")
    score, (low, high) = scores.pop(), cfg.judge_range
    if not math.isfinite(score) or not low <= score <= high:
        raise ValueError(f"{score:g} is outside of reward.judge_range=[{low:g},{high:g}]")
    return score


def check_server(cfg: JudgeOptionsConfig) -> None:
    """Check before a model is loaded that the server answers, accepts the key and has the model. Sends no text.

    Raises:
        ConfigError: it does not.
    """
    try:
        status, content = run_coroutine(_list_models(cfg))
    except (TimeoutError, httpx.HTTPError, httpx.InvalidURL) as error:
        reason = f"in {_SECONDS_OF_CHECK:g} s" if isinstance(error, TimeoutError) else describe(error)
        raise ConfigError(f"reward.url={cfg.url}: no server answers ({reason}): start it, or give another") from None
    if status in (401, 403) or 300 <= status < 400 or status >= 500:
        raise ConfigError(f"reward.url={cfg.url}: the server answered {status}: {_advice(cfg, status)}")
    try:
        names = [str(model["id"]) for model in parse_answer(content)["data"]] if status == 200 else []
    except (KeyError, TypeError):
        return  # a server without a list of its models
    if names and cfg.judge_model not in names:
        near = nearest(str(cfg.judge_model), names) or names[0]
        advice = f"did you mean reward.judge_model={plain_text(near)[:SHOWN]}?"
        raise ConfigError(f"reward.judge_model={cfg.judge_model}: the server at {cfg.url} has no such model: {advice}")


def receiver_notice(cfg: JudgeOptionsConfig) -> str:
    """Return a line that tells which texts a run sends, and where."""
    columns = [name for name in judge_fields(cfg.question()) if name not in ("prompt", "response")]
    what = " and ".join(["prompts and responses", *(f"the column {name}" for name in columns)])
    plain = cfg.api_key_variable is not None and urlsplit(str(cfg.url)).scheme == "http" and not is_local(str(cfg.url))
    key = f"; warning: http sends the key in {cfg.api_key_variable} unencrypted" if plain else ""
    return f"reward.url={cfg.url} receives {what}; its scores may differ from call to call{key}"


async def _list_models(cfg: JudgeOptionsConfig) -> tuple[int, bytes]:
    address = f"{_base(cfg)}/models"
    async with asyncio.timeout(_SECONDS_OF_CHECK), _client(cfg) as server:
        status, _, content = await request(server, "GET", address)
        return status, content


def _client(cfg: JudgeOptionsConfig) -> httpx.AsyncClient:
    key = _key(cfg)
    return client(str(cfg.url), cfg.timeout or JUDGE_TIMEOUT, {"Authorization": f"Bearer {key}"} if key else None)


def _message(answer: Any) -> str:
    """Return the text of a chat completion.

    Raises:
        KeyError: it is malformed.
    """
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise KeyError("the answer is not a chat completion")
    return text


def _base(cfg: JudgeOptionsConfig) -> str:
    return str(cfg.url).rstrip("/")


def _key(cfg: JudgeOptionsConfig) -> str:
    return os.environ.get(cfg.api_key_variable, "").strip() if cfg.api_key_variable else ""


def _advice(cfg: JudgeOptionsConfig, status: int) -> str:
    if status in (401, 403):
        variable = cfg.api_key_variable
        return f"check the key in {variable}" if variable else "give reward.api_key_variable=<environment variable>"
    if status < 400:
        return "give the address that it redirects to"
    return "give the address up to /v1" if status < 500 else "start it again, or wait until it is ready"
