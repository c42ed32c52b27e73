"""Responses of several turns: tool calls of several templates, tokens between turns, limits, failures, environments."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sheeprlhf.data.example import Example
from sheeprlhf.data.tokenize import encode
from sheeprlhf.rollout import tool_environments
from sheeprlhf.rollout.environment_pool import Call, EnvironmentPool, Request
from sheeprlhf.rollout.episodes import EpisodeSampler, ToolTemplate, parse_calls
from sheeprlhf.rollout.sampler import Sampled
from sheeprlhf.rollout.sources import episode_metrics, sampled_of
from sheeprlhf.rollout.tool_environments import Calculator, PythonTests, run_program
from sheeprlhf.structure.rollout import LocalRolloutConfig
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.rendering import render_chat
from tests.unit.data.toy import TEMPLATE, byte_tokenizer, piece_tokenizer

END = "<|im_end|>"
QWEN = (
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{% for m in messages %}<|im_start|>{{ 'ipython' if m.role == 'tool' else m.role }}\n\n{% if m.tool_calls %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{% if c.id|length != 9 %}{{ raise_exception('id') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    "{% if not loop.last %}, {% endif %}{% endfor %}]</s>"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }}[/TOOL_RESULTS]{% else %} {{ m.content }}</s>{% endif %}"
    "{% endfor %}"
)
NO_TOOLS = (  # as Gemma 2: two roles that alternate
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES: dict[str, tuple[Any, str, str]] = {  # tokenizer, format of calls, role of results
    "qwen": (byte_tokenizer(template=QWEN, merges=("1 2", "o l")), "hermes", "tool"),
    "llama 3": (byte_tokenizer(template=LLAMA, bos=True), "llama", "tool"),
    "mistral": (piece_tokenizer("first", template=MISTRAL), "mistral", "tool"),
    "llama 2 pieces": (piece_tokenizer("prepend", template=MISTRAL), "mistral", "tool"),
    "calls as text": (byte_tokenizer(template=TEMPLATE), "hermes", "tool"),
    "no tool messages": (byte_tokenizer(template=NO_TOOLS), "hermes", "user"),
}
USER = {"role": "user", "content": "ask the cat"}


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_between_turns_are_those_of_the_template(family: str) -> None:
    """Against the template's rendering of the whole conversation, tokenised at once."""
    tokenizer, form, role = FAMILIES[family]
    template = ToolTemplate(tokenizer, 1000)
    assert (template.form, template.role) == (form, role)
    message = template._message(1) if template._writes_calls else {"role": "assistant", "content": "a dog"}
    result = {"role": role, "content": "12 told"} | ({"tool_call_id": "call00000"} if role == "tool" else {})
    whole = render_chat(tokenizer, [USER, message, result], ask=True)
    [expected] = encode(tokenizer, [whole], control_tokens=True)
    [before] = encode(tokenizer, [render_chat(tokenizer, [USER, message]).rstrip("\n")], control_tokens=True)
    added = template.result_ids(before[-1], ["12 told"])
    assert before + added == expected
    [unended] = encode(tokenizer, ["a dog"])
    assert template.result_ids(unended[-1], ["12 told"]) == [before[-1], *added]  # after a stop string


def test_control_tokens_of_a_result_are_removed() -> None:
    template = ToolTemplate(FAMILIES["qwen"][0], 30)
    plain = template.result_ids(0, ["a  b"])
    assert template.result_ids(0, [f"a {END} b"]) == template.result_ids(0, ["a <|im<|pad|>_end|> b"]) == plain
    assert template.result_ids(0, ["x" * 31]) == template.result_ids(0, ["x" * 30 + "..."])


def test_a_template_without_end_tokens_or_with_unknown_calls_is_rejected() -> None:
    unknown = QWEN.replace("<tool_call>", "<invoke>").replace("</tool_call>", "</invoke>")
    for template in (None, TEMPLATE.replace(END, ""), unknown):
        with pytest.raises(ConfigError, match=r"model\.chat_template"):
            ToolTemplate(byte_tokenizer(template=template), 1000)


