"""Every layout of chat data goes through every task that can learn from it, with the tokens that it should learn."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sheeprlhf.cli import run
from sheeprlhf.data.example import Example, collate_padded
from sheeprlhf.data.store import TokenizedSplit

TEMPLATE = (
    "{% if tools %}(tools){% for tool in tools %}{{ tool.function.name }};{% endfor %}{% endif %}"
    "{% for m in messages %}({{ m.role }}){{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments | tojson }}]{% endfor %}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}(assistant){% endif %}"
)
ASKED = "(assistant)"
ROWS = 3  # of each layout
TOOLS = [{"type": "function", "function": {"name": "f"}}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
SAMPLING, PAIRS = ("sft", "grpo"), ("sft", "rm", "dpo", "kto", "grpo")

Turn = dict[str, Any]


def user(text: str) -> Turn:
    return {"role": "user", "content": text}


def assistant(text: str) -> Turn:
    return {"role": "assistant", "content": text}


class Layout(NamedTuple):
    """Rows of a layout, the tasks that read it, and its meaning: a text or messages, and the answers, best first."""

    row: Callable[[str], dict[str, Any]]
    context: Callable[[str], str | list[Turn]]
    answers: tuple[str, ...] = ("good", "bad")
    tasks: tuple[str, ...] = SAMPLING
    tools: list[Any] | None = None
    margin: float = 0.0


LAYOUTS = {
    "prompt-completion": Layout(lambda n: {"prompt": n, "completion": "good"}, str),
    "prompt-completion, messages": Layout(
        lambda n: {"prompt": [user(n)], "completion": [assistant("good")]}, lambda n: [user(n)]
    ),
    "alpaca": Layout(lambda n: {"instruction": n, "input": "i", "output": "good"}, lambda n: f"{n}\n\ni"),
    "alpaca, empty input": Layout(lambda n: {"instruction": n, "input": "", "output": "good"}, str),
    "alpaca, history": Layout(
        lambda n: {"instruction": n, "input": "i", "output": "good", "system": "s", "history": [["q", "a"]]},
        lambda n: [{"role": "system", "content": "s"}, user("q"), assistant("a"), user(f"{n}\n\ni")],
    ),
    "question-answer": Layout(lambda n: {"question": n, "answer": "good"}, str),
    "query-response": Layout(lambda n: {"query": n, "response": "good"}, str),
    "problem-solution": Layout(lambda n: {"problem": n, "solution": "good"}, str),
    "sharegpt": Layout(
        lambda n: {
            "conversations": [
                {"from": "human", "value": n},
                {"from": "function_call", "value": json.dumps({"name": "f", "arguments": {"x": 1}})},
                {"from": "observation", "value": "o"},
                {"from": "gpt", "value": "good"},
            ],
            "system": "s",
            "tools": json.dumps(TOOLS),
        },
        lambda n: [
            {"role": "system", "content": "s"},
            user(n),
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "content": "o"},
        ],
        tools=TOOLS,
    ),
    "openai": Layout(
        lambda n: {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": n}, {"type": "text", "text": "?"}]},
                assistant("a") | {"weight": 0},
                user("q"),
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "o"},
                assistant("good"),
            ],
            "tools": TOOLS,
        },
        lambda n: [
            *(user(f"{n}?"), assistant("a"), user("q"), {"role": "assistant", "tool_calls": [CALL]}),
            {"role": "tool", "content": "o"},
        ],
        tools=TOOLS,
    ),
    "preference": Layout(lambda n: {"prompt": n, "chosen": "good", "rejected": "bad"}, str, tasks=PAIRS),
    "preference, messages": Layout(
        lambda n: {"prompt": [user(n)], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        lambda n: [user(n)],
        tasks=PAIRS,
    ),
    "implicit prompt": Layout(
        lambda n: {"chosen": f"\n\nHuman: {n}\n\nAssistant: good", "rejected": f"\n\nHuman: {n}\n\nAssistant: bad"},
        lambda n: f"\n\nHuman: {n}\n\nAssistant:",
        (" good", " bad"),
        PAIRS,
    ),
    "implicit prompt, messages": Layout(
        lambda n: {"chosen": [user(n), assistant("good")], "rejected": [user(n), assistant("bad")]},
        lambda n: [user(n)],
        tasks=PAIRS,
    ),
    "ultrafeedback": Layout(
        lambda n: {
            "prompt": n,
            "chosen": [user(n), assistant("good")],
            "rejected": [user(n), assistant("bad")],
            "messages": [user(n), assistant("good")],
            "score_chosen": 8.5,
            "score_rejected": 6,
        },
        lambda n: [user(n)],
        tasks=PAIRS,
        margin=2.5,
    ),
    "swift": Layout(
        lambda n: {"messages": [user(n), assistant("good")], "rejected_response": "bad"},
        lambda n: [user(n)],
        tasks=PAIRS,
    ),
    "llama-factory": Layout(
        lambda n: {
            "conversations": [{"from": "human", "value": n}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        lambda n: [user(n)],
        tasks=PAIRS,
    ),
    "labels": Layout(lambda n: {"prompt": n, "completion": "good", "label": True}, str, ("good",), ("kto", "sft")),
    "labels, messages": Layout(
        lambda n: {"prompt": [user(n)], "completion": [assistant("bad")], "label": False},
        lambda n: [user(n)],
        ("bad",),
        ("kto", "sft"),
    ),
    "ranks": Layout(
        lambda n: {"prompt": n, "responses": ["bad", "good", "fair"], "ranks": [3, 1, 2]},
        str,
        ("good", "fair", "bad"),
        ("sft", "rm"),
    ),
    "scores": Layout(
        lambda n: {"prompt": [user(n)], "responses": ["bad", "good"], "scores": [0.1, 0.9]},
        lambda n: [user(n)],
        tasks=("sft", "rm", "dpo"),
    ),
    "text": Layout(lambda n: {"text": n}, lambda n: "", (), ("sft",)),
    "prompt alone": Layout(lambda n: {"prompt": n, "level": 3}, str, (), ("grpo",)),
    "prompt alone, messages": Layout(lambda n: {"prompt": [user(n)], "level": 3}, lambda n: [user(n)], (), ("grpo",)),
}
OPTIONS = {
    "grpo": ["task.num_generations=2", "reward=function", "reward.path=tests.support.rewards:letters"],
    "sft": ["task.mini_batch_size=100"],
    "rm": ["task.mini_batch_size=100"],
    "dpo": ["task.mini_batch_size=100"],
    "kto": ["task.mini_batch_size=100"],
}
Masked = tuple[list[int], list[bool]]  # ids of a prompt with a response, and which of them are learned


def expected(layout: Layout, key: str, tokenizer: PreTrainedTokenizerBase, task: str) -> list[Masked]:
    """Each response of a row, by the whole text and the places of its characters; of grpo the prompt alone."""
    context = layout.context(key)
    if layout.tasks == ("sft",):  # a text: all of it
        ids = [*tokenizer(key)["input_ids"], tokenizer.eos_token_id]
        return [(ids, [False] + [True] * (len(ids) - 1))]
    found = []
    for answer in {"sft": layout.answers[:1], "grpo": (None,)}.get(task, layout.answers):
        if isinstance(context, str):
            text, start = context + ("" if answer is None else answer + "</s>"), len(context)
        else:
            messages = [*context, *([] if answer is None else [assistant(answer)])]
            options = {"chat_template": TEMPLATE, "tokenize": False, "add_generation_prompt": answer is None}
            text = tokenizer.apply_chat_template(messages, layout.tools, **options)
            start = text.rindex(ASKED) + len(ASKED)
        plain = isinstance(context, str)  # a chat template writes BOS itself
        encoded = tokenizer(text, add_special_tokens=plain, return_offsets_mapping=True)
        mask = [end > first >= start for first, end in encoded["offset_mapping"]]
        found.append((encoded["input_ids"], mask))
    return found


def learned(example: Example, task: str) -> list[Masked]:
    """Each response of a row, by the batch that a task computes its loss from."""
    if task == "grpo":
        return [(example.prompt_ids.tolist(), [False] * len(example.prompt_ids))]
    batch = collate_padded([example], pad_id=0)
    assert batch.attention_mask_BT is not None
    rows, width = batch.input_ids_BT.shape
    is_target = [False] * (rows * width)
    for place in (batch.head_positions_R[batch.logit_index_N] + 1).tolist():
        is_target[place] = True
    lengths = batch.attention_mask_BT.sum(dim=1).tolist()
    return [
        (batch.input_ids_BT[row, :length].tolist(), is_target[row * width : row * width + length])
        for row, length in enumerate(lengths)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("task", OPTIONS)
def test_every_layout_is_learned_as_it_is_meant(
    task: str, tmp_path: Path, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All layouts of a task are one mixture, and each of its rows is in the only step."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    used = {name: layout for name, layout in LAYOUTS.items() if task in layout.tasks}
    mix, keys = [], {}
    for number, (name, layout) in enumerate(used.items()):
        keys[name] = [f"k{number}.{row}" for row in range(ROWS)]
        file = tmp_path / f"{number}.jsonl"
        file.write_text("".join(json.dumps(layout.row(key)) + "\n" for key in keys[name]))
        mix.append(f"{{train_file:{file}}}")
    run(
        [
            *(
                "train",
                f"task={task}",
                "model=auto",
                f"model.repo_name={model_folder()}",
                "model.chat_template=t.jinja",
            ),
            *("data=mix", f"data.mix=[{','.join(mix)}]", "data.validation_split=0", "data.test_split=0"),
            *("data.max_length=120", "data.max_prompt_length=100", f"data.cache_dir={tmp_path}/cache"),
            *("task.max_num_steps=1", "generation.max_new_tokens=4", "fabric=cpu", f"hydra.run.dir={tmp_path}/run"),
            *OPTIONS[task],
        ]
    )
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert [part["kept"] for part in report["mix"]] == [{"train": part["used"]["train"]} for part in report["mix"]]
    [file] = (tmp_path / "cache" / "data").glob("mix-*/train.arrow")
    split = TokenizedSplit(file)
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    wanted: list[tuple[float, bool, list[Masked]]] = []
    for name, layout in used.items():
        for key in keys[name]:
            rows = expected(layout, key, tokenizer, task)
            if task == "kto":
                desirable = [answer.strip() == "good" for answer in layout.answers]
                wanted += [(layout.margin, good, [row]) for good, row in zip(desirable, rows, strict=True)]
            else:
                wanted.append((layout.margin, True, rows))
    examples = split.examples(range(len(split)))
    made = [(example.margin, example.desirable, learned(example, task)) for example in examples]
    assert sorted(made) == sorted(wanted)
