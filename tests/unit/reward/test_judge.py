"""The judge against a real server on loopback: requests, concurrency, retries, failures, keys, and checks before."""

import asyncio
import socket
import time
from dataclasses import replace
from typing import Any

import pytest

from sheeprlhf.config.reward_checks import reward_problems
from sheeprlhf.reward.judge import check_server, parse_score, receiver_notice
from sheeprlhf.reward.score import RawScores, Texts, build_reward, check_columns, wanted_columns
from sheeprlhf.structure.reward import JudgeRewardConfig, ListRewardConfig
from sheeprlhf.utils import http
from sheeprlhf.utils.errors import ConfigError, RewardError
from tests.support.judge_server import judge_server

KEY = "a-key-of-nobody-1234567890"
SETTINGS: dict[str, Any] = {"judge_model": "judge-1", "judge_prompt": "{prompt}|{response}"}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_FIRST_WAIT", 0.01)


def texts_of(*responses: str, **columns: list[Any]) -> Texts:
    count = len(responses)
    return Texts([f"p{row}" for row in range(count)], list(responses), [True] * count, [3] * count, columns)


def raw_scores(cfg: JudgeRewardConfig, texts: Texts) -> RawScores:
    return build_reward(cfg, None, default=None, max_tokens=8).raw(texts)


def test_requests_are_concurrent_and_scores_in_order() -> None:
    """Twelve questions, answered after times that reverse their order, at most four at once."""

    def reply(question: str, _: int) -> tuple[int, str]:
        number = int(question.partition("|")[2])
        time.sleep(0.12 - number / 100)
        return 200, f"{number / 2:g}"

    with judge_server(reply) as server:
        cfg = JudgeRewardConfig(url=f"{server.url}/", num_workers=4, **SETTINGS)
        found = raw_scores(cfg, texts_of(*map(str, range(12))))
        assert found.by_term == {"judge": [row / 2 for row in range(12)]} and found.failures == 0
        assert 2 <= server.most <= 4
        assert {request.path for request in server.requests} == {"/v1/chat/completions"}
        body = next(request.body for request in server.requests if request.body["messages"][0]["content"] == "p7|7")
        assert body == {
            "model": "judge-1",
            "messages": [{"role": "user", "content": "p7|7"}],
            "temperature": 0,
            "max_tokens": 256,
        }


def test_it_is_asked_where_an_event_loop_runs() -> None:
    """As in a notebook."""
    with judge_server(lambda *_: (200, "3")) as server:
        cfg = JudgeRewardConfig(url=server.url, **SETTINGS)

        async def cell() -> RawScores:
            check_server(cfg)
            return raw_scores(cfg, texts_of("a", "b"))

        assert asyncio.run(cell()).total == [3.0, 3.0]


def test_columns_fill_the_prompt_and_braces_in_texts_stay() -> None:
    with judge_server(lambda *_: (200, "3")) as server:
        cfg = JudgeRewardConfig(url=server.url, **SETTINGS | {"judge_prompt": "{{{answer}}} {response}"})
        assert wanted_columns(cfg, default=None) == (("answer",), False)
        with pytest.raises(ConfigError, match="answer"):
            check_columns(cfg, ["prompt"], default=None)
        raw_scores(cfg, texts_of("{prompt}", answer=[{"x": 1}]))
        assert server.requests[0].body["messages"][0]["content"] == "{{'x': 1}} {prompt}"


@pytest.mark.parametrize(
    "first",
    [
        (429, {}, {"Retry-After": "1"}),
        (500, {}),
        (503, {}),
        (200, b"{"),
        (200, {"choices": []}),
        (200, b"text", {"Content-Encoding": "gzip"}),
    ],
)
def test_passing_faults_are_retried(first: Any) -> None:
    with judge_server(lambda _, attempt: first if attempt < 3 else (200, "Score: 4/10")) as server:
        assert raw_scores(JudgeRewardConfig(url=server.url, **SETTINGS), texts_of("r")).total == [4.0]
        times = [request.time for request in server.requests]
        assert len(times) == 3
        if first[0] == 429:
            assert times[1] - times[0] >= 1.0


