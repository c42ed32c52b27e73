"""What a word of `chat`, `demo` and `export` names, and every way in which it names nothing; without torch."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from sheeprlhf.config.model_lookup import POLICY, REWARD_MODEL, find_trained
from sheeprlhf.config.registry import choices, config_to_dict
from sheeprlhf.structure.data import DocstringsConfig
from sheeprlhf.structure.model import TinyConfig
from sheeprlhf.utils.errors import ConfigError, ModelError


def make_run(folder: Path, task: str = "sft", *, final: str = "config.json", model: dict | None = None, **options):
    """A run as far as names and configuration tell."""
    (folder / "final").mkdir(parents=True)
    if final:
        (folder / "final" / final).write_text("{}")
    else:
        (folder / "final").rmdir()
    parts = {"model": TinyConfig(), "data": DocstringsConfig(), "task": choices("task", "train")[task]()}
    saved = {group: config_to_dict(config) for group, config in parts.items()}
    saved["model"] |= model or {}
    saved["task"] |= options
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    return folder


def problems(word, weights=None, **options) -> str:
    with pytest.raises((ConfigError, ModelError)) as error:
        find_trained(str(word), weights, **options)
    return str(error.value)


def test_a_run_is_found_with_what_it_was_made_of(tmp_path):
    found = find_trained(str(make_run(tmp_path / "run", "ppo")))
    assert (found.trains, found.task, found.weights, found.run_dir) == (POLICY, "ppo", "final", tmp_path / "run")
    assert config_to_dict(found.model) == config_to_dict(TinyConfig())
    assert (config_to_dict(found.data), found.is_whole()) == (config_to_dict(DocstringsConfig()), True)
    of_rm = make_run(tmp_path / "rm", "rm")
    assert find_trained(str(of_rm), wanted=None).trains == REWARD_MODEL
    assert find_trained(str(of_rm), wanted=REWARD_MODEL).task == "rm"


def test_what_is_no_run_is_answered_with_the_nearest_that_is(tmp_path):
    make_run(tmp_path / "first" / "run")
    assert "did you mean" in problems(tmp_path / "fisrt")
    assert f"did you mean {tmp_path / 'first' / 'run'}?" in problems(tmp_path / "first")
    assert "`list runs`" in problems("zzzz")
    assert "--weights best" in problems("tiny", "best")


def test_a_run_of_another_kind_is_answered_with_what_would_do(tmp_path):
    of_rm, of_sft = make_run(tmp_path / "rm", "rm"), make_run(tmp_path / "sft")
    assert "trains a reward model" in problems(of_rm)
    assert "--reward" in problems(of_rm)
    assert "task=rm" in problems(of_sft, wanted=REWARD_MODEL)
    assert "trains a dataset" in problems(make_run(tmp_path / "best", "best_of_n"), wanted=None)


def test_a_run_that_has_not_ended_says_how_to_go_on(tmp_path):
    run = make_run(tmp_path / "run", final="")
    assert "final/" in problems(run)
    assert "--weights=last" in problems(run)
    assert "has no checkpoint" in problems(run, "best")
    (run / "checkpoints" / "step-4").mkdir(parents=True)
    assert "it has step-4" in problems(run, "step-5")
    assert "step-<n>" in problems(run, "newest")
    assert find_trained(str(run), "last").weights == "last"


def test_adapters_need_what_they_sit_on(tmp_path):
    gone = make_run(tmp_path / "a", final="adapter_config.json", model={"repo_name": str(tmp_path / "gone" / "x")})
    assert "final weights" in problems(gone)
    start = make_run(tmp_path / "start", final="adapter_config.json")
    run = make_run(tmp_path / "b", "dpo", final="adapter_config.json", sft_experiment_dir=str(start))
    assert not find_trained(str(run)).is_whole()
    shutil.rmtree(start)
    assert str(start) in problems(run)
    assert "give its run" in problems(run / "final")


def test_a_run_that_starts_from_itself_is_no_endless_search(tmp_path):
    run = tmp_path / "a"
    make_run(run, "dpo", final="adapter_config.json", sft_experiment_dir=str(run))
    assert "too many runs" in problems(run)


def test_a_folder_that_lacks_something_says_what(tmp_path):
    assert "config.json" in problems(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    assert "no tokenizer" in problems(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "model.safetensors" in problems(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "is a reward model" in problems(tmp_path)
    assert find_trained(str(tmp_path), wanted=None).trains == REWARD_MODEL
    for content in ("[", "[]", json.dumps({"architectures": 5})):
        (tmp_path / "config.json").write_text(content)
        if content.endswith("}"):
            assert find_trained(str(tmp_path)).trains == POLICY
        else:
            assert "config.json" in problems(tmp_path)


def test_code_of_a_stranger_is_never_trusted(tmp_path):
    library = {"revision": "0" * 40, "trust_remote_code": True, "local_files_only": False}
    run = make_run(tmp_path / "run", model={"library_cfg": library})
    assert find_trained(str(run)).model.library_cfg.trust_remote_code is False
