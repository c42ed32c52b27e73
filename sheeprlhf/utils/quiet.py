"""The libraries' own lines, progress bars and messages home, switched off before they are imported."""

import os

from sheeprlhf.utils.home import set_missing_variables

_QUIET = {
    "TOKENIZERS_PARALLELISM": "false",  # its threads and our forked workers do not go together
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def silence_libraries() -> None:
    """Set what the user's environment leaves open."""
    set_missing_variables()
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
