"""The page: its sections from the records of the runs."""

import base64
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import sheeprlhf
from sheeprlhf.apps.report.chart import Curves, Group, charts_of, draw_svg, group_tags, name_of, sign_style
from sheeprlhf.apps.report.html import MARK, Html, details, element, join, table
from sheeprlhf.apps.report.record import Record
from sheeprlhf.apps.report.results import Evaluation, number_cell, point_rows
from sheeprlhf.apps.report.tables import config_tables, data_tables, overview, speed_table
from sheeprlhf.apps.report.texts import Answer, Exchange

STYLE = Path(sheeprlhf.__file__).parent / "assets" / "report.css"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # no script, no request, whatever slips in
_FEW_NUMBERS = 8  # of an evaluation, before the rest is folded away
_MOST_NAMED = 5  # runs in the title
_MAX_PROMPTS = 6
_MAX_EARLIER = 6


def build_page(records: list[Record], notes: list[str]) -> str:
    """The whole page.

    Args:
        records: the runs, in the order of the page.
        notes: what there is to say besides.
    """
    sections: dict[str, Callable[[list[Record]], Iterable[Html]]] = {
        "Runs": overview,
        "Results": _results,
        "Curves": _curves,
        "Samples": _samples,
        "Configuration": config_tables,
        "Data": data_tables,
        "Speed and memory": speed_table,
    }
    body = []
    for title, write in sections.items():
        anchor = title.partition(" ")[0].lower()
        body.append(element("section", element("h2", title), *write(records), id=anchor))
    links = [element("a", title, href=f"#{title.partition(' ')[0].lower()}") for title in sections]
    many = _counted(len(records), "run")
    names = ", ".join(record.label for record in records) if len(records) <= _MOST_NAMED else many
    told = f"{many}, {time.strftime('%Y-%m-%d %H:%M')}, sheeprlhf {sheeprlhf.__version__}"
    header = element("header", element("h1", names), element("p", told), element("nav", *links))
    said = [*notes, *(f"{record.label} {note}" for record in records for note in record.notes)]
    if said:
        header = join([header, element("ul", *(element("li", line) for line in said), class_="notes")])
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="generator", content=MARK),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", f"{names} - SheepRLHF"),
        element("style", Html(STYLE.read_text(encoding="utf-8") + sign_style())),
    )
    return f"<!doctype html>\n{element('html', head, element('body', header, element('main', *body)), lang='en')}\n"


def _name(records: list[Record], number: int, note: str = "") -> Html:
    return name_of(number, records[number].label, note)


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number > 1)}"


def _none(words: str) -> list[Html]:
    return [element("p", words, class_="none")]


def _results(records: list[Record]) -> Iterable[Html]:
    """One table for each thing that was measured; a column for each run and its weights."""
    titles: dict[str, list[tuple[int, Evaluation]]] = {}
    for number, record in enumerate(records):
        for found in record.evaluations:
            titles.setdefault(found.title, []).append((number, found))
    if not titles:
        yield from _none("No evaluation yet: python sheeprlhf.py eval task=perplexity experiment_dir=<run>")
    tables = []
    for title, columns in sorted(titles.items()):
        columns.sort(key=lambda column: (column[0], column[1].weights != "final", column[1].weights))
        heads = [_name(records, number, "" if e.weights == "final" else e.weights) for number, e in columns]
        names = list(dict.fromkeys(name for _, found in columns for name in found.numbers))
        rows = [[name, *(number_cell(found.numbers.get(name)) for _, found in columns)] for name in names]
        parts = [element("h3", title), *([table(["", *heads], rows[:_FEW_NUMBERS])] if rows else [])]
        if rows[_FEW_NUMBERS:]:
            parts.append(
                details(_counted(len(rows) - _FEW_NUMBERS, "more number"), table(["", *heads], rows[_FEW_NUMBERS:]))
            )
        for head, (_, found) in zip(heads, columns, strict=True):
            for name, points in found.lists.items():
                first, *others = point_rows(points)
                parts.append(details(join([name, " of ", head]), table(first, others)))
        tables.append(element("div", *parts))
    yield element("div", *tables, class_="tables")
    images = [
        element(
            "figure",
            element("figcaption", element("b", name), _name(records, number)),
            element("img", src=f"data:image/png;base64,{base64.b64encode(content).decode()}", alt=name, loading="lazy"),
        )
        for number, record in enumerate(records)
        for name, content in record.images.items()
    ]
    if images:
        yield element("div", *images, class_="charts")


