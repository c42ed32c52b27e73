"""The chat templates that a tokenizer has, and those that this package brings. Imports no library."""

from importlib import resources
from pathlib import Path
from typing import Any

from sheeprlhf.utils.errors import DataError

OPTION, FLAG = "model.chat_template", "--chat-template"
FOLDER = Path(str(resources.files("sheeprlhf"))) / "assets" / "chat_templates"
SUFFIX = ".jinja"


def built_in_templates() -> list[str]:
    """Names of the chat templates that this package brings."""
    return sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}"))


def own_templates(tokenizer: Any) -> dict[str, Any]:
    """The chat templates that a tokenizer came with, by name; a single one is named "default"."""
    found = getattr(tokenizer, "chat_template", None)
    if not found:
        return {}
    return dict(found) if isinstance(found, dict) else {"default": found}


def check_has_template(tokenizer: Any, what: str = "column 'messages'") -> None:
    """Raise DataError if no chat template renders messages; `what` needs one and begins the message."""
    own = own_templates(tokenizer)
    if not own:
        advice = f"{template_advice(tokenizer)}; or take an instruction-tuned model (model=smollm2)"
        raise DataError(f"{what} needs a chat template and this model has none: {advice}")
    if "default" not in own:
        fix = template_advice(tokenizer)
        raise DataError(f"{what} needs one chat template, and this model has {', '.join(own)} and no default: {fix}")


def template_advice(tokenizer: Any) -> str:
    """Advice on choosing another chat template, for the end of a message."""
    names = template_names(tokenizer)
    return f"choose one by {OPTION}=<name> (chat, demo and export: {FLAG} <name>); it may be {names}"


def template_names(tokenizer: Any) -> str:
    """All chat templates that can be chosen for a tokenizer, for a message."""
    own, built_in = list(own_templates(tokenizer)), ", ".join(built_in_templates())
    of_model = f"{', '.join(own)} (of this model), " if own else ""
    return f"{of_model}{built_in} (built in), or a file that ends in {SUFFIX}"
