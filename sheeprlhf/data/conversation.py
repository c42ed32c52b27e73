"""Conversations: one representation for the layouts of chat data, and one way through the model's chat template.

A row of messages becomes a `ConversationExample`: the messages before the answer, the answer or the answers that are
compared, and the tools. `render_example` makes texts of it. Each text is found by rendering prefixes of the
conversation with the tokenizer's own chat template, and compared with the rendering of the whole.

A message is a dict with `role` and, as far as it has them, `content` (text), `tool_calls` (a list of objects),
`reasoning_content` and any other key of the row, which a chat template may read. `TRAINED` says whether the row marks
it as one to learn.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from os.path import commonprefix
from typing import Any, NamedTuple, TypeVar

from sheeprlhf.data.rows import (
    CONVERSATION_EXTRAS,
    SPELLINGS,
    STEPS,
    DropRowError,
    MissingColumnError,
    PreferenceExample,
    TemplatedExample,
    has_value,
    number,
    printable,
    text,
)
from sheeprlhf.utils.chat_templates import check_has_template
from sheeprlhf.utils.end_tokens import end_texts, first_end
from sheeprlhf.utils.errors import DataError
from sheeprlhf.utils.rendering import render_chat, template_keys, template_variables, writes_whole_messages

Message = dict[str, Any]

TRAINED = "\0trained"  # key of a message that no file can have: True or False where the row says what is learned
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # names of one field
ROLES = {  # other names, in any letter case -> the role that chat templates know
    **{name: name for name in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "chatbot", "bot", "ai", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "ipython"), "tool"),
}
_ROLE = re.compile(r"[A-Za-z_]{1,32}")
_MARKS = ("weight", "train", "loss")  # whether a message is learned
_UNKNOWN_MARKS = ("train_detail", "mask", "masked", "loss_mask", "loss_weight", "trainable", "training")
_TEXT_PARTS = ("text", "input_text", "output_text")  # types of parts of a message
_PROBE = " (probe)"


def read_messages(value: Any, column: str, *, role: str | None = None) -> tuple[Message, ...]:
    """The messages in a column: a list, one, JSON text, or a plain text of `role`. Raises DataError, DropRowError."""
    if isinstance(value, tuple) and all(isinstance(turn, dict) and "role" in turn for turn in value):
        return value
    if isinstance(value, str) and role is not None:
        return ({"role": role, "content": text({column: value}, column)},)
    if isinstance(value, str):
        value = _json(value, column)
    if isinstance(value, Mapping):
        value = _messages_in_object(value, column)
    if not isinstance(value, list | tuple) or not all(isinstance(turn, Mapping) for turn in value):
        raise DataError(f"column '{column}' must be a list of {{role, content}}")
    found = []
    for index, turn in enumerate(value):
        try:
            found.append(_message(turn))
        except DataError as error:
            raise DataError(f"column '{column}', message {index}: {error}") from None
    return tuple(found)


def read_tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    """The functions of column 'tools', JSON schemas as objects or text, or None. Raises DataError for anything else."""
    if isinstance(value, str):
        value = _json(value, "tools") if value.strip() else None
    if value is None or value == []:
        return None
    if isinstance(value, Mapping):
        value = [value]
    tools = [_json(tool, "tools") if isinstance(tool, str) else tool for tool in value] if _is_list(value) else [None]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError("column 'tools' must be a list of JSON schemas of functions")
    return tuple(dict(tool) for tool in tools if tool)


def is_answer(message: Message) -> bool:
    """True if the message is the assistant's."""
    return bool(message["role"] == "assistant")


def is_trained(message: Message) -> bool | None:
    """True if the row marks a message as one to learn, False if as one not to; None without a mark."""
    return message.get(TRAINED)


def plain_message(message: Message) -> Message:
    """The message as the chat template gets it."""
    return {key: value for key, value in message.items() if key != TRAINED}


def same_message(first: Message, second: Message) -> bool:
    """True if two messages have the same content."""
    return plain_message(first) == plain_message(second)


def reasoning_pattern(tags: Sequence[str]) -> re.Pattern[str]:
    """Pattern of a block of reasoning in a text, its tags and the white space behind it included.

    A block without its end goes on to the end of the text. One without its start begins with the text, as a chat
    template may have written the first tag at the end of the prompt; text has to follow it, as the second tag may be
    the token that ends all messages.
    """
    first, last = map(re.escape, tags)
    return re.compile(rf"{first}.*?(?:{last}\s*|\Z)|\A(?:(?!{first}).)*?{last}\s*(?=\S)", re.DOTALL)