def charts_by_group(records: list[Record]) -> Iterator[tuple[Group, Mapping[str, Curves]]]:
    """Every curve of the runs, once."""
    tasks = [record.past.names[2] for record in records]
    curves = [record.curves for record in records]
    for group in group_tags(list(dict.fromkeys(tag for found in curves for tag in found))):
        yield group, charts_of(group.tags, tasks, curves)


def _curves(records: list[Record]) -> Iterable[Html]:
    if not any(record.curves for record in records):
        yield from _none("No run has a row in its metrics.csv.")
        return
    for group, curves_of in charts_by_group(records):
        charts = [
            element(
                "figure",
                element("figcaption", element("b", title), *(_name(records, number) for number in curves)),
                draw_svg(title, curves, [record.label for record in records]),
            )
            for title, curves in curves_of.items()
        ]
        grid = element("div", *charts, class_="charts")
        title = join([group.title, element("small", f"{len(charts)}")])
        yield element("details", element("summary", title), grid, open="" if group.open else None, class_="group")
    yield element(
        "p",
        "The horizontal axis counts optimizer steps. A long curve is the mean of neighbouring points; where a chart "
        "has few curves, in a band from the lowest to the highest of them.",
        class_="none",
    )


def _samples(records: list[Record]) -> Iterable[Html]:
    """What the runs wrote for the same prompts: while they trained, and in each evaluation that kept its texts."""
    sources: dict[str, dict[int, dict[str, Exchange]]] = {}
    for number, record in enumerate(records):
        if record.samples:
            sources.setdefault("While training", {})[number] = record.samples
        for name, rows in record.generations.items():
            if rows:
                sources.setdefault(f"From eval/{name}", {})[number] = rows
    if not sources:
        yield from _none("No run has left texts: task.num_sample_prompts, and eval task=rouge, make some.")
    for title, of_runs in sources.items():
        shared = Counter(key for exchanges in of_runs.values() for key in exchanges)
        keys = [key for key, _ in shared.most_common(_MAX_PROMPTS)]  # the first ones, of those equally often there
        many = _counted(len(shared), "prompt")
        few = f"the first {len(keys)} of {many}" if len(shared) > len(keys) else many
        yield element("h3", title, element("small", few))
        for key in keys:
            yield _exchange(records, {number: found[key] for number, found in of_runs.items() if key in found})


def _exchange(records: list[Record], of_runs: dict[int, Exchange]) -> Html:
    """One prompt and the answers of the runs, side by side where there is room."""
    first = next(iter(of_runs.values()))
    cells = [element("div", element("h4", "dataset"), element("pre", text)) for text in first.references[:1]]
    for number, exchange in of_runs.items():
        *earlier, last = exchange.answers or [Answer(None, "", "")]
        cells.append(
            element(
                "div",
                element("h4", _name(records, number, _told(last))),
                element("pre", last.text),
                *([_earlier(earlier)] if earlier else []),
            )
        )
    return element("article", element("pre", first.prompt, class_="prompt"), element("div", *cells, class_="answers"))


def _earlier(answers: list[Answer]) -> Html:
    """What was written before, at some of the steps."""
    stride = -(-len(answers) // _MAX_EARLIER)
    shown = answers[::stride]
    parts = [part for answer in shown for part in (element("h5", _told(answer)), element("pre", answer.text))]
    return details("earlier", *parts)


def _told(answer: Answer) -> str:
    step = "" if answer.step is None else f"step {answer.step:,}"
    return ", ".join(filter(None, (step, answer.note)))
