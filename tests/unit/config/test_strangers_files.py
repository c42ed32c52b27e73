"""A configuration file of a stranger sets options. It runs nothing, reads no environment, writes nothing."""

import pytest

from sheeprlhf.cli import run

RECIPES = {
    "callback": "hydra:\n  callbacks:\n    mine: {_target_: builtins.open, file: SENTINEL, mode: w}\n",
    "target": "task: {_target_: builtins.open, file: SENTINEL, mode: w}\n",
    "entry_point": "task: {entry_point: 'os:mkdir'}\n",
    "new_group": "mine: {_target_: builtins.open, file: SENTINEL, mode: w}\n",
    "remote_code": f"model: {{library_cfg: {{trust_remote_code: true, revision: '{'0' * 40}'}}}}\n",
    "torn": "task: {epochs: [1\n",
    "unknown_key": "task: {epoch: 3}\n",
}


@pytest.mark.parametrize("kind", RECIPES)
def test_a_strangers_recipe_runs_nothing(kind, tmp_path, monkeypatch, capsys):
    sentinel = tmp_path / "sentinel"
    folder = tmp_path / "theirs" / "experiment"
    folder.mkdir(parents=True)
    (folder / "shared.yaml").write_text(f"# @package _global_\n{RECIPES[kind].replace('SENTINEL', str(sentinel))}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "canary-of-the-environment")
    with pytest.raises(SystemExit) as stop:
        run(["train", "task=sft", f"--config-dir={tmp_path}/theirs", "experiment=shared"])
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert "Traceback" not in printed.err
    assert "experiment=shared is not a choice" not in printed.err
    assert "canary" not in printed.err + printed.out
    assert {path.name for path in tmp_path.iterdir()} == {"theirs"}
