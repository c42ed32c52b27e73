"""`list`: what there is to choose, and past runs."""

from pathlib import Path

from rich.text import Text

from sheeprlhf.apps.arguments import read_flags
from sheeprlhf.apps.runs import PastRun, find_past_runs, past_run
from sheeprlhf.apps.terminal import Screen, clean, heading, is_for_people, paragraph, print_help, table
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.home import expand_home

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
_STATES = {"finished": "good", "stopped early": "good", "running": "busy", "unfinished": "odd"}


def run(arguments: list[str]) -> int:
    """Print the sections that the words name; all, if there are none. Raises ConfigError for another word."""
    given = read_flags("list", (), arguments)
    if given is None:
        where = f"Runs are found in {TrainConfig.root_dir}: `list runs` for all, `list runs <folder>`."
        meaning = "What there is. Without a section: all of them, and the newest runs."
        return print_help("list [section ...] [folder of runs]", [meaning], "Sections", SECTIONS, where)
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


def _parse_words(words: list[str]) -> tuple[list[str], Path]:
    """The sections, and the folders that follow `runs`. Raises ConfigError if another word is there."""
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
    from sheeprlhf.config.option_checks import did_you_mean
    from sheeprlhf.config.option_lookup import choices_like

    listed = f"the sections are {', '.join(SECTIONS)}"
    if "=" in word or choices_like(word):
        return f"{word} is not a section: `show {word}` tells about it; {listed}"
    return f"{word} is not a section: {did_you_mean(word, [*SECTIONS, *_ALIASES], listed, key='`list ', end='`')}"


def _no_folder(word: str, root: Path) -> str:
    from sheeprlhf.config.option_checks import near_path

    near = near_path(str(root))
    did = f": did you mean {near}?" if near else "; give the folder that holds your runs (root_dir)"
    return f"{word} is neither a folder nor a section{did}"


def _print_choices(screen: Screen, section: str) -> None:
    """Print the choices of a section."""
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
        (
            run.started or "?",
            *run.names,
            run.state,
            f"{run.step:,}" if run.step is not None else "?",
            "-" if run.best is None else f"{run.best:.5g}",
        )
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
