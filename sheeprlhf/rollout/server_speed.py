"""Warnings about rollout servers that stay slow."""

from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from statistics import median

from sheeprlhf.utils.errors import Notify

_TIMES_SLOWER = 3.0
_NUM_ROLLOUTS = 3  # in a row
_NUM_REMEMBERED = 50  # speeds of a server


class SpeedWatch:
    """Compares each server with the others, and with its own earlier speed. Rank zero only.

    Args:
        say: prints a line for the user.
    """

    def __init__(self, say: Notify) -> None:
        self._say = say
        self._earlier: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_NUM_REMEMBERED))
        self._num_slow: Counter[str] = Counter()  # rollouts in a row
        self._reported: set[str] = set()

    def add(self, speeds: Mapping[str, float]) -> None:
        """Add the tokens per second of each server in a rollout; warn once about each that was slow in three in a row.

        Slow is less than a third of the median of the other servers, or of the server's earlier rollouts that were not
        slow.
        """
        for url, speed in speeds.items():
            others = [other for name, other in speeds.items() if name != url]
            earlier = self._earlier[url]
            expected = {
                "the other servers sample": median(others) if others else 0.0,
                "it sampled before": median(earlier) if len(earlier) >= _NUM_ROLLOUTS else 0.0,
            }
            if _TIMES_SLOWER * speed >= max(expected.values()):
                self._num_slow[url] = 0
                earlier.append(speed)
                continue
            self._num_slow[url] += 1
            if self._num_slow[url] < _NUM_ROLLOUTS or url in self._reported:
                continue
            self._reported.add(url)
            whose = max(expected, key=lambda name: expected[name])
            self._say(
                f"warning: rollout server {url} is slow: {speed:.3g} tokens/s, {whose} {expected[whose]:.3g} tokens/s "
                f"(median); {_NUM_ROLLOUTS} rollouts in a row were this slow"
            )
