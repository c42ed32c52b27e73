"""`list`: what there is to choose, and past runs.

The files of runs may be untrusted, half written or of any size.
"""

import os
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rich.text import Text

from sheeprlhf.apps.flags import read_flags
from sheeprlhf.apps.terminal import Screen, clean, entry, heading, is_for_people, is_number, paragraph, table
from sheeprlhf.config.run_lookup import order_of, read_run_config
from sheeprlhf.engine.rundir import RUN_FILE, is_locked
from sheeprlhf.security.files import read_tail
from sheeprlhf.security.json_records import RESULT, RUN, STATE, Schema, load_json
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.utils.errors import ConfigError, RecordError
from sheeprlhf.utils.home import expand_home

MAX_DEPTH = 8  # root_dir/<data>/<model>/<task>/<time>/<run_name>, and some room
MAX_FOLDERS = 20_000
_MAX_NAMES = 5_000  # in one folder
_MAX_JSON = 100_000  # bytes
_MAX_RESULTS = 200  # files of one run
_TAIL_BYTES = 65_536  # bytes of metrics.csv: many rows
_NAME_COLUMNS = 16  # columns of a name: helpful_harmless
_UNKNOWN = "?"
_RUN_FILES = {RUN_FILE, "config.yaml", "metrics.csv", "checkpoints", "final"}
_MAIN_NUMBERS = {  # of the numbers of an evaluation; of another one, all
    "preference": ("accuracy", "margin"),
    "reward": ("score", "win_rate", "kl"),
    "generate": (),
    "frontier": (),
}
_VALIDATION_TAGS = {  # tags of a validation that tell more than its loss
    "val/rewards/accuracies": "accuracy",
    "val/rewards/margins": "margin",
}
_GROUPS = ("data", "model", "task")


class FoundRuns(NamedTuple):
    """Run directories, newest first, and what kept the search from being complete, if anything."""

    runs: list[tuple[Path, dict[str, Any]]]
    note: str


class PastRun(NamedTuple):
    """One run; every text is fit for a terminal.

    Attributes:
        dir: its directory.
        started: local time, empty if unknown.
        names: of data, model and task.
        state: finished, running or unfinished; unreadable or unknown if run.json is damaged or missing.
        step: optimizer steps done, None if unknown.
        best: the best validation result, None if there is none.
        results: the newest result of each metric, such as "perplexity 38.06", or what a validation told of pairs.
        problems: one sentence for each of its files that is damaged.
    """

    dir: Path
    started: str
    names: tuple[str, str, str]
    state: str
    step: int | None
    best: float | None
    results: list[str]
    problems: list[str]


def find_past_runs(root: Path) -> FoundRuns:
    """Every run directory at or below `root`, except below links, and what its run.json says."""
    runs, unreadable, seen = [], 0, 0
    waiting = deque([(root, 0)])
    while waiting and seen < MAX_FOLDERS:
        folder, depth = waiting.popleft()
        seen += 1
        try:
            with os.scandir(folder) as entries:
                names = {entry.name: entry.is_dir(follow_symlinks=False) for entry in islice(entries, _MAX_NAMES)}
        except OSError:
            unreadable += 1
            continue
        if RUN_FILE in names or len(_RUN_FILES & set(names)) > 1:
            runs.append((folder, _read(folder / RUN_FILE, RUN, [])))
        elif depth < MAX_DEPTH:
            below = sorted((name for name, is_dir in names.items() if is_dir and name[0] != "."), reverse=True)
            waiting.extend((folder / name, depth + 1) for name in below)
    notes = [f"not all was searched: {MAX_FOLDERS:,} folders are the limit"] if waiting else []
    notes += [f"{unreadable} folder{'s' * (unreadable > 1)} could not be read"] if unreadable else []
    return FoundRuns(sorted(runs, key=_order, reverse=True), "; ".join(notes))


def _order(run: tuple[Path, dict[str, Any]]) -> tuple[float, str]:
    folder, info = run
    return order_of(info), str(folder)


def _read(path: Path, schema: Schema, problems: list[str]) -> dict[str, Any]:
    """The content of a file of a run; empty, and a problem, if it is damaged."""
    try:
        return load_json(path, schema)
    except RecordError as error:
        problems.append(str(error))
        return {}


