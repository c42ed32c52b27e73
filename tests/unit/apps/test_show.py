"""`show` tells every option of what its words name, from the documentation of the dataclasses."""

import pytest
import yaml

from sheeprlhf.apps.arguments import VERBS
from sheeprlhf.apps.show import configuration_for_help, default_choices, recipe_meaning, recipe_names
from sheeprlhf.cli import run
from sheeprlhf.config.compose import Source, compose_for_help
from sheeprlhf.config.registry import ROOTS, choices, configs_directory, groups, options
from tests.support.runs import exit_code


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
    assert " (else " in printed  # a default


def test_an_option_is_found_by_its_full_and_by_its_last_name(capsys):
    printed = shown(capsys, "optim.lr")
    assert printed.startswith("optim.lr=null (with optim=adamw, adam")
    assert "optim.lr=0.01 (with optim=sgd) " in printed
    assert "model.lr" not in printed.split("(with optim=sgd)")[1]
    assert shown(capsys, "optim.lr=3") == printed
    assert "model.lora_cfg.lr=0.002 (with model=tiny)" in shown(capsys, "lr")
    printed = shown(capsys, "mini_batch_size")
    assert "task.mini_batch_size=32 rows (with task=sft, rm, " in printed
    assert "task.mini_batch_size=64 rows (with task=perplexity" in printed
    assert "debug=false (of train, eval, inspect, doctor, fetch, pipeline)" in shown(capsys, "debug")
    assert "model.dtype=float32 (with every model)" in shown(capsys, "dtype")


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
    assert exit_code(["show", words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert expected in printed.err


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_overview_lists_all_commands(words, capsys):
    run(words)
    printed = capsys.readouterr().out
    assert all(f"  {verb} " in printed for verb in VERBS)


@pytest.mark.parametrize("verb", ROOTS)
def test_a_command_shows_its_groups_choices_and_options(verb, capsys):
    run([verb, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for group in groups(verb):
        for name, cls in choices(group, verb).items():
            assert name in printed
            assert " ".join((cls.__doc__ or "").splitlines()[0].split()[:4]) in printed
    defaults = default_choices(verb)
    for group in groups(verb):
        default = defaults[group]
        assert f"{group}= (default {default})" in printed or default is None
    assert ("task= (must" in printed) == (verb in ("train", "eval"))
    assert ("task.eval_interval=100 optimizer steps " in printed) == ("task" in groups(verb) and verb != "eval")
    assert ("auto, packed, padded" in printed) == ("task" in groups(verb))
    assert "--multirun, -m" in printed


def test_choices_given_with_help_show_their_own_options(capsys):
    run(["train", "task=sft", "data=local", "optim=sgd", "--help"])
    printed = capsys.readouterr().out
    assert "data.train_file" in printed
    assert "optim.nesterov" in printed
    assert "optim.betas" not in printed


@pytest.mark.parametrize("verb", ROOTS)
def test_help_has_the_options_and_choices_of_the_composition(verb):
    names = {group: list(choices(group, verb)) for group in groups(verb)} if verb in ("train", "eval") else {}
    for index in range(-1, max(map(len, names.values()), default=0)):
        words = [f"{group}={of[index % len(of)]}" for group, of in names.items()] if index >= 0 else []
        found, composed = configuration_for_help(verb, words, None), compose_for_help(Source(verb), words)
        rows, expected = ([plain(option) for option in options(config)] for config, _ in (found, composed))
        assert rows == [row._replace(value=({} if isinstance(row.value, dict) else row.value)) for row in expected]
        assert {group: set(names) for group, names in found[1].items()} == {
            group: set(names) for group, names in composed[1].items()
        }


def plain(option):
    """The option with a list in place of a tuple, which a composition has not."""
    return option._replace(value=list(option.value) if isinstance(option.value, tuple) else option.value)


@pytest.mark.parametrize("word", ["seed=3", "model=nothing", "model='opt'", "task=sft task=dpo", "model.nothing=3"])
def test_help_with_other_words_is_composed(word, monkeypatch):
    composed = []
    monkeypatch.setattr("sheeprlhf.config.compose.compose_for_help", lambda *of: composed.append(of))
    configuration_for_help("train", word.split(), None)
    assert len(composed) == 1


def test_the_shell_completes_behind_the_command(capsys, monkeypatch):
    monkeypatch.setenv("COMP_LINE", "sheeprlhf train task=sft model=sm")
    run(["-sc", "query=bash"])
    assert "model=smollm2" in capsys.readouterr().out


def test_a_recipe_is_described_by_a_whole_sentence() -> None:
    meanings = {name: recipe_meaning(name) for name in recipe_names("")}
    assert [name for name, meaning in meanings.items() if not meaning.endswith(".")] == []
    assert meanings["iterated_docstrings"].endswith("on the embedded model and data.")
    assert "data.train_file=<your file>" in meanings["pretrain_tiny"]
    assert meanings["dr_grpo_published"].startswith("Dr. GRPO (")
