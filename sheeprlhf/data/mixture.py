"""A mixture: rows of several prepared datasets in one, by weight (`data=mix`)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sheeprlhf.data import store
from sheeprlhf.data.report import SPLITS, Report, available_columns, measure, notes_on
from sheeprlhf.data.store import SplitWriter, TokenizedSplit
from sheeprlhf.structure.data import KeptColumns
from sheeprlhf.utils.output import create_file

WEIGHTED = ("train", "reward")  # the other splits have every row once
_ROWS_AT_ONCE = 1_000


class MixPart(NamedTuple):
    """One prepared dataset of a mixture."""

    name: str  # its place among the datasets, for notes
    weight: float | None  # its share of the training rows, relative to others; None in all: every row once
    first_row: int  # added to the numbers of its rows, so that no two datasets have the same
    splits: dict[str, TokenizedSplit]  # its rows
    report: Report  # its data report


def name_in_mixture(given: Mapping[str, Any]) -> str:
    """The name of a dataset of `data.mix` for the report: its files, or its id with subset and split."""
    files = given.get("train_file")
    names = [files] if isinstance(files, str) else files or [given.get("data"), given.get("dataset_name")]
    return ", ".join(str(name) for name in (*names, given.get("subset"), given.get("split")) if name)


def numbered_parts(prepared: Sequence[tuple[float | None, dict[str, TokenizedSplit], Report]]) -> list[MixPart]:
    """The datasets of a mixture, from the weight, the splits and the report of each."""
    parts: list[MixPart] = []
    first_row = 0
    for number, (weight, splits, report) in enumerate(prepared, 1):
        parts.append(MixPart(f"dataset {number}", weight, first_row, splits, report))
        first_row += sum(split["read"] for split in report["splits"].values())
    return parts


def write_mixture(parts: Sequence[MixPart], folder: Path, *, name: str, kind: str, kept: KeptColumns) -> None:
    """Write the mixed splits and their report into an empty folder."""
    report: Report = {"name": name, "kind": kind, "splits": {}, "columns": {}, "available_columns": {}}
    report["mix"] = [
        {
            "weight": part.weight,
            "first_row": part.first_row,
            "kept": {split: len(rows) for split, rows in part.splits.items()},
            "used": {},
            "columns": part.report["columns"],
        }
        for part in parts
    ]
    lost: set[str] = set()
    for split in SPLITS:
        reports = [part.report["splits"][split] for part in parts if split in part.report["splits"]]
        if not reports:
            continue
        rows = _taken_rows(parts, split)
        for record, taken in zip(report["mix"], rows, strict=True):
            record["used"] |= {split: len(taken)} if len(taken) else {}
        mixed = _write_split(parts, split, rows, folder / f"{split}.arrow") if any(map(len, rows)) else None
        report["splits"][split] = _added(reports) | measure(mixed) | {"mixed_rows": len(mixed) if mixed else 0}
        columns = [set(available_columns(part.report, split)) for part in parts]
        of_all = columns[0].intersection(*columns)
        report["available_columns"][split] = sorted(of_all)
        lost |= columns[0].union(*columns) - of_all
    given = [part.report["template_args"] for part in parts if "template_args" in part.report]
    report |= {"template_args": given[0]} if given else {}
    report["notes"] = [*notes_on(report), *_notes_of(parts)]
    if names := sorted(column for column in lost if kept.every or column in kept.names):
        report["notes"].append(f"columns that not all datasets have, and no reward function gets: {', '.join(names)}")
    create_file(folder, store.REPORT, json.dumps(report, indent=1).encode())


def _taken_rows(parts: Sequence[MixPart], split: str) -> list[np.ndarray]:
    """Rows taken of a split of each dataset: whole passes by weight, then rows at equal distances."""
    sizes = [len(part.splits[split]) if split in part.splits else 0 for part in parts]
    pairs = zip(sizes, parts, strict=True)
    weights = [size if part.weight is None else part.weight * (size > 0) for size, part in pairs]
    taken = []
    for size, weight in zip(sizes, weights, strict=True):
        count = max(1, round(sum(sizes) * weight / sum(weights))) if size and split in WEIGHTED else size
        passes, rest = divmod(count, max(size, 1))
        taken.append(np.concatenate([np.tile(np.arange(size), passes), np.arange(rest) * size // max(rest, 1)]))
    return taken


def _write_split(parts: Sequence[MixPart], split: str, rows: Sequence[np.ndarray], file: Path) -> TokenizedSplit:
    """Write the rows that are taken of a split of each dataset, evenly mixed, and open the file."""
    owners = np.repeat(np.arange(len(rows)), [len(taken) for taken in rows])
    places = np.concatenate([(np.arange(len(taken)) + 0.5) / max(len(taken), 1) for taken in rows])
    order = np.argsort(places, kind="stable")
    writer = SplitWriter(file)
    for few in np.split(order, range(_ROWS_AT_ONCE, len(order), _ROWS_AT_ONCE)):
        chosen = zip(owners[few].tolist(), np.concatenate(rows)[few].tolist(), strict=True)
        stored = [(parts[owner].first_row, parts[owner].splits[split].token_row(index)) for owner, index in chosen]
        writer.write([row._replace(number=first_row + row.number) for first_row, row in stored])
    writer.close()
    return TokenizedSplit(file)


def _added(reports: Sequence[Report]) -> Report:
    """The reports of one split of several datasets, with their counts added."""
    total: Report = {}
    for report in reports:
        for name, value in report.items():
            before = total.get(name)
            if name in ("dropped", "truncated", "remarks", "labels"):
                total[name] = value | {key: count + value.get(key, 0) for key, count in (before or {}).items()}
            elif name == "first_dropped":
                total[name] = value | (before or {})
            elif isinstance(value, int):
                total[name] = value + (before or 0)
    return total | {"eos_share": total["ended_responses"] / total["responses"] if total["responses"] else None}


def _notes_of(parts: Sequence[MixPart]) -> list[str]:
    """The notes of the datasets, each once, with the datasets that it is about."""
    of_notes: dict[str, list[str]] = {}
    for part in parts:
        for note in part.report["notes"]:
            if note not in notes_on(part.report):
                of_notes.setdefault(note, []).append(part.name)
    return [note if len(names) == len(parts) else f"{', '.join(names)}: {note}" for note, names in of_notes.items()]
