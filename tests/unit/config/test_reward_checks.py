"""What is wrong with a source of rewards is said before anything is loaded, and without running the user's code."""

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sheeprlhf.config.overrides import readable
from sheeprlhf.config.path_checks import absolute_value
from sheeprlhf.config.reward_checks import reward_problems
from sheeprlhf.config.untrusted_config import content_problems
from sheeprlhf.reward import functions
from sheeprlhf.structure.reward import (
    BUILTINS,
    AutoRewardConfig,
    FunctionRewardConfig,
    ListRewardConfig,
    ModelRewardConfig,
    RewardSourceConfig,
    Term,
    model_sources,
    needs_model,
    parse_term,
    terms_of,
)

OWN = """
open("sentinel", "w")
raise RuntimeError("this must not run")
from math import sqrt as root
def brevity(prompts, responses): ...
class Toxicity: ...
if True:
    hidden = brevity
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with modules of the user's that would leave a sentinel if they ran."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_checked_rewards.py").write_text(OWN)
    (tmp_path / "my_folder").mkdir()
    (tmp_path / "my_folder" / "inner.py").write_text(OWN)
    (tmp_path / "my_torn.py").write_text("def f(:\n")
    (tmp_path / "my_dynamic.py").write_text("from json import *\n")
    return tmp_path


def problems(cfg: RewardSourceConfig) -> list[str]:
    return list(reward_problems(cfg))


def test_the_checks_know_the_functions_that_there_are():
    public = {name for name, value in vars(functions).items() if getattr(value, "__module__", "") == functions.__name__}
    assert {name for name in public if not name.startswith("_")} - {"repeated_share"} == set(BUILTINS)
    options_of_builtins = {name for builtin in BUILTINS.values() for name in builtin.reads}
    assert options_of_builtins == {"target_length", "length_unit", "pattern"}


@pytest.mark.parametrize(
    ("text", "term"),
    [
        ("model", (1.0, "model")),
        ("0.5*length", (0.5, "length")),
        (" -1 * my.own:f ", (-1.0, "my.own:f")),
        ("1e-3*a.b", (0.001, "a.b")),
    ],
)
def test_a_term_is_a_weight_and_a_source(text, term):
    assert parse_term(text) == Term(*term)


@pytest.mark.parametrize(
    "text", ["", "0.5*", "*length", "x*length", "nan*length", "inf*model", "-inf*model", "0*model"]
)
def test_what_is_no_term(text):
    with pytest.raises(ValueError, match=r".*"):
        parse_term(text)
    [problem] = problems(ListRewardConfig(terms=[text]))
    assert "is not a term" in problem and (text or "an empty text") in problem


def test_terms_of_each_source():
    one = Term(1.0, "model")
    assert terms_of(AutoRewardConfig(), None) == terms_of(ModelRewardConfig(), "imperative") == (one,)
    assert terms_of(AutoRewardConfig(), "imperative") == (Term(1.0, "imperative"),)
    assert terms_of(FunctionRewardConfig(path="a:b"), None) == (Term(1.0, "a:b"),)
    both = ListRewardConfig(terms=["2*model", "rouge"])
    assert terms_of(both, None) == (Term(2.0, "model"), Term(1.0, "rouge"))
    assert needs_model(both, None) and needs_model(AutoRewardConfig(), None)
    assert not needs_model(AutoRewardConfig(), "imperative") and not needs_model(FunctionRewardConfig(), None)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("imperativ", "reward.path=imperative"),
        ("qqq", "imperative"),
        ("model", "give reward=model"),
        ("./my_folder/inner.py", "reward.path=my_folder.inner:<function>"),
        ("my_checked_rewards.py:brevity", "reward.path=my_checked_rewards:brevity"),
        ("a..b", "cannot be read"),
        (":f", "cannot be read"),
        ("a:b:c", "cannot be read"),
        ("my-rewards:f", "cannot be read"),
        ("my.class.f", "cannot be read"),
        ("my_checked_reward:f", "reward.path=my_checked_rewards:f"),
        ("no_such_module_here.f", "no_such_module_here"),
        ("my_folder.other:f", "my_folder.other"),
        ("json.no.f", "json.no"),
        ("my_checked_rewards:brevty", "reward.path=my_checked_rewards:brevity"),
        ("my_folder.inner.brevty", "reward.path=my_folder.inner:brevity"),
        ("json:qqqq", "qqqq"),
        ("my_torn:f", "line 1, is not Python"),
        ("__main__:f", None),
    ],
)
def test_functions_that_are_not_there(path, said, own_module):
    found = problems(FunctionRewardConfig(path=path))
    assert len(found) == 1
    assert said is None or said in found[0]
    assert not (own_module / "sentinel").exists()


@pytest.mark.parametrize(
    "path",
    [
        *("my_checked_rewards:brevity", "my_checked_rewards.Toxicity", "my_checked_rewards:root"),
        *("my_checked_rewards:hidden", "my_folder.inner.brevity", "my_dynamic:loads"),
        *("json:dumps", "json.dumps", "os.path:join", "math:sqrt", "sys:exit"),
    ],
)
def test_functions_that_may_be_there(path, own_module):
    before = set(sys.modules)
    assert problems(FunctionRewardConfig(path=path)) == []
    assert problems(ListRewardConfig(terms=[f"-1*{path}"])) == []
    assert not (own_module / "sentinel").exists()
    assert set(sys.modules) == before


def test_an_installed_module_that_hides_ones_own_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "colorsys.py").write_text("def brevity(prompts, responses): ...\n")
    [problem] = problems(FunctionRewardConfig(path="colorsys:brevity"))
    assert "colorsys.py" in problem


@pytest.mark.parametrize("name", ["sentiment"])
def test_a_missing_package_is_named_with_its_extra(name, monkeypatch):
    builtin = BUILTINS[name]
    monkeypatch.setitem(sys.modules, builtin.requires[0], None)
    [problem] = problems(FunctionRewardConfig(path=name))
    assert builtin.requires[0] in problem and f'pip install "sheeprlhf[{builtin.extra}]"' in problem


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        (FunctionRewardConfig(target_length=3), "target_length=3"),
        (FunctionRewardConfig(path="regex", pattern="a", length_unit="characters"), "length_unit=characters"),
        (FunctionRewardConfig(path="length", target_length=3, pattern="a"), "pattern=a"),
        (FunctionRewardConfig(path="length"), "reward.target_length"),
        (FunctionRewardConfig(path="regex"), "reward.pattern"),
        (FunctionRewardConfig(path="regex", pattern="(a"), "pattern=(a"),
        (ListRewardConfig(terms=["model", "regex"]), "reward.pattern is missing"),
        (ListRewardConfig(terms=["model"], target_length=3), "target_length=3"),
        (ListRewardConfig(terms=[]), "terms=[]"),
        (ListRewardConfig(terms=["imperative", "0.5*imperative"]), "imperative is there more than once"),
        (ListRewardConfig(terms=["imperativ"]), "reward.terms: imperativ"),
        (ListRewardConfig(terms=["2*modl"]), "reward.terms: modl"),
        (ListRewardConfig(terms=["imperative"], folder="me/mine"), "reward.folder=me/mine"),
        (ListRewardConfig(terms=["imperative"], template="chat"), "reward.template=chat"),
        (ListRewardConfig(terms=["model", "2*model:/no/such/folder"]), "reward.terms: model:/no/such/folder"),
        (ListRewardConfig(terms=["model:me/mine", "0.5*model:me/mine"]), "model:me/mine is there more than once"),
    ],
)
def test_options_that_cannot_work(cfg, said):
    [problem] = problems(cfg)
    assert said in problem


def test_the_folder_of_a_model(tmp_path):
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "final" / "config.json").write_text("{}")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adapter_config.json").write_text("{}")
    (tmp_path / "lora" / "final").mkdir(parents=True)
    (tmp_path / "lora" / "config.yaml").write_text("{}")
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / "lora" / "final" / name).write_text("{}")
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "bare" / name).write_text("{}")
    for name in ("tokenizer.json", "pytorch_model.bin"):
        (tmp_path / "run" / "final" / name).write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")

    def said(name: str) -> list[str]:
        return problems(ModelRewardConfig(folder=str(tmp_path / name)))

    assert said("run/final") == problems(ModelRewardConfig(folder="me/mine")) == []
    assert f"did you mean reward.folder={tmp_path}/run/final?" in said("run")[0]
    assert "config.json" in said("empty")[0]
    [of_run], [of_others], [bare] = said("lora/final"), said("adapters"), said("bare")
    assert f"give task.rm_experiment_dir={tmp_path}/lora " in of_run
    assert "adapters" in of_others and "rm_experiment_dir" not in of_others
    assert bare.startswith(f"reward.folder={tmp_path}/bare: this folder has no weights")
    assert "is a file" in said("file")[0]
    assert f"did you mean reward.folder={tmp_path}/empty?" in said("emptyy")[0]


def test_further_reward_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "second").mkdir()
    cfg = ListRewardConfig(terms=["imperative", "0.5*model:second"])
    assert model_sources(cfg, None) == ["model:second"] and not needs_model(cfg, None)
    terms = [absolute_value("reward.terms", term) for term in ("model", "0.5*model:second", "model:me/mine", "a.b:c")]
    assert terms == ["model", f"0.5*model:{tmp_path}/second", "model:me/mine", "a.b:c"]


@pytest.mark.parametrize(
    ("node", "named"),
    [
        ({"path": "os:system"}, True),
        ({"path": "os.system"}, True),
        ({"path": "${task.name}"}, True),
        ({"terms": ["imperative", "0.5*os.system"]}, True),
        ({"path": "imperative"}, False),
        ({"terms": ["model", "0.5*length", "2*model:a/b.c"]}, False),
        ({"terms": ["model:${task.name}"]}, True),
        ({"url": "http://127.0.0.1:9/v1"}, True),
        ({"api_key_variable": "HF_TOKEN"}, True),
    ],
)
def test_a_file_names_no_function_of_anybodys(node, named):
    """A recipe may come from a stranger: only the command line may say which code runs."""
    base = OmegaConf.create({"reward": node, "task": {"name": "os.system"}})
    assert ["only the command line may" in problem for problem in content_problems(base, [])] == [True] * named
    [key] = node
    given, _ = readable([f"reward.{key}=x"])
    assert content_problems(base, given) == []
