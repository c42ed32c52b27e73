"""HTML by small functions. A plain string that becomes part of a page is text, whatever it holds: always escaped."""

import html
import math
from collections.abc import Iterable, Sequence

from sheeprlhf.security.redaction import plain_text, redact_text

MARK = "sheeprlhf report"  # in every file that the report writes: those, and no others, it may write again
NONE = "-"
_EMPTY = ("meta", "img")  # elements without an end


class Html(str):
    """What is HTML already."""


def text(value: object) -> Html:
    """Text as HTML, without secrets, control characters and anything that a browser would obey."""
    return value if isinstance(value, Html) else Html(html.escape(redact_text(plain_text(str(value)))))


def element(name: str, /, *content: object, **attributes: object) -> Html:
    """One element.

    Args:
        name: of the element.
        content: texts, which are escaped, and elements.
        attributes: a trailing underscore is dropped and others become dashes; None leaves one out.
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    head = "".join(f' {key}="{text(str(value))}"' for key, value in given.items())
    return Html(f"<{name}{head}>" if name in _EMPTY else f"<{name}{head}>{join(content)}</{name}>")


def join(parts: Iterable[object]) -> Html:
    """Texts, which are escaped, and elements, one behind the other."""
    return Html("".join(map(text, parts)))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], *, numbers: bool = True) -> Html:
    """A table that scrolls by itself where it is too wide; its first column stays in view.

    Args:
        head: of the columns; the first is that of the rows' names.
        rows: name and cells each; a row of one cell is a line of its own between the others.
        numbers: cells are aligned at the right.
    """
    first, *others = head
    top = element("tr", element("th", first, scope="col"), *(element("th", cell, scope="col") for cell in others))
    body = []
    for name, *cells in rows:
        if cells:
            body.append(element("tr", element("th", name, scope="row"), *(element("td", cell) for cell in cells)))
        else:
            body.append(element("tr", element("th", name, colspan=len(head), scope="rowgroup"), class_="between"))
    inner = element("table", element("thead", top), element("tbody", *body), class_="numbers" if numbers else None)
    return element("div", inner, class_="scroll", tabindex="0")


def details(summary: object, *content: object, class_: str | None = None) -> Html:
    """What is shown on a click, and on paper."""
    return element("details", element("summary", summary), *content, class_=class_)


def figure_text(value: float | None) -> str:
    """A number for people: four digits that count, whole numbers whole, a dash for none."""
    if value is None:
        return NONE
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 10_000:
        return f"{value:,.0f}" if size < 1e9 else f"{value:.3g}"
    if size >= 1_000:
        return f"{value:,.1f}"
    return f"{value:#.4g}".rstrip(".") if size >= 1e-3 else f"{value:.2e}"


def duration_text(seconds: float | None) -> str:
    """A time for people: "42 s", "3 min 20 s", "2 h 05 min"."""
    if seconds is None:
        return NONE
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"
