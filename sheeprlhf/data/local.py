"""Your own files: `prompt` + `response`, `prompt` + `chosen` + `rejected`, `prompt` + `responses`, or `messages`.

A `label` beside a response says whether it is desirable; tasks of unpaired data need it. Tasks that sample their
responses take rows with a prompt alone too.
"""

import re
from collections.abc import Mapping
from typing import Any

from jinja2.exceptions import TemplateError

from sheeprlhf.data.example import PreferenceExample
from sheeprlhf.data.rows import (
    DropRowError,
    MissingColumnError,
    TemplatedExample,
    number,
    optional_text,
    text,
    texts,
)
from sheeprlhf.utils.chat_templates import check_has_template, template_advice
from sheeprlhf.utils.errors import DataError

ROLE = re.compile(r"[A-Za-z_]{1,32}")
SHAPES = "a row has prompt and response, or prompt, chosen and rejected, or prompt and ranked responses, or messages"


def format_row(row: Mapping[str, Any], tokenizer: Any) -> PreferenceExample | None:
    """The row as it is; a row of `messages` goes once through the model's chat template.

    Raises:
        DataError: if the row has none of the three shapes, or the template cannot render it.
        DropRowError: if a message contains the text of a special token.
    """
    if row.get("messages") is not None:
        return _from_messages(row["messages"], tokenizer)._replace(label=row.get("label"))
    margin = number(row, "margin")
    if row.get("responses") is not None:
        ranked = texts(row, "responses")
        return PreferenceExample(text(row, "prompt"), optional_text(row, "response"), ranked=ranked, margin=margin)
    if row.get("response") is None and row.get("chosen") is None:
        raise MissingColumnError(SHAPES)
    chosen, rejected = optional_text(row, "chosen"), optional_text(row, "rejected")
    if (chosen is None) != (rejected is None):
        raise MissingColumnError("chosen and rejected go together, and one of the two is missing or null")
    response, label = optional_text(row, "response"), row.get("label")
    return PreferenceExample(text(row, "prompt"), response, chosen, rejected, margin=margin, label=label)


def format_prompt(row: Mapping[str, Any], tokenizer: Any) -> PreferenceExample | None:
    """As `format_row`, for tasks that sample the responses: a row may have a prompt and nothing else.

    A conversation that ends with the user's message is a prompt as a whole.

    Raises:
        DataError, DropRowError: as `format_row` does.
    """
    if row.get("messages") is not None:
        return _from_messages(row["messages"], tokenizer, as_prompt=True)
    if any(row.get(column) is not None for column in ("response", "chosen", "rejected", "responses")):
        return format_row(row, tokenizer)
    return PreferenceExample(text(row, "prompt"))


def _from_messages(messages: Any, tokenizer: Any, *, as_prompt: bool = False) -> TemplatedExample:
    """The last assistant message is the response, everything before it the prompt.

    The response is what the template writes after the prompt, up to its first EOS. With `as_prompt`, messages that end
    with the user's are a prompt without response.
    """
    check_has_template(tokenizer)
    turns = _turns(messages)
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    unanswered = as_prompt and bool(turns) and turns[-1]["role"] == "user"
    if unanswered:
        last = len(turns)
    elif last == 0:
        other = "a user's message at its end, or " if as_prompt else ""
        raise DataError(f"column 'messages' needs {other}an assistant message with a message before it")
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    if any(token in part for turn in turns for part in turn.values() for token in special):
        raise DropRowError("special_tokens_in_messages")
    try:
        prompt = tokenizer.apply_chat_template(turns[:last], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns[: last + 1], tokenize=False)
    except TemplateError as error:
        raise DataError(f"the model's chat template refuses column 'messages': {error}") from None
    except Exception as error:  # a template is a program, which may raise anything
        raise DataError(
            f"the model's chat template fails on column 'messages' ({type(error).__name__}: {error}): "
            f"{template_advice(tokenizer)}"
        ) from None
    if unanswered:
        return TemplatedExample(prompt=prompt)
    if not whole.startswith(prompt):
        raise DataError(
            "the model's chat template writes the conversation differently once it is answered; "
            "write the rows as prompt and response"
        )
    response = whole[len(prompt) :]
    if tokenizer.eos_token and tokenizer.eos_token in response:
        response = response[: response.index(tokenizer.eos_token) + len(tokenizer.eos_token)]
    if not turns[last]["content"].strip():
        response = ""  # a template writes its markers around nothing
    return TemplatedExample(prompt=prompt, response=response)


def _turns(messages: Any) -> list[dict[str, str]]:
    """The conversation, checked: a list of {role, content}, both text."""
    if not isinstance(messages, list) or not all(isinstance(turn, Mapping) for turn in messages):
        raise DataError("column 'messages' must be a list of {role, content}")
    turns = []
    for index, turn in enumerate(messages):
        try:
            turns.append({"role": text(turn, "role"), "content": text(turn, "content")})
        except DataError as error:
            raise DataError(f"column 'messages', message {index}: {error}") from None
        if not ROLE.fullmatch(turns[-1]["role"]):  # templates write roles between their markers
            raise DataError(f"column 'messages', message {index}: role {turns[-1]['role']!r} is not a word")
    return turns
