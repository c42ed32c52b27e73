"""Progress display of a run: a bar in a terminal, a line every ten seconds elsewhere. Only rank zero shows it."""

import sys
import time

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Rank zero only: steps done, what came of them, speed and time left."""

    def __init__(self, total: int, start: int, unit: str, *, began: float | None = None) -> None:
        """Begin at step `start` of `total`; speed is counted in `unit` per second since `began`, or since now."""
        self._total, self._start, self._unit = total, start, unit
        self._began = time.monotonic() if began is None else began
        self._amount = 0.0
        self._next_line = self._began + _SECONDS_BETWEEN_LINES
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, leave=True)

    def show(self, step: int, what: str, amount: float) -> None:
        """Step `step` is done, counted from 1, after `amount` more units (tokens, ...); `what`: "loss 0.1234"."""
        self._amount += amount
        now = time.monotonic()
        speed = self._amount / max(now - self._began, 1e-9)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{what}, {speed:,.0f} {self._unit}/s", refresh=False)
            self._bar.update(step - self._bar.n)
        elif now >= self._next_line or step == self._total:
            self._next_line = now + _SECONDS_BETWEEN_LINES
            left = (self._total - step) * (now - self._began) / max(step - self._start, 1)
            self.say(
                f"step {step}/{self._total}  {what}  {speed:,.0f} {self._unit}/s  "
                f"{int(left // 60)}:{int(left % 60):02d} left"
            )

    def say(self, line: str) -> None:
        """Print a line without breaking the bar."""
        tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
