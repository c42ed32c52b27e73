"""Rendering with chat templates: the one function that applies a template, what a template reads, and its variables.

A template may write today's date, or choose at random. The same rows must be the same tomorrow, so both are fixed here:
the date is `FIXED_DATE` unless `data.template_args` gives another one, and random choices are always the same.
"""

import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import date, datetime
from functools import cache, lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from jinja2 import Environment, meta, nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from yaml import YAMLError, safe_load

from sheeprlhf.utils.chat_templates import own_templates, template_advice
from sheeprlhf.utils.errors import ConfigError, DataError, ModelError
from sheeprlhf.utils.output import read_small, write_file

CLOCK = "strftime_now"  # the function with which templates write the date; in template_args, the date that it writes
FIXED_DATE = "2024-07-26"  # the date that Llama 3's templates write where they know no other
_STORED = "sheeprlhf_template_args"  # attribute of a tokenizer: the arguments that its model was trained with
_RANDOM = re.compile(r"\b(random|lipsum)\b")  # a filter and a function of Jinja
_fixing = Lock()
OPTION, FLAG = "data.template_args", "--template-args"
FILE = "sheeprlhf.json"  # next to a tokenizer: how the prompts of the trained model are written
_MAX_BYTES = 1 << 20
_FORM = "sheeprlhf_form"  # attribute of a tokenizer
_ARGS = f"{OPTION} (or {FLAG})"


class RefusedByTemplateError(DataError):
    """A chat template does not accept the roles or the content of a conversation."""


def render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    template_args: Mapping[str, Any] | None = None,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    ask: bool = False,
) -> str:
    """Render messages with the tokenizer's chat template; every prompt and training row is rendered here.

    Args:
        tokenizer: of transformers, with a chat template.
        messages: role, content and whatever else the template reads.
        template_args: further variables of the template, as in `fixed_arguments`; "strftime_now" is the date that
            means today.
        tools: JSON schemas of functions.
        ask: add the generation prompt, which opens the assistant's turn.

    Raises:
        RefusedByTemplateError: the template refuses the conversation.
        DataError: it fails.
    """
    plain_tools = None if tools is None else [dict(tool) for tool in tools]
    given = fixed_arguments(tokenizer, template_args)
    date = given.pop(CLOCK, FIXED_DATE)
    try:
        with _fixed_environment(tokenizer.get_chat_template(tools=plain_tools), date):
            return str(
                tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tools=plain_tools,
                    tokenize=False,
                    add_generation_prompt=ask,
                    **given,
                )
            )
    except TemplateError as error:
        if isinstance(error, TemplateSyntaxError):  # of every row
            raise _template_failure(tokenizer, error) from None
        roles = ", ".join(dict.fromkeys(str(message.get("role")) for message in messages))
        advice = f"{_first_line(error)} (its roles are {roles}); change its messages, or {template_advice(tokenizer)}"
        raise RefusedByTemplateError(f"the model's chat template refuses the conversation: {advice}") from None
    except Exception as error:  # a template is a program: it can raise whatever its expressions raise
        raise _template_failure(tokenizer, error) from None


def _template_failure(tokenizer: Any, error: Exception) -> DataError:
    reason = f"{type(error).__name__}: {_first_line(error)}"
    return DataError(f"the model's chat template fails on the conversation ({reason}): {template_advice(tokenizer)}")


@contextmanager
def _fixed_environment(text: str, date: str) -> Iterator[None]:
    """Make chat templates write this date as today's, which is no variable, and draw the same random numbers."""
    if CLOCK not in text and not _RANDOM.search(text):
        yield
        return
    from transformers.utils import chat_template_utils

    today = datetime.fromisoformat(date)
    with _fixing:
        compiled = chat_template_utils._compile_jinja_template(text)
        compiled.globals[CLOCK] = lambda form: today.strftime(form)
        state = random.getstate()
        random.seed(0)
        try:
            yield
        finally:
            random.setstate(state)


