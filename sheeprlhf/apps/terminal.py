"""Terminal output: colours only on terminals, wrapped lines, no control sequences from data."""

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text
from rich.theme import Theme

from sheeprlhf.apps.arguments import VERBS, Flag
from sheeprlhf.security.redaction import plain_text, redact_text

_THEME = Theme(
    {
        "head": "bold",
        "name": "cyan",
        "value": "green",
        "faint": "dim",
        "good": "green",
        "busy": "cyan",
        "odd": "yellow",
        "bad": "bold red",
    }
)
_CODE = r"`[^`]+`|(?<=did you mean )[^?]+(?=\?)"


class Screen(Console):
    """Rich's console for texts whose brackets mean nothing to rich; no colour in a file or with NO_COLOR."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, theme=_THEME, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def on_broken_pipe(self) -> None:
        """End the command without an error when the reader closes the pipe."""
        raise  # the BrokenPipeError that is being handled


def columns(at_most: int = 120) -> int:
    """Width for text: the terminal's, COLUMNS, or 100 in a file; between 60 and `at_most`."""
    return max(60, min(at_most, shutil.get_terminal_size((100, 20)).columns))


def is_for_people() -> bool:
    """True if lines should be wrapped: on a terminal, or if COLUMNS gives a width."""
    return sys.stdout.isatty() or "COLUMNS" in os.environ


def heading(text: str, note: str = "", style: str = "faint") -> Text:
    """A line above others, with a note behind it."""
    return Text.assemble((text, "head"), (f" {note}" if note else "", style))


def entry(name: str, meaning: str, *, width: int) -> Text:
    """A name and, in a column of its own from `width` on, its meaning; a longer name has the first line only."""
    indent = " " * (width + 3)
    body = textwrap.fill(meaning, columns(), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    alone = len(name) > width
    start = f"  {name}\n" if alone else f"  {name:<{width}} "
    return Text.assemble((start, "name"), _coded(body if alone else body[len(indent) :]))


def paragraph(text: str, *, indent: int = 0, style: str = "") -> Text:
    """Text wrapped to the width of the screen."""
    space = " " * indent
    wrap = textwrap.TextWrapper(columns(), initial_indent=space, subsequent_indent=space, break_on_hyphens=False)
    return _coded(wrap.fill(text), style)


def _coded(text: str, style: str = "") -> Text:
    """Text in which the parts between backticks, which can be typed, have another colour."""
    coded = Text(text, style=style)
    coded.highlight_regex(_CODE, "name")
    return coded


def table(rows: Iterable[Iterable[str]], *, right: Iterable[int] = ()) -> list[list[str]]:
    """The cells of a table, each padded to the width of its column; the columns `right` to the right."""
    cells = [list(row) for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]

    def padded(text: str, number: int) -> str:
        space = " " * (widths[number] - cell_len(text))
        return space + text if number in right else text + space

    return [[padded(text, number) for number, text in enumerate(row)] for row in cells]


def clean(text: object, limit: int = 60) -> str:
    """Text of a file or a path on one line: without secrets, control characters and what exceeds `limit` columns."""
    line = " ".join(redact_text(plain_text(str(text))).split())
    return line if cell_len(line) <= limit else f"{set_cell_size(line, limit - 3)}..."


def counted(number: int, name: str) -> str:
    """A number and what it counts: "1 process", "2 processes"."""
    return f"{number:,} {name}" + ("" if number == 1 else "es" if name.endswith("s") else "s")


def is_number(value: object) -> TypeGuard[int | float]:
    """True for a number of a file that can be shown: finite, not huge, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def print_error(message: str) -> None:
    """Onto stderr; on a terminal, its first line in colour and long lines wrapped under their beginning."""
    screen = Screen(stderr=True)
    first, *rest = plain_text(message).split("\n")
    if screen.is_terminal:
        how: dict[str, Any] = {"break_on_hyphens": False, "break_long_words": False}
        wrap = textwrap.TextWrapper(screen.width - 1, subsequent_indent="    ", **how)
        first, *rest = [wrap.fill(line) for line in (first, *rest)]
    head, colon, tail = first.partition(":")
    body = _coded("\n".join([tail, *rest]))
    screen.print(Text.assemble((head + colon, "bad"), body))  # in one piece: other processes may print too


def print_help(usage: str, texts: Sequence[str], title: str, entries: Mapping[str, str], *after: str) -> int:
    """Print the help of a command: its usage, paragraphs, a titled list, and further paragraphs; returns 0."""
    screen = Screen()
    verb, _, rest = usage.partition(" ")
    screen.print(heading(f"sheeprlhf {verb}", rest), "", *map(paragraph, texts), heading(f"\n{title}:"), sep="\n")
    for name, meaning in entries.items():
        screen.print(entry(name, meaning, width=min(26, max(map(len, entries)))))
    screen.print(*(part for text in after for part in ("", paragraph(text))), sep="\n", end="\n" * bool(after))
    return 0


def flag_entries(flags: Sequence[Flag]) -> dict[str, str]:
    """Flags as they are written, and their meaning."""
    names = [", ".join(filter(None, (f"--{flag.name}", flag.short))) for flag in flags]
    values = ["" if flag.kind is bool else f" <{flag.value or '|'.join(flag.values) or flag.name}>" for flag in flags]
    defaults = ["" if flag.default in (None, False) else f" [default {flag.default}]" for flag in flags]
    return {n + v: flag.help + d for n, v, d, flag in zip(names, values, defaults, flags, strict=True)}


def print_overview() -> int:
    """Print all commands; it imports nothing that composes configurations."""
    start = "Start with `train task=sft`; `list` and `<command> --help` tell what there is."
    usage = "<command> [group=choice] [option=value] [--flag]"
    return print_help(usage, ["Fine-tune and align language models."], "Commands", VERBS, start)
