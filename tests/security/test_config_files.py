"""The checks of configuration files stand between a file and what Hydra would do with it, and let ours pass."""

from pathlib import Path

import pytest
from hydra import compose
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry

from sheeprlhf.cli import run
from sheeprlhf.config.compose import Source, _hydra, configs_directory
from sheeprlhf.config.untrusted_config import CheckedPackage
from sheeprlhf.utils.errors import ConfigError
from tests.security.config_files import OF_HYDRA, PRIMARY


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
    with _hydra(Source("train", configs_directory(), "mine", str(tmp_path))):
        pass  # registers the sources
    monkeypatch.setitem(SourcesRegistry.instance().types, "file", FileConfigSource)
    monkeypatch.setattr("sheeprlhf.config.compose.check_sources", lambda: None)
    with _hydra(Source("train", configs_directory(), "mine", str(tmp_path))):
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