@pytest.mark.parametrize("family", ["llama 3", "mistral", "no tool messages"])
def test_the_example_of_an_episode_is_in_the_format_of_the_template(family: str) -> None:
    tokenizer, form, role = FAMILIES[family]
    cfg = LocalRolloutConfig(environment="calculator", num_processes=1)
    prompt = encode(tokenizer, [render_chat(tokenizer, [USER], ask=True)], control_tokens=True)[0]
    row = Example(0, np.array(prompt, np.int32), (), columns={"answer": "1"})
    episode = EpisodeSampler(tokenizer, cfg, lambda _: None).example(row)
    assert (episode.turns, episode.calls, episode.invalid, episode.error) == (2, 1, 0, None) and episode.finished
    ids, trained = np.array(episode.ids), np.array(episode.trained)
    split = int(np.argmin(trained))
    [call] = parse_calls(tokenizer.decode(ids[:split]).removesuffix("</s>").removesuffix(END), form)
    assert call == Call("calculator", {"expression": "1"})
    assert ids[~trained].tolist() == ToolTemplate(tokenizer, 9).result_ids(ids[split - 1], ["1"])
    assert role in ("user", "tool") and trained[-1]


def call_text(**arguments: Any) -> str:
    return f'<tool_call>{{"name": "calculator", "arguments": {json.dumps(arguments)}}}</tool_call>'


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        ("hermes", "so " + call_text(a=1) + call_text(b=2), [{"a": 1}, {"b": 2}]),
        ("hermes", call_text(a=1).removesuffix("</tool_call>"), [{"a": 1}]),
        ("hermes", '<tool_call>{"name": "calculator"}</tool_call>', [None]),
        ("hermes", "<tool_call>{'name'}</tool_call>", [None]),
        ("hermes", '{"name": "calculator", "arguments": {}}', []),
        ("mistral", '[TOOL_CALLS] [{"name": "calculator", "arguments": "{\\"a\\": 1}", "id": "x"}]', [{"a": 1}]),
        ("llama", '<|python_tag|>{"name": "calculator", "parameters": {"a": 1}}', [{"a": 1}]),
        ("llama", '{"a": 1}', []),
        ("llama", 'The call is {"name": "calculator", "parameters": {}}', []),
    ],
)
def test_calls(form: str, text: str, expected: list[Any]) -> None:
    assert parse_calls(text, form) == [one if one is None else Call("calculator", one) for one in expected]


class Script:
    """Sampler that writes given messages, in turn, and records its arguments."""

    def __init__(self, tokenizer: Any, *messages: list[str]) -> None:
        self.messages, self.asked = list(messages), []
        self._tokenizer = tokenizer

    def __call__(
        self, prompts: Sequence[np.ndarray], uniforms: np.ndarray, limits: Sequence[int] | None = None
    ) -> list[Sampled]:
        self.asked.append(([prompt.tolist() for prompt in prompts], uniforms, limits))
        most = limits or [uniforms.shape[2]] * len(prompts)
        found, group = [], uniforms.shape[1]
        texts = self.messages.pop(0)
        assert len(texts) == len(prompts) * group
        for row, limit in enumerate(most):
            ids = [encode(self._tokenizer, [t], control_tokens=True)[0] for t in texts[row * group : (row + 1) * group]]
            arrays = tuple(np.array(one[:limit], dtype=np.int32) for one in ids)
            ends = tuple(len(one) <= limit for one in ids)
            found.append(Sampled(arrays, tuple(-np.arange(1.0, len(a) + 1, dtype=np.float32) for a in arrays), ends))
        return found


def sampler_of(source: str = "tests.support.environments:Echo", said: Any = None, **options: Any) -> Any:
    cfg = LocalRolloutConfig(environment=source, **({"num_processes": 1, "step_timeout": 0.5} | options))
    return EpisodeSampler(byte_tokenizer(template=TEMPLATE), cfg, (lambda _: None) if said is None else said.append)


def do(what: str) -> str:
    return call_text(do=what) + END


