"""Choose the chat template that a tokenizer uses: one of its own, one that this package brings, or a file."""

from pathlib import Path
from typing import Any

from sheeprlhf.config.option_checks import nearest
from sheeprlhf.config.path_checks import is_template_file
from sheeprlhf.security.files import read_small
from sheeprlhf.security.model_folder import MAX_TEMPLATE
from sheeprlhf.utils.chat_templates import FOLDER, OPTION, SUFFIX, built_in_templates, own_templates, template_names
from sheeprlhf.utils.errors import ModelError
from sheeprlhf.utils.home import expand_home


def choose_template(tokenizer: Any, choice: str | None) -> None:
    """Make the chosen chat template the only one of a tokenizer, so that it goes wherever the tokenizer goes.

    Args:
        tokenizer: of transformers.
        choice: `model.chat_template`: a name of the tokenizer's own templates, of `built_in_templates`, or a file; None
            leaves the tokenizer as it is.

    Raises:
        ModelError: there is no such template, or the file cannot be read.
    """
    if choice is None:
        return
    own = own_templates(tokenizer)
    if choice in own:
        tokenizer.chat_template = own[choice]
    elif is_template_file(choice):
        tokenizer.chat_template = _read(expand_home(choice), choice)
    elif choice in built_in_templates():
        tokenizer.chat_template = _read(FOLDER / f"{choice}{SUFFIX}", choice)
    else:
        near = nearest(choice, [*own, *built_in_templates()])
        did = f"did you mean {OPTION}={near}? It may be" if near else "it may be"
        raise ModelError(f"{OPTION}={choice} is unknown: {did} {template_names(tokenizer)}")


def _read(path: Path, choice: str) -> str:
    try:
        return read_small(path, MAX_TEMPLATE).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ModelError(f"{OPTION}={choice} cannot be read: {reason}; give another file") from error
