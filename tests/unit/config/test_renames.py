"""Old names of options: on the command line, in YAML files and in saved runs."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from sheeprlhf.config.compose import Source, check, compose_job, configs_directory
from sheeprlhf.config.registry import RENAMED, _deprecate, config_hash, config_to_dict, current_word, options
from sheeprlhf.config.run_lookup import read_run_config

SOURCE = Source("train", configs_directory(), "train")
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