def past_run(folder: Path, info: dict[str, Any]) -> PastRun:
    """Summary of a run.

    Args:
        folder: its directory.
        info: the content of its run.json; empty if it has none that can be read.
    """
    problems: list[str] = []
    if not info:
        _read(folder / RUN_FILE, RUN, problems)
    names, finished = _names(folder, info), info.get("status") == "finished"
    progress = info if finished else _newest_state(folder, problems)
    logged = _last_rows(folder)
    steps = [step for step in (progress.get("step"), None if finished else _last_step(logged)) if step]
    return PastRun(
        folder,
        _local_time(info.get("started")),
        names,
        _state(folder, info),
        max(steps, default=0 if info else None),
        progress.get("best_metric"),
        _results(folder, names[0], problems) or _validation_results(logged),
        problems,
    )


def _state(folder: Path, info: dict[str, Any]) -> str:
    if not info:
        return "unreadable" if os.path.lexists(folder / RUN_FILE) else "unknown"
    if info.get("status") == "finished":
        return "finished"
    return "running" if is_locked(folder) else "unfinished"


def _names(folder: Path, info: dict[str, Any]) -> tuple[str, str, str]:
    """Names of data, model and task, from run.json, else from the saved configuration."""
    found = info
    if not info:
        try:
            if os.path.getsize(folder / "config.yaml") <= _MAX_JSON:
                saved = read_run_config(str(folder))
                found = {key: value.get("config_name") for key, value in saved.items() if isinstance(value, dict)}
        except (ConfigError, OSError):
            found = {}  # damaged or untrusted: shown as unknown
    data, model, task = (
        clean(found[key], _NAME_COLUMNS) if isinstance(found.get(key), str) else _UNKNOWN for key in _GROUPS
    )
    return data, model, task


def _newest_state(folder: Path, problems: list[str]) -> dict[str, Any]:
    """State of the newest readable checkpoint; empty if there is none."""
    try:
        with os.scandir(folder / "checkpoints") as entries:
            names = [entry.name for entry in islice(entries, _MAX_NAMES)]
    except OSError:
        return {}
    steps = [int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdecimal() and len(name) < 18]
    for step in sorted(steps, reverse=True):
        if state := _read(folder / "checkpoints" / f"step-{step}" / "state.json", STATE, problems):
            return state
    return {}


def _last_rows(folder: Path) -> list[str]:
    """The last complete rows of metrics.csv."""
    try:
        return read_tail(folder / "metrics.csv", _TAIL_BYTES).decode(errors="replace").split("\n")[:-1]
    except OSError:
        return []


def _last_step(lines: list[str]) -> int | None:
    """The step of the last row."""
    first = lines[-1].partition(",")[0] if lines else ""
    return int(first) if first.isdecimal() and len(first) <= 12 else None


def _validation_results(lines: list[str]) -> list[str]:
    """Results of the newest validation on pairs."""
    newest: dict[str, str] = {}
    for line in lines:
        _, _, rest = line.partition(",")
        tag, _, rest = rest.partition(",")
        if tag in _VALIDATION_TAGS:
            with suppress(ValueError):
                number = float(rest.partition(",")[0])
                if is_number(number):
                    newest[_VALIDATION_TAGS[tag]] = f"{_VALIDATION_TAGS[tag]} {number:.4g} (validation)"
    return list(newest.values())


def _results(folder: Path, data: str, problems: list[str]) -> list[str]:
    """The newest number of each metric in eval/*.json; what is not of the final weights on the test split says so."""
    newest: dict[str, tuple[float, str]] = {}
    for path in islice(_result_files(folder / "eval"), _MAX_RESULTS):
        record = _read(path, RESULT, problems)
        usual = {"weights": "final", "split": "test"} | ({"data": data} if data != _UNKNOWN else {})
        said = {key: clean(record.get(key, value), _NAME_COLUMNS) for key, value in usual.items()}
        odd = [said[key] for key, value in usual.items() if said[key] != value]
        when, task = _time_of(record.get("time")), record.get("task", "")
        shown = _MAIN_NUMBERS.get(task, tuple(record))
        for key in shown:
            number = record.get(key)
            if isinstance(number, float) and is_number(number) and when >= newest.get(key, (0.0, ""))[0]:
                newest[key] = (
                    when,
                    f"{clean(key, _NAME_COLUMNS)} {number:.4g}" + (f" ({', '.join(odd)})" if odd else ""),
                )
    return [text for _, text in newest.values()]


