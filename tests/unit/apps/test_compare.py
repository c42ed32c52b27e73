"""One prompt to several models: states of a page, and requests that no page would send."""

import html

import pytest

from sheeprlhf.apps.demo_page import ASK, MAX_CHARS, SUMMARISE, Panel, Settings, report_frame, transcript
from sheeprlhf.config.model_lookup import find_trained
from sheeprlhf.data.prompt_encoder import Turn
from sheeprlhf.task.text_generator import load_text_generator
from tests.support.models import byte_tokenizer, make_model_folder
from tests.support.past_runs import make_past_run
from tests.support.talking import TEMPLATE, says


def test_the_report_of_runs_is_a_frame_without_scripts(tmp_path):
    folder = make_past_run(tmp_path / "run")
    frame = report_frame([str(folder)])
    assert frame.startswith("<iframe ") and 'sandbox=""' in frame and frame.count("<") == 2  # the page is escaped
    page = html.unescape(frame)
    assert 'aria-label="train/loss: sft 4 at step 1, 1 at step 4' in page and "sft says 4" in page
    with (folder / "metrics.csv").open("a") as file:
        file.write("5,train/loss,0.5,9\n")
    assert 'aria-label="train/loss: sft 4 at step 1, 0.5000 at step 5' in html.unescape(report_frame([str(folder)]))


FAIR = Settings(0.7, 1.0, 0, 64, 1)


class Lengths:
    """Scores an answer by its length."""

    form_name, tokenizer = "text", byte_tokenizer()

    def score(self, form, turns, answer):
        self.asked = form, turns[-1].text
        return float(len(answer))


@pytest.fixture
def writers(model_folder, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    folder = make_model_folder(tmp_path / "chatty")
    tokenizer.save_pretrained(folder)
    words = {"plain": model_folder("llama"), "chatty": folder}
    return [(name, load_text_generator(find_trained(str(word)), print)) for name, word in words.items()]


def test_each_model_is_asked_in_its_form_and_scored(writers, monkeypatch):
    prompts = says(monkeypatch, "one", "three")
    scorer = Lengths()
    panel = Panel(SUMMARISE, writers, scorer)
    *states, last = panel.answer("A post.", panel.start().histories, FAIR)
    assert prompts[0] == "<s>A post.\nTL;DR:"
    assert prompts[1] == "[user]Summarise this text in one or two sentences:\n\nA post.[assistant]"
    assert last.status == "done; highest score: chatty" and last.scores == ["3.000", "5.000"]
    assert [transcript(history, turns=False) for history in last.histories] == ["one", "three"]
    assert states[0].status == "plain is writing ..." and states[0].scores == ["", ""]
    assert scorer.asked == ("tldr", "A post.")


def test_questions_remember_the_conversation_where_the_model_can(writers, monkeypatch):
    prompts = says(monkeypatch, "yes")
    panel = Panel(ASK, writers, None)
    *_, first = panel.answer("Hi", panel.start().histories, FAIR)
    *_, second = panel.answer("Why?", first.histories, FAIR)
    assert prompts[2] == "<s>Why?"
    assert prompts[3] == "[user]Hi[assistant]yes</s>[user]Why?[assistant]"
    assert transcript(second.histories[1], turns=True) == "You: Hi\n\nModel: yes\n\nYou: Why?\n\nModel: yes"
    assert second.scores == ["", ""] and second.status == "done"


def test_a_model_that_was_trained_on_plain_text_is_asked_without_its_chat_template(writers, monkeypatch):
    prompts = says(monkeypatch, "yes")
    chatty = [("chatty", dict(writers)["chatty"].in_form("text"))]
    for kind in (ASK, SUMMARISE):
        panel = Panel(kind, chatty, None)
        list(panel.answer("Hi", panel.start().histories, FAIR))
    assert prompts == ["<s>Hi", "<s>Hi\nTL;DR:"]


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("", FAIR, "the prompt is empty"),
        (" \n", FAIR, "the prompt is empty"),
        ("x" * (MAX_CHARS + 1), FAIR, "shorten it"),
        ("x", FAIR._replace(max_new_tokens=10**6), "512"),
        ("x", FAIR._replace(temperature=-1), "temperature"),
        ("x", FAIR._replace(temperature=float("nan")), "temperature"),
        ("x", FAIR._replace(top_p=0), "top-p"),
        ("x", FAIR._replace(top_k=None), "top-k"),
        ("x", FAIR._replace(seed="1"), "seed"),
    ],
)
def test_a_request_that_cannot_be_answered_says_why(prompt, settings, message, writers, monkeypatch):
    prompts = says(monkeypatch, "never")
    panel = Panel(ASK, writers, None)
    [state] = panel.answer(prompt, panel.start().histories, settings)
    assert message in state.status
    assert prompts == [] and state.histories == [[], []]


def test_a_prompt_that_one_model_cannot_read_is_answered_by_the_others(writers, monkeypatch):
    says(monkeypatch, "yes")
    panel = Panel(SUMMARISE, writers, None)
    *_, state = panel.answer("x" * 100, panel.start().histories, FAIR)
    assert state.status.startswith("chatty: the prompt has") and "plain" not in state.status
    assert transcript(state.histories[0], turns=False) == "yes" and state.histories[1] == []


def test_no_control_character_reaches_a_page():
    history = [Turn("user", "a"), Turn("assistant", "b\x1b[31mc\u202ed")]
    assert transcript(history, turns=False) == "bcd"
    assert transcript(history, turns=True) == "You: a\n\nModel: bcd"
