"""A run records absolute paths, is evaluated from what it has left, and goes on as its message says."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sheeprlhf.cli import run
from sheeprlhf.config.model_lookup import REWARD_MODEL, find_trained
from sheeprlhf.config.run_lookup import read_run_config
from tests.support.models import make_model_folder
from tests.support.runs import exit_code, write_pairs, write_rows
from tests.support.talking import LORA


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, data, and runs that were started in it with relative paths."""
    folder = tmp_path_factory.mktemp("records")
    make_model_folder(folder / "model")
    write_rows(folder / "rows.jsonl", 24)
    write_pairs(folder / "pairs.jsonl", 24)
    common = ["model=auto", "model.repo_name=model", "data=local", "dry_run=true"]
    rows, pairs = (f"data.{split}_file=" for split in ("train", "test"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHEEPRLHF_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        of_rows, of_pairs = ([f"{rows}{name}", f"{pairs}{name}"] for name in ("rows.jsonl", "pairs.jsonl"))
        run(["train", "task=sft", *common, *of_rows, *LORA, "run_name=adapters"])
        run(["train", "task=sft", *common, *of_rows, "run_name=whole"])
        run(["train", "task=rm", *common, *of_pairs, *LORA, "run_name=scores"])
    return folder


def run_of(place: Path, name: str) -> Path:
    [found] = place.glob(f"logs/runs/*/*/*/*/{name}")
    return found


def printed_error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert exit_code(list(words)) == 2
    return capsys.readouterr().err


@pytest.mark.slow
def test_relative_paths_are_recorded_as_absolute(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT and `export` find the model from another directory."""
    monkeypatch.chdir(tmp_path)
    run_dir = run_of(place, "adapters")
    saved = read_run_config(str(run_dir))
    assert saved["model"]["repo_name"] == str(place / "model")
    assert saved["data"]["train_file"] == str(place / "rows.jsonl")
    assert saved["root_dir"] == str(place / "logs" / "runs")
    assert f"model.repo_name={place / 'model'}" in json.loads((run_dir / "run.json").read_text())["command"]
    base = json.loads((run_dir / "final" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(place / "model")
    ids = torch.tensor([[3, 4, 5, 6]])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run_dir / "final").eval()
    run(["export", str(run_dir), "--to", str(tmp_path / "out")])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(exported(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_what_compares_with_the_start_needs_the_base(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other evaluations of a whole run do not: tests/e2e/test_chat_template.py."""
    whole = shutil.copytree(run_of(place, "whole"), tmp_path / "whole")
    text = (whole / "config.yaml").read_text()
    (whole / "config.yaml").write_text(text.replace(str(place / "model"), str(tmp_path / "gone")))
    printed = printed_error(capsys, "eval", "task=preference", f"experiment_dir={whole}")
    assert str(tmp_path / "gone") in printed and "task=preference" in printed


def test_newest_names_a_run_wherever_one_is_expected(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    assert find_trained("newest").run_dir == run_of(place, "whole")
    assert find_trained("newest", wanted=REWARD_MODEL).run_dir == run_of(place, "scores")
    assert find_trained("newest", wanted=None).run_dir == run_of(place, "scores")
    run(["eval", "task=perplexity", "experiment_dir=newest"])
    assert (run_of(place, "whole") / "eval" / "perplexity-test-final.json").is_file()
    run(["report", "newest", "--to", str(tmp_path / "page.html")])
    assert "scores" in (tmp_path / "page.html").read_text()
    run(["export", "newest", "--to", str(tmp_path / "out")])
    assert str(run_of(place, "scores")) in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    for words in (["eval", "task=perplexity", "experiment_dir=newest"], ["train", "resume_from=newest"]):
        assert "newest" in printed_error(capsys, *words)


def test_a_finished_run_goes_on_by_the_command_that_is_printed(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained further by a rate of zero, its weights are those that it has left."""
    monkeypatch.setenv("SHEEPRLHF_CACHE", str(place / "cache"))
    monkeypatch.chdir(place)
    run_dir = run_of(place, "whole")
    run(["train", f"resume_from={run_dir}"])  # its own options: nothing is left to do
    assert "finished" in capsys.readouterr().out
    printed = printed_error(capsys, "train", f"resume_from={run_dir}", "optim.lr=0")
    assert "best_of_n" not in printed and "optim.lr" in printed
    words = re.search(r"python sheeprlhf.py (train .*)", printed)
    assert words is not None
    run([*shlex.split(words[1]), "run_name=further"])
    further = run_of(place, "further")
    assert read_run_config(str(further))["task"]["sft_experiment_dir"] == str(run_dir)
    before, after = (load_file(path / "final" / "model.safetensors") for path in (run_dir, further))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_finished_reward_model_starts_anew(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No training starts from a reward model, so none is advised."""
    printed = printed_error(capsys, "train", f"resume_from={run_of(place, 'scores')}", "optim.lr=0.1")
    assert "optim.lr" in printed and "sft_experiment_dir" not in printed


def test_adapters_of_a_run_are_no_reward_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["task=grpo", "model=auto", f"model.repo_name={place / 'model'}", "data=local", "reward=model"]
    words += [f"data.train_file={place / 'rows.jsonl'}", f"root_dir={place / 'none'}"]
    folder = run_of(place, "scores") / "final"
    printed = printed_error(capsys, "train", *words, f"reward.folder={folder}")
    assert f"task.rm_experiment_dir={folder.parent}" in printed
