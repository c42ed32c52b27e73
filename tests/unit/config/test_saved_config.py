"""Saved configurations: read from earlier runs and from strangers, and options given to a resumed run."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from sheeprlhf.config.compose import Source, check, compose_job
from sheeprlhf.config.registry import RENAMED, _deprecate, choices, config_hash, config_to_dict, current_word, options
from sheeprlhf.config.run_lookup import read_run_config, saved_group
from sheeprlhf.structure.data import DocstringsConfig
from sheeprlhf.structure.model import TinyConfig
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.utils.errors import ConfigError

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD = {
    "object": "model: !!python/object/apply:os.mkdir [sentinel]\n",
    "anchors": BOMB,
    "deep": "model: " + "[" * 100_000,
    "large": "model: {repo_name: " + "x" * 1_100_000 + "}\n",
    "list": "- 1\n",
    "torn": "model: {repo_name\n",
    "binary": "model: \x00\x01",
    "no_model": "data: {config_name: docstrings}\n",
    "unknown_key": "model: {config_name: opt, _target_: os.mkdir}\n",
    "interpolation": "model: {config_name: opt, repo_name: '${oc.env:HOME}'}\n",
    "wrong_type": "model: {config_name: opt, lr: fast}\n",
    "missing": "model: {config_name: auto}\n",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_refused_quickly(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(BAD[kind])
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        saved_group(str(tmp_path), "model")
    assert time.process_time() - start < 5
    assert len(str(caught.value)) < 500
    assert kind != "anchors" or "alias" in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml"}


SOURCE = Source("train")


def write_run(folder: Path, **root: Any) -> Path:
    reward = choices("reward")["function"](path="os:getcwd")  # type: ignore[call-arg]
    task = choices("task", "train")["grpo"](sft_experiment_dir=None, max_num_steps=3)  # type: ignore[call-arg]
    parts = {"model": TinyConfig(), "data": DocstringsConfig(), "task": task, "reward": reward}
    saved = {group: config_to_dict(config) for group, config in parts.items()} | root
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    return folder


def test_options_are_those_of_the_run_unless_given(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", seed=7, run_name="mine", generation={"temperature": 0.5})
    given = ["reward.path=length", "reward.target_length=9", "task.max_num_steps=5"]
    config = compose_job(SOURCE, [f"resume_from={run_dir}", *given]).config
    assert isinstance(config, TrainConfig)
    assert (config.task.config_name, config.task.max_num_steps, config.seed, config.run_name) == ("grpo", 5, 7, "mine")
    assert (config.generation.temperature, config.resume_from) == (0.5, str(run_dir))


@pytest.mark.parametrize(
    ("place", "given", "expected"),
    [
        ("my runs/docstrings/tiny/grpo/2026/default", [], "my runs"),
        ("my runs/docstrings/tiny/grpo/2026/default", ["root_dir=other"], "other"),
        ("moved/2026/default", [], "logs/runs"),
    ],
)
def test_a_longer_run_is_made_next_to_its_beginning(
    place: str, given: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / place).parent.mkdir(parents=True)
    run_dir = write_run(tmp_path / place)
    info = {"status": "finished", "started": 1.0, "data": "docstrings", "model": "tiny", "task": "grpo"}
    (run_dir / "run.json").write_text(json.dumps(info))
    words = [f"resume_from={place}", "task.max_num_steps=5", "reward.path=length", "reward.target_length=9", *given]
    assert Path(compose_job(SOURCE, words).config.root_dir).absolute() == tmp_path / expected


@pytest.mark.parametrize("seed", [7, "${oc.env:HOME}"])
def test_the_file_names_no_code_and_reads_nothing_else(seed: Any, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", seed=seed)
    problems = check(SOURCE, [f"resume_from={run_dir}"])
    assert any("reward.path" in problem for problem in problems)
    assert any("seed" in problem for problem in problems) == (seed != 7)


START = ["task=ppo", "task.sft_experiment_dir=null"]
OLD = {
    "task.gradient_clip_val": 0.5,
    "task.eval_iters": 7,
    "task.ppo_epochs": 3,
    "task.target_kl_coeff": 2.5,
    "task.max_kl": 0.25,
    "task.truncated_value": "bootstrap",
    "reward.repetition_penalty": 0.75,
    "reward.overlong_cache": 9,
}
NEW = {RENAMED[key]: value for key, value in OLD.items()} | {"task.bootstrap_truncated": True}


def values(words: list[str], source: Source = SOURCE) -> dict[str, Any]:
    found = {option.key: option.value for option in options(compose_job(source, words).config)}
    return {key: found[key] for key in NEW}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        group, _, name = key.partition(".")
        tree.setdefault(group, {})[name] = value
    return tree


def test_old_names_on_the_command_line_mean_the_new_options() -> None:
    assert values([*START, *(f"{key}={value}" for key, value in OLD.items())]) == NEW
    assert values([*START, *(f"{key}={str(value).lower()}" for key, value in NEW.items())]) == NEW
    assert current_word("++task.truncated_value=terminal,Bootstrap") == "++task.bootstrap_truncated=false,true"


def test_old_names_in_a_recipe_and_in_a_file_of_a_group(tmp_path: Path) -> None:
    source = SOURCE._replace(extra=str(tmp_path))
    (tmp_path / "experiment").mkdir()
    recipe = {"defaults": [{"override /task": "ppo"}], **nested(OLD | {"task.sft_experiment_dir": None})}
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\n" + yaml.safe_dump(recipe))
    assert values(["experiment=mine"], source) == NEW
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.yaml").write_text(yaml.safe_dump({"defaults": ["ppo"], "max_kl": 0.25}))
    assert compose_job(source, ["task=mine", *START[1:]]).config.task.early_stop_kl == 0.25  # type: ignore[union-attr]


@pytest.mark.parametrize(("old", "deprecated"), [("task.max_kl", True), ("task.gradient_clip_val", False)])
def test_a_line_names_the_new_option_and_names_of_2023_stay(old: str, deprecated: bool, capsys: Any) -> None:
    _deprecate.cache_clear()
    check(SOURCE, [*START, f"{old}=1"])
    assert (RENAMED[old] in capsys.readouterr().err) == deprecated


def test_both_names_are_an_error(tmp_path: Path) -> None:
    [problem] = check(SOURCE, [*START, "task.max_kl=1", "task.early_stop_kl=2"])
    assert "task.max_kl" in problem and "task.early_stop_kl" in problem


def test_a_saved_run_with_old_names_is_the_same_run(tmp_path: Path) -> None:
    config = compose_job(SOURCE, [*START, *(f"{key}={value}" for key, value in OLD.items())]).config
    saved = config_to_dict(config)
    for key in OLD:
        group, _, name = RENAMED[key].partition(".")
        del saved[group][name]
        saved[group][key.partition(".")[2]] = OLD[key]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    assert read_run_config(str(tmp_path)) == config_to_dict(config)
    assert config_hash(compose_job(SOURCE, [f"resume_from={tmp_path}"]).config) == config_hash(config)


def test_the_order_of_saved_options_does_not_matter(tmp_path: Path) -> None:
    config = compose_job(SOURCE, START).config
    saved = config_to_dict(config)
    saved["task"] = dict(reversed(saved["task"].items()))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved, sort_keys=False))
    assert config_hash(compose_job(SOURCE, [f"resume_from={tmp_path}"]).config) == config_hash(config)
