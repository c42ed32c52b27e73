"""The mutation tool itself, a sample of mutants in CI, and all of them at night."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mutation.mutate import mutants_of
from tests.mutation.targets import TARGETS, WITHOUT_SURVIVORS

ROOT = Path(__file__).parents[2]
SOURCE = """
import functools
import math

@functools.lru_cache
def clip(value: float, limit: float = 1.0) -> float:
    if not math.isfinite(value):
        raise ValueError("not finite + 1")
    return min(value, limit) - 0.5

class Sums:
    def __init__(self):
        self.total = 0

    def add(self, *xs):
        self.total += sum(v for v in xs[1:] if v > 2)
        self.show(xs, flush=True)

    def show(self, *values, flush=False):
        pass
"""
CHANGES = [
    "clip: not math.isfinite(value) -> math.isfinite(value)",
    "clip: math.isfinite(value) -> value",
    "clip: raise ValueError('not finite + 1') -> pass",
    "clip: min(value, limit) - 0.5 -> min(value, limit) + 0.5",
    "clip: 0.5 -> 1.5",
    "Sums.__init__: self.total = 0 -> pass",
    "Sums.__init__: 0 -> 1",
    "Sums.add: self.total += sum((v for v in xs[1:] if v > 2)) -> self.total -= sum((v for v in xs[1:] if v > 2))",
    "Sums.add: self.total += sum((v for v in xs[1:] if v > 2)) -> pass",
    "Sums.add:  for v in xs[1:] if v > 2 ->  for v in xs[1:]",
    "Sums.add: 1: -> :",
    "Sums.add: 1 -> 2",
    "Sums.add: v > 2 -> v >= 2",
    "Sums.add: 2 -> 3",
    "Sums.add: self.show(xs, flush=True) -> pass",
    "Sums.add: self.show(xs, flush=True) -> self.show(xs)",
    "Sums.add: self.show(xs, flush=True) -> self",
    "Sums.add: True -> False",
]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "mutated_example.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("mutated_example", None)


def test_mutants_of_an_example(example: None) -> None:
    mutants = list(mutants_of("mutated_example"))
    assert [f"{mutant.function}: {mutant.change}" for mutant in mutants] == CHANGES
    assert {mutant.function for mutant in mutants_of("mutated_example", "Sums.")} == {"Sums.__init__", "Sums.add"}


def test_a_mutant_changes_a_decorated_function_and_a_method_in_use(example: None) -> None:
    mutants = list(mutants_of("mutated_example"))
    from mutated_example import Sums, clip

    sums = Sums()
    mutants[3].introduce()
    mutants[12].introduce()
    assert clip(7.0) == 1.5
    sums.add(9, 2, 3)
    assert sums.total == 5


def test_targets_and_their_tests_are_there() -> None:
    for target, tests in TARGETS.items():
        module = target.partition(":")[0].replace(".", "/") + ".py"
        assert [file for file in (module, *tests) if not (ROOT / file).is_file()] == []


def run(*words: str) -> tuple[int, dict[str, object]]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.mutation.run", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    return found.returncode, json.loads(found.stdout)


@pytest.mark.slow
def test_a_sample_is_killed() -> None:
    code, result = run("sheeprlhf.loss.advantage", "--sample", "12")
    assert (code, result["survivors"]) == (0, [])
    assert result["killed"] >= 10


@pytest.mark.nightly
def test_survivors_are_reported() -> None:
    code, result = run("sheeprlhf.loss.sft", "--sample", "2", "--tests", "tests/unit/loss/test_ppo.py")
    assert (code, result["killed"]) == (1, 0)
    assert len(result["survivors"]) == 2


@pytest.mark.nightly
@pytest.mark.parametrize("target", WITHOUT_SURVIVORS)
def test_every_mutant_is_killed(target: str) -> None:
    _, result = run(target)
    assert result["survivors"] == []
