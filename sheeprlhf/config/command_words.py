"""Write options as words of a command line, and commands, for messages and for other processes.

Hydra's parser, which decides about quotes, is imported by the first text: most commands write none.
"""

import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sheeprlhf.config.registry import options
from sheeprlhf.structure.option import Config

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

# a checkout has the file; a wheel has the script that pip installs
PROGRAM = ("python", "sheeprlhf.py") if (Path(__file__).parents[2] / "sheeprlhf.py").is_file() else ("sheeprlhf",)


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
    from hydra.core.override_parser.types import Quote, QuotedString

    read = [one and one.value() for one in (parse_word(f"key={text}"), parse_word(f"key=[{text}]"))]
    plain = "${" not in text and read == [text, [text]]
    mark = Quote.single if '"' in text else Quote.double  # the shell's quotes are single ones
    return text if plain else QuotedString(text.replace("${", "\\${"), mark).with_quotes()


def parse_word(word: str) -> "Override | None":
    """The override that a word is; None if Hydra cannot read it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(word)
    except (HydraException, ValueError):
        return None
