"""Which earlier run `task.sft_experiment_dir=newest` takes, and that a resumed run keeps the one that it began with."""

import json
from pathlib import Path

import pytest
import yaml

from sheeprlhf.config.registry import config_hash
from sheeprlhf.config.run_lookup import START, evaluated_run, is_same_model, links_of, resolve_runs, start_problems
from sheeprlhf.structure.option import Config
from sheeprlhf.structure.run import TrainConfig
from tests.unit.config.test_registry import composed, to_typed


def sft_start_of(config):
    return links_of(config).get(START)


def config(root: Path, *words: str) -> TrainConfig:
    typed = to_typed(composed("train", "task=dpo", f"root_dir='{root}'", *words))
    assert isinstance(typed, TrainConfig)
    return typed


def newest(root: Path, *words: str) -> TrainConfig:
    return config(root, "task.sft_experiment_dir=newest", *words)


def make_run(
    root: Path,
    started: float,
    *,
    task: str = "sft",
    model: str = "embedded:tiny",
    status: str = "finished",
    final: bool = True,
    dry_run: bool = False,
    start: str | None = None,
    config_hash: str = "",
) -> Path:
    folder = root / "docstrings" / "tiny" / task / f"time-{started}" / "default"
    folder.mkdir(parents=True)
    info = {"started": started, "status": status, "task": task, "config_hash": config_hash}
    (folder / "run.json").write_text(json.dumps(info))
    saved = {"model": {"config_name": "tiny", "repo_name": model}, "dry_run": dry_run}
    saved["task"] = {"config_name": task, "sft_experiment_dir": start}
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    if final:
        (folder / "final").mkdir()
    return folder


def test_the_newest_that_fits_is_taken(tmp_path: Path) -> None:
    make_run(tmp_path, 1.0)
    fits = make_run(tmp_path, 2.0)
    make_run(tmp_path, 3.0, status="running")
    make_run(tmp_path, 4.0, final=False)
    make_run(tmp_path, 5.0, task="dpo")
    make_run(tmp_path, 6.0, task="rm")
    make_run(tmp_path, 7.0, model="facebook/opt-350m")
    dry = make_run(tmp_path, 8.0, dry_run=True)
    torn = make_run(tmp_path, 9.0)
    (torn / "config.yaml").write_text("model: [")
    assert sft_start_of(resolve_runs(newest(tmp_path), None)) == str(fits)
    assert sft_start_of(resolve_runs(newest(tmp_path, "dry_run=true"), None)) == str(dry)
    assert sft_start_of(resolve_runs(config(tmp_path, "task.sft_experiment_dir=Newest"), None)) == str(fits)
    assert list(start_problems(resolve_runs(newest(tmp_path), None))) == []


def test_a_dry_run_is_evaluated_only_if_there_is_no_other(tmp_path: Path) -> None:
    make_run(tmp_path, 1.0, dry_run=True)
    newest_dry = make_run(tmp_path, 3.0, dry_run=True)
    assert evaluated_run("newest", str(tmp_path), "perplexity") == str(newest_dry)
    other = make_run(tmp_path, 2.0)
    assert evaluated_run("newest", str(tmp_path), "perplexity") == str(other)


def test_what_is_taken_is_a_whole_path_and_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "logs" / "runs", 1.0)
    monkeypatch.chdir(tmp_path)
    found = resolve_runs(newest(Path("logs/runs")), None)
    assert sft_start_of(found) == str(run)
    assert isinstance(found.task, Config)
    with pytest.raises(AttributeError, match="read-only"):
        found.task.epochs = 3
    given = config(tmp_path, f"task.sft_experiment_dir={run.relative_to(tmp_path)}")
    assert sft_start_of(resolve_runs(given, None)) == str(run)


@pytest.mark.parametrize("way", ["resume", "resume_from", "given"])
def test_a_resumed_run_keeps_its_start(way: str, tmp_path: Path) -> None:
    first = make_run(tmp_path, 1.0)
    words = {"resume": ["resume=true"], "resume_from": [], "given": ["resume=true"]}[way]
    begun = resolve_runs(newest(tmp_path), None)
    mine = make_run(
        tmp_path,
        2.0,
        task="dpo",
        status="running",
        final=False,
        start=sft_start_of(begun),
        config_hash=config_hash(begun),
    )
    second = make_run(tmp_path, 3.0)
    if way == "resume_from":
        words = [f"resume_from='{mine}'"]
    again = resolve_runs(newest(tmp_path, *words), str(mine) if way == "given" else None)
    assert sft_start_of(again) == str(first)
    assert config_hash(again) == config_hash(begun)
    assert sft_start_of(resolve_runs(newest(tmp_path, *words, "seed=1"), None)) == str(second)  # that is another run
    assert sft_start_of(resolve_runs(newest(tmp_path), None)) == str(second)


def test_one_folder_by_two_names_is_one_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    assert is_same_model(str(tmp_path / "model"), str(tmp_path / "link"))
    assert is_same_model("me/mine", "me/mine")
    assert not is_same_model("me/mine", "me/other")
    assert not is_same_model(str(tmp_path / "model"), str(tmp_path))
    assert not is_same_model(None, "me/mine")
    run = make_run(tmp_path / "runs", 1.0, model=str(tmp_path / "model"))
    asked = newest(tmp_path / "runs", f"model.repo_name={tmp_path / 'link'}")
    assert sft_start_of(resolve_runs(asked, None)) == str(run)


@pytest.mark.parametrize("task", ["rm", "dpo", "kto", "grpo", "ppo"])
def test_prompts_are_written_as_the_start_wrote_them(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, 1.0)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    saved["model"] |= {"chat_template": "chatml", "resize_embeddings": True, "extra_vocabulary": ["<a>"]}
    saved["data"] = {"config_name": "docstrings", "template_args": {"enable_thinking": False}}
    (run / "config.yaml").write_text(yaml.safe_dump(saved))
    start = [f"task={task}", f"task.sft_experiment_dir='{run}'"]
    found = resolve_runs(config(tmp_path, *start), None)
    assert isinstance(found, TrainConfig) and found.data.template_args == {"enable_thinking": False}
    assert (found.model.chat_template, found.model.resize_embeddings) == ("chatml", True)
    assert list(found.model.extra_vocabulary) == ["<a>"]
    given = resolve_runs(config(tmp_path, *start, "data.template_args={enable_thinking: true}"), None)
    assert isinstance(given, TrainConfig) and given.data.template_args == {"enable_thinking": True}
    printed = capsys.readouterr()
    assert "data.template_args=" in printed.out and f"{run}" in printed.out
    assert "data.template_args=" in printed.err and f"{run}" in printed.err
    added = resolve_runs(config(tmp_path, *start, "model.extra_vocabulary=[b]"), None)
    assert any("model.extra_vocabulary" in problem for problem in start_problems(added))
