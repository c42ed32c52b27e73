"""A program without this package: tries the chat template on stdin for 2 s and 512 MB; prints its problem, if any."""

import json
import resource
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

_SECONDS, _MEMORY, _OUTPUT = 2, 512 << 20, 1 << 20
_TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it warm?"},
    {"role": "assistant", "content": "It is."},
    {"role": "user", "content": "Thank you."},
]
_TALKS = (_TALK, _TALK[1:], _TALK[1:3], _TALK[:2], _TALK[1:2])
_WORDS = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")}


class _Generation(Extension):
    """`{% generation %}` of transformers: marks what an assistant says, and writes it."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        """The block's body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Callable[[], str]) -> str:
        return caller()


def _refuse(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = lambda value, indent=None, **_: json.dumps(value, ensure_ascii=False, indent=indent)
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = lambda form: datetime(2026, 1, 1).strftime(form)
    made.globals["TemplateDict"] = dict
    return made


def _problem(text: str) -> str:
    """Ignore a template's rejection of a conversation and its mistakes, which are reported when it is used."""
    try:
        template = _environment().from_string(text)
    except jinja2.TemplateSyntaxError:
        return ""
    for messages in _TALKS:
        for ask in (True, False):
            length = 0
            try:
                for part in template.generate(messages=messages, add_generation_prompt=ask, tools=None, **_WORDS):
                    length += len(part)
                    if length > _OUTPUT:
                        return f"writes more than {_OUTPUT} characters for a short conversation"
            except jinja2.exceptions.SecurityError as error:
                return f"reaches for what it may not ({str(error)[:80]!r})"
            except MemoryError:
                return f"needs more than {_MEMORY >> 20} MB"
            except RecursionError:
                return "calls itself without end"
            except (jinja2.TemplateError, ArithmeticError, TypeError, ValueError, LookupError, AttributeError):
                continue
    return ""


def _limit() -> None:
    for kind, value in (
        (resource.RLIMIT_AS, _MEMORY),
        (resource.RLIMIT_CPU, _SECONDS),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    given = sys.stdin.buffer.read().decode("utf-8", "replace")
    _limit()
    print(_problem(given).encode("ascii", "backslashreplace").decode())
