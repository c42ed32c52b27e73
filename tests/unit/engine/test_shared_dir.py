"""Machines that see rank zero's run directory, a copy of it, or nothing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sheeprlhf.engine import run as run_module
from sheeprlhf.engine.run import check_shared
from sheeprlhf.utils.errors import ConfigError


class Machines:
    """Two machines with a process each, whose code runs in turn here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folders: list[Path]) -> None:
        self._folders, self._views = folders, list[Any]()
        monkeypatch.setattr(run_module, "_SECONDS_TO_APPEAR", 0.0)
        monkeypatch.setattr(run_module, "gather_objects", self._gather)

    def _gather(self, fabric: Any, view: Any) -> list[Any]:
        if fabric.is_global_zero:
            other = self._folders[1]
            sign = next(path for path in self._folders[0].iterdir() if path.name.startswith(".seen-"))
            return [view, (1, run_module._appears(other / sign.name), run_module._checkpoints(other))]
        raise AssertionError

    def check(self) -> list[str]:
        """What rank zero says."""
        said: list[str] = []
        fabric: Any = SimpleNamespace(
            strategy=SimpleNamespace(num_nodes=2),
            is_global_zero=True,
            node_rank=0,
            broadcast=lambda item: item,
            barrier=lambda: None,
        )
        check_shared(fabric, self._folders[0], said.append)
        return said


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    made = [tmp_path / "a", tmp_path / "b"]
    for folder in made:
        folder.mkdir()
    return made


def checkpoint(folder: Path, text: str) -> None:
    (folder / "checkpoints" / "step-4").mkdir(parents=True)
    (folder / "checkpoints" / "step-4" / "MANIFEST.json").write_text(text)


def test_a_shared_directory_is_not_mentioned(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(folders[0], "a")
    assert Machines(monkeypatch, [folders[0], folders[0]]).check() == []
    assert [path.name for path in folders[0].iterdir()] == ["checkpoints"]


def test_a_new_run_says_what_another_machine_lacks(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (said,) = Machines(monkeypatch, folders).check()
    assert "node 1" in said and str(folders[0]) in said


def test_a_copy_can_be_gone_on_with(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in folders:
        checkpoint(folder, "a")
    assert len(Machines(monkeypatch, folders).check()) == 1


@pytest.mark.parametrize("content", [None, "another one"])
def test_without_the_checkpoint_it_is_refused(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    checkpoint(folders[0], "a")
    if content is not None:
        checkpoint(folders[1], content)
    with pytest.raises(ConfigError, match="node 1"):
        Machines(monkeypatch, folders).check()
    assert not list(folders[0].glob(".seen-*"))
