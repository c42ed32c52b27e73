"""Loading ahead: the same results in the same order, whoever loads."""

import threading
import time

import pytest

from sheeprlhf.data.sampler import load_ahead

WORKERS = pytest.mark.parametrize("workers", [0, 1, 2, 5])


@WORKERS
def test_results_keep_their_order(workers: int) -> None:
    def load(item: int) -> int:
        time.sleep(0.002 * (7 - item % 8))  # later items are ready first
        return item * item

    assert list(load_ahead(load, range(30), workers)) == [item * item for item in range(30)]
    assert list(load_ahead(load, [], workers)) == []


@WORKERS
def test_an_exception_comes_where_its_result_would_have(workers: int) -> None:
    def load(item: int) -> int:
        if item == 3:
            raise ValueError("row 3")
        return item

    found = load_ahead(load, range(9), workers)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="row 3"):
        next(found)
    assert list(found) == []


@WORKERS
def test_only_a_few_items_are_loaded_ahead_in_the_right_thread(workers: int) -> None:
    loaded: list[int] = []
    threads: set[str] = set()

    def load(item: int) -> int:
        threads.add(threading.current_thread().name)
        loaded.append(item)
        return item

    found = load_ahead(load, range(1000), workers)
    assert loaded == []  # nothing before the first result is asked for
    assert next(found) == 0
    time.sleep(0.05)
    assert len(loaded) <= 2 * workers + 1
    assert ("MainThread" in threads) == (workers == 0)
    found.close()  # type: ignore[attr-defined]
    count = len(loaded)
    time.sleep(0.05)
    assert len(loaded) <= count + workers  # what was waiting is cancelled
