"""Prompt format of a trained model, in a small file of its folder.

The tokenizer's files have the chat template. They have neither the variables that it was rendered with, nor whether it
wrote the prompts at all.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sheeprlhf.config.template_args import template_arg_problems
from sheeprlhf.security.files import read_small
from sheeprlhf.utils.errors import ModelError
from sheeprlhf.utils.output import write_file
from sheeprlhf.utils.rendering import set_stored_arguments

FILE = "sheeprlhf.json"
_MAX_BYTES = 1 << 20
_FORM = "sheeprlhf_form"  # attribute of a tokenizer


def write_prompt_form(folder: Path, form: str, template_args: Mapping[str, Any]) -> None:
    """Write the file beside a tokenizer that has a chat template.

    Args:
        folder: has the tokenizer.
        form: a name of `data.asking.FORMS`.
        template_args: variables that the chat template was rendered with, the date included.
    """
    content = {"form": form, "template_args": dict(template_args)}
    write_file(folder, FILE, json.dumps(content, indent=2, ensure_ascii=False).encode())


def read_prompt_form(folder: Path, tokenizer: Any) -> None:
    """Note on a tokenizer what the file of its folder says, if there is one.

    Raises:
        ModelError: the file is not what it has to be.
    """
    if not (folder / FILE).is_file():
        return
    try:
        content: Any = json.loads(read_small(folder / FILE, _MAX_BYTES))
        template_args, form = content.get("template_args"), content.get("form")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{folder / FILE} cannot be read ({type(error).__name__}): remove it") from error
    for problem in template_arg_problems(template_args, "template_args"):
        raise ModelError(f"{folder / FILE}: {problem}, or remove the file")
    set_stored_arguments(tokenizer, template_args or {})
    setattr(tokenizer, _FORM, form if isinstance(form, str) else "")


def stored_form(tokenizer: Any) -> str:
    """The name of the form in which the prompts of the tokenizer's model are written; empty if no file says it."""
    return str(getattr(tokenizer, _FORM, ""))
