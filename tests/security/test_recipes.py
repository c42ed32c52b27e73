"""A recipe that names things to call in every place that it can think of: none is called."""

import time
from pathlib import Path

import pytest

from sheeprlhf.cli import run
from tests.security.guard import watched
from tests.security.targets import TARGETS

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


def test_aliases_of_a_usual_size_are_read(tmp_path: Path, capsys) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nseed: &n 7\ntask: {epochs: *n}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    run(["train", "task=sft", f"--config-dir={tmp_path}", "experiment=mine", "--cfg", "job"])
    assert "epochs: 7" in capsys.readouterr().out
