"""Home and cache directories where HOME is missing, wrong or somebody else's, and users without a name."""

import ast
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sheeprlhf
from sheeprlhf.cli import run
from sheeprlhf.utils.home import cache_place, expand_home, home_problem, why_offline
from tests.support.runs import rejected, write_rows

PACKAGE = Path(sheeprlhf.__file__).parent
VARIABLES = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "SHEEPRLHF_CACHE", "XDG_CACHE_HOME", "HF_HOME")


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As in a container that is started with `-u 1234`: no HOME, no entry in the password database."""

    def unknown(_: object) -> object:
        raise KeyError("not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in (*VARIABLES, "MPLCONFIGDIR", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, "")  # restores what the code under test sets
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What is printed of a training that is refused before it makes anything."""
    before = sorted(Path.cwd().rglob("*"))
    message = rejected(["train", "task=sft", "model=tiny", "data=docstrings", *words], capsys)
    assert sorted(Path.cwd().rglob("*")) == before
    return message


def test_nothing_is_known_of_the_user(nobody: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys)
    assert "SHEEPRLHF_CACHE=~/.cache/sheeprlhf" in message and "HOME" in message and "data.cache_dir" in message
    assert "data.cache_dir=~/c" in refused(capsys, "data.cache_dir='~/c'")
    assert os.environ["LOGNAME"]


@pytest.mark.parametrize("home", ["", "relative", "/dev/null"])
def test_homes_that_are_none(home: str, nobody: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HOME", home)
    message = refused(capsys)
    assert "SHEEPRLHF_CACHE=~/.cache/sheeprlhf" in message and "data.cache_dir" in message


@pytest.mark.parametrize("key", ["root_dir", "hydra.run.dir", "task.sft_experiment_dir"])
def test_a_home_of_nobody_is_named_with_its_option(key: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    task = ["task=dpo"] if key.startswith("task.") else []
    assert f"{key}=~unknown/x: there is no user unknown" in refused(capsys, *task, f"{key}='~unknown/x'")


@pytest.mark.parametrize("variable", ["SHEEPRLHF_CACHE", "XDG_CACHE_HOME"])
def test_a_cache_of_the_environment_is_checked(variable: str, nobody: Path, monkeypatch, capsys) -> None:
    for value in ("~unknown/x", "/dev/null/x"):
        monkeypatch.setenv(variable, value)
        message = refused(capsys)
        assert f"{variable}={value}" in message and "data.cache_dir" in message


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/here")
    assert (expand_home("~"), expand_home("~/a"), expand_home("b/~")) == (Path("/here"), Path("/here/a"), Path("b/~"))
    assert home_problem("key", "~/a") is None
    assert expand_home("~unknown") == Path("~unknown") and home_problem("key", "~unknown") is not None
    Path("~unknown").touch()  # an editor's backup, for one
    assert expand_home("~unknown") == Path("~unknown") and home_problem("key", "~unknown") is None


def test_the_order_of_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHEEPRLHF_CACHE", "/ours")
    monkeypatch.setenv("XDG_CACHE_HOME", "/all")
    assert cache_place("/given", "cache_dir") == ("cache_dir", "/given")
    assert cache_place(None) == ("SHEEPRLHF_CACHE", "/ours")
    monkeypatch.setenv("SHEEPRLHF_CACHE", "")
    assert cache_place(None) == ("XDG_CACHE_HOME", "/all/sheeprlhf")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_place(None).path == "~/.cache/sheeprlhf"


def test_one_module_asks_for_the_home_directory() -> None:
    for path in PACKAGE.rglob("*.py"):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert path.name == "home.py" or not names & {"expanduser", "getuser", "XDG_CACHE_HOME"}, path


def test_with_a_cache_such_a_user_trains(nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHEEPRLHF_CACHE", str(nobody / "cache"))
    rows = write_rows(nobody / "rows.jsonl")
    run(["train", "task=sft", "model=tiny", "data=local", f"data.train_file={rows}", "dry_run=true"])
    assert sorted(path.name for path in nobody.iterdir()) == ["cache", "logs", "rows.jsonl"]


@pytest.mark.nightly
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root may become another user")
def test_a_user_without_a_name_trains(tmp_path: Path) -> None:
    """May read all files here, such as a Python below /root, and write its own."""
    place = Path("/tmp") / f"sheeprlhf-{os.getpid()}"
    place.mkdir(mode=0o777)
    place.chmod(0o777)
    rows = write_rows(place / "rows.jsonl")
    may_read = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    words = ["task=sft", "model=tiny", "data=local", f"data.train_file={rows}", "task.max_num_steps=1"]
    try:
        done = subprocess.run(
            [
                "setpriv",
                "--reuid=1234",
                "--clear-groups",
                *may_read,
                sys.executable,
                "-m",
                "sheeprlhf",
                "train",
                *words,
            ],
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(PACKAGE.parent),
                "SHEEPRLHF_CACHE": str(place / "cache"),
                "PYTHONPYCACHEPREFIX": os.environ.get("PYTHONPYCACHEPREFIX", ""),
            },
            cwd=place,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert sorted(path.name for path in place.iterdir()) == ["cache", "logs", "rows.jsonl"]
    finally:
        shutil.rmtree(place)


def test_a_silent_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(request: object, timeout: float) -> None:
        asked.append(request)
        raise OSError

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://silent.invalid")
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    assert why_offline()
    assert why_offline()
    assert len(asked) == 1
