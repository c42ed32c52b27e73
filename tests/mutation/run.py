"""Run the tests of each function with each of its mutants: `python -m tests.mutation.run [module[:function] ...]`.

The process imports the code and its tests once and forks for each mutant, so a mutant costs its tests' time alone.
A mutant is killed if a test fails, if pytest cannot run, or if it takes many times as long as the unchanged code.
"""

import argparse
import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path

import pytest

from tests.mutation.mutate import Mutant, mutants_of
from tests.mutation.targets import EQUIVALENT, TARGETS

ROOT = Path(__file__).parents[2]
_WORDS = ["-x", "-q", "-m", "", "-o", "addopts=--import-mode=importlib"]
_WORDS += ["-p", "no:cacheprovider", "-p", "no:unraisableexception"]  # the latter collects garbage
_IMPORTED_LATE = (  # by tests that import the package before the dot
    "torch.distributed.tensor",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)
_LONGEST = 900  # seconds of a test run by the clock


class Coverage:
    """A pytest plugin that records which functions of a file each test calls, and its CPU time."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.tests: dict[str, dict[str, float]] = {}  # of a function's qualified name

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        names, began = set(), time.process_time()
        sys.setprofile(lambda frame, *_: names.add(frame.f_code) if frame.f_code.co_filename == self.file else None)
        try:
            return (yield)
        finally:
            sys.setprofile(None)
            for name in {code.co_qualname.partition(".<locals>")[0] for code in names}:
                self.tests.setdefault(name, {})[item.nodeid] = time.process_time() - began


def _pytest(tests: Iterable[str], *words: str, plugins: Sequence[object] = ()) -> int:
    return int(pytest.main([*tests, *_WORDS, *words], plugins))


def _run(mutant: Mutant | None, tests: Iterable[str], folder: Path, cpu_seconds: int, cover: str = "") -> int:
    """Fork a process that runs tests, and wait for it.

    Args:
        mutant: what to introduce; None leaves the code as it is.
        tests: paths and node ids.
        folder: gets the tests' output in "log", and in "coverage" which of the tests call which function.
        cpu_seconds: limit of each process.
        cover: file whose functions are looked for; "" for none.

    Returns:
        pytest's exit code, or minus the number of the signal that ended it.
    """
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # processes that the tests left
        return os.waitstatus_to_exitcode(status)
    code = 70
    try:
        os.setsid()
        signal.alarm(_LONGEST)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        fork = multiprocessing.get_context("fork")  # processes of tests inherit the mutant
        multiprocessing.get_context = lambda _=None: fork  # type: ignore[assignment]
        if mutant is not None:
            mutant.introduce()
        coverage = Coverage(cover)
        code = _pytest(tests, "--basetemp", str(folder / "temporary"), plugins=[coverage] if cover else [])
        (folder / "coverage").write_text(json.dumps(coverage.tests))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def survivors(module: str, tests: tuple[str, ...], function: str = "", sample: int | None = None) -> dict[str, object]:
    """Test the mutants of a module.

    Args:
        module: dotted name.
        tests: paths and node ids; each mutant meets those that call its function, the quickest first, and then all of
            tests/distributed, whose processes are not looked into.
        function: beginning of the qualified names of the functions; "" takes all.
        sample: number of mutants, spread evenly; None takes all.

    Returns:
        The numbers of mutants "killed" and "equivalent", the names and lines of "survivors", "seconds".
    """
    began = time.monotonic()
    names = dict.fromkeys(test.partition("::")[0] for test in tests)
    of_processes = [test for test in tests if test.startswith("tests/distributed/")]
    tests = tuple(test for test in tests if test not in of_processes)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        assert _pytest(names, "--collect-only") == 0, f"{names} cannot be collected"
    for late in _IMPORTED_LATE:
        if late.partition(".")[0] in sys.modules:
            importlib.import_module(late)
    gc.unfreeze()  # tests/conftest.py freezes what a collection has imported; mutants are of objects that gc knows
    mutants = list(mutants_of(module, function))
    assert mutants, f"{module} has no function {function}"
    mutants = mutants if sample is None else mutants[:: max(1, len(mutants) // sample)][:sample]
    killed, equivalent, left = 0, 0, []
    gc.freeze()  # a collection in a forked process would copy every page
    with tempfile.TemporaryDirectory() as name:
        for group in filter(None, (of_processes, tests)):
            code = _run(None, group, Path(name), _LONGEST, str(sys.modules[module].__file__))
            assert code == 0, f"{module}: pytest's exit code {code} without a mutant\n{Path(name, 'log').read_text()}"
        coverage = json.loads(Path(name, "coverage").read_text())
        for mutant in mutants:
            if any(mutant.change in changes for changes in EQUIVALENT.get(f"{module}.{mutant.function}", {}).values()):
                equivalent += 1
                continue
            seconds = coverage.get(mutant.function, {})
            limit = int(10 + 5 * sum(seconds.values()))
            code = _run(mutant, sorted(seconds, key=seconds.get), Path(name), limit) if seconds else 0
            if not code and of_processes:
                code = _run(mutant, of_processes, Path(name), _LONGEST)
            killed += code != 0
            left += [] if code else [f"{mutant.function}: {mutant.change} (line {mutant.line})"]
    elapsed = round(time.monotonic() - began, 1)
    return {"module": module, "killed": killed, "equivalent": equivalent, "survivors": left, "seconds": elapsed}


def main() -> int:
    """Test the targets named on the command line, or all; 1 if a mutant survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", help="module, or module:beginning of a function's qualified name")
    parser.add_argument("--tests", nargs="+", help="run these tests instead of the target's own")
    parser.add_argument("--sample", type=int, help="number of mutants of each target")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    survived = False
    for target in arguments.targets or TARGETS:
        module, _, function = target.partition(":")
        tests = tuple(arguments.tests or TARGETS.get(target) or TARGETS[module])
        result = survivors(module, tests, function, arguments.sample)
        survived |= bool(result["survivors"])
        print(json.dumps(result, indent=1), flush=True)
    return int(survived)


if __name__ == "__main__":
    sys.exit(main())
