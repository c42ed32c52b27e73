"""`inspect`: what is printed is what the loss counts, and nothing of somebody else's is harmed."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from sheeprlhf.apps import inspect
from sheeprlhf.apps.inspect import Viewer, draw_histograms, text_histogram, token_texts, trained_tokens
from sheeprlhf.cli import run
from sheeprlhf.data.example import collate_packed
from sheeprlhf.data.tokenize import RowTokenizer, TokenRow, encode
from sheeprlhf.utils.errors import DataError
from tests.support.batches import random_examples
from tests.support.runs import exit_code
from tests.unit.data.toy import BOS_TEMPLATE, TEMPLATE, byte_tokenizer, example

FAKE_IMAGE = b"made by sheeprlhf inspect"
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, no colour, lines of 100 columns, and no time spent on drawing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(inspect, "draw_histograms", lambda *_: FAKE_IMAGE)
    return tmp_path


def save_tokenizer(folder: Path, **options: object) -> Path:
    byte_tokenizer(**{"bos": True, **options}).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def words(home: Path, rows: list[dict], *extra: str, **options: object) -> list[str]:
    """The command for some rows; all of them are in the training split."""
    (home / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = save_tokenizer(home / "model", **options)
    shares = ["data.validation_split=0", "data.test_split=0", "data.minimum_response_length=1"]
    mine = ["data=local", "data.train_file=my.jsonl", "model=auto", f"model.repo_name={model}", *shares]
    return ["inspect", *mine, *extra]


def shown(printed: str, number: int = 1) -> list[str]:
    """The lines of one example."""
    return printed.split(f"example {number}: ")[1].split("\n\n")[0].splitlines()


def test_prompt_and_response_stand_apart_token_by_token(home: Path, capsys: pytest.CaptureFixture) -> None:
    run(words(home, [{"prompt": "ab\n c", "response": "de"}]))
    assert shown(capsys.readouterr().out) == [
        "row 0",
        "prompt 6 + response 3 = 9 tokens, 3 trained on, BOS: 1, response ends in EOS",
        "prompt:",
        "  <s>\u00a6a\u00a6b\u00a6\u21b5",
        "   \u00a6c",
        "response:",
        "+ d\u00a6e\u00a6<|im_end|>",
    ]


def test_a_scored_newline_has_a_line_of_its_own(home: Path, capsys: pytest.CaptureFixture) -> None:
    """Of a process reward model: the separator of steps is scored, the tokens before it are not."""
    run(words(home, [{"prompt": "Q", "completions": ["ab", "c"], "labels": [True, False]}], "task=prm"))
    lines = shown(capsys.readouterr().out)
    assert lines[lines.index("response:") + 1 :] == ["  a\u00a6b", "+ \u21b5", "  c", "+ <|im_end|>"]


def test_the_prompt_counts_if_the_task_says_so(home: Path, capsys: pytest.CaptureFixture) -> None:
    run(words(home, [{"prompt": "ab", "response": "de"}], "task.completion_only_loss=false"))
    printed = capsys.readouterr().out
    lines = shown(printed)
    assert lines[1].startswith("prompt 3 + response 3 = 6 tokens, 5 trained on")
    assert lines[3:5] == ["  <s>", "+ a\u00a6b"]  # nothing predicts the first token
    assert "task.completion_only_loss=false" in printed


@pytest.mark.parametrize("num_responses", [1, 2, 3])
def test_the_mask_is_that_of_the_batch(num_responses: int) -> None:
    for one in random_examples(20, num_responses):
        num_prompt = len(one.prompt_ids)
        after_prompt = np.arange(one.num_tokens()) >= num_prompt
        assert (trained_tokens(collate_packed([one])).numpy() == after_prompt).all()
        after_first = np.arange(one.num_tokens()) >= 1
        assert (trained_tokens(collate_packed([one], targets="all")).numpy() == after_first).all()
        scored = trained_tokens(collate_packed([one], targets="scores"), scored=True).numpy()
        assert (scored == after_prompt).all()
        last = trained_tokens(collate_packed([one], targets="last"), scored=True).numpy()
        ends = num_prompt + np.cumsum([len(response) for response in one.responses]) - 1
        assert np.flatnonzero(last).tolist() == ends.tolist()


@pytest.mark.parametrize("num_responses", [1, 2])
def test_tokens_that_the_example_masks_are_not_marked(num_responses: int) -> None:
    rng = np.random.default_rng(0)
    for one in random_examples(20, num_responses):
        mask = np.concatenate([np.append(rng.random(len(ids) - 1) < 0.5, True) for ids in one.responses])
        marked = trained_tokens(collate_packed([one._replace(trained=mask)])).numpy()
        assert marked.tolist() == [False] * len(one.prompt_ids) + mask.tolist()


def test_two_bos_are_a_warning(home: Path, capsys: pytest.CaptureFixture) -> None:
    run(words(home, [{"messages": CHAT}], template="{{ bos_token }}" + BOS_TEMPLATE))
    printed = "\n".join(shown(capsys.readouterr().out))
    assert "BOS: 2" in printed
    assert "WARNING" in printed


def test_a_template_applied_to_its_own_output_is_a_warning() -> None:
    tokenizer = byte_tokenizer(template=TEMPLATE)
    once = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    again = [{"role": "user", "content": once}]
    twice = tokenizer.apply_chat_template(again, tokenize=False, add_generation_prompt=True)
    answered = tokenizer.apply_chat_template([*CHAT, *CHAT[:1]], tokenize=False, add_generation_prompt=True)
    viewer = Viewer(tokenizer, targets="response")
    views = [
        viewer.view(example(encode(tokenizer, [text], control_tokens=True)[0], [5])) for text in (once, answered, twice)
    ]
    assert ["chat template applied once" in view.facts for view in views] == [True, True, False]
    assert [len(view.warnings) for view in views] == [0, 0, 1]
    assert "opens 2 answers and leaves 1 without text" in views[2].warnings[0]


PAIRS = [{"prompt": "ab", "chosen": "de", "rejected": "d", "margin": 0.5}]


@pytest.mark.parametrize(
    ("words_of_task", "meaning_of_loss", "scored", "chosen", "rejected"),
    [
        (
            ["task=dpo"],
            "the log-probabilities of whole responses",
            "5 trained on",
            ["+ d\u00a6e\u00a6<|im_end|>"],
            None,
        ),
        (
            ["task=rm"],
            "the scores after the last token",
            "2 scored",
            ["  d\u00a6e", "+ <|im_end|>"],
            ["  d", "+ <|im_end|>"],
        ),
        (["task=rm", "task.loss_type=average"], "from the first that differs on", "5 scored", None, None),
    ],
)
def test_a_pair_shows_which_response_is_better_and_what_the_loss_looks_at(
    home: Path,
    capsys: pytest.CaptureFixture,
    words_of_task: list[str],
    meaning_of_loss: str,
    scored: str,
    chosen: list[str] | None,
    rejected: list[str] | None,
) -> None:
    run(words(home, PAIRS, *words_of_task))
    printed = capsys.readouterr().out
    assert meaning_of_loss in printed
    lines = shown(printed)
    facts = " ".join(lines[1 : lines.index("prompt:")])
    assert facts.startswith(f"prompt 3 + chosen 3 + rejected 2 = 8 tokens, {scored}, BOS: 1, ")
    assert facts.endswith("chosen ends in EOS, rejected ends in EOS, margin 0.5")
    assert lines[lines.index("prompt:") + 1] == "  <s>\u00a6a\u00a6b"
    better, worse = lines.index("chosen (the better one):"), lines.index("rejected (the worse one):")
    assert lines[better + 1 : worse] == (chosen or ["+ d\u00a6e\u00a6<|im_end|>"])
    assert lines[worse + 1 :] == (rejected or ["+ d\u00a6<|im_end|>"])
    assert re.search(r"pairs of a better and a worse response +1\n", printed)
    assert re.search(r"tokens +prompt +better +worse +total\n", printed)
    assert set(words_of_task) <= set(printed.splitlines()[-1].split())  # the next command


def test_the_split_shown_is_the_one_that_the_task_trains_on(home: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "de", "rejected": "f"} for i in range(40)]
    half = "data.reward_model_split=0.5"
    for task, split in (("rm", "reward"), ("sft", "train")):
        run(words(home, rows, f"task={task}", half, "num_examples=0"))
        assert f"\n{split} split: 0 of " in capsys.readouterr().out
    run(words(home, rows, "task=rm", "data.reward_model_split=0", "num_examples=0"))
    assert "\ntrain split: 0 of 40 " in capsys.readouterr().out


def test_nothing_hidden_reaches_the_terminal(home: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [{"prompt": "a\x1b[31mb\r\u202e\t hf_abcdefghijklmnopqrstuvwxyzABCDEFGH end", "response": "[bold]**[/bold]"}]
    run(words(home, rows))
    printed = capsys.readouterr().out
    assert not any(letter in printed for letter in "\x1b\r\u202e\t")
    text = "\n".join(shown(printed)).replace("\u00a6", "")
    assert r"a\x1b[31mb\r" in text
    assert text.count("*") == 37 + 2  # of the key, and of the response
    assert "stars in the prompt hide" in text
    assert "stars in the response" not in text  # its own
    assert "[bold]**[/bold]" in text


def test_texts_of_tokens_are_the_decoded_text() -> None:
    tokenizer = byte_tokenizer()
    for text in ("a\u00e9\U0001f600b", "\u6570\u5b66", "plain  \n\n x"):
        [ids] = encode(tokenizer, [text])
        texts = token_texts(tokenizer, ids)
        assert "".join(texts) == text
        assert len(texts) == len(ids)
    [ids] = encode(tokenizer, ["a\u00e9"])
    assert token_texts(tokenizer, ids) == ["a", "", "\u00e9"]
    assert token_texts(tokenizer, ids[:-1]) == ["a", ""]  # cut inside a character


def test_a_row_with_nothing_to_train_on_is_an_error_for_all_commands(
    home: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = RowTokenizer.__call__

    def losing(self: RowTokenizer, rows: list) -> list[TokenRow]:
        first, *others = call(self, rows)
        return [first, *(row._replace(sizes=(row.sizes[0], 0), tokens=row.tokens[: row.sizes[0]]) for row in others)]

    monkeypatch.setattr(RowTokenizer, "__call__", losing)
    rows = [{"prompt": f"ab{i}", "response": "de"} for i in range(3)]
    line = words(home, rows, "data.max_length=9", "data.max_prompt_length=4")
    for command in (line, ["train", "task=sft", "model.random_init=true", *line[1:]]):
        assert exit_code(command) == 2
        error = capsys.readouterr().err
        assert "row 1 " in error
        assert "data.max_length=9" in error


@pytest.mark.parametrize("targets", ["response", "all"])
def test_no_batch_has_an_empty_response(targets: str) -> None:
    with pytest.raises(DataError, match="row 3"):
        collate_packed([example([1], [2]), example([1, 2], [], row_id=3)], targets=targets)


def test_files_are_replaced_if_they_are_ours_alone(home: Path, capsys: pytest.CaptureFixture) -> None:
    line = words(home, [{"prompt": "ab", "response": "de"}], "output_dir=out put", "num_examples=0")
    run(line)
    image, report = sorted((home / "out put").iterdir(), reverse=True)
    assert (image.name, report.name) == ("local-auto-lengths.png", "local-auto-data_report.json")
    assert json.loads(report.read_text())["splits"]["train"]["kept"] == 1
    first = capsys.readouterr().out
    assert "in place of" not in first
    assert f"wrote {image.relative_to(home)}\n" in first
    run(line)
    assert capsys.readouterr().out.count("(in place of ") == 2
    report.write_text('{"splits": {}}')
    assert exit_code(line) == 2
    assert f"output_dir: {report.relative_to(home)}" in capsys.readouterr().err
    assert report.read_text() == '{"splits": {}}'
    report.unlink()
    report.symlink_to(image)
    assert exit_code(line) == 2
    assert image.read_bytes() == FAKE_IMAGE


def test_the_next_command_has_the_users_own_words(home: Path, capsys: pytest.CaptureFixture) -> None:
    (home / "my rows.jsonl").write_text('{"prompt": "ab", "response": "de"}')
    mine = ["data.max_length=999", "split=train", "num_examples=0", "output_dir=o", "data.test_file='my rows.jsonl'"]
    run(words(home, [{"prompt": "ab", "response": "de"}], *mine))
    last = capsys.readouterr().out.splitlines()[-1]
    kept = ["data=local", "data.train_file=my.jsonl", "model=auto", f"model.repo_name={home}/model"]
    kept += ["data.validation_split=0", "data.test_split=0", "data.minimum_response_length=1"]
    kept += ["data.max_length=999", "data.test_file='my rows.jsonl'"]
    assert shlex.split(last) == ["next:", "python", "sheeprlhf.py", "train", "task=sft", *kept]


def test_the_histogram_of_text_by_hand() -> None:
    lengths = {"prompt": np.array([12, 14, 14, 23]), "total": np.array([30, 31, 32, 33])}
    assert text_histogram(lengths, bar="#", longest_bar=4) == [
        "tokens  prompt  total",
        "  9-12  ##   1",
        " 13-16  #### 2",
        " 17-20",
        " 21-24  ##   1",
        " 25-28",
        " 29-32          #### 3",
        " 33-36          ##   1",
    ]
    long = text_histogram({"total": np.array([3, 1151])}, bar="#", longest_bar=4)
    assert (long[1], long[-1], len(long)) == ("    1-150  #### 1", "1051-1200  #### 1", 9)


def test_prompts_alone(home: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a split with responses too, which has one column of the image more."""
    monkeypatch.setattr(inspect, "draw_histograms", draw_histograms)
    (home / "held_out.jsonl").write_text('{"prompt": "hey", "response": "ho"}\n{"prompt": "alone"}\n')
    run(words(home, [{"prompt": "hi"}], "task=grpo", "data.validation_file=held_out.jsonl", "output_dir=out"))
    printed = capsys.readouterr().out
    assert "the model writes" in printed
    assert "prompt 3 tokens, no response" in printed
    assert not any(line.startswith("+ ") and "trained on" not in line for line in printed.splitlines())
    assert [path.read_bytes()[:4] for path in (home / "out").glob("*.png")] == [b"\x89PNG"]