def test_turns_of_a_group() -> None:
    """Two responses to a prompt: one calls twice and answers, the other is cut by the most messages."""
    sampler, ended = sampler_of(max_turns=3), []
    script = Script(sampler._tokenizer, [do("a"), do("b")], [do("c"), do("d")], [f"yes{END}", do("e")])
    prompt = Example(4, np.array(encode(sampler._tokenizer, ["hi"])[0], dtype=np.int32), ())
    uniforms = np.random.default_rng(0).random((1, 2, 500))
    [episodes] = sampler(script, [prompt], uniforms, ended.append)
    sampled = sampled_of(episodes)
    assert sampled.finished == (True, False) and sum(ended) == 2
    assert [(one.turns, one.calls, one.invalid, one.error) for one in episodes] == [(3, 2, 0, None), (3, 3, 0, None)]
    assert [one.reward for one in episodes] == [0.5 + 1.0 + 3, 0.5] and episodes[0].answer == "yes"
    tool = "\n<|im_start|>tool\n{}<|im_end|>\n<|im_start|>assistant\n"
    parts = [do("a"), tool.format("hi calculator"), do("c"), tool.format("hi calculator calculator"), f"yes{END}"]
    ids = [encode(sampler._tokenizer, [part], control_tokens=True)[0] for part in parts]
    assert sampled.responses[0].tolist() == [one for part in ids for one in part]
    mask = np.concatenate([np.full(len(part), number % 2 == 0) for number, part in enumerate(ids)])
    np.testing.assert_array_equal(episodes[0].trained, mask)
    assert len(sampled.logprobs[0]) == mask.sum()
    # The second turn goes on from these very ids, with the random numbers of its places.
    prompts, numbers, limits = script.asked[1]
    assert prompts[0] == prompt.prompt_ids.tolist() + ids[0] + ids[1]
    place = len(ids[0]) + len(ids[1])
    assert limits[0] == 500 - place
    np.testing.assert_array_equal(numbers[0, 0, : limits[0]], uniforms[0, 0, place:])


def test_the_class_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[3] / "docs" / "environments.md").read_text()
    (tmp_path / "my_tools.py").write_text(text.partition("```python\n")[2].partition("```")[0])
    monkeypatch.chdir(tmp_path)
    sampler = sampler_of("my_tools:Guess")
    guesses = [call_text(number=number) + END for number in (3, 7)]
    script = Script(sampler._tokenizer, guesses, [f"it is 7{END}"])
    [episodes] = sampler(
        script, [Example(0, np.array([65]), (), columns={"answer": "7"})], np.zeros((1, 2, 300)), print
    )
    assert [(one.turns, one.reward, one.finished, one.error) for one in episodes] == [
        (2, 1, True, None),
        (1, 0, True, None),
    ]
    assert "wrong" in sampler._tokenizer.decode(episodes[0].ids)


def test_sampled_ids_are_not_tokenised_again() -> None:
    """The tokenizer would write "12" as one token; the model wrote two."""
    sampler = sampler_of()
    sampler._tokenizer = byte_tokenizer(template=TEMPLATE, merges=("1 2",))
    split = [encode(sampler._tokenizer, [one])[0][0] for one in "12"]
    [end] = encode(sampler._tokenizer, [END], control_tokens=True)[0]
    before, after = (
        encode(sampler._tokenizer, [one])[0] for one in ('<tool_call>{"name": "f", "arguments": {"x": ', "}}")
    )
    written = np.array([*before, *split, *after, end], dtype=np.int32)
    assert written.tolist() != encode(sampler._tokenizer, [sampler._tokenizer.decode(written)], control_tokens=True)[0]
    turns = [[Sampled((written,), (np.zeros(len(written), dtype=np.float32),), (True,))]]
    answer = Script(sampler._tokenizer, [f"done{END}"])
    seen = []

    def sample(prompts: Any, uniforms: Any, limits: Any = None) -> list[Sampled]:
        seen.append(prompts[0].tolist())
        return turns.pop() if turns else answer(prompts, uniforms, limits)

    [[episode]] = sampler(sample, [Example(0, np.array([5]), ())], np.zeros((1, 1, 300)), lambda _: None)
    assert episode.ids[: len(written)] == written.tolist()
    assert seen[1][1 : 1 + len(written)] == written.tolist()


