"""Each one-line mistake of the lists beside this file must fail its test.

A copy of the tree is changed, tested and restored, one in each worker of pytest; this checkout is never touched. CI
runs the first mutant of each trap that has a number (those of the field) and whose test is quick.
`pytest -m "slow or nightly" tests/mutants` runs all, and their tests in the copy as it is.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mutants import (
    best_of_n_mutants,
    cli_mutants,
    data_mutants,
    engine_mutants,
    engine_of_rollouts_mutants,
    eval_mutants,
    fault_mutants,
    fetch_mutants,
    kto_mutants,
    model_mutants,
    online_mutants,
    pipeline_mutants,
    preference_mutants,
    report_mutants,
    reward_mutants,
    rl_loss_mutants,
    sample_mutants,
    security_mutants,
    stop_mutants,
    talk_mutants,
)
from tests.mutants.mutant import Mutant

ROOT = Path(__file__).parents[2]
TREE = ("sheeprlhf", "configs", "tests", "sheeprlhf.py", "pyproject.toml", "README.md")
_LISTS = (
    engine_mutants,
    engine_of_rollouts_mutants,
    data_mutants,
    model_mutants,
    best_of_n_mutants,
    cli_mutants,
    eval_mutants,
    fault_mutants,
    fetch_mutants,
    preference_mutants,
    report_mutants,
    kto_mutants,
    rl_loss_mutants,
    reward_mutants,
    sample_mutants,
    security_mutants,
    stop_mutants,
    online_mutants,
    pipeline_mutants,
    talk_mutants,
)
MUTANTS = [mutant for module in _LISTS for mutant in module.MUTANTS]
FIRST_OF_TRAP = {mutant.trap: mutant for mutant in reversed(MUTANTS)}
QUICK = ("tests/unit/", "tests/parity/", "tests/security/")


def copy_tree(target: Path) -> Path:
    """A copy of what the tests need."""
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.mkdir(exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


@pytest.fixture(scope="session")
def fork_server() -> Iterator[Callable[..., int]]:
    """A function (arguments of `fork_server.become_pytest`) -> pytest's exit code; see that file."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("PYTHONPATH", None)  # it may lead to this checkout
    command = [sys.executable, str(Path(__file__).with_name("fork_server.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:

        def ask(**request: object) -> int:
            assert server.stdin and server.stdout
            print(json.dumps(request), file=server.stdin, flush=True)
            return json.loads(server.stdout.readline())

        yield ask
        server.kill()


class Tree:
    """A copy of what the tests need, and pytest in it."""

    def __init__(self, folder: Path, ask: Callable[..., int]) -> None:
        self.folder, self._ask = copy_tree(folder), ask

    def run(self, *nodes: str) -> tuple[int, str]:
        """pytest's exit code and output. The copy comes before an installed package."""
        words = ["-x", "-q", "-m", "", "-p", "no:cacheprovider", "--basetemp", str(self.folder / "temporary")]
        words += ["-o", "addopts=--import-mode=importlib"]  # nothing in parallel: other trees are
        environment = os.environ | {
            "PYTHONPATH": str(self.folder),
            "PYTHONDONTWRITEBYTECODE": "1",  # a file changes twice within a second
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("PYTEST_ADDOPTS", None)
        log = self.folder / "log"
        code = self._ask(tree=str(self.folder), words=[*nodes, *words], environment=environment, log=str(log))
        return code, log.read_text(errors="replace")[-7000:]

    def run_mutant(self, mutant: Mutant) -> tuple[int, str]:
        """The exit code and output of a mutant's test in the tree that has the mutant."""
        file = self.folder / mutant.file
        source = file.read_text()
        assert source.count(mutant.old) == 1, f"{mutant.file} holds {mutant.old!r} {source.count(mutant.old)} times"
        file.write_text(source.replace(mutant.old, mutant.new))
        try:
            return self.run(mutant.tests)
        finally:
            file.write_text(source)


@pytest.fixture(scope="session")
def tree(fork_server: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(tmp_path_factory.mktemp("tree") / "copy", fork_server)


WHERE = """
import subprocess, sys
import sheeprlhf, tests.support.jobs

def test_where():
    found = [sheeprlhf.__file__, tests.support.jobs.__file__]
    code = "import sheeprlhf, tests.support.jobs as jobs; print(sheeprlhf.__file__, jobs.__file__)"
    found += subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert len(found) == 4
    assert [path for path in found if not path.startswith(COPY)] == []
"""


@pytest.mark.slow
def test_a_copy_imports_itself(tree: Tree) -> None:
    """Not this checkout, and not an installed package; nor do the processes that its tests start."""
    (tree.folder / "tests" / "test_where.py").write_text(WHERE.replace("COPY", repr(f"{tree.folder}/")))
    code, output = tree.run("tests/test_where.py")
    assert code == 0, output


@pytest.mark.nightly
@pytest.mark.parametrize("file", dict.fromkeys(mutant.tests.partition("::")[0] for mutant in MUTANTS))
def test_without_a_mutant_their_tests_pass(file: str, tree: Tree) -> None:
    nodes = dict.fromkeys(mutant.tests for mutant in MUTANTS if mutant.tests.partition("::")[0] == file)
    code, output = tree.run(*nodes)
    assert code == 0, output


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{Path(mutant.file).stem}-{mutant.old.strip()[:40]}")
def test_the_place_of_a_mutant_is_there(mutant: Mutant) -> None:
    """In every plain run: code that changes must not leave its mutants behind."""
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert (ROOT / mutant.tests.partition("::")[0]).is_file()


def test_every_mutant_is_another() -> None:
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)


def is_in_ci(mutant: Mutant) -> bool:
    return FIRST_OF_TRAP[mutant.trap] is mutant and mutant.trap[0].isdigit() and mutant.tests.startswith(QUICK)


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(one, marks=pytest.mark.slow if is_in_ci(one) else pytest.mark.nightly) for one in MUTANTS],
    ids=lambda mutant: f"{Path(mutant.file).stem}-{mutant.old.strip()[:40]}",
)
def test_a_mutant_is_killed(mutant: Mutant, tree: Tree) -> None:
    code, output = tree.run_mutant(mutant)
    assert code != 0, f"{mutant} survived"
    assert code == 1, f"{mutant} broke its test instead of failing it (pytest's exit code {code}):\n{output}"
