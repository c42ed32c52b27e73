"""Functions called with one response at a time: in processes, or as tasks of an event loop."""

import asyncio
import os
import time
from pathlib import Path

import pytest

from sheeprlhf.config.reward_checks import reward_problems
from sheeprlhf.reward.call import RewardFunction, load_term
from sheeprlhf.reward.score import Texts
from sheeprlhf.structure.reward import FunctionRewardConfig
from sheeprlhf.utils.errors import ConfigError, RewardError

CODE = """\
import asyncio, os, time
import numpy as np
now, most = 0, 0

def length(responses, answer):
    time.sleep(0.02 * (3 - int(answer[0]) % 4))
    return np.array([len(response) + int(own) for response, own in zip(responses, answer, strict=True)])

def process(responses):
    return [float(os.getpid())]

def strict(responses):
    return [1 / (response != "bad") for response in responses]

def two(responses):
    return [1.0, 2.0]

def ends(responses):
    os._exit(3)

def hangs(responses):
    while responses == ["slow"]:
        pass
    return [1.0]

async def waits(responses, answer):
    global now, most
    now += 1
    most = max(most, now)
    await asyncio.sleep(0.05 - int(answer[0]) / 200)
    now -= 1
    return [float(answer[0]) + most / 100]

async def answers_task(responses, answer):
    await asyncio.sleep(0)
    return [float(one) for one in answer]

async def strict_task(responses):
    return strict(responses)

async def hangs_task(responses):
    await asyncio.sleep(60 * (responses == ["slow"]))
    return [1.0]
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current directory."""
    name = f"parallel_rewards_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return name


def texts_of(*responses: str) -> Texts:
    count = len(responses)
    answers = {"answer": [str(row) for row in range(count)]}
    return Texts(["prompt"] * count, list(responses), [True] * count, [1] * count, answers)


def load(own: str, name: str, **options: object) -> RewardFunction:
    return load_term(f"{own}:{name}", FunctionRewardConfig(path=f"{own}:{name}", **options))


def test_processes_keep_the_order(own: str) -> None:
    texts = texts_of("a", "bb", "", "dddd", "e")
    function = load(own, "length", num_workers=2)
    assert function(texts) == load(own, "length")(texts) == [1.0, 3.0, 2.0, 7.0, 5.0]
    pids = set(load(own, "process", num_workers=2)(texts))
    assert len(pids) <= 2 and os.getpid() not in pids


def test_tasks_keep_the_order_and_the_limit(own: str) -> None:
    scores = load(own, "waits", num_workers=3)(texts_of(*"abcdefgh"))
    assert [int(score) for score in scores] == list(range(8))
    assert max(score % 1 for score in scores) == pytest.approx(0.03)  # three at once, never four


def test_tasks_run_where_an_event_loop_runs(own: str) -> None:
    """As in a notebook; every call has the same loop of its own."""
    for num_workers in (0, 3):
        function = load(own, "answers_task", num_workers=num_workers)

        async def cell(function: RewardFunction = function) -> list[list[float]]:
            return [function(texts_of(*"abc")), function(texts_of("a"))]

        assert asyncio.run(cell()) == [[0.0, 1.0, 2.0], [0.0]]


@pytest.mark.parametrize("name", ["strict", "strict_task"])
def test_an_exception_names_the_row_and_the_line(name: str, own: str) -> None:
    with pytest.raises(RewardError, match="response 2 of 3") as info:
        load(own, name, num_workers=2)(texts_of("good", "bad", "bad"))
    assert "ZeroDivisionError" in str(info.value) and f"{own}.py, line 13" in str(info.value)


def test_what_is_not_one_number_names_its_row(own: str) -> None:
    with pytest.raises(RewardError, match="2 scores for 1 response"):
        load(own, "two", num_workers=1)(texts_of("a"))


def test_a_process_that_ends_is_reported(own: str) -> None:
    with pytest.raises(RewardError, match=r"reward\.num_workers"):
        load(own, "ends", num_workers=1)(texts_of("a", "b"))


@pytest.mark.parametrize(("name", "num_workers"), [("hangs", 1), ("hangs_task", 2), ("hangs_task", 0)])
def test_a_timeout(name: str, num_workers: int, own: str) -> None:
    function = load(own, name, num_workers=num_workers, timeout=0.5)
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"reward\.timeout=0\.5"):
        function(texts_of(*(("quick", "slow") if num_workers else ("slow",))))
    assert time.monotonic() - began < 20
    assert function(texts_of("quick")) == [1.0]


def test_options_that_do_nothing_are_rejected(own: str) -> None:
    with pytest.raises(ConfigError, match=r"reward\.num_workers"):
        load(own, "hangs", timeout=1.0)
    [problem] = reward_problems(FunctionRewardConfig(num_workers=2))
    assert "reward.num_workers=2" in problem