@pytest.mark.parametrize(
    ("reply", "attempts", "said"),
    [
        ((500, {"error": KEY}), 4, "500"),
        ((400, {}), 1, "400"),
        ((200, "no idea"), 1, "judge_pattern"),
        ((200, "11"), 1, "judge_range"),
    ],
)
def test_a_failure_ends_the_run_or_gets_its_score(
    reply: Any, attempts: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUDGE_ACCESS", KEY)

    def answer(question: str, _: int) -> Any:
        return reply if question.endswith("bad") else (200, "5")

    with judge_server(answer) as server:
        cfg = JudgeRewardConfig(url=server.url, api_key_variable="JUDGE_ACCESS", **SETTINGS)
        with pytest.raises(RewardError, match="response 2 of 3") as info:
            raw_scores(cfg, texts_of("a", "bad", "c"))
        assert said in str(info.value) and "judge_failure_score" in str(info.value) and KEY not in str(info.value)
        assert sum(request.body["messages"][0]["content"].endswith("bad") for request in server.requests) == attempts
        cfg = replace(cfg, judge_failure_score=-1.5)
        found = raw_scores(cfg, texts_of("a", "bad", "c"))
        assert (found.total, found.failures) == ([5.0, -1.5, 5.0], 1)
        assert KEY not in capsys.readouterr().err
        with pytest.raises(RewardError):  # if all fail, the server is at fault
            raw_scores(cfg, texts_of("bad", "bad"))
        assert {request.authorization for request in server.requests} == {f"Bearer {KEY}"}


def test_a_slow_server() -> None:
    def reply(_: str, attempt: int) -> tuple[int, str]:
        time.sleep(1.0 if attempt == 1 else 0.0)
        return 200, "5"

    with judge_server(reply) as server:
        cfg = JudgeRewardConfig(url=server.url, timeout=0.3, judge_retries=0, **SETTINGS)
        with pytest.raises(RewardError, match=r"reward\.timeout=0\.3"):
            raw_scores(cfg, texts_of("r"))
        assert raw_scores(replace(cfg, judge_retries=1), texts_of("s")).total == [5.0]


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_what_no_retry_can_help_ends_the_run_at_once(status: int) -> None:
    with judge_server(lambda *_: (status, {}, {"Location": "http://127.0.0.1:9/"})) as server:
        cfg = JudgeRewardConfig(url=server.url, judge_failure_score=0.0, num_workers=1, **SETTINGS)
        with pytest.raises(RewardError, match=str(status)):
            raw_scores(cfg, texts_of("a", "b", "c"))
        assert len(server.requests) <= 2


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("7", 7.0),
        ("7/10", 7.0),
        ("Score: 2.5. So 2.5 it is", 2.5),
        ("<think>9? 8?</think> 3", 3.0),
        ("3 reasons, so 8", None),
        ("-1", None),
        ("none", None),
        ("inf", None),
    ],
)
def test_the_number_in_an_answer(answer: str, score: float | None) -> None:
    cfg = JudgeRewardConfig()
    if score is None:
        with pytest.raises(ValueError, match=r"reward\.judge_"):
            parse_score(answer, cfg)
    else:
        assert parse_score(answer, cfg) == score
    assert parse_score("rated 3 [[1.5]]", replace(cfg, judge_pattern=r"\[\[([\d.]+)\]\]")) == 1.5


def test_a_term_of_a_weighted_sum() -> None:
    with judge_server(lambda *_: (200, "4")) as server:
        cfg = ListRewardConfig(terms=["0.5*judge", "length"], target_length=1, url=server.url, **SETTINGS)
        assert list(reward_problems(cfg)) == []
        assert raw_scores(cfg, texts_of("one")).total == [3.0]  # type: ignore[arg-type]


def test_the_server_is_checked_before_training() -> None:
    with judge_server(lambda *_: (200, "4")) as server:
        cfg = JudgeRewardConfig(url=server.url, **SETTINGS)
        check_server(cfg)
        with pytest.raises(ConfigError, match=r"reward\.judge_model=judge-1"):
            check_server(replace(cfg, judge_model="judge-2"))
        for status, said in ((401, "api_key_variable"), (503, "503"), (307, "redirects")):
            server.models = (status, {})
            with pytest.raises(ConfigError, match=said):
                check_server(cfg)
        server.models = (404, {})  # a server without a list
        check_server(cfg)
        assert server.requests == []


@pytest.mark.parametrize(
    ("host", "warns"), [("http://127.0.0.1", False), ("https://host", False), ("http://host", True)]
)
def test_the_notice_names_the_receiver_and_what_it_gets(host: str, warns: bool) -> None:
    cfg = JudgeRewardConfig(url=f"{host}/v1", judge_prompt="{response} {answer}", api_key_variable="JUDGE_ACCESS")
    notice = receiver_notice(cfg)
    assert f"{host}/v1" in notice and "answer" in notice and ("JUDGE_ACCESS" in notice) is warns


@pytest.mark.slow
def test_a_silent_address_is_reported_within_five_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts and never answers
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        for _ in range(2):  # then nothing listens
            began = time.monotonic()
            with pytest.raises(ConfigError, match=r"reward\.url"):
                check_server(JudgeRewardConfig(url=address, **SETTINGS))
            assert time.monotonic() - began < 15  # this machine may be busy with other tests
            listener.close()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"url": None}, "reward.url"),
        ({"url": "ftp://host/v1"}, "reward.url"),
        ({"url": "http://"}, "reward.url"),
        ({"url": "http://host:99999/v1"}, "reward.url"),
        ({"url": f"https://me:{KEY}@host/v1"}, "reward.url"),
        ({"url": f"https://host/v1?key={KEY}"}, "reward.url"),
        ({"url": "https://host/v1/chat/completions"}, "reward.url"),
        ({"judge_model": None}, "reward.judge_model"),
        ({"judge_prompt": "{prompt}"}, "reward.judge_prompt"),
        ({"judge_prompt": "{response.x}"}, "reward.judge_prompt"),
        ({"judge_prompt": "{response"}, "reward.judge_prompt"),
        ({"judge_pattern": "("}, "reward.judge_pattern"),
        ({"judge_range": [1.0, 1.0]}, "reward.judge_range"),
        ({"judge_failure_score": float("nan")}, "reward.judge_failure_score"),
        ({"api_key_variable": f"{KEY}"}, "reward.api_key_variable"),
        ({"api_key_variable": "NOT_SET_ANYWHERE"}, "reward.api_key_variable"),
    ],
)
def test_invalid_options(options: dict[str, Any], named: str) -> None:
    [problem] = reward_problems(JudgeRewardConfig(**{"url": "http://127.0.0.1:1/v1", "judge_model": "m"} | options))
    assert named in problem and KEY not in problem


def test_options_of_a_judge_that_no_term_reads() -> None:
    problems = list(
        reward_problems(ListRewardConfig(terms=["length"], target_length=1, url="http://h/v1", timeout=3.0))
    )
    assert {word for problem in problems for word in problem.split() if word.startswith("reward.")} == {
        "reward.url",
        "reward.timeout=3.0",
    }