def without_reasoning_of(message: Message, pattern: re.Pattern[str]) -> Message:
    """A message of the assistant without its reasoning; any other as it is."""
    if not is_answer(message):
        return message
    kept = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    if "content" not in kept and "tool_calls" in kept:
        return kept
    return kept | {"content": pattern.sub("", kept.get("content", ""))}


def strings_of(value: Any) -> Iterator[str]:
    """Every text in a nested value, keys of objects included."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            if one != TRAINED:
                yield one
        elif isinstance(one, Mapping):
            waiting += [*one.keys(), *one.values()]
        elif _is_list(one):
            waiting += one


def _messages_in_object(value: Mapping[Any, Any], column: str) -> list[Any]:
    """The one message that an object is, or the messages of an object of lists, as older `datasets` store them."""
    if not _is_list(value.get("role", value.get("from"))):
        return [value]
    lists = {key: entries for key, entries in value.items() if entries is not None}
    if not all(map(_is_list, lists.values())) or len(set(map(len, lists.values()))) > 1:
        raise DataError(f"column '{column}' has lists of different lengths; write a list of {{role, content}}")
    return [dict(zip(lists, entries, strict=True)) for entries in zip(*lists.values(), strict=True)]


def _message(turn: Mapping[Any, Any]) -> Message:
    """One message in the form that chat templates read."""
    given = {str(key): value for key, value in turn.items() if value is not None}
    for name, other in (("role", "from"), ("content", "value")):
        if name not in given and other in given:
            given[name] = given.pop(other)
    if "role" not in given:
        raise DataError(f"key 'role' (or 'from') is missing; {_has(given)}")
    role = text(given, "role")
    if not _ROLE.fullmatch(role):  # templates write roles between their markers
        raise DataError(f"role {role!r} is not a word")
    message: Message = {"role": ROLES.get(role.casefold(), role)}
    call = given.pop("function_call", None)
    if role.casefold() == "function_call":
        call = given.pop("content", None)
    if call is not None:
        given["tool_calls"] = _calls(call)
    calls = _tool_calls(given.pop("tool_calls", None))
    if "content" in given:
        message["content"] = _content(given["content"])
    elif not calls and not any(given.get(key) for key in REASONING_KEYS):
        raise DataError(f"key 'content' (or 'value') is missing or null; {_has(given)}")
    if calls:
        message["tool_calls"] = calls
    trained = _trained(given)
    if trained is not None:
        message[TRAINED] = trained
    for key in REASONING_KEYS:
        if key in given and not isinstance(given[key], str):
            raise DataError(f"key '{key}' holds {type(given[key]).__name__}, not text; write it as a string")
    others = {key: value for key, value in given.items() if key not in ("role", "content", *_MARKS)}
    return message | {key: value for key, value in others.items() if value not in ("", [], {})}


def _has(given: Mapping[str, Any]) -> str:
    return f"the message has {printable(given) or 'no key with a value'}; write its role and its text under these keys"


def _content(value: Any) -> str:
    """The text of a message, of one or more parts."""
    if not _is_list(value):
        return text({"content": value}, "content")
    parts = []
    for part in value:
        if isinstance(part, Mapping) and part.get("type", "text") in _TEXT_PARTS and isinstance(part.get("text"), str):
            part = part["text"]
        if not isinstance(part, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise DataError(f"a part of key 'content' is of type {str(kind)[:40]}; only text can be trained on")
        parts.append(text({"content": part}, "content"))
    return "".join(parts)


def _calls(value: Any) -> list[Any]:
    """Calls of functions as ShareGPT and older data have them: `{"name": ..., "arguments": ...}`, or its JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    calls = [value] if isinstance(value, Mapping) else value
    if not _is_list(calls) or not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise DataError('a function call must be JSON such as {"name": "f", "arguments": {}}; write it so')
    return [{"type": "function", "function": dict(call)} for call in calls]


def _tool_calls(value: Any) -> list[dict[str, Any]]:
    """Key 'tool_calls', checked."""
    if isinstance(value, str):
        value = _json(value, "tool_calls") if value.strip() else None
    if value is None:
        return []
    if not _is_list(value) or not all(isinstance(call, Mapping) for call in value):
        raise DataError("key 'tool_calls' must be a list of objects")
    for call in value:
        inner = call.get("function", call)
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise DataError("key 'tool_calls' has a call without the name of a function")
    return [dict(call) for call in value]


