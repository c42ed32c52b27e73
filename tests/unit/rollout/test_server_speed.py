"""Which speeds of rollout servers are reported, from numbers alone; test_server.py has a server that delays."""

import pytest

from sheeprlhf.rollout.server_speed import SpeedWatch

Speeds = list[dict[str, float]]


def reported(speeds: Speeds) -> list[list[str]]:
    """The servers that each rollout reports."""
    said: list[str] = []
    watch, found = SpeedWatch(said.append), []
    for one in speeds:
        watch.add(one)
        found.append([url for url in one if any(f"{url} " in line for line in said)])
        said.clear()
    return found


def test_a_server_slower_than_a_third_of_the_others_is_reported_once() -> None:
    """The median of 90, 30 and 60 is 60: 21 is more than a third of it, 19 less."""
    others = {"http://b": 90.0, "http://c": 30.0, "http://d": 60.0}
    assert reported([{"http://a": 21.0, **others}] * 9) == [[]] * 9
    assert reported([{"http://a": 19.0, **others}] * 9) == [[], [], ["http://a"], *[[]] * 6]


def test_a_single_server_is_compared_with_its_earlier_rollouts() -> None:
    speeds = [100.0, 100.0, 100.0, 30.0, 30.0, 90.0, 30.0, 30.0, 30.0, 30.0]
    assert reported([{"http://a": speed} for speed in speeds]) == [*[[]] * 8, ["http://a"], []]


@pytest.mark.parametrize("speeds", [[9.0, 1.0, 1.0, 1.0, 1.0], [30.0, 20.0, 14.0, 10.0, 10.0, 10.0, 10.0]])
def test_a_first_rollout_or_a_gradual_change_is_not_reported(speeds: list[float]) -> None:
    assert not any(reported([{"http://a": speed} for speed in speeds]))


def test_the_message_names_server_and_speeds() -> None:
    said: list[str] = []
    watch = SpeedWatch(said.append)
    for _ in range(3):
        watch.add({"http://a": 4.5, "http://b": 150.0})
    [line] = said
    assert all(part in line for part in ("http://a ", "4.5 ", "150 "))
