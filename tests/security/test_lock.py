"""The committed lock: a hash for all that a run installs, within the bounds and floors, and no address of anything."""

import importlib.metadata
import importlib.util
import json
import re
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from sheeprlhf.security.version_guard import version_problem

CI = Path(__file__).parents[2] / ".ci"
LINE = re.compile(r"([a-z0-9-]+)==([0-9][\w.]*) --hash=sha256:([0-9a-f]{64})")

CONSTRAINT = re.compile(r"([a-z0-9-]+)==([0-9][\w.]*)")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = SourceFileLoader("lock_script", str(CI / "lock"))
    spec = importlib.util.spec_from_loader("lock_script", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def locked() -> dict[str, tuple[str, str]]:
    """Version and hash by name."""
    lines = [line for line in (CI / "requirements.lock").read_text().splitlines() if "==" in line]
    found = [LINE.fullmatch(line) for line in lines]
    names = [match[1] for match in found if match]
    assert len(names) == len(lines) == len(set(names)) > 50 and names == sorted(names)
    return {match[1]: (match[2], match[3]) for match in found if match}


def named(requirement: Requirement) -> str:
    return re.sub(r"[-_.]+", "-", requirement.name).lower()


def test_pip_demands_a_hash_and_wheels() -> None:
    text = (CI / "requirements.lock").read_text()
    options = [line for line in text.splitlines() if line.startswith("-")]
    sources = ["--no-binary antlr4-python3-runtime", "--no-binary rouge-score"]
    assert options == ["--require-hashes", "--only-binary :all:", *sources]
    assert "\nsetuptools==" in text  # which builds these two
    assert "x86-64" in text and "3.11" in text.splitlines()[0]
    assert "/" not in text.partition("\n")[2] and "://" not in (CI / "sbom.json").read_text()  # no index, no folder


def test_it_is_within_the_bounds_and_above_the_floors(script: ModuleType, locked: dict[str, tuple[str, str]]) -> None:
    asked = [Requirement(line) for line in script.requirements()]
    assert {"torch", "lightning", "gradio", "vadersentiment"} <= {named(requirement) for requirement in asked}
    for requirement in asked:
        assert requirement.specifier.contains(locked[named(requirement)][0]), requirement
    assert [problem for name, (version, _) in locked.items() if (problem := version_problem(name, version))] == []


def test_constraints_are_within_the_bounds_and_agree_with_the_lock(
    script: ModuleType, locked: dict[str, tuple[str, str]]
) -> None:
    lines = (CI / "constraints.txt").read_text().splitlines()[1:]
    versions = {str(found[1]): str(found[2]) for line in lines if (found := CONSTRAINT.fullmatch(line))}
    assert len(versions) == len(lines) and list(versions) == sorted(versions)
    asked = [Requirement(line) for line in script.requirements((*script.EXTRAS, "dev"))]
    assert {"torch", "gradio", "ruff", "pytest"} <= {named(requirement) for requirement in asked}
    for requirement in asked:
        assert requirement.specifier.contains(versions[named(requirement)]), requirement
    assert {name: version for name, (version, _) in locked.items()}.items() <= versions.items()


def test_it_is_complete(locked: dict[str, tuple[str, str]]) -> None:
    """What the packages that are installed here ask for is in it too, in a version that they take."""
    looked_at = 0
    for name in locked:
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        if importlib.metadata.version(name) != locked[name][0]:
            continue
        looked_at += 1
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert requirement.specifier.contains(locked[named(requirement)][0], prereleases=True), requirement
    if not looked_at:  # the lock is older than all that is here
        pytest.skip("no package is installed in the version of the lock")


def test_the_bill_of_materials_is_of_the_same(locked: dict[str, tuple[str, str]]) -> None:
    bill = json.loads((CI / "sbom.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    found = {}
    for component in bill["components"]:
        [digest] = component["hashes"]
        assert digest["alg"] == "SHA-256"
        assert component["purl"] == component["bom-ref"] == f"pkg:pypi/{component['name']}@{component['version']}"
        found[component["name"]] = (component["version"], digest["content"])
    assert found == locked


def item(name: str, version: str, digest: str, url: str = "https://index.example/x.whl") -> dict:
    archive = {"archive_info": {"hashes": {"sha256": digest}}, "url": url}
    return {"metadata": {"name": name, "version": version, "license_expression": "MIT"}, "download_info": archive}


def test_what_is_written_of_a_report(script: ModuleType) -> None:
    report = {"install": [item("Typing_Extensions", "4.1", "b" * 64), item("rouge_score", "0.1.2", "a" * 64)]}
    found = script.packages(report)
    assert script.lock_text(found) == (
        "# Linux x86-64, CPython 3.11. Written by .ci/lock; do not edit.\n"
        "--require-hashes\n--only-binary :all:\n--no-binary rouge-score\n"
        f"rouge-score==0.1.2 --hash=sha256:{'a' * 64}\ntyping-extensions==4.1 --hash=sha256:{'b' * 64}\n"
    )
    bill = script.bill_of_materials(found)
    assert "example" not in bill and json.loads(bill)["components"][1]["licenses"] == [{"expression": "MIT"}]


@pytest.mark.parametrize(("version", "digest"), [("2.13.0+cpu", "a" * 64), ("2.13.0", "a" * 63), ("2.13.0", "")])
def test_a_build_from_elsewhere_is_refused(version: str, digest: str, script: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no package of the index"):
        script.packages({"install": [item("torch", version, digest)]})