def _result_files(folder: Path) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in islice(entries, _MAX_NAMES))
    except OSError:
        return
    yield from (folder / name for name in names if name.endswith(".json"))


def _local_time(seconds: Any) -> str:
    try:
        return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
    except (TypeError, ValueError, OverflowError, OSError):
        return ""


def _time_of(text: Any) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError, OverflowError, OSError):
        return 0.0


SECTIONS = {
    "tasks": "What a model can be trained for, and how it can be evaluated.",
    "models": "Models that have a name here; any other by `model=auto model.repo_name=<hub id or folder>`.",
    "data": "Datasets that have a name here; your own files by `data=local data.train_file=<file>`.",
    "fabric": "Where it computes.",
    "optim": "Optimizers.",
    "experiments": "Recipes: named values of many options at once.",
    "pipelines": "Recipes of several stages: trainings and evaluations in one command.",
    "runs": "Runs that were made, newest first, with their results; `list runs <folder>` looks there.",
}
_ALIASES = {"task": "tasks", "model": "models", "experiment": "experiments", "recipes": "experiments", "run": "runs"}
_ALIASES |= {"pipeline": "pipelines"}
_SHORT_LIST = 3  # runs that `list` alone shows
_LONG_LIST = 100
_MAX_PROBLEMS = 20
_STATES = {"finished": "good", "running": "busy", "unfinished": "odd"}


def run(arguments: list[str]) -> int:
    """Print the sections that the words name; all, if there are none.

    Raises:
        ConfigError: a word is not a section, or a folder of runs is none.
    """
    given = read_flags("list", (), arguments)
    if given is None:
        _print_help()
        return 0
    sections, root = _parse_words(given.words)
    screen = Screen()
    for number, section in enumerate(sections or SECTIONS):
        if number:
            screen.print()
        if section == "runs":
            _print_runs(screen, root, _LONG_LIST if sections else _SHORT_LIST)
        else:
            _print_choices(screen, section)
    if not sections:
        screen.print()
        screen.print(paragraph("`show <name>` tells all options of one, `list <section>` prints one section."))
    return 0


def _print_help() -> None:
    screen = Screen()
    screen.print(heading("sheeprlhf list", "[section ...] [folder of runs]"))
    screen.print("\nWhat there is. Without a section: all of them, and the newest runs.\n")
    screen.print(heading("Sections:"))
    for name, meaning in SECTIONS.items():
        screen.print(entry(name, meaning, width=12))
    screen.print()
    screen.print(
        paragraph(f"Runs are looked for in {TrainConfig.root_dir}: `list runs` for all, `list runs <folder>`.")
    )


def _parse_words(words: list[str]) -> tuple[list[str], Path]:
    """The sections, and where to look for runs: what follows `runs` and is not a section.

    Raises:
        ConfigError: something else is among the words.
    """
    sections: list[str] = []
    root, given, problems = Path(TrainConfig.root_dir), False, []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals and _ALIASES.get(word, word) in SECTIONS:
            sections.append(_ALIASES.get(word, word))
        elif (key == "root_dir" and equals) or (sections[-1:] == ["runs"] and not given):
            root, given = expand_home(value if key == "root_dir" and equals else word), True
            problems += [] if root.is_dir() else [_no_folder(word, root)]
            sections += [] if "runs" in sections else ["runs"]
        else:
            problems.append(_no_section(word))
    if problems:
        raise ConfigError(*problems)
    return list(dict.fromkeys(sections)), root


def _no_section(word: str) -> str:
    from sheeprlhf.config.option_checks import nearest
    from sheeprlhf.config.option_search import choices_like

    listed = f"the sections are {', '.join(SECTIONS)}"
    if "=" in word or choices_like(word):
        return f"{word} is not a section: `show {word}` tells about it; {listed}"
    near = nearest(word, [*SECTIONS, *_ALIASES])
    hint = f"did you mean `list {_ALIASES.get(near, near)}`? {listed.capitalize()}" if near else listed
    return f"{word} is not a section: {hint}"


