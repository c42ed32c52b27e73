"""Tables of the report: what the runs are, how their configurations differ, their data, their speed."""

import statistics
from collections.abc import Iterable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from sheeprlhf.apps.describe import shown
from sheeprlhf.apps.report.chart import name_of
from sheeprlhf.apps.report.html import NONE, Html, details, duration_text, element, figure_text, table
from sheeprlhf.apps.report.record import Record
from sheeprlhf.apps.terminal import clean
from sheeprlhf.config.shell import command
from sheeprlhf.utils.home import expand_home
from sheeprlhf.utils.memory import size_text

_UNTOLD = {
    "root_dir",
    "run_name",
    "resume",
    "resume_from",
    "debug",
    "experiment",
    "data.cache_dir",
}  # no cause of a result
_LINKS = {"task.sft_experiment_dir": "starts from", "task.rm_experiment_dir": "judged by"}
_MAX_SPLITS = 8
Row = list[object]


def overview(records: list[Record]) -> Iterable[Html]:
    """The table of what the runs are."""
    yield table(_heads(records), _overview_rows(records), numbers=False)


def _heads(records: list[Record]) -> list[object]:
    return ["", *(name_of(number, record.label) for number, record in enumerate(records))]


def _overview_rows(records: list[Record]) -> Iterable[Row]:
    def row(name: str, cells: Iterable[object]) -> Row:
        return [name, *cells]

    pasts = [record.past for record in records]
    yield row("task", (past.names[2] for past in pasts))
    yield row("model", (past.names[1] for past in pasts))
    yield row("data", (past.names[0] for past in pasts))
    for key, name in _LINKS.items():
        cells = [_value(record, key, records) for record in records]
        if any(cell not in (NONE, "null") for cell in cells):
            yield row(name, (NONE if cell == "null" else cell for cell in cells))
    yield row("trains", (_trains(record) for record in records))
    yield row("state", (element("span", past.state, class_=f"state {past.state}") for past in pasts))
    yield row("steps", (figure_text(past.step) for past in pasts))
    yield row("best validation", (figure_text(past.best) for past in pasts))
    for title in sorted({found.title for record in records for found in record.evaluations}):
        told = [_headline(record, title) for record in records]
        if any(cell != NONE for cell in told):
            yield row(title, told)
    yield row("started", (past.started or "?" for past in pasts))
    yield row("took", (duration_text(_seconds(record)) for record in records))
    yield row("seed", (_value(record, "seed", records) for record in records))
    yield row("directory", (element("code", clean(past.dir, 300)) for past in pasts))
    yield row("command", (_command(record) for record in records))


def _headline(record: Record, title: str) -> str:
    """The number of an evaluation of the final weights that tells most."""
    found = next((e for e in record.evaluations if e.title == title and e.weights == "final"), None)
    return NONE if found is None else found.headline()


def _trains(record: Record) -> str:
    """All weights, or adapters of which rank."""
    if record.config.get("model.finetune_mode") == "LORA":
        return f"LoRA, rank {clean(record.config.get('model.lora_cfg.rank', '?'), 10)}"
    return "all weights" if record.config.get("model.finetune_mode") == "ALL" else "?"


def _command(record: Record) -> str:
    words = record.info.get("command")
    if not isinstance(words, list) or not words:
        return NONE
    return details("show", element("code", clean(command(map(str, words)), 2_000)))


def _seconds(record: Record) -> float | None:
    """From the start to the end, or to the last row of metrics.csv."""
    began, ended = record.info.get("started"), record.info.get("finished")
    times = [curve.times[-1] for curve in record.curves.values()]
    last = ended if isinstance(ended, int | float) else max(times, default=0.0)
    took = last - began if isinstance(began, int | float) else -1
    return float(took) if 0 <= took < 1e9 else None


def _value(record: Record, key: str, records: list[Record]) -> str:
    """An option as the command line takes it; a run of this page by its label."""
    if key not in record.config:
        return NONE
    value = record.config[key]
    if key in _LINKS and isinstance(value, str):
        of_page = {_resolved(other.past.dir): other.label for other in records}
        return of_page.get(_resolved(Path(value)), clean(value, 200))
    return clean(shown(value), 200)


def _resolved(path: Path) -> Path:
    return expand_home(path).absolute()


def config_tables(records: list[Record]) -> Iterable[Html]:
    """Where the configurations differ; all of them below, folded."""
    keys = list(dict.fromkeys(key for record in records for key in record.config if key not in _UNTOLD))
    heads = _heads(records)
    differing, of_some = [], []
    for key in keys:
        cells = [_value(record, key, records) for record in records]
        there = [cell for cell in cells if cell != NONE]
        if len(set(there)) > 1:
            differing.append([key, *cells])
        elif len(there) < len(records):
            of_some.append([key, *cells])
    if len(records) > 1:
        if differing:
            yield element("p", "Options of which the runs have different values.", class_="none")
            yield table(heads, differing, numbers=False)
        else:
            yield element("p", "The runs have the same values of every option that they share.", class_="none")
    if of_some:
        summary = f"{len(of_some)} option{'s' * (len(of_some) > 1)} that only some of the runs have"
        yield details(summary, table(heads, of_some, numbers=False))
    everything = [[key, *(_value(record, key, records) for record in records)] for key in keys]
    if everything:
        yield details(f"all {len(keys)} options", table(heads, everything, numbers=False), class_="all")
    else:
        yield element("p", "No configuration could be read.", class_="none")


