"""`report`: one or several runs as a single HTML page without scripts or external files."""

import os
import time
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from sheeprlhf.apps.arguments import Flag, read_flags
from sheeprlhf.apps.pipeline import Row, read_pipeline
from sheeprlhf.apps.runs import MARK, FoundRuns, Record, find_past_runs, read_record, run_order
from sheeprlhf.apps.terminal import Screen, clean, flag_entries, paragraph, print_help
from sheeprlhf.config.option_checks import near_path
from sheeprlhf.config.path_checks import new_folder_problems
from sheeprlhf.config.run_lookup import is_newest, run_above
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.home import expand_home
from sheeprlhf.utils.output import is_own_file, write_file

OUTPUT_DIR = "logs/report"
_SUFFIXES = (".html", ".htm")
_PAGE = "report.html"  # in a folder that --to names
FLAGS = (
    Flag(
        "to",
        f"A name that ends in .html, or a folder, which gets {_PAGE}; without it {OUTPUT_DIR}/<time>.html. An older "
        "report there is replaced, any other file is not.",
        value="file or folder",
    ),
    Flag("png", "The curves as images too, one for each group of charts, next to the page.", False, bool),
)

RunInfo = tuple[Path, dict[str, Any]]


class WrittenReport(NamedTuple):
    """The written files, and remarks on the runs."""

    files: list[Path]
    notes: list[str]


def run(arguments: list[str]) -> int:
    """Write the page and print its place. Raises ConfigError if a word names no run, or it cannot be written."""
    given = read_flags("report", FLAGS, arguments)
    if given is None:
        meaning = (
            "One HTML page of runs: their options and results, curves in common charts, samples for the same prompts, "
            "differences of configuration, data, speed and memory. It needs no network and has no script."
        )
        root = TrainConfig.root_dir
        which = (
            "<run> is a run directory, or a folder: all runs in it; a pipeline's folder adds its summary. Without one: "
            f"the newest run in {root}."
        )
        return print_help("report [<run> ...]", [meaning, which], "Flags", flag_entries(FLAGS))
    written = write_report(given.words, to=given.values["to"], png=given.values["png"])
    screen = Screen()
    for note in written.notes:
        screen.print(paragraph(f"note: {note}", style="odd"))
    for path in written.files:
        screen.print(f"saved: {clean(path, 4096)}")
    return 0


def write_report(folders: list[str], *, to: str | None = None, png: bool = False) -> WrittenReport:
    """Write the page of runs and folders of runs (none: the newest run) to a file or folder. Raises ConfigError."""
    notes: list[str] = []
    problems: list[str] = []
    runs, pipelines = _choose_runs(folders, notes, problems)
    page = _output_path(to, problems)
    if problems:
        raise ConfigError(*problems)

    from sheeprlhf.apps.report_page import build_page, charts_by_group, draw_png  # imports matplotlib

    records = _read_records(runs, notes)
    labels = [record.label for record in records]
    files = {page: build_page(records, pipelines, notes).encode()}
    for group, charts in charts_by_group(records) if png else ():
        name = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in group.title.lower())
        files[page.with_name(f"{page.stem}-{name}.png")] = draw_png(group.title, charts, labels)
    _write(files)
    notes += [f"{record.label} {note}" for record in records for note in record.notes]
    return WrittenReport(list(files), notes)


def page_of_runs(folders: list[str]) -> str:
    """The page of runs as they are now, without those that cannot be read."""
    from sheeprlhf.apps.report_page import build_page

    notes: list[str] = []
    runs, pipelines = _choose_runs(folders, notes, [])
    return build_page(_read_records(runs, notes), pipelines, notes)


def _read_records(runs: list[RunInfo], notes: list[str]) -> list[Record]:
    """Read the runs, the newest ones if they are too many, and label them."""
    from sheeprlhf.apps.report_page import MAX_RUNS

    if len(runs) > MAX_RUNS:
        notes.append(f"{len(runs):,} runs are too many for one page: these are the newest {MAX_RUNS}")
        runs = sorted(runs, key=run_order)[-MAX_RUNS:]
    records = [read_record(folder, info) for folder, info in runs]
    return [record._replace(label=label) for record, label in zip(records, _labels(records), strict=True)]


