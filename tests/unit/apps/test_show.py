"""`show` tells every option of what its words name, from the documentation of the dataclasses."""

import pytest
import yaml

from sheeprlhf.apps.arguments import VERBS
from sheeprlhf.apps.show import recipe_names
from sheeprlhf.cli import run
from sheeprlhf.config.compose import configs_directory
from sheeprlhf.config.registry import ROOTS, choices, groups, options
from sheeprlhf.structure.generation import GenConfig


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What is printed, on one line."""
    run(["show", *words])
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("group", "name"),
    [(group, name) for group in ("task", "model", "data", "fabric", "optim") for name in choices(group)],
)
def test_a_choice_shows_all_its_options(group, name, capsys):
    cls = choices(group)[name]
    printed = shown(capsys, f"{group}={name}")
    assert " ".join((cls.__doc__ or "").splitlines()[0].split()) in printed
    for option in options(cls(), f"{group}."):
        if option.key == f"{group}.config_name":
            assert option.key not in printed
            continue
        assert option.key in printed
        assert option.metadata["help"] in printed
        assert option.metadata["unit"] in printed
        assert all(value in printed for value in option.metadata["choices"])


@pytest.mark.parametrize("verb", ROOTS)
def test_a_command_shows_its_groups_and_own_options(verb, capsys):
    printed = shown(capsys, verb)
    for group in groups(verb):
        assert f" {group}=" in printed
        assert ", ".join(choices(group, verb)) in printed
    for option in options(ROOTS[verb]()):
        assert option.key in printed
    assert ("must be given: sft" in printed) == (verb == "train")


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_shows_its_choices_and_values(name, capsys):
    printed = shown(capsys, f"experiment={name}")
    content = yaml.safe_load((configs_directory() / "experiment" / f"{name}.yaml").read_text())
    for group, choice in (pair for line in content["defaults"] if isinstance(line, dict) for pair in line.items()):
        assert f"{group.removeprefix('override /')}={choice}" in printed
    numbers = {key: value for key, value in content.get("task", {}).items() if type(value) in (int, float)}
    assert numbers or name.endswith("_rm")
    for key, value in numbers.items():
        assert f"task.{key}={value}" in printed
    assert " optimizer steps (else " in printed  # a unit and a default


@pytest.mark.parametrize("name", recipe_names("pipeline"))
def test_a_pipeline_shows_its_stages(name, capsys):
    printed = shown(capsys, f"experiment={name}")
    content = yaml.safe_load((configs_directory() / "experiment" / f"{name}.yaml").read_text())
    assert f"`pipeline experiment={name}`" in printed
    assert all(f" {stage} {command}".rstrip() in printed for stage, command in content["stages"].items())


def test_an_option_is_found_by_its_full_and_by_its_last_name(capsys):
    printed = shown(capsys, "optim.lr")
    assert printed.startswith("optim.lr=null (with optim=adamw, adam")
    assert "optim.lr=0.01 (with optim=sgd) Peak learning rate. (number, 0 or more, or null)" in printed
    assert "model.lr" not in printed.split("(with optim=sgd)")[1]
    assert shown(capsys, "optim.lr=3") == printed
    assert "model.lora_cfg.lr=0.002 (with model=tiny)" in shown(capsys, "lr")
    printed = shown(capsys, "mini_batch_size")
    assert "task.mini_batch_size=32 rows (with task=sft, rm, dpo" in printed
    assert "task.mini_batch_size=64 rows (with task=perplexity" in printed
    assert "debug=false (of train, eval, inspect, doctor, fetch, pipeline) Show" in shown(capsys, "debug")
    assert "model.dtype=float32 (with every model)" in shown(capsys, "dtype")


def test_the_options_of_a_part_are_shown(capsys):
    assert shown(capsys, "generation").count("generation.") == len(list(options(GenConfig())))
    assert "model.lora_cfg.rank=16 (with every model)" in shown(capsys, "lora_cfg")
    assert shown(capsys, "model.lora_cfg") == shown(capsys, "lora_cfg")


def test_several_words_and_names_alone(capsys):
    together = shown(capsys, "sft", "opt")
    assert together == " ".join([shown(capsys, "task=sft"), shown(capsys, "model=opt")])
    assert "model=auto A causal" in shown(capsys, "auto")
    assert "fabric=auto On a CUDA" in shown(capsys, "auto")
    assert "pretrain_tiny" in shown(capsys, "experiment")
    assert "`show model=tiny`" in shown(capsys, "model")


def test_a_choice_of_a_file_says_where_its_options_are(capsys, monkeypatch, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("repo_name: me/mine\n")
    monkeypatch.setattr("sheeprlhf.apps.show.configs_directory", lambda: tmp_path)
    assert "`train task=sft model=mine --help`" in shown(capsys, "model=mine")


@pytest.mark.parametrize("words", [[], ["--help"], ["opt", "-h"]])
def test_alone_it_explains_itself(words, capsys):
    printed = shown(capsys, *words)
    assert "sheeprlhf show <what>" in printed
    assert all(name in printed for group in ("task", "model", "data", "fabric", "optim") for name in choices(group))
    assert all(verb in printed for verb in VERBS)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("model=optt", "`show model=opt`"),
        ("experiment=pretrain", "`show experiment=pretrain_tiny`"),
        ("optt", "`show model=opt`"),
        ("mini_batch_siez", "`show mini_batch_size`"),
        ("qqqqqq", "qqqqqq"),
        ("../../train", "../../train"),
        ("--hlep", "--hlep"),
    ],
)
def test_an_unknown_word_is_answered_with_the_nearest(words, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        run(["show", words])
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert expected in printed.err
