"""The settings of glibc, by the page faults of a process."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = """
import resource, sys, numpy
from sheeprlhf.utils.memory import set_malloc
set_malloc(sharded="sharded" in sys.argv)
def fill():
    arrays = [numpy.ones(1 << 20) for _ in range(16)]  # 128 MB, 32,768 small pages
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such settings")
@pytest.mark.parametrize(
    ("words", "given", "least", "most"),
    [
        ([], {}, 0, 1000),
        (["sharded"], {}, 5000, 10**6),
        ([], {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}, 5000, 10**6),
        ([], {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}, 5000, 10**6),
    ],
)
def test_freed_memory_is_kept_unless_weights_are_sharded_or_the_environment_says_otherwise(
    words: list[str], given: dict[str, str], least: int, most: int
) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    env = kept | {"PYTHONPATH": str(ROOT)} | given
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], env=env, capture_output=True, text=True, check=True)
    assert least <= int(done.stdout) <= most