def fixed_arguments(tokenizer: Any, template_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """The variables of a tokenizer's chat templates, with the date; None: those that the model was trained with."""
    given = getattr(tokenizer, _STORED, None) if template_args is None else template_args
    has_clock = any(CLOCK in str(text) for text in own_templates(tokenizer).values())
    return {**({CLOCK: FIXED_DATE} if has_clock else {}), **(given or {})}


@cache
def template_variables(text: str) -> frozenset[str]:
    """Variables that a chat template reads and does not define itself; empty if its syntax is wrong."""
    parsed = _parsed(text)
    try:
        return frozenset() if parsed is None else frozenset(meta.find_undeclared_variables(parsed))
    except TemplateSyntaxError:  # a filter that does not exist
        return frozenset()


def _own_variables(text: str) -> frozenset[str]:
    """Of `template_variables`, those that a caller may give: not set by the template, or set where they are missing."""
    parsed = _parsed(text)
    if parsed is None:
        return frozenset()
    stored = {node.name for node in parsed.find_all(nodes.Name) if node.ctx == "store"}
    tests = (node.node for node in parsed.find_all(nodes.Test) if node.name in ("defined", "undefined"))
    return (
        template_variables(text)
        - {CLOCK, "namespace"}
        - (stored - {node.name for node in tests if isinstance(node, nodes.Name)})
        - _TAKEN
    )


@cache
def template_keys(text: str) -> frozenset[str]:
    """Names that a chat template reads off messages: attributes, and constant texts such as `m["name"]`."""
    parsed = _parsed(text)
    if parsed is None:
        return frozenset()
    keys = {node.attr for node in parsed.find_all(nodes.Getattr)}
    return frozenset(keys | {node.value for node in parsed.find_all(nodes.Const) if isinstance(node.value, str)})


def writes_whole_messages(tokenizer: Any, text: str, template_args: Mapping[str, Any] | None) -> bool:
    """True if a chat template writes all keys of a message, for example as JSON."""
    return _writes_whole_messages(tokenizer, text, json.dumps(template_args, sort_keys=True))


@lru_cache(maxsize=16)
def _writes_whole_messages(tokenizer: Any, text: str, template_args: str) -> bool:
    messages = [{"role": "user", "content": "a", "unknown_key": "unknown value"}]
    with suppress(DataError):
        return "unknown value" in render_chat(tokenizer, messages, json.loads(template_args), ask=True)
    return False


def check_template_args(tokenizer: Any, template_args: Mapping[str, Any] | None) -> None:
    """Raise DataError for arguments that no chat template of the tokenizer reads."""
    if not template_args:
        return
    templates = getattr(tokenizer, "chat_template", None)
    if not templates:
        raise DataError(f"{_ARGS} is for a chat template, and this model has none: remove it")
    texts = templates.values() if isinstance(templates, dict) else [templates]
    known = frozenset().union(*map(template_variables, texts))
    unknown = [name for name in template_args if name not in known]
    if known and unknown:
        own = sorted(name for name in frozenset().union(*map(_own_variables, texts)) if not name.endswith("_token"))
        reads = f"it reads {', '.join(own)}" if own else "it reads no other variable"
        raise DataError(f"{_ARGS}: the model's chat template does not read {', '.join(unknown)}; {reads}")


def _parsed(text: str) -> nodes.Template | None:
    """The syntax tree of a template; None if its syntax is wrong."""
    plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", text)  # a tag of transformers only
    try:
        return Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except TemplateSyntaxError:
        return None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def write_prompt_form(folder: Path, form: str, template_args: Mapping[str, Any]) -> None:
    """Write the file next to a tokenizer: the form, and the variables that its chat template was rendered with."""
    content = {"form": form, "template_args": dict(template_args)}
    write_file(folder, FILE, json.dumps(content, indent=2, ensure_ascii=False).encode())


def read_prompt_form(folder: Path, tokenizer: Any) -> None:
    """Note on a tokenizer what the file of its folder says, if there is one. Raises ModelError if it is damaged."""
    if not (folder / FILE).is_file():
        return
    try:
        content: Any = json.loads(read_small(folder / FILE, _MAX_BYTES))
        template_args, form = content.get("template_args"), content.get("form")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{folder / FILE} cannot be read ({type(error).__name__}): remove it") from error
    for problem in template_arg_problems(template_args, "template_args"):
        raise ModelError(f"{folder / FILE}: {problem}, or remove the file")
    setattr(tokenizer, _STORED, dict(template_args or {}))
    setattr(tokenizer, _FORM, form if isinstance(form, str) else "")


def stored_form(tokenizer: Any) -> str:
    """The name of the form in which the prompts of the tokenizer's model are written; empty if no file says it."""
    return str(getattr(tokenizer, _FORM, ""))


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_TAKEN = {  # given to every chat template, or to the function of transformers that renders one
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "sanitize_control_tokens", "tokenizer_kwargs", "raise_exception",
}  # fmt: skip


def template_arg_problems(given: Any, key: str = OPTION) -> Iterator[str]:
    """Problems of variables for a chat template; `key` is the option or the flag that gives them."""
    if given is None:
        return
    if not isinstance(given, dict):
        example = f"{key}={{enable_thinking: false}}" if key == OPTION else f"{key} {{enable_thinking: false}}"
        yield f"{key}={str(given)[:40]} is not a mapping of names to values: give for example '{example}'"
        return
    for name, value in given.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            yield f"{key}: {str(name)[:40]!r} is not a variable's name: use letters, digits and _"
        elif name in _TAKEN or name.endswith("_token"):
            yield f"{key}: {name} cannot be given: it is set for every conversation; remove it"
        elif name == "strftime_now" and not _is_date(value):
            yield f"{key}: strftime_now={str(value)[:40]} is not a date: give it as 2025-03-01"
        elif not _is_plain(value):
            yield f"{key}: {name}={str(value)[:40]} cannot be read: give text, a number, true or false"


def read_template_args(text: str) -> dict[str, Any]:
    """The variables that a flag gives as `{enable_thinking: false}`. Raises ConfigError if they cannot be read."""
    try:
        given = safe_load(text)
    except YAMLError:
        given = text
    if isinstance(given, dict):
        given = {name: str(value) if isinstance(value, date) else value for name, value in given.items()}
    if problems := list(template_arg_problems(text if given is None else given, FLAG)):
        raise ConfigError(*problems)
    return dict(given)


def _is_date(value: Any) -> bool:
    """True if a text is a date such as 2025-03-01."""
    try:
        return isinstance(value, str) and str(date.fromisoformat(value)) == value
    except ValueError:
        return False


def _is_plain(value: Any) -> bool:
    """True if JSON can represent a value."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
