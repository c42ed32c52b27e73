"""`--help` tells everything that the configuration knows about itself."""

import pytest

from sheeprlhf.apps.arguments import VERBS
from sheeprlhf.apps.show import default_choices
from sheeprlhf.cli import run
from sheeprlhf.config.registry import ROOTS, choices, groups


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
    assert ("task= (must be given)" in printed) == (verb in ("train", "eval"))
    trains = "task" in groups(verb) and verb != "eval"
    assert ("Between two validations. [whole number, optimizer steps, default 100]" in printed) == trains
    assert ("One of auto, packed, padded." in printed) == ("task" in groups(verb))
    assert "--multirun, -m" in printed


def test_choices_given_with_help_show_their_own_options(capsys):
    run(["train", "task=sft", "data=local", "optim=sgd", "--help"])
    printed = capsys.readouterr().out
    assert "data.train_file" in printed
    assert "optim.nesterov" in printed
    assert "optim.betas" not in printed


def test_the_shell_completes_behind_the_command(capsys, monkeypatch):
    monkeypatch.setenv("COMP_LINE", "sheeprlhf train task=sft model=sm")
    run(["-sc", "query=bash"])
    assert "model=smollm2" in capsys.readouterr().out
