"""Installed as people do: the wheel alone, in an environment of its own, used from another directory."""

import json
import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sheeprlhf
from sheeprlhf.cli import run
from pathlib import Path
from sheeprlhf.config.compose import configs_directory
from sheeprlhf.utils.home import embedded_folder
places = Path(sheeprlhf.__file__).parent, configs_directory(), embedded_folder("embedded:tiny")
run(["train", "task=sft", "dry_run=true"])
run(["list"])
print(json.dumps([str(place) for place in places]))
"""


def build_wheel(folder: Path) -> Path:
    """The wheel of what git tracks or would track; built from a copy, so that the checkout stays as it is."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.rstrip("\0").split("\0"):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    subprocess.run(build, cwd=folder / "source", check=True, env=os.environ | {"PIP_NO_INDEX": "1"})
    shutil.rmtree(folder / "source")  # nothing can be read from here any more
    return next(folder.glob("*.whl"))


def install(wheel: Path, folder: Path) -> Path:
    """Into a new environment that borrows this one's packages, but not this one's installation of ours."""
    venv.create(folder, with_pip=False)
    packages = next(folder.glob("lib/python*/site-packages"))
    # These folders are searched after the new one, and the .pth files in them (an editable checkout) are not obeyed.
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()))
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, env=clean_environment(folder))
    return folder / "bin"


KEPT = ("HOME", "TMPDIR", "LANG", "OMP_NUM_THREADS", "PYTHONPYCACHEPREFIX")


def clean_environment(folder: Path) -> dict[str, str]:
    """Of the tests' own environment, nothing that leads to the checkout."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    path = os.pathsep.join([str(folder / "bin"), "/usr/bin", "/bin"])
    return kept | {"PATH": path, "HF_HUB_OFFLINE": "1", "SHEEPRLHF_CACHE": str(folder / "cache")}


def test_the_wheel_has_what_a_run_reads_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    configs = {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert {"train.yaml", "eval.yaml", "experiment/pretrain_tiny.yaml"} <= configs
    assert {f"sheeprlhf/configs/{name}" for name in configs} <= names
    tiny = {
        f"sheeprlhf/assets/tiny/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md")
    }
    data = {f"sheeprlhf/assets/docstrings/{split}.parquet" for split in ("train", "validation", "test")}
    data |= {f"sheeprlhf/assets/docstrings/{name}" for name in ("NOTICE", "README.md")}
    assert tiny | data <= names
    [licence] = [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
    [facts] = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
    info = licence.partition("/")[0]
    assert info == facts.partition("/")[0]
    assert all(name.startswith(("sheeprlhf/", f"{info}/")) for name in names)
    for unwanted in ("__pycache__", ".pyc", "/tests/", "/.", "logs/", "bench"):
        assert not [name for name in names if unwanted in name], unwanted
    source = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sheeprlhf").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == source


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.mark.nightly
def test_installed_it_trains_and_lists_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    programs, elsewhere = install(wheel, tmp_path / "venv"), tmp_path / "elsewhere"
    elsewhere.mkdir()

    def call(*words: str) -> str:
        done = subprocess.run(
            words, cwd=elsewhere, env=clean_environment(tmp_path / "venv"), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    packages = next((tmp_path / "venv").resolve().glob("lib/python*/site-packages"))
    *listed, places = call(str(programs / "python"), "-c", PROGRAM).splitlines()
    names = ("sheeprlhf", "sheeprlhf/configs", "sheeprlhf/assets/tiny")
    assert json.loads(places) == [str(packages / name) for name in names]

    [run_dir] = elsewhere.glob("logs/runs/docstrings/tiny/sft/*/default")
    assert json.loads((run_dir / "run.json").read_text())["status"] == "finished"
    for name in ("sft", "smollm2", "docstrings", "pretrain_tiny", run_dir.parent.name):
        assert any(name in line for line in listed), name
    assert "train" in call(str(programs / "sheeprlhf"), "--help")
    assert {path.name for path in elsewhere.iterdir()} == {"logs"}
