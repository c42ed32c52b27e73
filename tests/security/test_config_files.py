"""The checks of configuration files and recipes stand between a file and what Hydra would do with it; ours pass."""

import time
from pathlib import Path

import pytest
from hydra import compose
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry

from sheeprlhf.cli import run
from sheeprlhf.config.compose import Source, _hydra
from sheeprlhf.config.untrusted_config import CheckedPackage
from sheeprlhf.utils.errors import ConfigError
from tests.security.config_files import OF_HYDRA, PRIMARY, TARGETS
from tests.security.guard import watched


@pytest.fixture
def payload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A package that makes a file when it is imported: its name, and the file."""
    name, sentinel = f"payload_of_{tmp_path.name.replace('-', '_')}", tmp_path / "sentinel"
    (tmp_path / "importable" / name).mkdir(parents=True)
    (tmp_path / "importable" / name / "__init__.py").write_text(f"open({str(sentinel)!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path / "importable")
    return name, sentinel


def test_without_the_checks_hydra_imports_what_a_file_names(payload, tmp_path, monkeypatch):
    name, sentinel = payload
    text = OF_HYDRA["searchpath of a package"].replace("MODULE", name)
    (tmp_path / "mine.yaml").write_text(f"{PRIMARY}hydra: {{{text}}}\n")
    with _hydra(Source("train", str(tmp_path), "mine")):
        pass  # registers the sources
    monkeypatch.setitem(SourcesRegistry.instance().types, "file", FileConfigSource)
    monkeypatch.setattr("sheeprlhf.config.compose.check_sources", lambda: None)
    with _hydra(Source("train", str(tmp_path), "mine")):
        compose("mine")
    assert sentinel.exists()


def test_files_that_set_options_compose(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults:\n  - tiny\n\nlora_cfg:\n  rank: 3\n")
    text = (
        PRIMARY.replace("{model: tiny}", "{model: mine}") + "hydra: {output_subdir: null, run: {dir: .}}\nseed: &n 7\n"
    )
    (tmp_path / "mine.yaml").write_text(f"{text}task: {{epochs: *n}}\n")
    run(["train", f"--config-dir={tmp_path}", "--config-name=mine", "--cfg", "job"])
    shown = capsys.readouterr().out
    assert "seed: 7" in shown and "epochs: 7" in shown and "rank: 3" in shown


def test_the_files_of_a_package_are_checked_too(payload, tmp_path):
    name, _ = payload
    file = tmp_path / "importable" / name / "theirs.yaml"
    file.write_text("lr: 0.5\n")
    source = CheckedPackage("command-line", f"pkg://{name}")
    assert source.load_config("theirs").config == {"lr": 0.5}
    for text, named in (
        ("# @package hydra\nverbose: true\n", "@package hydra"),
        ("hydra: {verbose: true}\n", "hydra.verb"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=named):
            source.load_config("theirs")


PLACES = ("task", "model", "data", "optim", "fabric", "generation", "reward", "mine")
ALIASES = "".join(f"  {b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
RECIPES = {
    "targets": "".join(
        f"{place}:\n"
        + "".join(f"  key{number}: {{CALL{number}}}\n" for number in range(start, len(TARGETS), len(PLACES)))
        for start, place in enumerate(PLACES)
    ),
    "large": "mine: [" + "x, " * 400_000 + "x]\n",
    "deep": "mine: " + "[" * 5_000,
    "alias bomb": "mine:\n  a: &a [x, x, x, x, x, x, x, x, x]\n" + ALIASES,
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_calls_nothing_and_ends_soon(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    sentinels, folder = tmp_path / "sentinels", tmp_path / "theirs" / "experiment"
    folder.mkdir(parents=True)
    text = RECIPES[name].replace("SENTINELS", str(sentinels))
    for number, target in reversed(list(enumerate(TARGETS))):
        path = sentinels / target
        call = f"_target_: {target}, _args_: ['touch {path}'], path: {path}, file: {path}, mode: w"
        text = text.replace(f"CALL{number}}}", f"{call}}}")
    (folder / "shared.yaml").write_text(f"# @package _global_\n{text}")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    start = time.process_time()
    with watched(sentinels) as watch, pytest.raises(SystemExit) as stop:
        run(["train", "task=sft", f"--config-dir={tmp_path}/theirs", "experiment=shared"])
    assert stop.value.code == 2 and time.process_time() - start < 10
    error = capsys.readouterr().err
    assert "Traceback" not in error and len(error) < 40_000
    assert (watch.code_run(), watch.programs, watch.sockets) == ([], [], [])
    assert list((tmp_path / "empty").iterdir()) == []
    assert name != "targets" or text.count("_target_") == len(TARGETS)
