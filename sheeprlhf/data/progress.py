"""Progress bar of data preparation, shown if it takes longer than a second."""

import sys
from typing import Any

from tqdm.auto import tqdm

QUIET_SECONDS = 1.0  # what is done sooner shows nothing
LOG_SECONDS = 5.0  # between two lines in a file, where none overwrites the last one


def progress_bar(label: str, total: int | None, *, shown: bool, **options: Any) -> tqdm:
    """A bar for a `with` block; `total` may be an estimate, or None where only the end would tell."""
    seldom = {} if sys.stderr.isatty() else {"mininterval": LOG_SECONDS}
    return tqdm(desc=label, total=total, disable=not shown, delay=QUIET_SECONDS, **seldom, **options)
