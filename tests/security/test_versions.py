"""Versions that must not run are refused before anything is imported; the list is checked without a network."""

import importlib.metadata
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sheeprlhf.cli import run
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.floors import BANNED, FLOORS, check_versions, version_problem

DENIED = {
    "lightning": ["2.6.2", "2.6.3", "2.6.5", "2.6.1", "2.5.0.post0"],
    "pytorch-lightning": ["2.6.2", "2.6.3"],
    "hydra-core": ["1.3.2", "1.3.4", "1.3.7"],
    "transformers": ["4.57.6", "5.2.0", "5.4.0", "5.9.9"],
    "torch": ["2.5.1", "2.9.1+cpu", "2.9.1"],
    "datasets": ["4.8.0", "5.0.0"],
    "jinja2": ["3.1.5", "2.11.3"],
}
ALLOWED = {
    "lightning": ["2.6.6", "2.7.0"],
    "pytorch-lightning": ["2.6.1", "2.6.6"],
    "hydra-core": ["1.3.8"],
    "transformers": ["5.10.0", "5.24.0", "6.0.0"],
    "torch": ["2.10.0", "2.13.0+cpu", "3.0"],
    "datasets": ["5.0.1", "5.2.0"],
    "jinja2": ["3.1.6", "3.2"],
}


def test_the_lists() -> None:
    for versions, refused in ((DENIED, True), (ALLOWED, False)):
        assert versions.keys() == FLOORS.keys() | BANNED.keys()
        for name, numbers in versions.items():
            for number in numbers:
                assert bool(version_problem(name, number)) == refused, (name, number)
    assert "renew the secrets" in version_problem("lightning", "2.6.3")


def test_what_is_installed_may_run_and_is_asked_quickly() -> None:
    check_versions()
    start = time.process_time()
    check_versions()
    assert time.process_time() - start < 0.1


def test_the_bounds_of_the_package_are_no_lower() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"]):
        for version in (*BANNED.get(requirement.name, ()), *DENIED.get(requirement.name, ())):
            assert not requirement.specifier.contains(version), f"{requirement} allows {version}"


@pytest.mark.parametrize("name", ["lightning", "torch"])
def test_a_run_is_refused_before_it_imports_anything(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda asked: DENIED[name][0] if asked == name else real(asked))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(["train", "task=sft"])
    assert stop.value.code == 2
    assert f"{name} {DENIED[name][0]}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="pip install"):
        check_versions()


def test_asking_imports_nothing_heavy() -> None:
    code = "import sys, sheeprlhf.utils.floors as f; f.check_versions(); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {f"'{name}'" for name in ("torch", "lightning", "packaging", "jinja2")} & set(done.stdout.split(", "))
