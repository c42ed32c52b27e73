"""Printed commands: what a shell and then Hydra read is what was meant, whatever characters a path has."""

import ast
import random
import shlex
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from sheeprlhf.api.jobs import as_words
from sheeprlhf.apps.arguments import parse_args
from sheeprlhf.config.command_words import changed_words, command, hydra_value, option_word, shell_word
from sheeprlhf.config.compose import Source, check, compose_job
from sheeprlhf.config.registry import config_to_dict
from sheeprlhf.rollout.engines import StopStrings
from sheeprlhf.structure.data import DocstringsConfig, LocalDataConfig
from sheeprlhf.structure.model import AutoModelConfig
from sheeprlhf.structure.reward import FunctionRewardConfig
from sheeprlhf.structure.rollout import BestOfNConfig, GRPOConfig
from sheeprlhf.structure.run import EvalConfig, GenConfig, TrainConfig
from sheeprlhf.task.finish import evaluation_of
from sheeprlhf.utils.errors import ConfigError
from tests.support.models import byte_tokenizer, make_model_folder

ODD = ("with space", "it's", '"quoted"', "a=b,c", "(x)[y]{z}", "$HOME", "~tilde", "back\\slash\\", "true", "#;&|")
FOLDERS = ('it\'s "a"=b,c (x)[y]{z} $HOME #;&| back\\slash\\ \u00fcn\u00ef',)
PACKAGE = Path(__file__).parents[3] / "sheeprlhf"


def read(word: str) -> object:
    return OverridesParser.create().parse_override(word).value()


def test_texts_come_back_from_shell_and_hydra() -> None:
    rng = random.Random(0)
    letters = "ab /\\'\"=,()[]{}$~*?:;|&<>!#%@^`+-_.0 \t\u00e9\u6f22"
    texts = ["".join(rng.choice(letters) for _ in range(rng.randint(1, 8))) for _ in range(150)]
    for text in [*ODD, "null", "1", "1e3", "nan", "", *(text for text in texts if "${" not in text)]:
        words = shlex.split(command(["eval", option_word("a", text), option_word("b", [text, "x", text])]))
        assert words[:3] == ["python", "sheeprlhf.py", "eval"]
        assert [read(word) for word in words[3:]] == [text, [text, "x", text]], text
        assert read(shlex.split(shell_word("a", text))[0]) == text


def test_other_values() -> None:
    values = [None, True, False, 3, -0.5, 1e-05, ("a", 1), [], {"k": "a b", "other": [1, "c,d"]}]
    for value in values:
        assert read(option_word("a", value)) == (list(value) if isinstance(value, tuple) else value)
    assert [hydra_value(value) for value in ("/plain/path-1.txt", "owner/name", 0.5)] == [
        "/plain/path-1.txt",
        "owner/name",
        "0.5",
    ]


