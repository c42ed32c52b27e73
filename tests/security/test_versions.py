"""Versions that must not run are refused by the package's bounds and at the start of every command; no network."""

import importlib.metadata
import itertools
import re
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sheeprlhf.apps.doctor import versions
from sheeprlhf.security.version_guard import BANNED, FLOORS, OPTIONAL, check_versions, version_problem
from sheeprlhf.utils.errors import ConfigError
from tests.support.runs import exit_code

DENIED = {
    "lightning": ["2.6.2", "2.6.3", "2.6.2+local", "2.6.5", "2.6.1", "2.6.6rc1", "2.6.6.dev20260901", "2.5.0.post0"],
    "pytorch-lightning": ["2.6.2", "2.6.3"],
    "hydra-core": ["1.3.2", "1.3.4", "1.3.7"],
    "transformers": ["4.57.6", "5.2.0", "5.4.0", "5.9.9"],
    "torch": ["2.5.1", "2.9.1+cpu", "2.9.1", "2.10", "2.10.0", "2.10.0+cu130", "2.11.0a0+1f3b"],
    "datasets": ["4.8.0", "5.0.0"],
    "jinja2": ["3.1.5", "2.11.3", "3.1"],
    "gradio": ["5.49.1", "6.5.1", "6.15.0", "6.17.3", "6.30.0"],
}
ALLOWED = {
    "lightning": ["2.6.6", "2.7.0"],
    "pytorch-lightning": ["2.6.1", "2.6.6"],
    "hydra-core": ["1.3.8"],
    "transformers": ["5.10.0", "5.24.0", "6.0.0"],
    "torch": ["2.11.0", "2.11.1", "2.13.0+cpu", "2.12.0a0+1f3b", "3.0"],
    "datasets": ["5.0.1", "5.2.0"],
    "jinja2": ["3.1.6", "3.1.6.post1", "3.2"],
    "gradio": ["6.31.0", "6.32.1"],
}
# How each command that imports any of them is started; a run or a model is found first.
STARTS = {
    "train": "train task=sft",
    "eval": "eval task=perplexity model=tiny data=docstrings",
    "inspect": "inspect data=docstrings",
    "doctor": "doctor task=sft",
    "fetch": "fetch model=tiny",
    "pipeline": "pipeline experiment=quickstart",
    "chat": "chat tiny",
    "export": "export tiny --to exported",
    "demo": "demo tiny",
}
ALIKE = ("eval", "inspect", "fetch", "pipeline")  # take the same way as train and doctor


def test_the_lists() -> None:
    for lists, refused in ((DENIED, True), (ALLOWED, False)):
        assert lists.keys() == FLOORS.keys() | BANNED.keys()
        for name, numbers in lists.items():
            for number in numbers:
                assert bool(version_problem(name, number)) == refused, (name, number)
    assert "renew the secrets" in version_problem("lightning", "2.6.3")


def test_what_is_installed_may_run_and_is_asked_quickly() -> None:
    check_versions()
    start = time.process_time()
    check_versions()
    assert time.process_time() - start < 0.1


def requirements() -> dict[str, Requirement]:
    """What pyproject.toml asks for, extras included."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    lines = itertools.chain(project["dependencies"], *project["optional-dependencies"].values())
    return {requirement.name.lower(): requirement for requirement in map(Requirement, lines)}


def test_the_bounds_of_the_package_are_no_lower() -> None:
    """`contains` is what pip's resolver asks; with `prereleases`, as if the user allowed them."""
    bounds = requirements()
    assert FLOORS.keys() <= bounds.keys()
    for name in FLOORS:
        for version in (*BANNED.get(name, ()), *DENIED[name]):
            assert not bounds[name].specifier.contains(version, prereleases=True), f"{bounds[name]} allows {version}"


@pytest.mark.slow
def test_pip_resolves_to_none_of_them(tmp_path: Path) -> None:
    """Of an index that has the malicious versions alone, and of one that has a good one too."""
    pip = [sys.executable, "-m", "pip", "install", "--isolated", "--dry-run", "--no-index", "--no-deps"]
    pip += ["--ignore-installed", "--find-links", str(tmp_path), str(requirements()["lightning"])]

    def add(version: str) -> None:
        with zipfile.ZipFile(tmp_path / f"lightning-{version}-py3-none-any.whl", "w") as wheel:
            place = f"lightning-{version}.dist-info"
            wheel.writestr(f"{place}/METADATA", f"Metadata-Version: 2.1\nName: lightning\nVersion: {version}\n")
            wheel.writestr(f"{place}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{place}/RECORD", "")

    for version in ("2.6.1", *BANNED["lightning"], "2.6.5", "2.7.0"):
        add(version)
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "No matching distribution found for lightning" in done.stderr
    add("2.6.6")
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "Would install lightning-2.6.6")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("demo", "gradio"),
        *(pytest.param(command, "lightning", marks=pytest.mark.slow if command in ALIKE else ()) for command in STARTS),
    ],
)
def test_a_command_is_refused_before_it_imports_anything(
    command: str, name: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    real, bad = importlib.metadata.version, DENIED[name][0]
    monkeypatch.setattr(importlib.metadata, "version", lambda asked: bad if asked == name else real(asked))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    assert exit_code(STARTS[command].split()) == 2
    assert f"{name} {bad}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert not {found.partition(".")[0] for found in set(sys.modules) - before} & {"torch", "lightning", "transformers"}


@pytest.mark.parametrize("name", DENIED)
def test_each_is_looked_for(name: str, monkeypatch) -> None:
    real = importlib.metadata.version
    for bad in DENIED[name]:
        monkeypatch.setattr(importlib.metadata, "version", lambda asked, bad=bad: bad if asked == name else real(asked))
        with pytest.raises(ConfigError, match=rf"^{name} {re.escape(bad)} .*pip (un)?install"):
            check_versions(*OPTIONAL)


def test_what_no_command_uses_does_not_stop_it(monkeypatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.0.0" if name == "gradio" else real(name))
    check_versions()
    found = {finding.level: finding.text for finding in versions()}
    assert "gradio 5.0.0" in found["warning"] and "`demo`" in found["warning"]


def test_asking_imports_nothing_heavy() -> None:
    code = "import sys, sheeprlhf.security.version_guard as f; f.check_versions(); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {f"'{name}'" for name in ("torch", "lightning", "jinja2")} & set(done.stdout.split(", "))
