"""Describe how the prompts of a trained model are written, and check variables for its chat template."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from yaml import YAMLError, safe_load

from sheeprlhf.utils.errors import ConfigError, ModelError
from sheeprlhf.utils.output import read_small, write_file

FILE = "sheeprlhf.json"
_MAX_BYTES = 1 << 20
_FORM = "sheeprlhf_form"  # attribute of a tokenizer


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
    from sheeprlhf.utils.rendering import set_stored_arguments

    set_stored_arguments(tokenizer, template_args or {})
    setattr(tokenizer, _FORM, form if isinstance(form, str) else "")


def stored_form(tokenizer: Any) -> str:
    """The name of the form in which the prompts of the tokenizer's model are written; empty if no file says it."""
    return str(getattr(tokenizer, _FORM, ""))


OPTION, FLAG = "data.template_args", "--template-args"
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