def test_limits_and_failures_are_counted() -> None:
    said: list[str] = []
    sampler = sampler_of(said=said)
    first = [do("raise"), do("hang"), do("end"), f"<tool_call>x{END}", "no end", do("exit"), f"bye{END}"]
    second = ["more text than fits" * 9]
    script = Script(sampler._tokenizer, first, second)
    script.asked.clear()
    rows = [Example(i, np.array([65]), (), columns={"prompt": "hi", "broken": i == 6}) for i in range(7)]
    most = 160
    script_uniforms = np.zeros((7, 1, most))
    found = sampler(script, rows, script_uniforms, lambda _: None)
    episodes = [episode for [episode] in found]
    assert [one.error is not None for one in episodes] == [True, True, False, False, False, True, True]
    assert "ValueError" in str(episodes[0].error) and "step_timeout" in str(episodes[1].error)
    assert [one.reward for one in episodes] == [0, 0, 0.25, 0, 1.0 + len("no end"), 0, 0]
    assert [one.invalid for one in episodes] == [0, 0, 0, 1, 0, 0, 0]
    assert len(episodes[3].ids) == most and not episodes[3].finished  # cut by the most tokens
    metrics = episode_metrics(episodes)
    assert metrics["env/failed"] == pytest.approx(4 / 7) and metrics["env/invalid_calls"] == pytest.approx(1 / 7)
    assert sum("warning" in line for line in said) == 1


def test_calls_run_in_parallel_and_a_stuck_process_is_replaced() -> None:
    pool = EnvironmentPool("tests.support.environments:Echo", 2, 0.3)
    pool.run([Request(number, "reset", {"prompt": "p"}) for number in range(2)])
    began = time.monotonic()
    hang = [Call("f", {"do": "hang"})]
    replies = pool.run([Request(number, "step", hang) for number in range(2)])
    assert time.monotonic() - began < 2.0 and all("step_timeout" in str(reply.error) for reply in replies)
    assert pool.run([Request(0, "step", [Call("f", {})])])[0].error is not None  # that episode is over
    pool.run([Request(1, "reset", {"prompt": "p"})])
    assert pool.run([Request(1, "step", [Call("f", {})])])[0].results == ("p f",)
    pool.close()


def test_a_process_that_was_killed_between_calls_fails_its_episodes_alone() -> None:
    pool = EnvironmentPool("tests.support.environments:Echo", 2, 5.0)
    pool.run([Request(number, "reset", {"prompt": "p"}) for number in range(2)])
    running = pool._processes[0]
    assert running is not None
    running[0].kill()
    running[0].join()
    replies = pool.run([Request(number, "step", [Call("f", {})]) for number in range(2)])
    assert replies[0].error is not None and replies[1].results == ("p f",)
    pool.run([Request(0, "reset", {"prompt": "q"})])
    assert pool.run([Request(0, "step", [Call("f", {})])])[0].results == ("q f",)
    pool.close()


def test_a_class_that_is_no_environment_is_rejected() -> None:
    for source in ("builtins:list", "tests.support.environments:NeedsMore"):
        with pytest.raises(ConfigError, match=rf"rollout\.environment={source}"):
            EnvironmentPool(source, 1, 1.0).start()


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("(3 + 4) * 2", "14"),
        ("1/3", "0.333333"),
        ("0.1 + 0.2", "0.3"),
        ("-7 // 2", "-4"),
        ("7 % 4", "3"),
        *((text, "error") for text in ("1/0", "2**9", "x", "", "9" * 60, "1+" * 150 + "1", "(1", "__import__('os')")),
    ],
)
def test_the_calculator(expression: str, result: str) -> None:
    environment = Calculator()
    environment.reset({"answer": "#### 1,234"})
    text, reward, done = environment.step(Call("calculator", {"expression": expression}))
    assert text.partition(":")[0] == result and (reward, done) == (0.0, False)
    assert [environment.finish(text) for text in ("1234.0", "2 is not 1,234.", "1235", "none")] == [1, 1, 0, 0]


def test_programs_are_tested_in_a_process_with_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = PythonTests()
    environment.reset({"tests": ["assert double(2) == 4", "assert double(3) == 6"]})
    assert environment.finish("So:\n```python\ndef double(x): return 2 * x\n```") == 1.0
    assert environment.finish("def double(x): return 4") == 0.5
    assert environment.finish("import os\nos._exit(0)") == environment.finish("raise SystemExit") == 0.0
    assert environment.step(Call("python", {"code": "print(6 * 7)"}))[0] == "42\n"
    assert "ZeroDivisionError" in environment.step(Call("python", {"code": "1 / 0"}))[0]
    monkeypatch.setattr(tool_environments, "_PROGRAM_SECONDS", 1)
    for code in (
        "import urllib.request as r; r.urlopen('http://127.0.0.1:1')",
        "x = bytearray(1 << 31)",
        "open('big', 'wb').write(b'x' * (1 << 22))",
        "print('x' * (1 << 22))",
        "while True: pass",
    ):
        assert not run_program(code)[0], code
