"""A folder that left its run, and an export, know how prompts were written: the template's variables and its date."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sheeprlhf.cli import run
from sheeprlhf.config.model_lookup import REWARD_MODEL, find_trained
from sheeprlhf.data.prepare import prepare_data
from sheeprlhf.data.prompt_encoder import Turn
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.structure.data import LocalDataConfig
from sheeprlhf.structure.model import AutoModelConfig
from sheeprlhf.task.text_generator import load_reward_scorer, load_text_generator
from sheeprlhf.utils.errors import ModelError
from sheeprlhf.utils.rendering import FILE
from tests.support.models import ModelFolder, byte_tokenizer, make_model_folder
from tests.support.runs import figures, rejected, train, train_words, write_rows

TEMPLATE = (
    "{{ strftime_now('%Y') }}({{ mood | default('none') }}){% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ARGS = ["data.template_args={mood: kind, strftime_now: '2019-03-01'}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs on chats ("sft", "rm") and on plain rows ("plain"); their final folders alone ("sft_final", ...)."""
    folder = tmp_path_factory.mktemp("form")
    model, tokenizer = make_model_folder(folder / "model"), byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)

    def message(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    rows: dict[str, list[dict[str, Any]]] = {"sft": [], "rm": [], "plain": []}
    for number in range(24):
        question, answer = message("user", f"{number} times"), message("assistant", f"word {number}")
        rows["sft"].append({"messages": [question, answer]})
        rows["rm"].append({"prompt": [question], "chosen": [answer], "rejected": [message("assistant", "no")]})
        rows["plain"].append({"prompt": f"{number} times", "response": f" word {number}"})
    found = {"model": model}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHEEPRLHF_CACHE", str(folder / "cache"))
        for name, of_name in rows.items():
            data = folder / f"{name}.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in of_name))
            found[f"{name}_rows"], task = data, "rm" if name == "rm" else "sft"
            given = [] if name == "plain" else ARGS
            found[name] = train(model, data, folder / name, "dry_run=true", *given, task=task)
            shutil.copytree(found[name] / "final", folder / f"{name}_final")
            found[f"{name}_final"] = folder / f"{name}_final"
    return found


def prompt_of(word: Path, **given: Any) -> str:
    writer = load_text_generator(find_trained(str(word), **given), print)
    _, example = writer.fit([Turn("user", "5 times")])
    return str(writer.tokenizer.decode(example.prompt_ids))


@pytest.mark.slow
def test_a_folder_is_asked_as_its_run(runs: dict[str, Path]) -> None:
    assert prompt_of(runs["sft"]) == prompt_of(runs["sft_final"]) == "2019(kind)[user]5 times[assistant]"
    assert prompt_of(runs["plain"]) == prompt_of(runs["plain_final"]) == "<s>5 times"
    assert prompt_of(runs["sft_final"], template_args="{mood: sad}") == "2024(sad)[user]5 times[assistant]"
    assert prompt_of(runs["model"]) == "2024(none)[user]5 times[assistant]"


def test_rows_are_rendered_as_in_training(runs: dict[str, Path]) -> None:
    """An evaluation or a training that begins with the folder takes its variables unless others are given."""
    tokenizer = load_tokenizer(AutoModelConfig(repo_name=str(runs["sft_final"])))
    for given, begin in ((None, "2019(kind)"), ({}, "2024(none)"), ({"mood": "sad"}, "2024(sad)")):
        cfg = LocalDataConfig(
            train_file=str(runs["sft_rows"]), template_args=given, cache_dir=str(runs["model"].parent)
        )
        data = prepare_data(cfg, tokenizer, kind="sft", say=print, progress=False)
        assert tokenizer.decode(data.splits["train"].example(0).prompt_ids).startswith(begin)


def executed(card: str, folder: Path) -> str:
    """The lines that the snippet of a card prints, with this folder, a prompt and a response."""
    snippet = card.partition("```python\n")[2].partition("```")[0]
    snippet = snippet.replace("<folder>", str(folder)).replace("<prompt>", "5 times").replace("<response>", "word 5")
    messages: list[str] = []
    with torch.no_grad():
        exec(snippet, {"print": lambda value: messages.append(str(value))})
    return messages[0]


@pytest.mark.parametrize("name", ["rm", "rm_final"])
def test_the_card_of_a_reward_model_scores_with_the_end_token_of_its_training(
    name: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(["export", str(runs[name]), "--to", str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    scorer = load_reward_scorer(find_trained(str(runs[name]), wanted=REWARD_MODEL), print)
    turns = [Turn("user", "5 times")]
    expected = scorer.score("template", turns, "word 5")
    assert "<|end|>" in card and "eos_token" not in card and "2019-03-01" in card
    stored = json.loads((tmp_path / "out" / FILE).read_text())
    assert stored == {"form": "template", "template_args": {"mood": "kind", "strftime_now": "2019-03-01"}}
    exported = load_reward_scorer(find_trained(str(tmp_path / "out"), wanted=REWARD_MODEL), print)
    assert exported.score("template", turns, "word 5") == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", _Then)
    assert float(executed(card, tmp_path / "out")) == pytest.approx(expected, abs=1e-5)


class _Then:
    """A clock that stands still."""

    @staticmethod
    def now(tz: object = None) -> Any:
        from datetime import datetime

        return datetime(2019, 3, 1)


def test_the_card_of_a_policy_asks_in_the_template(runs: dict[str, Path], tmp_path: Path) -> None:
    for name, begin in (("sft", "(kind)[user]How do I"), ("plain", "<s>Once upon a time")):
        run(["export", str(runs[name]), "--to", str(tmp_path / name)])
        card = (tmp_path / name / "README.md").read_text()
        assert begin in executed(card, tmp_path / name)


def test_a_file_that_is_not_what_it_has_to_be_is_rejected(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs["sft_final"], tmp_path / "model"))
    for content in ("[]", "{", '{"template_args": {"tools": []}}', '{"template_args": {"strftime_now": "now"}}'):
        (folder / FILE).write_text(content)
        with pytest.raises(ModelError, match=FILE):
            load_tokenizer(AutoModelConfig(repo_name=str(folder)))


def test_a_bias_of_a_reward_head_is_reported_by_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain transformers leaves it out of its logits; the snippet of the card gives the score with it."""
    folder = make_model_folder(tmp_path / "model", scores=True)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"score.bias": torch.tensor([0.7])}, folder / "model.safetensors", {"format": "pt"})
    run(["export", str(folder), "--to", str(tmp_path / "out")])
    assert "0.7" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`0.7`" in card and "</s>" in card
    tokenizer, plain = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        logits = plain(**tokenizer("5 timesword 5</s>", return_tensors="pt")).logits.item()
    assert float(executed(card, tmp_path / "out")) == pytest.approx(logits + 0.7, abs=1e-5)


LENGTH = ("reward.path=length", "reward.target_length=3")


def files(folder: Path, *answered: bool) -> tuple[Path, Path]:
    """Training and held-out rows; of each file, whether its rows have responses."""
    made = []
    for name, keep in zip(("train", "held_out"), answered, strict=True):
        rows = [json.loads(line) for line in write_rows(folder / f"{name}.jsonl", 16).read_text().splitlines()]
        made.append(folder / f"{name}.jsonl")
        made[-1].write_text("".join(json.dumps(row if keep else {"prompt": row["prompt"]}) + "\n" for row in rows))
    return made[0], made[1]


def words(model: Path, data: tuple[Path, Path], run_dir: Path, *extra: str, task: str = "grpo") -> list[str]:
    held_out = [f"data.{split}_file={data[1]}" for split in ("validation", "test")]
    return [*train_words(model, data[0], run_dir, "task.max_num_steps=2", *held_out, task=task), *extra]


@pytest.mark.slow
def test_two_steps_on_prompts(tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]) -> None:
    data, run_dir = files(tmp_path, False, False), tmp_path / "run"
    run(words(model_folder(), data, run_dir, *LENGTH))
    printed = capsys.readouterr().err.rpartition("next: python sheeprlhf.py ")[2].splitlines()[0]
    found = figures(run_dir)
    assert len(found["objective/scores"]) == 1 and len(found["val/scores"]) == 1
    assert "val/perplexity" not in found
    [table] = [path.read_text() for path in (run_dir / "samples").glob("*.txt")]
    assert "[prompt]" in table and "[model]" in table and "[reference]" not in table
    report = json.loads((run_dir / "data_report.json").read_text())
    assert report["splits"]["train"]["prompts_alone"] == 16
    run(shlex.split(printed))  # against the start: there are no references
    result = json.loads((run_dir / "eval" / "reward-length-test-final.json").read_text())
    assert result["against"] == "start" and result["rows"] == 16
    run(["eval", "task=generate", f"experiment_dir={run_dir}", "generation.max_new_tokens=4"])
    written = (run_dir / "eval" / "generate-test-final.jsonl").read_text().splitlines()
    assert len(written) == 16 and json.loads(written[0])["reference"] is None
    assert "response" in rejected(["eval", "task=perplexity", f"experiment_dir={run_dir}"], capsys)


def test_held_out_responses_of_prompts_alone_have_a_perplexity(tmp_path: Path, model_folder: ModelFolder) -> None:
    run(words(model_folder(), files(tmp_path, False, True), tmp_path / "run", *LENGTH))
    assert figures(tmp_path / "run")["val/perplexity"][0] > 1


@pytest.mark.slow
def test_what_reads_responses_is_refused(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a model loads."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("nothing was to be loaded")

    monkeypatch.setattr("sheeprlhf.task.models.load_rl_models", load)
    model = model_folder()
    for number, answered in enumerate([(False, False), (True, False)]):
        (tmp_path / f"{number}").mkdir()
        data = files(tmp_path / f"{number}", *answered)
        printed = rejected(words(model, data, tmp_path / f"rouge-{number}", "reward.path=rouge"), capsys)
        split = "validation" if answered[0] else "train"
        assert (
            f"reward rouge needs a column 'reference' of the {split} rows; there is prompt: it is the row's" in printed
        )
    data = files(tmp_path / "0", False, True)
    printed = rejected(words(model, data, tmp_path / "ptx", *LENGTH, "task.ptx_coeff=0.5", task="ppo"), capsys)
    assert "task.ptx_coeff=0.5" in printed