def _choose_runs(
    folders: list[str], notes: list[str], problems: list[str]
) -> tuple[list[RunInfo], dict[str, list[Row]]]:
    """The runs of a page, and the stages of its pipelines by folder; adds to notes and problems."""
    runs: dict[Path, RunInfo] = {}
    pipelines: dict[str, list[Row]] = {}
    for word in folders or [TrainConfig.root_dir]:
        newest = not folders or (is_newest(word) and not os.path.isdir(word))
        folder = expand_home(TrainConfig.root_dir if newest else word)
        found = find_past_runs(folder) if os.path.isdir(folder) else FoundRuns([], "")
        if not found.runs:
            none = f"there is no run in {folder} yet: `train task=sft` makes one; or name a run: `report <run>`"
            problems.append(none if newest else _no_run(word, folder))
        taken = sorted(found.runs, key=run_order)
        if newest and taken:
            taken = taken[-1:]
            notes.append(f"{word if folders else 'no run was named'}: this is the newest, {taken[0][0]}")
        notes += [f"{word}: {found.note}"] if found.note else []
        for path, info in taken:
            runs.setdefault(path.resolve(), (path, info))
        if not newest and (stages := read_pipeline(folder, notes)):
            pipelines[clean(folder, 200)] = stages
    return list(runs.values()), pipelines


def _no_run(word: str, folder: Path) -> str:
    """The problem of a word that names no run, and the likely fix."""
    key, equals, value = word.partition("=")
    if equals and not os.path.lexists(folder):
        run = value if os.path.isdir(expand_home(value)) else "<run>"
        return f"{key}= is not a word of report: write `report {run}`; `report --help` lists its words"
    above = run_above(folder)
    if os.path.lexists(folder) and above is not None:
        return f"{word} is a part of a run: did you mean {above}?"
    if os.path.isdir(folder):
        return f"{word} holds no run: give a run directory or a folder above some; `list runs` shows which there are"
    if os.path.lexists(folder):
        return f"{word} is not a folder: give a run directory; `list runs` shows which there are"
    near = near_path(str(folder))
    did = f"did you mean {near}? " if near else ""
    return f"{word} does not exist: {did}`list runs` shows which runs there are"


def _output_path(to: str | None, problems: list[str]) -> Path:
    """The path of the page; adds to the problems if it cannot be written."""
    path = expand_home(to or OUTPUT_DIR)
    named = path.suffix.lower() in _SUFFIXES and not os.path.isdir(path)
    if path.suffix and not named and not os.path.isdir(path):
        problems.append(f"--to {to} ends in {path.suffix}: give a name that ends in .html, or a folder")
        return path
    problems += new_folder_problems("--to", str(path.parent if named else path))
    if to is None:
        name = time.strftime("%Y-%m-%d_%H-%M-%S")
        names = (f"{name}.html" if number == 1 else f"{name}-{number}.html" for number in count(1))
        return next(path / name for name in names if not os.path.lexists(path / name))
    path = path if named else path / _PAGE
    if not _is_free(path):
        problems.append(f"--to {to}: {path} is there and is not a report: give another name")
    return path


def _is_free(path: Path) -> bool:
    """True if the path does not exist, or is a file that this command has written."""
    marks = (f'name="generator" content="{MARK}"', f"Software\0{MARK}")
    return not os.path.lexists(path) or is_own_file(path, *(mark.encode() for mark in marks))


def _write(files: dict[Path, bytes]) -> None:
    taken = [path for path in files if not _is_free(path)]
    if taken:
        raise ConfigError(*(f"{path} is there and is not of a report: give another name with --to" for path in taken))
    for path, content in files.items():
        try:
            write_file(path.parent, path.name, content)
        except OSError as error:
            why = error.strerror or error
            raise ConfigError(f"{path} cannot be written ({why}): give another place with --to") from error


def _labels(records: list[Record]) -> list[str]:
    """A short name for each run: its task; with its run name, or numbered, where several have the same."""
    tasks = [record.past.names[2] for record in records]
    named = [
        f"{task} {clean(record.info.get('run_name', '?'), 24)}" for task, record in zip(tasks, records, strict=True)
    ]
    counts, labels = Counter(tasks), []
    seen: Counter[str] = Counter()
    for task, name in zip(tasks, named, strict=True):
        seen[task] += 1
        unique = name if named.count(name) == 1 else f"{task} {seen[task]}"
        labels.append(task if counts[task] == 1 else unique)
    return labels