def data_tables(records: list[Record]) -> Iterable[Html]:
    """What the data became, once for all runs that trained on the same."""
    found: list[tuple[dict[str, Any], list[str]]] = []
    for record in records:
        same = next((labels for report, labels in found if report == record.data), None)
        if same is not None:
            same.append(record.label)
        elif record.data:
            found.append((record.data, [record.label]))
    if not found:
        yield element("p", "No run has left a data_report.json.", class_="none")
    tables = []
    for report, labels in found:
        splits = report.get("splits")
        named = splits.items() if isinstance(splits, dict) else ()
        parts = {clean(name, 20): part for name, part in islice(named, _MAX_SPLITS) if isinstance(part, dict)}
        title = f"{clean(report.get('name', '?'))}, as {clean(report.get('kind', '?'))} rows"
        heading = element("h3", title, element("small", "of " + ", ".join(labels)))
        notes = report.get("notes")
        said = [clean(note, 400) for note in (notes[:20] if isinstance(notes, list) else [])]
        below = [element("p", note, class_="none") for note in said]
        tables.append(element("div", heading, table(["", *parts], _data_rows(list(parts.values()))), *below))
    yield element("div", *tables, class_="tables")


def _data_rows(parts: list[dict[str, Any]]) -> Iterable[Row]:
    def inner(part: dict[str, Any], *keys: str) -> Any:
        value: Any = part
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def counts(name: str, *keys: str, always: bool = False) -> Iterable[Row]:
        values = [inner(part, *keys) for part in parts]
        values = [value if isinstance(value, int) else None for value in values]
        if always or any(values):
            yield [name, *map(figure_text, values)]

    yield from counts("rows read", "read", always=True)
    yield from counts("rows kept", "kept", always=True)
    dropped = [inner(part, "dropped") for part in parts]
    for reason in sorted({str(key) for of_part in dropped if isinstance(of_part, dict) for key in of_part})[:30]:
        yield from counts(f"dropped: {clean(reason.replace('_', ' '))}", "dropped", reason)
    yield from counts("prompts cut", "truncated", "prompt")
    yield from counts("responses cut", "truncated", "response")
    yield from counts("duplicate rows", "duplicates")
    yield from counts("rows with text of special tokens", "special_token_rows")
    yield from counts("pairs", "pairs")
    yield from counts("rows with a margin", "rows_with_margin")
    yield from counts("tokens to learn", "trained_tokens", always=True)
    for what in ("prompt", "response", "total"):
        for key, name in {"p50": "median", "p95": "95 % up to", "max": "longest"}.items():
            yield from counts(f"{what} tokens, {name}", "tokens", what, key)


def speed_table(records: list[Record]) -> Iterable[Html]:
    """Time, items a second and memory, as far as they were logged."""
    yield table(_heads(records), _speed_rows(records))
    yield element(
        "p",
        "Items are what a loss is a mean of: tokens to learn, or pairs. Times are medians between the rows of "
        "metrics.csv; without a row before it, the time to the first step does not count.",
        class_="none",
    )


def _speed_rows(records: list[Record]) -> Iterable[Row]:
    paces = [_pace(record) for record in records]
    items = [_items(record) for record in records]
    yield ["whole run", *(duration_text(_seconds(record)) for record in records)]
    yield ["one step", *(duration_text(pace) for pace in paces)]
    yield ["items of a step", *map(figure_text, items)]
    rates = [amount / pace if amount and pace else None for amount, pace in zip(items, paces, strict=True)]
    yield ["items a second", *map(figure_text, rates)]
    tags = dict.fromkeys(tag for record in records for tag in record.curves if tag.startswith(("time/", "memory/")))
    for tag in tags:
        found = [record.curves.get(tag) for record in records]
        show = duration_text if tag.startswith("time/") else figure_text
        yield [tag, *(show(statistics.median(curve.values)) if curve else NONE for curve in found)]
    peaks = [record.info.get("peak_memory") for record in records]
    yield ["peak memory", *(size_text(peak) if isinstance(peak, int) else NONE for peak in peaks)]
    for key, name in {
        "fabric.accelerator": "device",
        "fabric.devices": "devices",
        "fabric.precision": "precision",
    }.items():
        yield [name, *(_value(record, key, records) for record in records)]


def _pace(record: Record) -> float | None:
    """Seconds of an optimizer step: the median between rows."""
    written = {
        step: time for curve in record.curves.values() for step, time in zip(curve.steps, curve.times, strict=True)
    }
    paces = [
        (later - sooner) / (after - before)
        for (before, sooner), (after, later) in pairwise(sorted(written.items()))
        if later >= sooner  # else the clock has moved backwards
    ]
    return statistics.median(paces) if paces else None


def _items(record: Record) -> float | None:
    curve = record.curves.get("train/items") or record.curves.get("policy/items")
    return statistics.median(curve.values) if curve else None
