"""Checks of untrusted chat templates: Jinja programs, run under limits before they are used.

transformers renders them in a sandbox, from which they reach no Python; but a sandbox bounds neither time nor memory.
"""

import hashlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from sheeprlhf.security.model_folder import MAX_TEMPLATE
from sheeprlhf.utils.errors import ModelError

SECONDS = 2  # of the processor; the wall may be slow
_WALL_SECONDS = 30
_PROBE = Path(__file__).with_name("template_probe.py")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # saving a template makes a file of its name
_READ = {"872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788"}  # SHA-256 of SmolLM2's: no trial


def check_templates(tokenizer: Any, where: str) -> None:
    """Raise ModelError for chat templates that are not text of bounded size that renders within limits."""
    templates = getattr(tokenizer, "chat_template", None) or {}
    named = templates if isinstance(templates, dict) else {"default": templates}
    for name, text in named.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ModelError(f"{where}: the chat template {str(name)[:60]!r} needs a name of letters, digits, - and _")
        if not isinstance(text, str):
            raise ModelError(f"{where}: its chat template {name!r} is not text")
        if len(text.encode("utf-8", "replace")) > MAX_TEMPLATE:
            raise ModelError(f"{where}: its chat template {name!r} has more than {MAX_TEMPLATE} bytes")
        if problem := _problem(text):
            raise ModelError(f"{where}: its chat template {name!r} {problem}; it will not be used")


@cache
def _problem(text: str) -> str:
    """The forbidden operation of a template that renders a short conversation; empty if there is none."""
    content = text.encode("utf-8", "replace")
    if hashlib.sha256(content).hexdigest() in _READ:
        return ""
    command = [sys.executable, "-I", str(_PROBE)]
    try:
        done = subprocess.run(
            command, input=content, capture_output=True, timeout=_WALL_SECONDS, env={}, cwd="/", check=False
        )
    except subprocess.TimeoutExpired:
        return f"does not end within {_WALL_SECONDS} seconds"
    if done.returncode < 0:  # the limit of time is a signal
        return f"does not end within {SECONDS} seconds of the processor"
    if done.returncode:
        return "cannot be tried: it ends the program that tries it"
    return done.stdout.decode("utf-8", "replace").strip()