def _trained(given: Mapping[str, Any]) -> bool | None:
    """True if a message is learned, by keys 'weight', 'train' and 'loss'. Raises DataError if a mark is not read."""
    if (unknown := next((key for key in _UNKNOWN_MARKS if key in given), None)) is not None:
        raise DataError(
            f"key '{unknown}' is not read; write \"train\": true or false instead, or leave it out by "
            f"'data.ignore_columns=[messages.{unknown}]'"
        )
    said = []
    for key in _MARKS:
        if key in given:
            value = given[key]
            mark = SPELLINGS.get(str(value).strip().casefold())
            if mark is None:
                raise DataError(f"key '{key}' is {str(value)[:40]!r}; only 0 and 1, or true and false, are read")
            said.append(mark)
    if len(set(said)) > 1:
        raise DataError(f"keys {' and '.join(key for key in _MARKS if key in given)} contradict each other; keep one")
    return said[0] if said else None


def _json(value: str, name: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"column '{name}' holds a text that is not JSON; write it with json.dumps") from None


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


class ConversationExample(NamedTuple):
    """One row of messages, before the chat template."""

    context: tuple[Message, ...]  # messages before the answers
    tools: tuple[dict[str, Any], ...] | None = None  # JSON schemas of the functions that the assistant may call
    response: Message | None = None  # the answer to learn
    following: tuple[Message, ...] = ()  # messages after it, which a template may render with it differently
    chosen: Message | None = None  # the better answer of a pair
    rejected: Message | None = None  # the worse one
    ranked: tuple[Message, ...] | None = None  # instead of a pair, two or more answers, best first
    margin: float = 0.0  # how much better the chosen answer is
    label: Any = None  # whether `response` is desirable
    unused: tuple[str, ...] = ()  # names of the parts of the row that nothing reads
    own_turns: int = 0  # messages at the end of `context` that are not given; answers among them can be learned


AnyExample = TypeVar("AnyExample", PreferenceExample, ConversationExample)


def has_messages(row: Mapping[str, Any]) -> bool:
    """True if a row has messages, in a column for them or in place of a text, or system text or tools of a prompt."""
    if any(row.get(column) is not None for column in ("messages", "conversations")) or extra_of_prompt(row):
        return True
    values = [row.get(column) for column in ("prompt", "response", "chosen", "rejected")]
    ranked = row.get("responses")
    values += ranked if isinstance(ranked, list | tuple) else []
    return any(_is_message_list(value) for value in values)


def extra_of_prompt(row: Mapping[str, Any]) -> str | None:
    """The column, system or tools, that makes a conversation of a prompt; None for other rows."""
    if not has_value(row.get("prompt")) or row.get(STEPS[0]) is not None:
        return None
    return next((name for name in CONVERSATION_EXTRAS if has_value(row.get(name))), None)


def read_conversation(row: Mapping[str, Any], *, as_prompt: bool = False) -> ConversationExample:
    """A row of messages as one example; `as_prompt` needs no answer. Raises DataError and DropRowError."""
    unused: list[str] = []
    given = next((column for column in ("messages", "conversations") if row.get(column) is not None), None)
    if given == "messages" and row.get("conversations") is not None:
        unused.append("conversations")
    messages = None if given is None else read_messages(row[given], given)
    names = ("chosen", "rejected", "responses", "rejected_response", "response")
    answers = {name: row[name] for name in names if row.get(name) is not None}
    if messages and is_answer(messages[-1]):  # it has its answer
        unused += ["response"] * (answers.pop("response", None) is not None)
    if messages is not None and not answers:
        example = _dialogue(messages, str(given), as_prompt=as_prompt)
        unused += ["prompt"] * (row.get("prompt") is not None)
    elif answers:
        context, own = _context(row, messages, answers, unused)
        example = ConversationExample(context, **own)
    else:
        prompt = _prompt(row)
        if not as_prompt:
            raise MissingColumnError("column 'prompt' has messages and there is no answer to them")
        if not _asks(prompt):
            raise DataError("column 'prompt' needs a user's message at its end")
        example = ConversationExample(prompt)
    unused += example.unused
    context = _with_system(row, example.context)
    tools = read_tools(row.get("tools"))
    everything = (context, tools, example.response, example.following, example.chosen, example.rejected, example.ranked)
    _check_strings(everything)
    margin = margin_of(row) if example.chosen is not None or example.ranked is not None else 0.0
    return example._replace(context=context, tools=tools, label=row.get("label"), margin=margin, unused=tuple(unused))