@pytest.fixture
def odd(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path / request.param
    folder.mkdir()
    return folder


def composed(line: str) -> tuple[str, object]:
    """The configuration of a printed command, by what the command line does with it; it has to have no problem."""
    python, program, verb, *words = shlex.split(line)
    assert (python, program) == ("python", "sheeprlhf.py")
    source = Source(verb)
    assert check(source, words) == []
    return verb, compose_job(source, words).config


@pytest.mark.parametrize("odd", FOLDERS, indirect=True)
def test_the_evaluation_after_a_run(odd: Path) -> None:
    model, rows = make_model_folder(odd / "final"), odd / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n')
    stop = ["</s>", "a,b", "it's", '"', " [x]", "$"]
    cfg = TrainConfig(
        task=GRPOConfig(sft_experiment_dir=None, rm_experiment_dir=None),
        model=AutoModelConfig(repo_name=str(model)),
        data=LocalDataConfig(train_file=str(rows)),
        reward=FunctionRewardConfig(path="regex", pattern=r"^(Return|Give)\b.*['\"], *$"),
        generation=GenConfig(stop_strings=stop, temperature=0.7),
    )
    (odd / "config.yaml").write_text(yaml.safe_dump(config_to_dict(cfg)))
    (odd / "data_report.json").write_text(
        '{"splits": {"train": {"read": 3, "kept": 3}, "validation": {"read": 2, "kept": 2}}}'
    )
    verb, found = composed(evaluation_of(cfg, odd))
    assert verb == "eval" and isinstance(found, EvalConfig)
    assert found.experiment_dir == str(odd) and found.task.data_split == "validation"  # there are no test rows
    assert found.reward.pattern == cfg.reward.pattern
    assert list(found.generation.stop_strings) == stop and found.generation.temperature == 0.7


@pytest.mark.parametrize("odd", FOLDERS, indirect=True)
def test_the_training_after_best_of_n(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from sheeprlhf.engine.checkpoint import TrainState
    from sheeprlhf.task.train import best_of_n

    model = make_model_folder(odd / "model")
    cfg = TrainConfig(
        task=BestOfNConfig(), model=AutoModelConfig(repo_name=str(model)), data=DocstringsConfig(), run_name="x"
    )
    row = {
        "status": "kept",
        "prompt": "a",
        "response": "b",
        "score": 1.0,
        "n": 8,
        "mean_score": 0.5,
        "first_score": 0.1,
    }
    row |= {"first_score": 0.1, "rejected": "c", "rejected_score": 0.2}
    (odd / "run.json").write_text('{"started": 1, "status": "running"}')
    run = SimpleNamespace(cfg=cfg, dir=odd, say=lambda text: None)
    line = best_of_n._finish(run, {"train": [row]}, TrainState(step=1), longest=20)  # type: ignore[arg-type]
    verb, found = composed(line)
    assert verb == "train" and isinstance(found, TrainConfig)
    assert found.data.train_file == str(odd / "dataset" / "train.jsonl")  # type: ignore[attr-defined]
    assert found.model.repo_name == str(model)


@pytest.mark.parametrize("odd", FOLDERS, indirect=True)
def test_the_training_that_has_to_come_first(odd: Path) -> None:
    """A message names the whole command between backticks; the rows and the model are in it."""
    model, rows = make_model_folder(odd / "model"), odd / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n')
    words = ["task=ppo", "model=auto", "data=local", "reward=model", option_word("model.repo_name", str(model))]
    words += [option_word("data.train_file", str(rows)), option_word("root_dir", str(odd / "runs"))]
    [problem] = check(Source("train"), words)
    lines = problem.split("`")[1::2]
    assert len(lines) == 2
    for line, task in zip(lines, ("sft", "rm"), strict=True):
        verb, found = composed(line)
        assert verb == "train" and isinstance(found, TrainConfig) and found.task.config_name == task
        assert (found.model.repo_name, found.data.train_file) == (str(model), str(rows))  # type: ignore[attr-defined]


def test_no_command_is_put_together_elsewhere() -> None:
    """Other modules hold no program name beside values: fixed text alone, or `command`."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr) and any(isinstance(part, ast.FormattedValue) for part in node.values):
                texts = [part.value for part in node.values if isinstance(part, ast.Constant)]
                assert not any("sheeprlhf.py " in str(text) for text in texts), path


LISTS = {  # as typed behind a shell's quotes, and what is meant
    "[<end_of_turn>]": ["<end_of_turn>"],
    "[<|im_end|>,END]": ["<|im_end|>", "END"],
    "[ <a> , b c ]": ["<a>", "b c"],
    "[### Human:,</s>]": ["### Human:", "</s>"],
    '["<a>,b",<c>]': ["<a>,b", "<c>"],
    "[it's]": ["it's"],
    "[<a, b>]": ["<a", "b>"],
    "[10,1e3,true,null]": ["10", "1e3", "true", "null"],
    "[?!,*]": ["?!", "*"],
    '[say "hi"]': ['say "hi"'],
    '["\n\n",<x>]': ["\n\n", "<x>"],
    "['<a>']": ["<a>"],
    "[]": [],
    "[a\\,b,<c>]": ["a,b", "<c>"],
    "[{x},(y)]": ["{x}", "(y)"],
}


@pytest.mark.parametrize("typed", LISTS)
def test_stop_strings_are_read_as_they_are_typed(typed: str) -> None:
    words = parse_args(["task=grpo", f"generation.stop_strings={typed}"]).words
    assert read(words[1]) == LISTS[typed]
    assert parse_args(words).words == words
    for printed in changed_words("generation", GenConfig(stop_strings=LISTS[typed])):
        [pasted] = shlex.split(shlex.quote(printed))
        assert read(*parse_args([pasted]).words) == LISTS[typed]


def test_other_words_stay_as_they_are() -> None:
    words = ["seed=1", "optim.betas=[0.9,0.95]", "a=[1,2],[3]", "a=[b", "x=[[1],[2]]", "fabric.devices=[0,1]"]
    words += ["a=b c", "a='<x>'", "a='x", "a=<x>,<y>", "a=${x}", "a=1", "a=null", "ü=<a>", "+a=3", "a="]
    assert parse_args(words).words == words
    assert read(*parse_args(["optim.betas=[0.9,<a>]"]).words) == [0.9, "<a>"]


def test_a_text_that_looks_like_a_number_stays_as_it_is() -> None:
    for text in ("2024_01_05", "1e3", "1.10", ".5", "+7", "NaN", "12e4567"):
        words = parse_args([f"run_name={text}", f"model.library_cfg.revision={text}"]).words
        assert list(map(read, words)) == [text, text]
    numbers = ["optim.lr=1e-4", "task.token_budget=4_096"]
    assert parse_args(numbers).words == numbers
    assert [read(word) for word in parse_args(["seed=7", "run_name=7"]).words] == [7, 7]  # whose text is the same
    assert list(map(read, as_words(["run_name=1.10", "root_dir=runs/été (1)"]))) == ["1.10", "runs/été (1)"]


@pytest.mark.parametrize("typed", ["my runs ü", "it's (1)", "a=b.jsonl", "/数据/x#1 & y!.jsonl", "<a>", 'say "hi"'])
def test_a_text_with_special_characters_needs_no_quotes(typed: str) -> None:
    [word] = parse_args([f"root_dir={typed}"]).words
    assert read(word) == typed
    assert parse_args([word]).words == [word]


def advice_in(message: str) -> str:
    """The option that a message tells to write, as a shell reads it."""
    place = message.index("generation.stop_strings=", message.index("write ") if "write " in message else 0)
    place -= message[place - 1] == "'"
    [word, *_] = shlex.split(message[place:])
    return word


WRONG = {"<end>": ["<end>"], '["a]': ["a"]}


@pytest.mark.parametrize("typed", WRONG)
def test_the_advice_about_stop_strings_works(typed: str) -> None:
    """What the message tells to write, read by a shell and then by the command line, has no problem."""
    source = Source("train")
    rest = ["task=grpo", "data=docstrings", "model=tiny"]
    [problem] = check(source, parse_args([*rest, f"generation.stop_strings={typed}"]).words)
    word = advice_in(problem)
    assert read(word) == WRONG[typed]
    assert check(source, parse_args([*rest, word]).words) == []


@pytest.mark.parametrize("text", ["it's, (1)", "runs/\u00e9t\u00e9,2"])
def test_the_advice_about_a_text_with_a_comma_works(text: str) -> None:
    [problem] = check(Source("train"), ["task=sft", f"root_dir={text}"])
    place = problem.rindex("root_dir=")
    [word] = shlex.split(problem[place - (problem[place - 1] == "'") :])
    assert read(word) == text


@pytest.mark.parametrize("string", ["<end_of_turn>\n", "say <end_of_turn>"])
def test_a_stop_string_beside_a_special_token(string: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    with pytest.raises(ConfigError) as error:
        StopStrings(["it's", string], tokenizer)
    message = str(error.value)
    place = message.rindex("only, ") + len("only, ")
    [word] = parse_args(shlex.split(message[place:])).words
    assert read(word) == ["it's", "<end_of_turn>"]
    StopStrings(read(word), tokenizer)
