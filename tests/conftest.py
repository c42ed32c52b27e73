"""Fixtures shared by all tests: no network, one thread, a cache of one's own, tiny model folders made once."""

import gc
import os
import signal
import sys
from pathlib import Path

# Compile each module once, not in each process that imports it: importing torch takes 2 seconds of CPU instead of 7.
# Where Python shall leave no bytecode beside the sources, it goes into pytest's own cache.
if sys.dont_write_bytecode:
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": sys.pycache_prefix}

# Before torch, transformers or datasets is imported anywhere. One thread: many processes share few cores here, and the
# models are tiny.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # as the command line sets it

from collections.abc import Callable, Iterator

import pytest

from tests.support.jobs import JobServer


def pytest_configure() -> None:
    """Heed what a shell ignores in background jobs, and nohup: the processes that tests signal inherit it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have slow tests: the quick ones fill up the time of the other processes."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Take the imported modules out of garbage collection, which takes a tenth of the time otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tokenised data of tests out of the user's cache; the session shares one."""
    monkeypatch.setenv("SHEEPRLHF_CACHE", str(tmp_path_factory.getbasetemp() / "sheeprlhf-cache"))


@pytest.fixture(scope="session", autouse=True)
def compositions() -> Iterator[None]:
    """Commands that choose the same groups are composed once; processes of their own compose as users' do."""
    from tests.support.composed import compose_once

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sheeprlhf.config.compose._compose_base", compose_once)
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function (architecture) -> folder of a tiny random model, made once a session."""
    made: dict[str, Path] = {}

    def make(architecture: str = "llama") -> Path:
        from tests.support.models import make_model_folder

        if architecture not in made:
            made[architecture] = make_model_folder(tmp_path_factory.mktemp(architecture), architecture)
        return made[architecture]

    return make


@pytest.fixture(scope="session")
def server() -> Iterator[JobServer]:
    """Starts jobs cheaply; one for all tests."""
    with JobServer() as started:
        yield started
