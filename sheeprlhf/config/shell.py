"""Commands as they are printed: `option_word` quotes for Hydra, `command` and `shell_word` for the shell too."""

import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from sheeprlhf.config.registry import options
from sheeprlhf.structure.option import Config

PROGRAM = ("python", "sheeprlhf.py")


def command(words: Iterable[str]) -> str:
    """Return a command line for a shell; its options are words of `option_word`, or as a user typed them."""
    return shlex.join([*PROGRAM, *words])


def option_word(key: str, value: Any) -> str:
    """Return `key=value` as Hydra reads it back: text in quotes where it has to be, lists in brackets."""
    return f"{key}={hydra_value(value)}"


def shell_word(key: str, value: Any) -> str:
    """Return `option_word` as a shell takes it, for messages that name one option."""
    return shlex.quote(option_word(key, value))


def hydra_value(value: Any) -> str:
    """Return a value in the grammar of Hydra's command line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(hydra_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{hydra_value(of)}' for key, of in value.items())}}}"
    return str(value) if isinstance(value, int | float) else _text(str(value))


def changed_words(group: str, config: Config, left_out: Iterable[str] = ()) -> Iterator[str]:
    """Yield the options of a group that differ from the defaults of their choice, except for those `left_out`."""
    default = type(config)()
    for option in options(config, f"{group}."):
        name = option.key.rpartition(".")[2]
        value, usual = (
            tuple(of) if isinstance(of, list) else of for of in (option.value, getattr(default, name, None))
        )
        if value in (None, usual) or name in (*left_out, "config_name") or (not usual and not value):
            continue
        yield option_word(option.key, value)


def _text(text: str) -> str:
    """Return a text, in quotes unless Hydra reads it as the same text without them."""
    parser = OverridesParser.create()
    try:
        plain = "${" not in text and parser.parse_override(f"key={text}").value() == text
        plain = plain and parser.parse_override(f"key=[{text}]").value() == [text]
    except (HydraException, ValueError):
        plain = False
    mark = Quote.single if '"' in text else Quote.double  # the shell's quotes are single ones
    return text if plain else QuotedString(text.replace("${", "\\${"), mark).with_quotes()
