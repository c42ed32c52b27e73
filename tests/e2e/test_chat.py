"""Talking in a terminal: the model's answer, nothing that a terminal obeys, and ways to stop, forget and end."""

import io
import json
import os
import pty
import select
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import sheeprlhf.apps.chat as chat
from sheeprlhf.cli import run
from sheeprlhf.config.model_lookup import find_trained
from sheeprlhf.data.prompt_encoder import Turn
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.rollout.engines import generate_responses
from sheeprlhf.structure.model import TinyConfig
from sheeprlhf.structure.run import GenConfig
from sheeprlhf.task.text_generator import load_text_generator
from sheeprlhf.utils.errors import DataError
from tests.support.models import byte_tokenizer, make_model_folder
from tests.support.runs import exit_code, train
from tests.support.talking import TEMPLATE, says

ROOT = Path(__file__).parents[2]


@pytest.fixture
def chatty(tmp_path):
    """A model's folder with a chat template."""
    folder = make_model_folder(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def piped(monkeypatch, capsys, text: str, *words: object) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    run(["chat", *map(str, words)])
    return capsys.readouterr().out


def test_from_a_pipe_the_answer_is_what_generate_writes(monkeypatch, capsys):
    signature = 'def read_json(path, encoding="utf-8"):'
    printed = piped(monkeypatch, capsys, f"{signature}\n", "tiny", "--temperature", "0", "--max-new-tokens", "16")
    tokenizer = load_tokenizer(TinyConfig())
    folder = ROOT / "sheeprlhf" / "assets" / "tiny"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = tokenizer(f'{signature}\n    """', return_tensors="np")["input_ids"][0]
    # a name of `list models` was trained on nothing here, so it goes on with the text as it is
    plain = tokenizer(signature + "\n", return_tensors="np")["input_ids"][0]
    expected = generate_responses(model, tokenizer, [plain, prompt], GenConfig(max_new_tokens=16))
    assert printed == f"{expected[0].strip()}\n"


def test_nothing_that_a_terminal_obeys_is_printed(monkeypatch, capsys, chatty):
    evil = "a\x1b[31mred\x1b]0;title\x07b\x9b2J\u202e\x08<b>\r\n\tok\x1b["
    says(monkeypatch, evil)
    printed = piped(monkeypatch, capsys, "hello", chatty)
    assert not set("\x1b\x07\x9b\u202e\x08\r") & set(printed)
    assert printed == "aredb2J<b>\n\tok\n"


def test_a_conversation_is_remembered_and_forgotten(monkeypatch, capsys, chatty):
    prompts = says(monkeypatch, "yes", "no")
    lines = iter(["Hi", "Why?", "/reset", "New", "/nonsense", "/help", "/quit"])
    conversation = chat.Conversation(load_text_generator(find_trained(str(chatty)), print), GenConfig(), 0, "Be kind.")
    chat._loop(conversation, lambda: next(lines))
    start = "[system]Be kind.[user]"
    assert prompts[0] == f"{start}Hi[assistant]"
    assert prompts[1] == f"{start}Hi[assistant]yes</s>[user]Why?[assistant]"
    assert prompts[2] == f"{start}New[assistant]"
    printed = capsys.readouterr()
    assert printed.out == "yes\nno\nyes\n"
    assert "/nonsense" in printed.err and "(forgotten)" in printed.err


def test_the_oldest_turns_make_room(monkeypatch, chatty, capsys):
    prompts = says(monkeypatch, "y" * 20)
    conversation = chat.Conversation(load_text_generator(find_trained(str(chatty)), print), GenConfig(), 0, "sys")
    for number in range(4):
        conversation.say(f"{number}" * 20)
    assert all(len(prompt) < 128 for prompt in prompts)
    assert "0" * 20 not in prompts[-1] and "3" * 20 in prompts[-1] and "[system]sys" in prompts[-1]
    assert "were left out" in capsys.readouterr().err
    before = list(conversation.turns)
    with pytest.raises(DataError, match="127"):
        conversation.say("x" * 200)
    assert conversation.turns == before


def test_the_answer_ends_where_the_model_ends(chatty):
    writer = load_text_generator(find_trained(str(chatty)), print)
    prompt = [Turn("user", "x" * 90)]
    _, example = writer.fit(prompt)
    cfg = GenConfig(max_new_tokens=500)
    *_, last = writer.answer(prompt, cfg, 0)
    assert len(byte_tokenizer()(last)["input_ids"]) <= 128 - len(example.prompt_ids) + 1


def test_a_model_of_dialogues_stops_before_it_speaks_for_the_human(monkeypatch, model_folder):
    says(monkeypatch, " Sure.\n\nHuman: thanks")
    writer = load_text_generator(find_trained(str(model_folder("llama"))), print).in_form("dialogue")
    assert list(writer.answer([Turn("user", "Hi")], GenConfig(), 0))[-1] == " Sure."


def test_ctrl_c_stops_an_answer_and_not_the_chat(monkeypatch, capsys, chatty):
    def interrupted(model, prompt_ids, cfg, **_):
        yield from byte_tokenizer()("half", add_special_tokens=False)["input_ids"]
        raise KeyboardInterrupt

    conversation = chat.Conversation(load_text_generator(find_trained(str(chatty)), print), GenConfig(), 0)
    monkeypatch.setattr("sheeprlhf.task.text_generator.stream_ids", interrupted)
    lines = iter(["Hi"])

    def read() -> str:
        for line in lines:
            return line
        raise EOFError

    chat._loop(conversation, read)
    assert conversation.turns == [Turn("user", "Hi"), Turn("assistant", "half")]
    printed = capsys.readouterr()
    assert printed.out == "half\n\n" and "(stopped)" in printed.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "`chat`"),
        (["tiny", "tiny"], "2 were given"),
        (["tiny", "--temprature", "1"], "did you mean --temperature?"),
        (["tiny", "--system", "x"], "asked without a chat template"),
        (["nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_message(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("x"))
    assert exit_code(["chat", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err and "Traceback" not in printed.err


@pytest.mark.parametrize(("form", "asked"), [("text", "hello"), ("template", "[user]hello[assistant]")])
def test_a_chat_model_is_asked_as_its_rows_were_written(form, asked, chatty, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    for i in range(24):
        row = {"prompt": f"p{i}", "response": f"r{i}"}
        if form == "template":
            turns = zip(("user", "assistant"), row.values(), strict=True)
            row = {"messages": [{"role": role, "content": text} for role, text in turns]}
        with file.open("a") as lines:
            lines.write(f"{json.dumps(row)}\n")
    trained = train(chatty, file, tmp_path / "run", "dry_run=true")
    assert ("chat template" in capsys.readouterr().err) == (form == "template")
    writer = load_text_generator(find_trained(str(trained)), print)
    assert writer.form_name == form
    _, example = writer.fit([Turn("user", "hello")])
    assert writer.tokenizer.decode(example.prompt_ids, skip_special_tokens=True) == asked


@pytest.mark.slow
def test_in_a_terminal(server, tmp_path):
    """A real one: two lines end with an empty one, the answer follows."""
    outer, inner = pty.openpty()
    streams = (
        f"import os\nfor fd in range(3):\n    os.dup2(os.open({os.ttyname(inner)!r}, os.O_RDWR | os.O_NOCTTY), fd)"
    )
    job = server.start(["chat", "tiny", "--temperature", "0", "--max-new-tokens", "12"], tmp_path / "log", streams)
    seen = ""

    def until(text: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 120
        while text not in seen:
            assert select.select([outer], [], [], deadline - time.monotonic())[0], seen
            seen += os.read(outer, 4096).decode(errors="replace")
        seen = seen.partition(text)[2]

    try:
        until("/reset forgets")
        until("> ")
        os.write(outer, b"class Queue:\n    def push(self, item):\n\n")
        until('"""')  # the embedded model goes on with the docstring
        until("> ")
        os.write(outer, b"/quit\n")
        assert job.wait(30) == 0
    finally:
        os.close(outer)
        os.close(inner)
