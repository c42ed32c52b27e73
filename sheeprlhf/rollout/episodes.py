"""Responses of several turns: the model calls tools, an environment answers, until the model writes no further call.

```
tokens     p p p | a a a END  e e e e e  a a END     a: sampled; e: results, as the chat template writes them
trained          | 1 1 1 1    0 0 0 0 0  1 1 1       losses, KL, advantages and values are of sampled tokens only
```

All of it after the prompt is one response. Sampled ids are kept as they are: no text is tokenised again. The tokens
between two turns are what the template adds for the results of a call in a short conversation of its own.

Letters: P prompts, K responses of each, N most new tokens.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sheeprlhf.data.example import Example
from sheeprlhf.data.tokenize import decode, encode
from sheeprlhf.rollout.environment_pool import Call, EnvironmentPool, Request
from sheeprlhf.rollout.sampler import Sampled
from sheeprlhf.rollout.sources import Episode
from sheeprlhf.structure.rollout import LocalRolloutConfig
from sheeprlhf.utils.end_tokens import control_tokens, end_texts, end_token_ids, first_end
from sheeprlhf.utils.errors import ConfigError, DataError, Notify
from sheeprlhf.utils.rendering import render_chat

_HERMES = "hermes"
_CALLS = {  # by format: the part of a message that holds the JSON of a call, or a list of calls
    _HERMES: re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL),  # Hermes, Qwen
    "mistral": re.compile(r"\[TOOL_CALLS\]\s*(.*\S)", re.DOTALL),
    "llama": re.compile(r"\A\s*(?:<\|python_tag\|>)?\s*(\{.*\})\s*\Z", re.DOTALL),  # the whole message
}
_PROBE = Call("some_tool", {"value": "some value"})
_RESULT = "some result"
_QUESTION = {"role": "user", "content": "some question"}

SampleFn = Callable[..., list[Sampled]]  # (prompts, uniforms, limits=None)


def parse_calls(text: str, form: str) -> list[Call | None]:
    """Return the tool calls of a message; None for one that cannot be read.

    Args:
        text: of the message, control tokens included, without its end token.
        form: "hermes": `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them; "mistral":
            `[TOOL_CALLS] [{...}]`; "llama": a message that is `{"name": ..., "parameters": {...}}` and nothing else.
    """
    calls: list[Call | None] = []
    for written in _CALLS[form].findall(text):
        try:
            value = json.loads(written)
            found = [_call_of(one) for one in (value if isinstance(value, list) else [value])]
        except (ValueError, RecursionError):
            found = [None]
        if form != "llama" or None not in found:  # other JSON is an answer
            calls += found
    return calls


def _call_of(value: Any) -> Call | None:
    arguments = value.get("arguments", value.get("parameters")) if isinstance(value, dict) else None
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if isinstance(arguments, dict) and isinstance(value.get("name"), str):
        return Call(value["name"], arguments)
    return None


class ToolTemplate:
    """The tool calls and results of a chat template.

    Args:
        tokenizer: of the policy.
        max_result_length: characters of a result; the rest is cut.

    Attributes:
        form: how it writes calls, see `parse_calls`; "hermes" if it writes none.
        role: role of a message with a result: "tool", or "user" for a template without it.

    Raises:
        ConfigError: there is no template, or it does not write calls or results in a known form.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_result_length: int) -> None:
        self._tokenizer, self._max_result_length = tokenizer, max_result_length
        self._control = sorted((text for text in control_tokens(tokenizer).values() if text), key=len, reverse=True)
        if not tokenizer.chat_template:
            raise ConfigError("rollout.environment needs a chat template: give model.chat_template")
        self.form = self._form()
        for self.role, self._writes_calls in (("tool", True), ("tool", False), ("user", False)):
            try:
                if _RESULT in self._between([_RESULT])[1]:
                    return
            except DataError:
                continue
        raise ConfigError(
            "rollout.environment: the model's chat template does not add the result of a tool after an answer that "
            "ends in an end token: give another model.chat_template"
        )

    def result_ids(self, last_id: int, results: Sequence[str]) -> list[int]:
        """Return the tokens between a message with calls and the model's next message.

        Args:
            last_id: last token of the message; without an end token, that of the template is added.
            results: texts; those of control tokens are removed from them.
        """
        end, after = self._between([self._plain(result) for result in results])
        [[end_id, *ids]] = encode(self._tokenizer, [end + after], control_tokens=True)
        return ids if last_id in end_token_ids(self._tokenizer) else [end_id, *ids]

    def _plain(self, result: str) -> str:
        if len(result) > self._max_result_length:
            result = f"{result[: self._max_result_length]}..."
        while any(text in result for text in self._control):
            for text in self._control:
                result = result.replace(text, "")
        return result

    def example_messages(self, call: Call) -> list[str]:
        """Return two messages of the model, end tokens included: a call and an answer."""
        own = self._written(call) if self._writes_calls else f"<tool_call>{json.dumps(call._asdict())}</tool_call>"
        end = self._between([_RESULT])[0]
        return [own + end, f"The answer.{end}"]

    def _message(self, calls: int, call: Call = _PROBE) -> dict[str, Any]:
        function = {"name": call.name, "arguments": call.arguments}
        ids = [f"call{number:05d}" for number in range(calls)]  # nine characters, as Mistral's templates demand
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": one, "type": "function", "function": function} for one in ids],
        }

    def _written(self, call: Call) -> str:
        """Return a message with a call as the template writes it, without its end token; without the call if it can't.

        Raises:
            DataError: the template refuses it.
        """
        own = render_chat(self._tokenizer, [_QUESTION, self._message(1, call)])
        prompt = render_chat(self._tokenizer, [_QUESTION], ask=True)
        own = own.removeprefix(prompt) if own.startswith(prompt) else own.rpartition(_QUESTION["content"])[2]
        end = first_end(own, end_texts(self._tokenizer))
        own = own if end is None else own[: own.index(end)]
        return own if call.name in own else ""

    def _form(self) -> str:
        """Find the format in which the template writes a call."""
        try:
            own = self._written(_PROBE)
        except DataError:
            own = ""
        if not own:
            return _HERMES  # the data teaches it as plain text
        found = next((form for form in _CALLS if parse_calls(own, form) == [_PROBE]), None)
        if found is None:
            raise ConfigError(
                f"rollout.environment: the tool calls of the model's chat template cannot be read ({own[:80]!r}): give "
                "a model.chat_template that writes <tool_call>{...}</tool_call>"
            )
        return found

    def _between(self, results: Sequence[str]) -> tuple[str, str]:
        """Return the end token of a message with calls, and the text between it and the model's next message.

        Raises:
            DataError: the template refuses such a conversation, or writes none.
        """
        asked = self._message(len(results))
        if not self._writes_calls:
            asked = {"role": "assistant", "content": _PROBE.name}
        ids = [f"call{number:05d}" for number in range(len(results))]
        answers: list[Mapping[str, Any]] = [
            {"role": "tool", "name": _PROBE.name, "tool_call_id": one, "content": result}
            for one, result in zip(ids, results, strict=True)
        ]
        if self.role == "user":
            answers = [{"role": "user", "content": "\n".join(results)}]
        before = render_chat(self._tokenizer, [_QUESTION, asked])
        whole = render_chat(self._tokenizer, [_QUESTION, asked, *answers], ask=True)
        start = before.rfind(_PROBE.name)
        end = first_end(before[start:], end_texts(self._tokenizer))
        if start < 0 or end is None:
            raise DataError("the chat template ends an answer with no end token")
        cut = before.index(end, start) + len(end)
        if whole[:cut] != before[:cut]:
            raise DataError("the chat template writes an answer differently before a result")
        return end, whole[cut:]


class EpisodeSampler:
    """Samples responses of several turns.

    Args:
        tokenizer: of the policy.
        cfg: with an environment.
        say: prints a line for the user.

    Raises:
        ConfigError: as for `ToolTemplate`, or the environment cannot be imported.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, cfg: LocalRolloutConfig, say: Notify) -> None:
        assert cfg.environment is not None
        self._tokenizer, self._cfg, self._say_line, self._said = tokenizer, cfg, say, set[str]()
        self._template = ToolTemplate(tokenizer, cfg.max_result_length)
        self._pool = EnvironmentPool(cfg.environment, cfg.num_processes, cfg.step_timeout)
        self._pool.start()
        if self._template.role == "user":
            say("rollout.environment: the chat template has no tool messages: results are messages of the user")
        self.tools = self._pool.tools

    def describe(self) -> str:
        """Return a line about the environment's tools and the format of calls."""
        tools = ", ".join(tool["name"] for tool in self.tools) or "without schemas"
        written = f"format of calls {self._template.form}, results by the {self._template.role}"
        return f"rollout.environment={self._cfg.environment}: tools {tools}; {written}"

    def example(self, prompt: Example) -> Episode:
        """Return an episode of a row in which a made-up call and an answer take the place of the model's messages."""
        tool: dict[str, Any] = self.tools[0] if self.tools else {"name": "tool"}
        schema = tool.get("parameters", {})
        kinds = {name: schema.get("properties", {}).get(name, {}).get("type") for name in schema.get("required", [])}
        call = Call(tool["name"], {name: "1" if kind == "string" else 1 for name, kind in kinds.items()})
        messages = encode(self._tokenizer, self._template.example_messages(call), control_tokens=True)

        def sample(*_: Any, **__: Any) -> list[Sampled]:
            ids = messages.pop(0)
            return [Sampled((np.array(ids, np.int32),), (np.zeros(len(ids), np.float32),), (True,))]

        [[episode]] = self(sample, [prompt], np.zeros((1, 1, 1 << 16)), lambda _: None)
        return episode

    def __call__(
        self,
        sample: SampleFn,
        prompts: Sequence[Example],
        uniforms_PKN: np.ndarray,
        progress: Callable[[int], object],
    ) -> list[list[Episode]]:
        """Return K episodes of each prompt.

        Args:
            sample: called with the ids of prompts, random numbers as of `sample_responses`, and the most new tokens of
                each prompt.
            prompts: rows; an environment gets their columns, and the prompt's text as "prompt" if there is none.
            uniforms_PKN: (P, K, N) random numbers; the token at place t of a response is drawn with number t.
            progress: called with the number of responses that have just ended.
        """
        group, most = uniforms_PKN.shape[1:]
        texts = decode(self._tokenizer, [prompt.prompt_ids.tolist() for prompt in prompts])
        rows = [{"prompt": text, **(prompt.columns or {})} for prompt, text in zip(prompts, texts, strict=True)]
        episodes = [Episode() for _ in range(len(prompts) * group)]
        self._ask(episodes, {number: ("reset", rows[number // group]) for number in range(len(episodes))})
        self._note_tools(texts)
        turns = sample([prompt.prompt_ids for prompt in prompts], uniforms_PKN)
        live = list(range(len(episodes)))
        while live:
            newest = [turn for one in turns for turn in zip(*one, strict=True)]
            going_on = self._take_turn(episodes, dict(zip(live, newest, strict=True)), most)
            progress(len(live) - len(going_on))
            live = going_on
            if live:
                limits = [most - len(episodes[number].ids) for number in live]
                uniforms = np.zeros((len(live), 1, max(limits)))
                for row, (number, limit) in enumerate(zip(live, limits, strict=True)):
                    uniforms[row, 0, :limit] = uniforms_PKN[number // group, number % group, most - limit :]
                before = [(prompts[number // group].prompt_ids, episodes[number].ids) for number in live]
                turns = sample([np.concatenate(parts).astype(np.int32) for parts in before], uniforms, limits=limits)
        return [episodes[start : start + group] for start in range(0, len(episodes), group)]

    def _take_turn(self, episodes: list[Episode], newest: dict[int, tuple[Any, Any, bool]], most: int) -> list[int]:
        """Add the newest messages and the environment's answers; return the episodes that go on."""
        requests: dict[int, tuple[str, Any]] = {}
        ends = end_token_ids(self._tokenizer)
        for number, (ids, logprobs, finished) in newest.items():
            episode = episodes[number]
            episode.add(ids.tolist(), sampled=True)
            episode.logprobs += logprobs.tolist()
            episode.turns += 1
            written = ids[:-1] if ids[-1] in ends else ids
            [text] = decode(self._tokenizer, [written.tolist()])
            episode.answer = str(self._tokenizer.decode(written.tolist(), skip_special_tokens=True))
            calls = parse_calls(text, self._template.form) if finished else []
            episode.calls += len(calls)
            episode.invalid += calls.count(None)
            episode.finished = finished and not calls
            if episode.error is None and episode.finished:
                requests[number] = ("finish", episode.answer)
            elif episode.error is None and calls and episode.turns < self._cfg.max_turns:
                requests[number] = ("step", calls)
        going_on = []
        for number, (results, done) in self._ask(episodes, requests).items():
            episode = episodes[number]
            if requests[number][0] == "finish" or episode.error is not None:
                continue
            episode.finished = done
            if done:
                continue
            added = self._template.result_ids(episode.ids[-1], results)
            if len(episode.ids) + len(added) < most:
                episode.add(added, sampled=False)
                going_on.append(number)
        return going_on

    def _ask(
        self, episodes: list[Episode], requests: dict[int, tuple[str, Any]]
    ) -> dict[int, tuple[tuple[str, ...], bool]]:
        """Send requests to the environments; note rewards and errors; return the results and whether they ended."""
        replies = self._pool.run([Request(number, *request) for number, request in requests.items()])
        for number, reply in zip(requests, replies, strict=True):
            episodes[number].reward += reply.reward
            if reply.error is not None:
                episodes[number].reward, episodes[number].error = 0.0, reply.error
                text = f"{self._cfg.environment} failed; env/failed counts such episodes, reward 0: {reply.error}"
                self._say_once("failed", f"warning: rollout.environment={text}")
        return {number: (reply.results, reply.done) for number, reply in zip(requests, replies, strict=True)}

    def _note_tools(self, prompts: list[str]) -> None:
        """Say once which tools the prompts do not mention."""
        names = [tool["name"] for tool in self.tools]
        missing = [name for name in names if prompts and not any(name in text for text in prompts)]
        if missing:
            self._say_once(
                "tools",
                f"note: no prompt mentions the tool {', '.join(missing)}: give the rows a column 'tools' with the JSON "
                "schemas, or a system message, unless the model knows the tool",
            )

    def _say_once(self, topic: str, line: str) -> None:
        if topic not in self._said:
            self._said.add(topic)
            self._say_line(line)
