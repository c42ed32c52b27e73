"""From a recipe and a command line to the commands of the stages."""

import pytest

from sheeprlhf.config.command_words import parse_word
from sheeprlhf.config.pipeline import Stage, collected, stages_of
from sheeprlhf.structure.run import PipelineConfig
from sheeprlhf.utils.errors import ConfigError

STAGES = {
    "sft": "train task=sft optim.lr=1e-3",
    "rm": "train task=rm from=<sft>",
    "text": "eval -m x=1,2 on=<sft>,<rm>",
}


def config(**given):
    return PipelineConfig(**{"stages": dict(STAGES)} | given)


def texts(**given):
    return {stage.name: stage.text() for stage in stages_of(config(**given))}


def problems(**given):
    with pytest.raises(ConfigError) as error:
        stages_of(config(**given))
    return list(error.value.problems)


def test_words_that_are_no_option_of_the_pipeline_are_collected():
    own, others = ["experiment=mine", "seed=1", "hydra.verbose=true"], ["model=opt", "ppo.optim.betas=[0.9,0.95]"]
    others += ["+a.b='x y'", r"reward.pattern='^It\'s\b\\'", "a=1,2", "a=\\"]  # what a pattern escapes stays as it is
    *first, last = collected([*others, *own])
    override = parse_word(last)
    assert first == own and override is not None
    assert (override.key_or_group, override.value()) == ("words", others)
    for left in (["seed=1"], ["model"], ["=3"], ["words=[a=1]"], []):
        assert collected(left) == left


def test_a_stage_has_its_words_and_those_of_the_command_line_each_option_once():
    assert texts(
        common={"train": "model=tiny optim.lr=5", "eval": "fabric=auto"},
        words=["model=opt", "fabric=cpu", "rm.optim.lr=7", "task.epochs=2", "generation.top_k=1", "text.on=<rm>"],
        seed=3,
        dry_run=True,
    ) == {
        "sft": "train model=opt optim.lr=1e-3 task=sft seed=3 dry_run=true fabric=cpu task.epochs=2 generation.top_k=1",
        "rm": "train model=opt optim.lr=7 task=rm from=<sft> seed=3 dry_run=true fabric=cpu task.epochs=2 "
        "generation.top_k=1",
        "text": "eval -m fabric=cpu x=1,2 on=<rm> seed=3 dry_run=true generation.top_k=1",
    }


def test_stages_that_are_left_out_are_not_among_several():
    stage = Stage("text", "eval", ("-m",), ("task=a,b", "on=<sft>,<rm>", "by=<rm>"))
    assert stage.links() == {"sft", "rm"}
    assert stage.without({"rm"}).words == ("task=a,b", "on=<sft>", "by=<rm>")
    assert stage.without({"rm"}).links() == {"sft", "rm"}
    assert stage.placed({"sft": "/a", "rm": "/b=c"}) == ["eval", "-m", "task=a,b", 'on=/a,"/b=c"', 'by="/b=c"']
    inside = Stage("sft", "train", (), ("data.train_file=<best>/dataset/train.jsonl",))
    assert inside.placed({"best": "/b=c"}) == ["train", 'data.train_file="/b=c/dataset/train.jsonl"']


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"stages": {}}, ["give experiment=<recipe>"]),
        ({"stages": {"a": "train on=<b>", "b": "train"}}, ["stages.a: <b> "]),
        ({"stages": {"a": "train", "b": "train on=<c>"}}, ["<c> "]),
        ({"stages": {"a": "show x"}}, ["stages.a begins with 'show'"]),
        ({"stages": {"a": ""}}, ["stages.a begins with ''"]),
        ({"stages": {"a": "train x='"}}, ["cannot be read"]),
        ({"stages": {"reward": "train", "A b": "train"}}, ["stages.reward cannot name", "stages.A b cannot name"]),
        ({"common": {"list": ""}}, ["common.list "]),
        ({"words": ["rmm.x=1", "sed=2"]}, ["did you mean rm.x?", "did you mean seed?"]),
        ({"skip": ["rn", "zzzz"]}, ["skip=[rm]?", "sft, rm, text"]),
    ],
)
def test_what_cannot_be_meant_is_reported_at_once(given, said):
    found = problems(**given)
    assert len(found) == len(said)
    assert all(part in problem for part, problem in zip(said, found, strict=True)), found


@pytest.mark.parametrize(
    "word",
    [
        "reward.path=theirs:f",
        "'reward.terms=[imperative,2*theirs:f]'",
        "model.library_cfg.trust_remote_code=true",
        "+model.library_cfg.trust_remote_code=true",
        "hydra.job.name=x",
        "hydra/launcher=x",
        "--config-dir=/theirs",
    ],
)
def test_a_recipe_may_not_say_what_only_the_command_line_may(word):
    [problem] = problems(stages={"a": f"train task=ppo {word}"})
    assert problem.startswith("stages.a: ")
    assert "command line" in problem
    assert problems(stages={"a": "train task=ppo"}, common={"train": word})
    if not word.startswith("-"):
        assert stages_of(config(words=[f"sft.{word}"]))
