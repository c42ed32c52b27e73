"""Load in the training thread, or ahead of it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def load_ahead(load: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """`load(item)` for every item, in order, made by `workers` threads a few items ahead.

    Args:
        load: a pure function; its exception is raised where its result would have come.
        items: what to load.
        workers: threads; 0 loads in the calling thread, when the result is asked for.
    """
    if workers == 0:
        yield from map(load, items)
        return
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="load-ahead")
    try:
        for item in items:
            waiting.append(pool.submit(load, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
