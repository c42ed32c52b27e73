"""Conversations: every layout becomes the prompt and the answer that the chat template writes for it."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sheeprlhf.data.prompt_encoder import FORMS, Asker, Turn
from sheeprlhf.data.read import Row
from sheeprlhf.data.report import render_report
from sheeprlhf.data.tokenize import RowTokenizer, TokenRow
from sheeprlhf.structure.data import LocalDataConfig
from sheeprlhf.utils.errors import ConfigError, DataError
from sheeprlhf.utils.rendering import read_template_args, render_chat, template_arg_problems
from tests.unit.data.toy import TEMPLATE, byte_tokenizer, local, prepare, texts

# Tools, calls and thoughts; the last answer has a think block, earlier ones have none.
CHAT = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}<think></think>{% endif %}"
    "{% endif %}"
)
END = "<|im_end|>"
ASKED = "<|im_start|>assistant\n"
USER, ANSWER = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "yes"}
OTHER = {"role": "assistant", "content": "no"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}{END}\n"


def run(row: dict[str, Any], kind: str = "sft", template: str = TEMPLATE, **options: Any) -> TokenRow:
    options = {"minimum_response_length": 1, "max_length": 2048, "max_prompt_length": 2000} | options
    tokenizer = byte_tokenizer(template=template)
    return RowTokenizer(LocalDataConfig(**options), tokenizer, kind)([Row(0, "f.jsonl line 1", row)])[0]


def read(row: dict[str, Any], kind: str = "sft", template: str = TEMPLATE, **options: Any) -> list[str]:
    """Prompt and responses of a row that is kept, as text."""
    made = run(row, kind, template, **options)
    assert made.dropped is None
    tokenizer = byte_tokenizer()
    return [tokenizer.decode(ids) for ids in np.split(made.tokens, np.cumsum(made.sizes)[:-1])]


QUESTION = turn("user", "ask") + ASKED
SYSTEM = turn("system", "Be brief.") + QUESTION
SFT = {
    "messages": ({"messages": [USER, ANSWER]}, QUESTION),
    "sharegpt": ({"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "yes"}]}, QUESTION),
    "sharegpt renamed": (
        {"messages": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "yes"}], "system": "Be brief."},
        SYSTEM,
    ),
    "roles of sharegpt": ({"messages": [USER | {"role": "human"}, ANSWER | {"role": "gpt"}]}, QUESTION),
    "other spellings": ({"messages": [USER | {"role": "User"}, ANSWER | {"role": "Bot"}]}, QUESTION),
    "system column": ({"messages": [USER, ANSWER], "system": "Be brief."}, SYSTEM),
    "same system twice": (
        {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER], "system": "Be brief."},
        SYSTEM,
    ),
    "lists": ({"prompt": [USER], "response": [ANSWER]}, QUESTION),
    "list and text": ({"prompt": [USER], "response": "yes"}, QUESTION),
    "text and list": ({"prompt": "ask", "response": [ANSWER]}, QUESTION),
    "parts": (
        {"messages": [USER | {"content": [{"type": "text", "text": "as"}, {"type": "text", "text": "k"}]}, ANSWER]},
        QUESTION,
    ),
    "types of parts": (
        {
            "messages": [
                USER | {"content": [{"type": "input_text", "text": "ask"}]},
                ANSWER | {"content": [{"type": "output_text", "text": "yes"}]},
            ]
        },
        QUESTION,
    ),
    "object of lists": (
        {"conversations": {"from": ["human", "gpt"], "value": ["ask", "yes"], "weight": [None, 1], "name": None}},
        QUESTION,
    ),
    "prompt as an object of lists": (
        {"prompt": {"role": ["user"], "content": ["ask"]}, "response": "yes", "system": "Be brief."},
        SYSTEM,
    ),
    "nulls": ({"messages": [USER | {"tool_calls": None, "name": None}, ANSWER | {"weight": None}]}, QUESTION),
    "later question": ({"messages": [USER, ANSWER, USER]}, QUESTION),
}


def learned_tokens(row: TokenRow) -> np.ndarray:
    """The response tokens that count in the loss."""
    responses = row.tokens[row.sizes[0] :]
    return responses if row.trained is None else responses[row.trained]


@pytest.mark.parametrize("name", SFT)
def test_layouts_of_one_answer(name: str) -> None:
    row, prompt = SFT[name]
    assert read(row) == [prompt, f"yes{END}"]


PAIRS = {
    "explicit prompt": {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
    "prompt as text": {"prompt": "ask", "chosen": [ANSWER], "rejected": [OTHER]},
    "answers as text": {"prompt": [USER], "chosen": "yes", "rejected": "no"},
    "common start": {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    "ultrafeedback": {"prompt": "ask", "chosen": [USER, ANSWER], "rejected": [USER, OTHER], "messages": [USER, ANSWER]},
    "messages and text": {"messages": [USER, ANSWER], "rejected_response": "no"},
    "prompt, response and rejected": {"prompt": [USER], "response": "yes", "rejected_response": "no"},
    "conversations and objects": {
        "conversations": [{"from": "human", "value": "ask"}],
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    },
    "ranked": {"prompt": [USER], "responses": [[ANSWER], "no"]},
}


@pytest.mark.parametrize("name", PAIRS)
def test_layouts_of_preferences(name: str) -> None:
    made = run(PAIRS[name], "preference")
    assert (made.remarks, made.untrained) == ((), 0)
    assert read(PAIRS[name], "preference") == [QUESTION, f"yes{END}", f"no{END}"]
    assert read(PAIRS[name], "sft") == [QUESTION, f"yes{END}"]
    assert read(PAIRS[name], "prompts")[0] == QUESTION


def test_preferences_of_several_turns() -> None:
    start = [USER, ANSWER, USER | {"content": "more"}]
    prompt = turn("user", "ask") + turn("assistant", "yes") + turn("user", "more") + ASKED
    expected = [prompt, f"yes{END}", f"no{END}"]
    assert read({"chosen": [*start, ANSWER], "rejected": [*start, OTHER]}, "preference") == expected
    assert read({"prompt": start, "chosen": [ANSWER], "rejected": [OTHER]}, "preference") == expected
    pair = {"chosen": [ANSWER, start[2], ANSWER], "rejected": [ANSWER, start[2], OTHER]}
    assert read({"prompt": [USER], **pair}, "preference") == expected
    early = {"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, OTHER, USER, ANSWER]}
    assert run(early, "preference").dropped == "more_than_one_answer"


def test_a_dialogue_text_without_prompt_has_its_common_start_as_prompt() -> None:
    start = "\n\nHuman: ask\n\nAssistant: hm\n\nHuman: more\n\nAssistant:"
    row = {"chosen": f"{start} yes", "rejected": f"{start} no"}
    assert read(row, "preference") == [start, f" yes{END}", f" no{END}"]
    for other in (f"{start} no\n\nHuman: why\n\nAssistant: so", start.replace("more", "less") + " no"):
        assert run({"chosen": f"{start} yes", "rejected": other}, "preference").dropped == "more_than_one_answer"
        assert run({"chosen": other, "rejected": f"{start} yes"}, "preference").dropped == "more_than_one_answer"
    other = {"chosen": "\n\nHuman: a\n\nAssistant: yes", "rejected": "\n\nHuman: b\n\nAssistant: no"}
    with pytest.raises(DataError, match="column 'prompt' is missing"):
        run(other, "preference")


def test_the_margin_is_the_difference_of_the_scores() -> None:
    row = PAIRS["ultrafeedback"] | {"score_chosen": 8.5, "score_rejected": 3.0}
    assert run(row, "preference").margin == 5.5
    assert run(row | {"margin": 2.0}, "preference").margin == 2.0
    assert run({"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1, "score_rejected": 4}).margin == -3.0


@pytest.mark.parametrize(
    ("column", "values", "order"),
    [("ranks", [3, 1, 2], "bca"), ("scores", [0.5, 2, -1], "bac"), ("scores", ["1", "2", "3"], "cba")],
)
def test_ranks_and_scores_order_the_responses(column: str, values: list[Any], order: str) -> None:
    expected = [f"{letter}{END}" for letter in order]
    for prompt in ("p", [USER]):
        row = {"prompt": prompt, "responses": ["a", "b", "c"], column: values}
        assert read(row, "preference")[1:] == expected
        assert read(row, "sft")[1:] == expected[:1]
        assert run(row | {column: [1, 1, 2]}, "preference").dropped == "equal_ranks"
        with pytest.raises(DataError, match=f"column '{column}'"):
            run(row | {column: values[:2]}, "preference")
        with pytest.raises(DataError, match=f"column '{column}'"):
            run(row | {column: [1, 2, None]}, "preference")


def test_a_list_is_a_prompt_for_tasks_that_sample() -> None:
    assert read({"prompt": [USER], "answer": "4"}, "prompts") == [QUESTION]
    with pytest.raises(DataError, match="no answer"):
        run({"prompt": [USER]}, "sft")
    with pytest.raises(DataError, match="user"):
        run({"prompt": [USER, ANSWER]}, "prompts")


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'])
@pytest.mark.parametrize("content", ["hm", None])
def test_tools_and_calls_reach_the_template(arguments: Any, content: str | None) -> None:
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    asks = {"role": "assistant", "content": content, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "c", "content": "3"}
    head = turn("tools", json.dumps(TOOLS)) + turn("user", "ask")
    called = f'{content or ""}<call>f {{"x": 1}}</call>'
    last = read({"messages": [USER, asks], "tools": TOOLS}, template=CHAT)
    assert last == [head + ASKED, f"<think></think>{called}{END}"]
    row = {"messages": [USER, asks, result, ANSWER], "tools": json.dumps(TOOLS)}
    prompt = head + turn("assistant", called) + turn("tool", "3") + ASKED
    assert read(row, template=CHAT) == [prompt, f"<think></think>yes{END}"]
    assert run(row, template=CHAT).remarks == ("not used: messages.tool_call_id",)
    given = {"from": "function_call", "value": json.dumps({"name": "f", "arguments": arguments})}
    if content is None:
        sharegpt = [{"from": "human", "value": "ask"}, given, {"from": "observation", "value": "3"}, ANSWER]
        assert read({"conversations": sharegpt, "tools": json.dumps(TOOLS)}, template=CHAT)[0] == prompt


def test_arguments_of_the_template() -> None:
    args = {"enable_thinking": False}
    prompt = f"{QUESTION}<think></think>"
    assert read({"messages": [USER, ANSWER]}, template=CHAT, template_args=args) == [prompt, f"yes{END}"]
    tokenizer = byte_tokenizer(template=CHAT)
    assert render_chat(tokenizer, [USER], args, ask=True) == prompt
    asked = Asker(FORMS["template"], tokenizer, args).example([Turn("user", "ask")])
    assert tokenizer.decode(asked.prompt_ids) == prompt
    with pytest.raises(DataError, match=r"enable_thinkin.*enable_thinking"):
        run({"messages": [USER, ANSWER]}, template=CHAT, template_args={"enable_thinkin": False})
    with pytest.raises(DataError, match=r"data\.template_args"):
        RowTokenizer(LocalDataConfig(template_args=args), byte_tokenizer(), "sft")
    thought = {"messages": [USER, ANSWER | {"reasoning_content": "hm"}]}
    with pytest.raises(DataError, match=r"data\.template_args"):
        run(thought, template=CHAT, template_args=args)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("5", "--template-args"),
        ("{a b: 1}", "a b"),
        ("{messages: 1}", "messages"),
        ("{", "--template-args"),
        ("", "--"),
    ],
)
def test_the_flag_of_the_arguments_is_checked(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read_template_args(text)
    assert read_template_args("{enable_thinking: false, date_string: 1 May}") == {
        "enable_thinking": False,
        "date_string": "1 May",
    }


@pytest.mark.parametrize("given", [5, {"tools": 1}, {"bos_token": "x"}, {"x": float("inf")}, {"a b": 1}])
def test_the_option_of_the_arguments_is_checked(given: Any) -> None:
    [problem] = template_arg_problems(given)
    assert problem.startswith("data.template_args")
    assert not list(template_arg_problems({"x": [1, {"y": None}]}))


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
def test_a_message_marked_bad_is_never_a_target(key: str) -> None:
    talk = [USER, ANSWER | {key: 1}, USER | {"content": "more"}, OTHER | {key: 0}]
    assert read({"messages": talk}, template=CHAT) == [QUESTION, f"yes{END}"]  # as rendered before a later question
    assert run({"messages": talk}, template=CHAT).remarks == ("not used: messages after the answer",)
    talk[3] = OTHER | {key: True}
    assert read({"messages": talk})[1] == f"no{END}"
    assert run({"messages": talk}).untrained == 1
    assert run({"messages": [USER, ANSWER | {key: False}]}).dropped == "no_trained_message"
    assert run({"prompt": [USER], "response": [ANSWER | {key: "0"}]}).dropped == "no_trained_message"
    with pytest.raises(DataError, match=f"key '{key}' is '0.5'"):
        run({"messages": [USER, ANSWER | {key: 0.5}]})


def test_all_answers_of_a_conversation(tmp_path: Path) -> None:
    more, third = USER | {"content": "more"}, {"role": "assistant", "content": "well"}
    rows = [{"messages": [USER, ANSWER, more, OTHER, more, third]}]
    rows.append({"messages": [USER, ANSWER | {"weight": 0}, more, OTHER | {"weight": 1}]})
    tokenizer = byte_tokenizer(template=CHAT)
    prepared = prepare(local(tmp_path, rows, train_on="all", validation_split=0.5, split_seed=1), tokenizer)
    first = turn("user", "ask") + turn("assistant", "yes") + turn("user", "more")
    second = first + turn("assistant", "no") + turn("user", "more") + ASKED
    answers = [f"yes{END}", f"no{END}", f"<think></think>well{END}"]
    whole = (QUESTION, (second + answers[2]).removeprefix(QUESTION))  # one example, as its text grows turn by turn
    marked = (first + ASKED, f"<think></think>no{END}")
    by_split = [texts(prepared, tokenizer, split) for split in ("train", "validation")]
    assert sorted([*by_split[0], *by_split[1]]) == sorted([whole, marked])
    examples = [rows.example(number) for rows in prepared.splits.values() for number in range(len(rows))]
    learned = {tokenizer.decode(one.responses[0][one.masks()[0]]) for one in examples}
    assert learned == {"".join(answers), marked[1]}
    parts = prepared.report["splits"].values()
    keys = ("read", "kept", "joined_answers", "further_answers", "untrained_answers", "trained_tokens")
    counts = {key: sum(part[key] for part in parts) for key in keys}
    num_learned = sum(len(tokenizer.encode(text)) for text in learned)
    assert counts == dict(zip(keys, (2, 2, 2, 0, 0, num_learned), strict=True))


def test_a_conversation_that_is_too_long_is_divided_at_its_answers() -> None:
    more = USER | {"content": "more"}
    messages = [USER, ANSWER, more, OTHER]
    whole = turn("user", "ask") + turn("assistant", "yes") + turn("user", "more") + turn("assistant", "no")
    tokenizer = byte_tokenizer(template=TEMPLATE)
    size = len(tokenizer.encode(whole)) - 1  # without the newline behind it
    for max_length, num_rows in ((size, 1), (size - 1, 2)):
        cfg = LocalDataConfig(
            train_on="all", minimum_response_length=1, max_length=max_length, max_prompt_length=size - 4
        )
        made = RowTokenizer(cfg, tokenizer, "sft")([Row(0, "f line 1", {"messages": messages})])
        assert [one.dropped for one in made] == [None] * num_rows
        assert [one.num_joined for one in made] == [2 - num_rows] * num_rows
        learned = [tokenizer.decode(learned_tokens(one)) for one in made]
        assert "".join(learned) == f"yes{END}no{END}"
    prompt = tokenizer.decode(made[1].tokens[: made[1].sizes[0]])  # with the turns before it, cut at its start
    assert len(made[1].tokens) == size - 1 and whole.startswith(prompt, whole.index(prompt)) and prompt.endswith(ASKED)
    assert made[0].digest != made[1].digest


@pytest.mark.parametrize("marks", [(None, True, None), (True, None, True), (False, True, False), (None, None, False)])
def test_marked_answers_alone_are_learned(marks: tuple[bool | None, ...]) -> None:
    messages: list[dict[str, Any]] = []
    for number, mark in enumerate(marks):
        answer = {"role": "assistant", "content": f"answer {number}"}
        messages += [USER, answer if mark is None else answer | {"weight": int(mark)}]
    tokenizer = byte_tokenizer(template=TEMPLATE)
    cfg = LocalDataConfig(train_on="weights", minimum_response_length=1, max_length=2048, max_prompt_length=2000)
    [made] = RowTokenizer(cfg, tokenizer, "sft")([Row(0, "f line 1", {"messages": messages})])
    if True not in marks:
        assert made.dropped == "no_trained_message"
        return
    learned = "".join(f"answer {number}{END}" for number, mark in enumerate(marks) if mark)
    assert tokenizer.decode(learned_tokens(made)) == learned
    assert made.untrained == marks.count(None)
    assert tokenizer.decode(made.tokens).endswith(f"answer {max(n for n, mark in enumerate(marks) if mark)}{END}")


def test_answers_in_a_given_prompt_are_never_learned() -> None:
    row = {"prompt": [USER, ANSWER, USER], "response": [OTHER, USER, ANSWER]}
    tokenizer = byte_tokenizer(template=TEMPLATE)
    limits = {"minimum_response_length": 1, "max_length": 2048, "max_prompt_length": 2000}
    made = RowTokenizer(LocalDataConfig(train_on="all", **limits), tokenizer, "sft")([Row(0, "f line 1", row)])
    assert [tokenizer.decode(learned_tokens(one)) for one in made] == [f"no{END}yes{END}"]


def test_a_template_that_writes_earlier_answers_in_another_way_is_followed_turn_by_turn() -> None:
    """Two answers behind one question: the first has its thoughts until a later question is asked."""
    since = (
        "{% set at = namespace(question=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set at.question = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.index0 > at.question %}<think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    talk = [USER, OTHER, {"role": "tool", "content": "3"}, ANSWER, USER, ANSWER]
    tokenizer = byte_tokenizer(template=since)
    limits = {"minimum_response_length": 1, "max_length": 2048, "max_prompt_length": 2000}
    made = RowTokenizer(LocalDataConfig(train_on="all", **limits), tokenizer, "sft")(
        [Row(0, "f line 1", {"messages": talk})]
    )
    second = turn("user", "ask") + turn("assistant", "<think>no") + turn("tool", "<think>3") + ASKED
    found = [[tokenizer.decode(ids) for ids in np.split(one.tokens, [one.sizes[0]])] for one in made]
    assert found[:2] == [[QUESTION, f"no{END}"], [second, f"<think>yes{END}"]]
    for prompt, answer in found[1:]:  # each is what the template writes for the messages up to it
        number = 3 if answer == found[1][1] and prompt == second else 5
        assert render_chat(tokenizer, talk[: number + 1]) == f"{prompt}{answer}\n"


REFUSED = {
    "tools": ({"messages": [USER, ANSWER], "tools": TOOLS}, "column 'tools'"),
    "calls": ({"messages": [USER, ANSWER | {"tool_calls": [CALL]}]}, "key 'tool_calls'"),
    "reasoning": ({"messages": [USER, ANSWER | {"reasoning_content": "hm"}]}, "key 'reasoning_content'"),
    "unknown mark": ({"messages": [USER, ANSWER | {"trainable": False}]}, "key 'trainable'"),
    "contradiction": ({"messages": [USER, ANSWER | {"train": True, "weight": 0}]}, "train and|weight and"),
    "image": ({"messages": [USER | {"content": [{"type": "image", "url": "x"}]}, ANSWER]}, "type image"),
    "null": ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 1: key 'content'"),
    "no role": ({"messages": [{"content": "a"}, ANSWER]}, "message 0: key 'role'"),
    "two systems": ({"messages": [USER | {"role": "system"}, USER, ANSWER], "system": "Be brief."}, "'system'"),
    "no call": ({"conversations": [USER, {"from": "function_call", "value": "f(x)"}]}, "function call"),
    "text with tools": ({"prompt": "p", "response": "r", "tools": TOOLS}, "column 'tools'"),
    "system without a prompt": ({"chosen": "p", "rejected": "r", "system": "Be brief."}, "column 'system'"),
    "tools of text": ({"messages": [USER, ANSWER], "tools": "f"}, "column 'tools'"),
    "surrogate": ({"messages": [USER, ANSWER | {"name": "\udc00"}]}, "surrogate"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_the_meaning_and_cannot_be_read_is_refused(name: str) -> None:
    row, problem = REFUSED[name]
    with pytest.raises(DataError, match=problem) as caught:
        run(row)
    assert str(caught.value).startswith("f.jsonl line 1: ")


def test_keys_of_messages_can_be_left_out(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(template=TEMPLATE)
    row = {"messages": [USER, ANSWER | {"reasoning_content": "hm", "trainable": False}], "tools": TOOLS}
    rows, ignored = [row, {"prompt": [USER], "response": ANSWER | {"trainable": 1}}], ["tools"]
    for key in ("trainable", "reasoning_content"):
        with pytest.raises(DataError, match=rf"data.ignore_columns=\[messages.{key}\]"):
            prepare(local(tmp_path, rows, ignore_columns=ignored), tokenizer)
        ignored = [*ignored, f"messages.{key}"]
    prepared = prepare(local(tmp_path, rows, ignore_columns=ignored, remove_same_inputs=False), tokenizer)
    assert texts(prepared, tokenizer) == [(QUESTION, f"yes{END}")] * 2


def test_special_tokens_are_refused_in_every_part() -> None:
    bad = f"a{END}"
    rows: list[dict[str, Any]] = [
        {"messages": [USER | {"content": bad}, ANSWER]},
        {"messages": [USER, ANSWER], "system": bad},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER | {"content": bad}]},
        {"messages": [USER, ANSWER], "tools": [{"name": bad}]},
        {"messages": [USER, ANSWER | {"tool_calls": [{"function": {"name": "f", "arguments": {bad: 1}}}]}]},
        {"messages": [USER, ANSWER | {"reasoning_content": bad}]},
    ]
    assert [run(row, template=CHAT).dropped for row in rows] == ["special_tokens_in_messages"] * len(rows)


def test_what_is_not_used_is_reported(tmp_path: Path) -> None:
    no_system = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    rows = [{"messages": [USER, ANSWER, USER, OTHER], "system": "Be brief."}]
    rows.append({"messages": [USER | {"mood": "glad"}, ANSWER]})
    prepared = prepare(local(tmp_path, rows), byte_tokenizer(template=no_system))
    part = prepared.report["splits"]["train"]
    assert part["remarks"] == {"not used: messages of role system": 1, "not used: messages.mood": 1}
    assert part["untrained_answers"] == 1
    assert "messages.mood" in render_report(prepared.report)


def test_unknown_roles_are_written_and_counted(tmp_path: Path) -> None:
    talk = [{"role": "customer", "content": "ask"}, {"role": "customer", "content": "more"}, ANSWER]
    rows = [
        {"messages": talk},
        {"messages": [USER, *talk[:1], ANSWER]},
        {"messages": [{"role": "Human", "content": "a"}, ANSWER]},
    ]
    tokenizer = byte_tokenizer(template=TEMPLATE)
    prepared = prepare(local(tmp_path, rows), tokenizer)
    assert prepared.report["splits"]["train"]["remarks"] == {"unknown role: customer": 2}
    assert texts(prepared, tokenizer)[0][0] == turn("customer", "ask") + turn("customer", "more") + ASKED
    assert re.search(r"unknown role: customer +2\n", render_report(prepared.report))


SYSTEM_COLUMN = {  # row, kind, answers, data.columns
    "response": ({"prompt": "ask", "system": "Be brief.", "response": "yes"}, "sft", ["yes"], None),
    "answer": ({"question": "ask", "system": "Be brief.", "answer": "yes"}, "sft", ["yes"], None),
    "pair": (
        {"prompt": "ask", "system": "Be brief.", "chosen": "yes", "rejected": "no"},
        "preference",
        ["yes", "no"],
        None,
    ),
    "label": ({"prompt": "ask", "system": "Be brief.", "response": "yes", "label": True}, "unpaired", ["yes"], None),
    "prompt": ({"prompt": "ask", "system": "Be brief."}, "prompts", [], None),
    "renamed": (
        {"topic": "ask", "context": "Be brief.", "response": "yes"},
        "sft",
        ["yes"],
        {"prompt": "topic", "system": "context"},
    ),
}


@pytest.mark.parametrize("name", SYSTEM_COLUMN)
def test_a_system_text_next_to_a_prompt_is_the_system_turn(name: str, tmp_path: Path) -> None:
    row, kind, answers, columns = SYSTEM_COLUMN[name]
    tokenizer = byte_tokenizer(template=TEMPLATE)
    prepared = prepare(local(tmp_path, [row], columns=columns), tokenizer, kind)
    assert texts(prepared, tokenizer) == [(SYSTEM, *(text + END for text in answers))]
    assert prepared.report["columns"]["not_read"] == {}


def test_advice_on_a_system_text_next_to_a_prompt_works(tmp_path: Path) -> None:
    rows, plain = [{"prompt": "ask", "system": "Be brief.", "response": "yes"}], byte_tokenizer()
    with pytest.raises(DataError, match=r"model\.chat_template") as caught:
        prepare(local(tmp_path, rows), plain)
    assert "'data.columns={prompt: [system, prompt]}'" in str(caught.value)
    joined = prepare(local(tmp_path, rows, columns={"prompt": ["system", "prompt"]}), plain)
    assert texts(joined, plain) == [("Be brief.\n\nask", "yes" + END)]
    left_out = prepare(local(tmp_path, rows, ignore_columns=["system"]), plain)
    assert texts(left_out, plain) == [("ask", "yes" + END)]
    rows = [{"text": "yes", "system": "Be brief."}]
    with pytest.raises(DataError, match=r"'data\.columns=\{response: text, prompt: system\}'"):
        prepare(local(tmp_path, rows), plain)
    made = prepare(local(tmp_path, rows, columns={"response": "text", "prompt": "system"}), plain)
    assert texts(made, plain) == [("Be brief.", "yes" + END)]
    rows = [{"prompt": "ask", "response": "yes", "system_prompt": "Be brief.", "tools": "[]"}]
    with pytest.raises(DataError, match=r"'data\.columns=\{system: system_prompt\}'"):
        prepare(local(tmp_path, rows), plain)
    tokenizer = byte_tokenizer(template=TEMPLATE)
    made = prepare(local(tmp_path, rows, columns={"system": "system_prompt"}), tokenizer)
    assert texts(made, tokenizer) == [(SYSTEM, "yes" + END)]


def test_lists_in_parquet_and_in_csv(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(template=TEMPLATE)
    expected = [(QUESTION, f"yes{END}", f"no{END}")]
    pair = PAIRS["explicit prompt"]
    pq.write_table(pa.Table.from_pylist([pair]), tmp_path / "a.parquet")
    cfg = local(tmp_path, train_file=str(tmp_path / "a.parquet"))
    assert texts(prepare(cfg, tokenizer, "preference"), tokenizer) == expected
    calls = [{**CALL, "function": {"name": "f", "arguments": {name: 1}}} for name in "xy"]
    talks = [{"messages": [USER, ANSWER | {"tool_calls": [call]}]} for call in calls]
    pq.write_table(pa.Table.from_pylist(talks), tmp_path / "b.parquet")
    chat = byte_tokenizer(template=CHAT)
    found = texts(prepare(local(tmp_path, train_file=str(tmp_path / "b.parquet")), chat), chat)
    assert [answer for _, answer in found] == [  # without the other row's argument, which is null here
        f'<think></think>yes<call>f {{"{name}": 1}}</call>{END}' for name in "xy"
    ]
    cells = ",".join('"' + json.dumps(value).replace('"', '""') + '"' for value in pair.values())
    (tmp_path / "a.csv").write_text(f"{','.join(pair)}\n{cells}\n")
    cfg = local(tmp_path, train_file=str(tmp_path / "a.csv"))
    assert texts(prepare(cfg, tokenizer, "preference"), tokenizer) == expected
