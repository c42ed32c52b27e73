"""A chosen chat template goes wherever the tokenizer goes: data, final/, chat, export, evaluations and further runs."""

import io
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sheeprlhf.cli import run
from sheeprlhf.config.run_lookup import read_run_config
from tests.support.models import make_model_folder
from tests.support.runs import exit_code, train
from tests.support.talking import LORA, says

MINE = (
    "{% for m in messages %}({{ m['role'] }}){{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}(assistant){% endif %}"
)


def write_chats(path: Path) -> Path:
    turns = [[("user", f"{number} times"), ("assistant", f"word {number}")] for number in range(24)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in turns]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of a model without a template by a file of the user's, one that goes on from it, and the data of both."""
    folder = tmp_path_factory.mktemp("template")
    model, rows = make_model_folder(folder / "model"), write_chats(folder / "rows.jsonl")
    (folder / "mine.jinja").write_text(MINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHEEPRLHF_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        chosen = "model.chat_template=mine.jinja"
        first = train(model, rows, folder / "first", "dry_run=true", chosen)
        (folder / "mine.jinja").unlink()  # the run has what it needs
        then = ["dry_run=true", f"task.sft_experiment_dir={first}", "task.num_generations=2", "reward=function"]
        then += ["reward.path=tests.support.rewards:letters", *LORA]
        second = folder / "second"
        words = [
            "train",
            "task=grpo",
            "model=auto",
            f"model.repo_name={model}",
            "data=local",
            f"hydra.run.dir={second}",
        ]
        run([*words, f"data.train_file={rows}", "data.max_length=120", "data.max_prompt_length=70", *then])
    return {"model": model, "rows": rows, "first": first, "second": second}


def test_the_run_has_its_template(runs: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(runs["first"] / "final")
    assert tokenizer.chat_template == MINE
    assert read_run_config(str(runs["first"]))["model"]["chat_template"].endswith("mine.jinja")
    run(["export", str(runs["first"]), "--to", str(tmp_path / "out")])
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == MINE


@pytest.mark.parametrize("name", ["first", "second"])
def test_it_is_asked_in_that_template(
    name: str, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a run that goes on from it, whose adapters have no tokenizer of their own."""
    prompts = says(monkeypatch, "word 3")
    monkeypatch.setattr("sys.stdin", io.StringIO("3 times"))
    run(["chat", str(runs[name])])
    assert prompts[-1].removeprefix("<s>") == "(user)3 times(assistant)"
    assert "word 3" in capsys.readouterr().out


def test_another_one_can_be_chosen_for_a_conversation(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for word in (runs["first"], runs["model"]):
        prompts = says(monkeypatch, "word 3")
        monkeypatch.setattr("sys.stdin", io.StringIO("3 times"))
        run(["chat", str(word), "--chat-template", "zephyr"])
        assert prompts[-1].removeprefix("<s>") == "<|user|>\n3 times</s>\n<|assistant|>\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("3 times"))
    assert exit_code(["chat", str(runs["model"]), "--chat-template", "zepyhr"]) == 2
    assert "zephyr" in capsys.readouterr().err


def test_an_evaluation_needs_neither_the_file_nor_the_base(runs: dict[str, Path], tmp_path: Path) -> None:
    alone = shutil.copytree(runs["first"], tmp_path / "alone")
    text = (alone / "config.yaml").read_text()
    (alone / "config.yaml").write_text(text.replace(str(runs["model"]), str(tmp_path / "gone")))
    for run_dir in (runs["first"], alone):
        run(["eval", "task=perplexity", f"experiment_dir={run_dir}"])
    kept, other = (json.loads((d / "eval" / "perplexity-test-final.json").read_text()) for d in (runs["first"], alone))
    assert kept["perplexity"] == other["perplexity"]
