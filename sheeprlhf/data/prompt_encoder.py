"""From what a person types to the token ids that training would have made of it, by a row of the run's dataset."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sheeprlhf.config.model_lookup import Trained
from sheeprlhf.data.example import Example
from sheeprlhf.data.formats import TURN
from sheeprlhf.data.read import Row
from sheeprlhf.data.tokenize import RowTokenizer
from sheeprlhf.structure.data import (
    DataConfig,
    DocstringsConfig,
    HelpfulHarmlessConfig,
    LocalDataConfig,
    SummarizationConfig,
)
from sheeprlhf.utils.errors import DataError
from sheeprlhf.utils.rendering import fixed_arguments, stored_form, write_prompt_form

HUMAN = "\n\nHuman:"
QUOTES = '"""'
_ANY_LENGTH = sys.maxsize
_DROPPED = {
    "empty_prompt": "the prompt is empty: write something",
    "nul_character": "the prompt has a NUL character: remove it",
    "special_tokens_in_messages": "the text has one of the model's control tokens in it: remove it",
}


class Turn(NamedTuple):
    """A message: role "system", "user" or "assistant", and its text."""

    role: str
    text: str


class Form(NamedTuple):
    """Format that turns a conversation into a row of a dataset."""

    meaning: str  # for people
    data: type[DataConfig]  # the dataset whose format it takes
    prompt: Callable[[Sequence[Turn]], dict[str, Any]]  # the columns of the row
    turns: bool = False  # whether it can hold more than one message; else only the last is taken
    stop: tuple[str, ...] = ()  # strings with which the model begins somebody else's turn
    example: str = ""  # a prompt to try


def _last(turns: Sequence[Turn]) -> dict[str, Any]:
    return {"prompt": turns[-1].text}


def _signature(turns: Sequence[Turn]) -> dict[str, Any]:
    """A signature, and below it the quotes that begin its docstring."""
    text = turns[-1].text.rstrip()
    if not text or text.endswith(QUOTES):
        return {"prompt": text}
    last = text.splitlines()[-1]
    indent = last[: len(last) - len(last.lstrip())] + "    "
    return {"prompt": f"{text.removesuffix(':')}:\n{indent}{QUOTES}"}


def _dialogue(turns: Sequence[Turn]) -> dict[str, Any]:
    marks = {"user": HUMAN, "assistant": TURN}
    if not turns[-1].text.strip():
        return {"prompt": ""}
    return {"prompt": "".join(f"{marks[turn.role]} {turn.text.strip()}" for turn in turns)}


def _messages(turns: Sequence[Turn]) -> dict[str, Any]:
    return {"messages": [{"role": turn.role, "content": turn.text} for turn in turns]}


FORMS = {
    "docstring": Form(
        "a signature, of which the model writes the docstring's first line",
        DocstringsConfig,
        _signature,
        example="class Queue:\n    def push(self, item, priority=0):",
    ),
    "tldr": Form(
        "a post, which the model sums up after TL;DR:",
        SummarizationConfig,
        _last,
        example="My neighbour practises the drums every night at eleven. I like him and I do not want to call the "
        "landlord, but I have to get up at five. Last week I left a note and nothing changed. How do I tell him?",
    ),
    "dialogue": Form(
        "a dialogue of Human and Assistant",
        HelpfulHarmlessConfig,
        _dialogue,
        turns=True,
        stop=(HUMAN,),
        example="How do I keep bread fresh for a week?",
    ),
    "template": Form(
        "a conversation in the model's own chat template",
        LocalDataConfig,
        _messages,
        turns=True,
        example="How do I keep bread fresh for a week?",
    ),
    "text": Form("a text, which the model continues with as it is", LocalDataConfig, _last, example="Once upon a time"),
}


def form_of(trained: Trained, tokenizer: Any) -> str:
    """The form of training: the dataset's; else the chat template's, if it wrote the rows or was chosen; else text."""
    if trained.chat_template is not None:
        return "template"
    if trained.data is None and stored_form(tokenizer) in FORMS:
        return stored_form(tokenizer)
    data = type(trained.data)
    own = next((name for name, form in FORMS.items() if form.data is data and name != "template"), "text")
    has_template = bool(getattr(tokenizer, "chat_template", None))
    return "template" if own == "text" and has_template and trained.templated() else own


def template_args_of(trained: Trained) -> dict[str, Any] | None:
    """The variables with which the chat template wrote the rows that it was trained on; None: those of its folder."""
    if trained.template_args is not None:
        return trained.template_args
    own_template = trained.data is not None and trained.chat_template is None
    return trained.data.template_args if trained.data is not None and own_template else None


def save_form(folder: Path, trained: Trained, tokenizer: Any) -> None:
    """Save the prompt format with a tokenizer that has a chat template, for a folder that leaves its run."""
    if getattr(tokenizer, "chat_template", None):
        form = form_of(trained, tokenizer)
        is_templated = form == "template"
        write_prompt_form(folder, form, fixed_arguments(tokenizer, template_args_of(trained)) if is_templated else {})


class Asker:
    """Makes prompts of one form for one tokenizer."""

    def __init__(self, form: Form, tokenizer: Any, template_args: Mapping[str, Any] | None = None) -> None:
        """Prepare for one form; without `template_args`, the chat template gets those of the tokenizer's folder."""
        self.form = form
        no_limits = form.data(max_length=_ANY_LENGTH, max_prompt_length=_ANY_LENGTH, minimum_response_length=1)
        if form is FORMS["template"]:
            no_limits.template_args = None if template_args is None else dict(template_args)
        self._rows = RowTokenizer(no_limits, tokenizer, "sft")

    def example(self, turns: Sequence[Turn], response: str = "x") -> Example:
        """The ids of a prompt, and of a response with its end token. Raises DataError if the prompt is not possible."""
        row = self.form.prompt(turns)
        if "messages" in row:
            row = {"messages": [*row["messages"], {"role": "assistant", "content": response}]}
            empty = not turns[-1].text.strip()
        else:
            row |= {"response": response, "chosen": response, "rejected": f"{response} "}
            empty = not row["prompt"].strip()
        if empty:
            raise DataError(_DROPPED["empty_prompt"])
        [made] = self._rows([Row(0, "the prompt", row)])
        if made.dropped is not None:
            raise DataError(_DROPPED.get(made.dropped, f"this prompt cannot be asked: {made.detail}"))
        prompt = made.sizes[0]
        return Example(0, made.tokens[:prompt], (made.tokens[prompt:],))