def each_answer(example: ConversationExample, *, marked: bool) -> list[ConversationExample]:
    """An example for each answer to learn, with its context and `following`. Raises DropRowError if none is."""
    if example.response is None or example.chosen is not None or example.ranked is not None:
        return [example]
    messages = (*example.context, example.response, *example.following)
    last = len(example.context)
    chosen = [
        index
        for index in range(max(last - example.own_turns, 1), last + 1)
        if is_answer(messages[index]) and is_trained(messages[index]) in ((True,) if marked else (True, None))
    ]
    if not chosen:
        raise DropRowError("no_trained_message")
    return [
        example._replace(
            context=messages[:index], response=messages[index], following=messages[index + 1 :], own_turns=0
        )
        for index in chosen
    ]


def remove_reasoning(example: AnyExample, pattern: re.Pattern[str]) -> AnyExample:
    """An example without the reasoning of its answers; those in the context of a conversation included."""
    answers: dict[str, Any] = {}
    for name in ("response", "chosen", "rejected", "ranked", "context", "following"):
        value = getattr(example, name, None)
        if isinstance(value, str):
            answers[name] = pattern.sub("", value)
        elif isinstance(value, dict):
            answers[name] = without_reasoning_of(value, pattern)
        elif isinstance(value, tuple):
            answers[name] = tuple(
                pattern.sub("", one) if isinstance(one, str) else without_reasoning_of(one, pattern) for one in value
            )
    return example._replace(**answers)


def render_example(
    example: ConversationExample,
    tokenizer: Any,
    template_args: Mapping[str, Any] | None,
    *,
    masked: re.Pattern[str] | None = None,
) -> TemplatedExample:
    """The texts of a conversation, written by the model's chat template.

    The prompt is the rendering of the context with the generation prompt. An answer is the part behind it in the
    rendering of context and answer, its end token included.

    `masked` is what will be looked for in the answers as their reasoning; None: nothing.

    Raises:
        DataError: the model has no template; the template rewrites what it wrote before, or does not write a part that
            changes the meaning; RefusedByTemplateError: it refuses the conversation.
        DropRowError: a message has the text of one of the tokenizer's special tokens.
    """
    check_has_template(tokenizer, "a row of messages")
    render = _Renderer(tokenizer, template_args, example.tools)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special += end_texts(tokenizer)
    texts = list(strings_of((example.context, example.tools, example.following, _all_answers(example))))
    if any(token in text for text in texts for token in special):
        raise DropRowError("special_tokens_in_messages")
    messages = [*example.context, *_all_answers(example), *example.following]
    roles = {message["role"] for message in messages}
    unused = (*example.unused, *render.check_keys(messages))
    prompt = render(example.context, ask=True)
    unused += tuple(render.unwritten(example.context, prompt))
    remarks = [f"not used: {printable([name])}" for name in unused]
    remarks += [f"unknown role: {role}" for role in sorted(roles - {*ROLES.values()})]

    def answer(message: Message | None, following: Sequence[Message] = ()) -> str | None:
        if message is None:
            return None
        written = render.answer(example.context, message, following, prompt)
        keys = [key for key in REASONING_KEYS if message.get(key) and message[key].strip() in written]
        if masked and keys and not masked.search(written):
            raise DataError(
                f"the model's chat template does not write key '{keys[0]}' of a message between data.reasoning_tags, "
                "where data.reasoning=mask looks for it; give its tags, or data.reasoning=train or remove"
            )
        return written

    earlier = sum(is_answer(message) and is_trained(message) is not False for message in example.context)
    return TemplatedExample(
        prompt=prompt,
        response=answer(example.response, example.following),
        chosen=answer(example.chosen),
        rejected=answer(example.rejected),
        ranked=None if example.ranked is None else tuple(str(answer(message)) for message in example.ranked),
        margin=example.margin,
        label=example.label,
        remarks=tuple(remarks),
        untrained=earlier if example.response is not None else 0,
    )


