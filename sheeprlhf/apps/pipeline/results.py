"""Results of a pipeline: a table of its stages, from the evaluations stored with their runs."""

import csv
import io
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from sheeprlhf.config.pipeline import Stage
from sheeprlhf.security.json_records import load_json
from sheeprlhf.security.record_schemas import RESULT
from sheeprlhf.utils.errors import RecordError
from sheeprlhf.utils.output import write_file

RESULT_FILES = ("results.csv", "results.md", "results.json")
_MAX_FILES = 200


class Column(NamedTuple):
    """A figure of a stage: its name in files, its heading, and how a number of it is shown."""

    name: str
    heading: str
    form: str


COLUMNS = (
    Column("imperative", "imperative", "{:.1%}"),
    Column("reward", "reward", "{:.3g}"),
    Column("win_rate", "win rate", "{:.1%}"),
    Column("kl", "KL, nats", "{:.2f}"),
    Column("rouge_l", "ROUGE-L", "{:.1f}"),
    Column("perplexity", "perplexity", "{:.2f}"),
    Column("pairs_right", "pairs right", "{:.2%}"),
    Column("pairs", "of pairs", "{:,.0f}"),
    Column("seconds", "s", "{:,.0f}"),
)


class Row(NamedTuple):
    """A stage and its figures, by name; those that nothing has measured are missing."""

    stage: str
    figures: dict[str, float]


def write_results(folder: Path, stages: list[Stage], state: Mapping[str, Any]) -> list[Row]:
    """Collect the figures of all stages and keep them as results.json, results.csv and results.md in the folder."""
    rows = []
    for stage in stages:
        seconds = state["stages"].get(stage.name, {}).get("seconds")
        if seconds is not None:
            figures = figures_of(folder / stage.name) if stage.verb == "train" else {}
            rows.append(Row(stage.name, figures | {"seconds": round(float(seconds), 1)}))
    records = [{"stage": row.stage, **row.figures} for row in rows]
    columns = used_columns(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, ["stage", *(column.name for column in columns)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    lines = [["stage", *(column.heading for column in columns)], ["---"] * (len(columns) + 1), *cells(rows, columns)]
    markdown = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    for name, content in zip(RESULT_FILES, (text.getvalue(), markdown, json.dumps(records, indent=1)), strict=True):
        write_file(folder, name, content.encode())
    return rows


def show_results(folder: Path, rows: list[Row]) -> None:
    """Print the table of the stages that train, 80 columns wide, how long the others took, and where all is kept."""
    trained = [row for row in rows if len(row.figures) > 1]
    columns = used_columns(trained)
    table = Table("stage", title="results of the stages", box=None, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column.heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for line in cells(trained, columns):
        table.add_row(*line)
    Console().print(table)
    others = [f"{row.stage} {row.figures['seconds']:,.0f} s" for row in rows if row not in trained]
    total = sum(row.figures["seconds"] for row in rows)
    print(f"{''.join(f'{text}, ' for text in others)}everything {total:,.0f} s")
    print(f"saved: {folder / 'results.json'} (also .csv and .md)")


def used_columns(rows: list[Row]) -> list[Column]:
    """Those that some stage has a figure for."""
    return [column for column in COLUMNS if any(column.name in row.figures for row in rows)]


def cells(rows: list[Row], columns: list[Column]) -> list[list[str]]:
    """The table's lines as texts."""
    return [
        [
            row.stage,
            *(column.form.format(row.figures[column.name]) if column.name in row.figures else "" for column in columns),
        ]
        for row in rows
    ]


def figures_of(run_dir: Path) -> dict[str, float]:
    """The figures of a run's final weights on the test split, from its eval/*.json."""
    found: dict[str, Any] = {}
    for path in sorted((run_dir / "eval").glob("*.json"))[:_MAX_FILES]:
        try:
            record = load_json(path, RESULT)
        except RecordError as error:
            print(f"warning: {error}", file=sys.stderr)
            continue
        if record.get("weights") == "final" and record.get("split") == "test":
            found |= _figures(path.stem, record)
    return {name: float(value) for name, value in found.items() if _is_number(value)}


def _figures(stem: str, record: Mapping[str, Any]) -> dict[str, Any]:
    task = record.get("task")
    if task == "perplexity":
        return {"perplexity": record.get("perplexity")}
    if task == "rouge":
        return {"rouge_l": record.get("rougeL")}
    if task == "preference":
        return {"pairs_right": record.get("accuracy"), "pairs": record.get("pairs")}
    if task == "reward":
        scorer = stem.removeprefix("reward-").removesuffix("-test-final")
        if scorer == "imperative":
            return {"imperative": record.get("score"), "kl": record.get("kl")}
        return {"reward": record.get("score"), "win_rate": record.get("win_rate"), "kl": record.get("kl")}
    return {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