def _no_folder(word: str, root: Path) -> str:
    from sheeprlhf.config.option_checks import near_path

    near = near_path(str(root))
    did = f": did you mean {near}?" if near else "; give the folder that holds your runs (root_dir)"
    return f"{word} is neither a folder nor a section{did}"


def _print_choices(screen: Screen, section: str) -> None:
    """Print the choices of a section; imports Hydra."""
    from sheeprlhf.apps.show import choices_of, default_choices, print_choices

    for number, (group, title, verb, words) in enumerate(_CHOICES[section]):
        default = default_choices(verb).get(group)
        screen.print(heading("\n" * (number > 0) + title, f"{words} (default {default})" if default else words))
        print_choices(screen, choices_of(group, verb))


_CHOICES = {  # of each section: group, title, command, and how to use a choice
    "tasks": (
        ("task", "Tasks to train", "train", "train task=<name>"),
        ("task", "Tasks to evaluate", "eval", "eval task=<name> experiment_dir=<run>"),
    ),
    "models": (("model", "Models", "train", "model=<name>"),),
    "data": (("data", "Data", "train", "data=<name>"),),
    "fabric": (("fabric", "Fabric", "train", "fabric=<name>"),),
    "optim": (("optim", "Optimizers", "train", "optim=<name>"),),
    "experiments": (("experiment", "Experiments", "train", "train experiment=<name>"),),
    "pipelines": (("experiment", "Pipelines", "pipeline", "pipeline experiment=<name>"),),
}


def _print_runs(screen: Screen, root: Path, most: int) -> None:
    found = find_past_runs(root) if root.is_dir() else None
    count = len(found.runs) if found else 0
    few = f"(the newest {most} of {count:,})" if count > most else f"({count:,}, newest first)" if count > 1 else ""
    screen.print(heading(f"Runs in {clean(root, 200)}", few))
    if found is None or not found.runs:
        screen.print(paragraph("None yet: `train task=sft` makes one.", indent=2))
    else:
        runs = [past_run(folder, info) for folder, info in found.runs[:most]]
        _print_table(screen, runs)
        problems = [problem for run in runs for problem in run.problems]
        problems[_MAX_PROBLEMS:] = [f"and {len(problems) - _MAX_PROBLEMS:,} more"] * (len(problems) > _MAX_PROBLEMS)
        for problem in problems:
            screen.print(paragraph(clean(problem, 4096), indent=2, style="bad"))
    if found and found.note:
        screen.print(paragraph(found.note, indent=2, style="odd"))
    if count > most:
        more = "`list runs`" if most == _SHORT_LIST else "`list runs <folder>`, with a folder below this one,"
        screen.print(paragraph(f"{more} shows more.", indent=2))


def _print_table(screen: Screen, runs: list[PastRun]) -> None:
    """A line a run where it fits and in a pipe, so that `grep` finds whole runs; else results and path below it."""
    head = ("started", "data", "model", "task", "state", "step", "best val")
    rows = [
        (run.started or "?", *run.names, run.state, f"{run.step:,}" if run.step is not None else "?", _number(run.best))
        for run in runs
    ]
    first, *lines = table([head, *rows], right={5, 6})
    results = [", ".join(run.results) or "-" for run in runs]
    paths = [clean(run.dir, 4096) for run in runs]
    below = table([("results",), *((text,) for text in results)])
    width = len("  ".join(first)) + 2 + len(below[0][0]) + 2 + max(map(len, paths))
    one_line = width < screen.width or not is_for_people()
    screen.print("  ".join([*first, *((below[0][0], "directory") if one_line else ())]), style="faint")
    for run, cells, (result,), path in zip(runs, lines, below[1:], paths, strict=True):
        before, state, after = "  ".join(cells[:4]), cells[4], "  ".join(cells[5:])
        text = Text.assemble(f"{before}  ", (state, _STATES.get(run.state, "bad")), f"  {after}")
        if one_line:
            text.append(f"  {result}  {path}")
        else:
            text.append(f"\n  {result.rstrip()}" if run.results else "").append(f"\n  {path}", "faint")
        screen.print(text)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"