def raw_example(example: ConversationExample) -> PreferenceExample:
    """A conversation with its messages as JSON in place of texts: what identifies the row, whatever the template."""

    def raw(messages: Sequence[Message], *more: Any) -> str:
        return json.dumps([[plain_message(message) for message in messages], *more], sort_keys=True, default=str)

    def answer(message: Message | None) -> str | None:
        return None if message is None else raw([message], *(later["role"] for later in example.following))

    ranked = None if example.ranked is None else tuple(raw([message]) for message in example.ranked)
    return PreferenceExample(
        raw(example.context, example.tools),
        answer(example.response),
        answer(example.chosen),
        answer(example.rejected),
        ranked,
        label=example.label,
    )


class _Renderer:
    """Renders messages for one row, with its tools and the arguments of the template."""

    def __init__(
        self, tokenizer: Any, template_args: Mapping[str, Any] | None, tools: tuple[dict[str, Any], ...] | None
    ) -> None:
        self._tokenizer, self._args, self._tools = tokenizer, template_args, tools
        self._text: str = tokenizer.get_chat_template(tools=tools)
        self._decoded = False

    def __call__(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """The text of messages; calls get objects as arguments only if the template fails on JSON text."""
        if not self._decoded:
            arguments = [text for message in messages for text in _argument_texts(message)]
            try:
                text = self._render(messages, ask)
            except DataError:
                if not arguments:
                    raise
            else:
                if not any(json.dumps(one, ensure_ascii=ascii) in text for one in arguments for ascii in (True, False)):
                    return text
            self._decoded = True
        return self._render([_with_objects(message) for message in messages], ask)

    def _render(self, messages: Sequence[Message], ask: bool) -> str:
        plain = [plain_message(message) for message in messages]
        return render_chat(self._tokenizer, plain, self._args, tools=self._tools, ask=ask)

    def answer(self, context: Sequence[Message], message: Message, following: Sequence[Message], prompt: str) -> str:
        """Text that the template writes for an answer, up to its end token; empty for an answer without content."""
        if not any(str(message.get(key) or "").strip() for key in ("content", "tool_calls", *REASONING_KEYS)):
            return ""  # a template writes its markers around nothing
        alone = self([*context, message])
        if not alone.startswith(prompt):
            raise DataError(self._rewritten(prompt, alone))
        self._check_written([*context], message, alone)
        own = alone[len(prompt) :]
        end = self._end(own)
        if following:
            whole = self([*context, message, *following])
            if whole.startswith(alone):
                return own if end is None else own[: own.index(end) + len(end)]
            if whole.startswith(prompt) and end is not None and end in whole[len(prompt) :]:
                own = whole[len(prompt) :]  # as the template renders it in front of later messages
        return own if end is None else own[: own.index(end) + len(end)]

    def _end(self, answer: str) -> str | None:
        """The token with which an answer ends; None if the template writes none."""
        return first_end(answer, end_texts(self._tokenizer))

    def _rewritten(self, prompt: str, answered: str) -> str:
        """Message for a template that writes another prompt once it is answered."""
        same = len(commonprefix([prompt, answered]))  # noqa: RUF071 - texts, not paths
        change = f"{prompt[same:][:40]!r} becomes {answered[same:][:40]!r}"
        fix = "change data.template_args, or " if self._args else ""
        return (
            f"the model's chat template writes the conversation differently once it is answered ({change}); {fix}"
            "write the rows as prompt and response, rendered by the template, and give data.control_tokens=true"
        )

    def check_keys(self, messages: Sequence[Message]) -> list[str]:
        """Names of message keys that the template does not read. Raises DataError for tools, calls and reasoning."""
        if writes_whole_messages(self._tokenizer, self._text, self._args):
            return []
        known = template_keys(self._text) | template_variables(self._text)
        if self._tools and "tools" not in known:
            advice = "take a model whose template does, or leave it out by 'data.ignore_columns=[tools]'"
            raise DataError(f"the model's chat template does not read column 'tools'; {advice}")
        keys = dict.fromkeys(key for message in messages for key in message if key not in ("role", "content"))
        unused = []
        for key in keys:
            if key == TRAINED:
                if any(message.get(key) for message in messages if not is_answer(message)):
                    unused.append("messages.weight of other roles")
            elif key in known or (key in REASONING_KEYS and known & set(REASONING_KEYS)):
                continue
            elif key in REASONING_KEYS or key == "tool_calls":
                fix = "write it into the content between data.reasoning_tags, " if key in REASONING_KEYS else ""
                raise DataError(
                    f"the model's chat template does not read key '{key}' of a message; {fix}take a model whose "
                    f"template does, or leave it out by 'data.ignore_columns=[messages.{key}]'"
                )
            else:
                unused.append(f"messages.{key}")
        return unused

    def unwritten(self, context: Sequence[Message], prompt: str) -> Iterator[str]:
        """Roles whose content the template leaves out of the prompt."""
        for index, message in enumerate(context):
            content = message.get("content")
            if is_answer(message) or not isinstance(content, str) or not content.strip() or content.strip() in prompt:
                continue
            changed = [*context[:index], {**message, "content": content + _PROBE}, *context[index + 1 :]]
            if self(changed, ask=True) == prompt:
                yield f"messages of role {message['role']}"

    def _check_written(self, context: list[Message], message: Message, written: str) -> None:
        """Raise DataError if the answer's reasoning or calls change nothing in the rendering."""
        for keys in (REASONING_KEYS, ("tool_calls",)):
            found = [key for key in keys if message.get(key)]
            without = {name: value for name, value in message.items() if name not in found}
            if found and self([*context, {"content": "", **without}]) == written:
                advice = f"take another model, or leave it out by 'data.ignore_columns=[messages.{found[0]}]'"
                raise DataError(f"the model's chat template does not write key '{found[0]}' of the answer; {advice}")


def _is_message_list(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "role" in value or "from" in value
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(entry, Mapping) for entry in value)


def _dialogue(messages: tuple[Message, ...], column: str, *, as_prompt: bool) -> ConversationExample:
    """The last answer to be learned, with the messages before it."""
    if as_prompt and _asks(messages):
        return ConversationExample(messages)
    answers = [index for index, message in enumerate(messages) if index and is_answer(message)]
    if not answers:
        other = "a user's message at its end, or " if as_prompt else ""
        roles = printable(dict.fromkeys(message["role"] for message in messages)) or "no messages"
        raise DataError(f"column '{column}' needs {other}an assistant message with a message before it; it has {roles}")
    trained = [index for index in answers if is_trained(messages[index]) is not False]
    if not trained:
        raise DropRowError("no_trained_message")
    last, target = answers[-1], trained[-1]
    unused = ("messages after the answer",) if target < len(messages) - 1 else ()
    return ConversationExample(
        messages[:target],
        response=messages[target],
        following=messages[target + 1 : last + 1],
        unused=unused,
        own_turns=target,
    )


def _prompt(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """Column 'prompt' as messages; a text is the user's."""
    return () if row.get("prompt") is None else read_messages(row["prompt"], "prompt", role="user")


def _context(
    row: Mapping[str, Any], messages: tuple[Message, ...] | None, answers: dict[str, Any], unused: list[str]
) -> tuple[tuple[Message, ...], dict[str, Any]]:
    """The messages before the answers, and the answers by their names in `ConversationExample`."""
    worse = answers.pop("rejected_response", None)
    if worse is not None and "chosen" not in answers:
        better = messages[-1:] if messages and is_answer(messages[-1]) else answers.get("response")
        if not better:
            raise MissingColumnError("column 'rejected_response' needs a better answer: messages that end with one")
        answers |= {"chosen": better, "rejected": worse}
    elif worse is not None:
        unused.append("rejected_response")
    if ("chosen" in answers) != ("rejected" in answers):
        raise MissingColumnError("chosen and rejected go together, and one of the two is missing or null")
    lists = {name: read_messages(of, name, role="assistant") for name, of in answers.items() if name != "responses"}
    compared = [lists[name] for name in ("chosen", "rejected") if name in lists]
    if (ranked := answers.get("responses")) is not None:
        if not isinstance(ranked, list | tuple) or len(ranked) < 2:
            raise DataError("column 'responses' must be a list of two or more answers, best first")
        unused += [name for name in ("chosen", "rejected") if lists.pop(name, None) is not None]
        compared = [read_messages(entry, "responses", role="assistant") for entry in ranked]
    response = lists.get("response")
    if not all([*compared, *([response] if response is not None else [])]):
        raise DropRowError("empty_response")
    context = _before(compared or [response or ()], _prompt(row), messages, unused)
    own: dict[str, Any] = {} if compared else {"own_turns": len(response or ()) - 1}
    shared = len(_common_start(compared)) if compared else 0
    ends = [one[shared:] if len(one) > 1 else one for one in compared]
    if any(len(end) != 1 or not is_answer(end[0]) for end in ends) or (response and not is_answer(response[-1])):
        raise DropRowError("more_than_one_answer")
    own |= {"response": response[-1]} if response else {}
    if ranked is not None:
        own["ranked"] = tuple(end[0] for end in ends)
    elif ends:
        own |= {"chosen": ends[0][0], "rejected": ends[1][0]}
    if any(is_trained(message) is False for message in (*(end[0] for end in ends), *(response or ())[-1:])):
        raise DropRowError("no_trained_message")
    if not context:
        raise DropRowError("empty_prompt")
    return context, own


def _before(
    lists: list[tuple[Message, ...]],
    prompt: tuple[Message, ...],
    messages: tuple[Message, ...] | None,
    unused: list[str],
) -> tuple[Message, ...]:
    """The messages before the answers: the common start of the lists, behind a prompt that they do not repeat."""
    start = _common_start(lists)
    given = messages or prompt
    if messages and prompt and not any(same_message(prompt[-1], message) for message in (*messages, *start)):
        unused.append("prompt")
    if messages and is_answer(messages[-1]):
        given = messages[:-1]
    if start and not is_answer(start[0]):  # the lists have the whole dialogue
        if prompt and not messages and not any(same_message(prompt[-1], message) for message in start):
            unused.append("prompt")
        if messages and not (len(given) == len(start) and all(map(same_message, given, start))):
            unused.append("messages")
        return start
    if not given and not start:
        raise MissingColumnError("the answers have no common start, and column 'prompt' is missing")
    return (*given, *start)


def _asks(messages: Sequence[Message]) -> bool:
    """True if the next message is the assistant's."""
    return bool(messages) and messages[-1]["role"] in ("user", "tool")


def _common_start(lists: Sequence[tuple[Message, ...]]) -> tuple[Message, ...]:
    """The messages with which all lists begin; at least one of each is left."""
    most = min(len(one) for one in lists) - 1
    shared = 0
    while shared < most and all(same_message(one[shared], lists[0][shared]) for one in lists):
        shared += 1
    return lists[0][:shared]


def _with_system(row: Mapping[str, Any], context: tuple[Message, ...]) -> tuple[Message, ...]:
    """The context with the text of column 'system' in front of it."""
    value = row.get("system")
    if value is None or value == "":
        return context
    [message] = read_messages([{"role": "system", "content": value}], "system")
    if not message["content"].strip():
        return context
    if context and context[0]["role"] in ("system", "developer"):
        if same_message(context[0], message):
            return context
        raise DataError("column 'system' and the first message both give a system text; keep one of them")
    return (message, *context)


def margin_of(row: Mapping[str, Any]) -> float:
    """Column 'margin', else the difference of the two scores."""
    if row.get("margin") is not None or row.get("score_chosen") is None or row.get("score_rejected") is None:
        return number(row, "margin")
    return number(row, "score_chosen") - number(row, "score_rejected")


def _all_answers(example: ConversationExample) -> list[Message]:
    found = (example.response, example.chosen, example.rejected, *(example.ranked or ()))
    return [message for message in found if message is not None]


def _check_strings(value: Any) -> None:
    """Refuse what no tokenizer can encode."""
    for string in strings_of(value):
        if "\0" in string:
            raise DropRowError("nul_character")
        try:
            string.encode()
        except UnicodeEncodeError:
            raise DataError("a message holds half a surrogate pair; remove it") from None


def _argument_texts(message: Message) -> Iterator[str]:
    """Arguments of a message's tool calls that are text and spell an object."""
    for call in message.get("tool_calls") or ():
        arguments = (call.get("function") or call).get("arguments")
        if isinstance(arguments, str) and isinstance(_decoded(arguments), dict):
            yield arguments


def _with_objects(message: Message) -> Message:
    """A message whose calls have objects as arguments, not their JSON text."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    decoded = []
    for call in calls:
        inner = call.get("function") or call
        arguments = inner.get("arguments")
        value = _decoded(arguments) if isinstance(arguments, str) else arguments
        inner = {**inner, "arguments": value if isinstance(value, dict) else arguments}
        decoded.append({**call, "function": inner} if call.get("function") else inner)
    return {**message, "tool_calls": decoded}


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
