"""Each one-line mistake of the lists beside this file must fail its test.

Two copies of the tree are changed, tested and restored in parallel; this checkout is never touched. CI runs the first
mutant of each trap; `pytest -m "slow or nightly" tests/mutants` runs them all.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import pytest

from tests.mutants import (
    cli_mutants,
    data_mutants,
    engine_mutants,
    eval_mutants,
    fetch_mutants,
    kto_mutants,
    model_mutants,
    preference_mutants,
    rl_loss_mutants,
)
from tests.mutants.mutant import Mutant

ROOT = Path(__file__).parents[2]
TREE = ("sheeprlhf", "configs", "tests", "sheeprlhf.py", "pyproject.toml", "README.md")
_LISTS = (
    engine_mutants,
    data_mutants,
    model_mutants,
    cli_mutants,
    eval_mutants,
    fetch_mutants,
    preference_mutants,
    kto_mutants,
    rl_loss_mutants,
)
MUTANTS = [mutant for module in _LISTS for mutant in module.MUTANTS]
FIRST_OF_TRAP = {mutant.trap: mutant for mutant in reversed(MUTANTS)}
NUM_TREES = 2


def copy_tree(target: Path) -> Path:
    """A copy of what the tests need."""
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.mkdir(exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def python(tree: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a copy of the tree, which comes before an installed package."""
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",  # a file changes twice within a second
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # hypothesis alone takes as long to import as torch
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTEST_ADDOPTS", None)
    return subprocess.run(
        [sys.executable, *words], cwd=tree, env=environment, capture_output=True, text=True, timeout=600
    )


def run_tests(tree: Path, *nodes: str) -> tuple[int, str]:
    """pytest's exit code and output."""
    words = ("-x", "-q", "-m", "", "-p", "no:cacheprovider", "--basetemp", str(tree / "temporary"))
    done = python(tree, "-m", "pytest", *nodes, *words)
    return done.returncode, done.stdout[-5000:] + done.stderr[-2000:]


def run_mutant(tree: Path, mutant: Mutant) -> tuple[int, str]:
    """The exit code and output of a mutant's test in a tree that has the mutant."""
    file = tree / mutant.file
    source = file.read_text()
    assert source.count(mutant.old) == 1, f"{mutant.file} holds {mutant.old!r} {source.count(mutant.old)} times"
    file.write_text(source.replace(mutant.old, mutant.new))
    try:
        return run_tests(tree, mutant.tests)
    finally:
        file.write_text(source)


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Mutant | None, Future[tuple[int, str]]]]:
    """Results of the mutants that this session asks for, and under None of all their tests without a mutant."""
    trees: SimpleQueue[Path] = SimpleQueue()
    for number in range(NUM_TREES):
        trees.put(copy_tree(tmp_path_factory.mktemp("tree") / str(number)))

    def work(mutant: Mutant | None) -> tuple[int, str]:
        tree = trees.get()
        try:
            return run_tests(tree, *nodes) if mutant is None else run_mutant(tree, mutant)
        finally:
            trees.put(tree)

    asked = [item.callspec.params["mutant"] for item in request.session.items if item.originalname == KILLED]
    nodes = list(dict.fromkeys(mutant.tests for mutant in asked))
    with ThreadPoolExecutor(NUM_TREES) as pool:
        yield {mutant: pool.submit(work, mutant) for mutant in (None, *asked)}
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
def test_a_copy_imports_itself(tmp_path: Path) -> None:
    """Not this checkout, and not an installed package."""
    tree = copy_tree(tmp_path / "tree")
    found = python(tree, "-c", "import sheeprlhf; print(sheeprlhf.__file__)")
    assert found.stdout.strip() == str(tree / "sheeprlhf" / "__init__.py"), found.stderr
    (tree / "tests" / "test_where.py").write_text(
        f"import sheeprlhf\n\ndef test_where():\n    assert sheeprlhf.__file__.startswith({str(tree)!r})\n"
    )
    assert run_tests(tree, "tests/test_where.py")[0] == 0


@pytest.mark.slow
def test_without_a_mutant_their_tests_pass(outcomes: dict[Mutant | None, Future[tuple[int, str]]]) -> None:
    code, output = outcomes[None].result()
    assert code == 0, output


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{Path(mutant.file).stem}-{mutant.old.strip()[:40]}")
def test_the_place_of_a_mutant_is_there(mutant: Mutant) -> None:
    """In every plain run: code that changes must not leave its mutants behind."""
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert (ROOT / mutant.tests.partition("::")[0]).is_file()


def test_every_mutant_is_another() -> None:
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(mutant, marks=pytest.mark.slow if FIRST_OF_TRAP[mutant.trap] is mutant else pytest.mark.nightly)
        for mutant in MUTANTS
    ],
    ids=lambda mutant: f"{Path(mutant.file).stem}-{mutant.old.strip()[:40]}",
)
def test_a_mutant_is_killed(mutant: Mutant, outcomes: dict[Mutant | None, Future[tuple[int, str]]]) -> None:
    code, output = outcomes[mutant].result()
    assert code != 0, f"{mutant} survived"
    assert code == 1, f"{mutant} broke its test instead of failing it (pytest's exit code {code}):\n{output}"


KILLED = test_a_mutant_is_killed.__name__
