"""`pipeline`: checked commands one after the other, each in its own process; finished ones are not repeated."""

import csv
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

import sheeprlhf
from sheeprlhf.apps.arguments import ParsedArgs, parse_args
from sheeprlhf.apps.runs import read_results
from sheeprlhf.apps.terminal import Screen, is_number
from sheeprlhf.config.command_words import command, option_word
from sheeprlhf.config.compose import Source, compose_jobs
from sheeprlhf.config.pipeline import Stage, stages_of
from sheeprlhf.config.registry import NOT_IN_HASH, config_to_dict
from sheeprlhf.config.run_lookup import next_order, order_of
from sheeprlhf.engine.rundir import LOCK_FILE, RUN_FILE, RunLock, is_finished, make_unique_dir
from sheeprlhf.security.json_records import PIPELINE, load_json
from sheeprlhf.security.redaction import redact_command
from sheeprlhf.structure.rollout import BestOfNConfig
from sheeprlhf.structure.run import PipelineConfig, RootConfig, TrainConfig
from sheeprlhf.utils.errors import ConfigError, RecordError, UnsafePathError
from sheeprlhf.utils.home import expand_home
from sheeprlhf.utils.output import create_file, link_problems, make_folder, read_small, real_path, write_file
from sheeprlhf.utils.processes import Children, children

RESULT_FILES = ("results.csv", "results.md", "results.json")
_MAX_STAGES = 60
_MAX_BYTES = 1 << 20  # of results.json


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


_FIGURES = {  # of a result by its task, by their names in it; those of a rule are named by it
    "perplexity": {"perplexity": "perplexity"},
    "rouge": {"rougeL": "rouge_l"},
    "preference": {"accuracy": "pairs_right", "pairs": "pairs"},
    "reward": {"score": "reward", "win_rate": "win_rate", "kl": "kl"},
    "reward by imperative": {"score": "imperative", "kl": "kl"},
}


def figures_of(run_dir: Path) -> dict[str, float]:
    """The figures of a run's final weights on the test split, from its eval/*.json."""
    found: dict[str, float] = {}
    problems: list[str] = []
    for name, record in read_results(run_dir, problems):
        if record.get("weights") == "final" and record.get("split") == "test":
            kind = "reward by imperative" if name == "reward-imperative-test-final" else str(record.get("task"))
            named = {column: record.get(key) for key, column in _FIGURES.get(kind, {}).items()}
            found |= {column: float(value) for column, value in named.items() if is_number(value)}
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    return found


def read_pipeline(folder: Path, notes: list[str]) -> list[Row]:
    """The stages in a pipeline's results.json; none if the folder is not of a finished pipeline."""
    name = RESULT_FILES[2]
    if not os.path.lexists(folder / name):
        return []
    try:
        content = json.loads(read_small(real_path(folder / name, folder), _MAX_BYTES))
        stages = [stage for stage in content[:_MAX_STAGES] if isinstance(stage["stage"], str)]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        notes.append(f"{folder}/{name} is damaged: left out")
        return []
    names = [column.name for column in COLUMNS]
    return [
        Row(stage["stage"], {key: value for key, value in stage.items() if key in names and is_number(value)})
        for stage in stages
    ]


STATE_FILE = "pipeline.json"
Recipe = Mapping[str, list[str]]  # of each stage the words of its command, where it runs left open


class PipelineFolder(NamedTuple):
    """An existing folder of a pipeline, the content of its pipeline.json, and a line for the user."""

    dir: Path
    state: dict[str, Any]
    note: str


def read_state(folder: Path) -> dict[str, Any]:
    """The content of pipeline.json; empty if it is missing. Raises RecordError if it is damaged."""
    return load_json(folder / STATE_FILE, PIPELINE)


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """All of it, or what was there before."""
    write_file(folder, STATE_FILE, json.dumps(state, indent=1).encode())


def choose_folder(config: PipelineConfig, stages: list[Stage], command: list[str]) -> PipelineFolder:
    """Find the pipeline to continue with, or make a new folder. Raises ConfigError if there is none to continue."""
    recipe = {stage.name: redact_command([stage.verb, *stage.flags, *stage.words]) for stage in stages}
    if config.resume and config.resume_from is not None:
        raise ConfigError("resume=true and resume_from name two pipelines: give one of them")
    if config.resume_from is not None:
        folder = expand_home(config.resume_from).absolute()
        state = read_state(folder)
        if not state:
            advice = f"it has no {STATE_FILE}; {config.root_dir} has those that were made"
            raise ConfigError(f"resume_from={config.resume_from} is not a pipeline's folder: {advice}")
        _reject_changes(f"resume_from={config.resume_from}", state, recipe)
        return PipelineFolder(folder, state, f"going on with {folder}")
    made = _find_pipelines(Path(config.root_dir).absolute())
    if config.resume:
        same = [(folder, state) for folder, state in made if state.get("experiment") == config.experiment]
        for folder, state in same:
            if not list(differences(state["recipe"], recipe)):
                return PipelineFolder(folder, state, f"going on with {folder}")
        for folder, state in same:
            if "finished" not in state:
                _reject_changes(f"resume=true: {folder}", state, recipe)
    name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{config.experiment}"
    folder = make_unique_dir(Path(config.root_dir).absolute(), name)
    now = time.time()
    state = {
        "experiment": config.experiment,
        "version": sheeprlhf.__version__,
        "started": now,
        "order": next_order(now, (order_of(state) for _, state in made)),
        "command": redact_command(command),
        "recipe": recipe,
        "stages": {},
    }
    write_state(folder, state)
    fresh = f"resume=true found no pipeline of this recipe under {config.root_dir}: a fresh start in"
    return PipelineFolder(folder, state, f"{fresh if config.resume else 'folder:'} {folder}")


def _find_pipelines(root_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Folder and state of every pipeline, newest first; one whose pipeline.json is damaged is named and left out."""
    made = []
    for path in root_dir.glob(f"*/{STATE_FILE}"):
        try:
            made.append((path.parent, read_state(path.parent)))
        except RecordError as error:
            print(f"warning: skipping a pipeline: {error}", file=sys.stderr)
    return sorted(made, key=lambda found: (order_of(found[1]), found[0].name), reverse=True)


def _reject_changes(what: str, state: dict[str, Any], recipe: Recipe) -> None:
    changes = list(differences(state["recipe"], recipe))
    if changes:
        raise ConfigError(
            f"{what} has another recipe ({'; '.join(changes)}): give what it was begun with "
            f"({' '.join(map(str, state.get('command', [])))}), or start anew without resume"
        )


def differences(before: Mapping[str, Any], now: Recipe) -> Iterator[str]:
    """Differences between two recipes, without options that only choose devices and batch sizes."""
    for name in before.keys() - now.keys():
        yield f"stage {name} is gone"
    for name, words in now.items():
        if name not in before:
            yield f"stage {name} is new"
            continue
        old, new = _values_by_key(before[name]), _values_by_key(words)
        for key in dict.fromkeys([*old, *new]):
            if old.get(key) != new.get(key):
                yield f"{name}: {key} was {old.get(key, 'not given')} and is {new.get(key, 'not given')}"
    if not before.keys() ^ now.keys() and list(before) != list(now):
        yield f"the order was {', '.join(before)} and is {', '.join(now)}"


def _values_by_key(words: Any) -> dict[str, str]:
    """Value by option; a verb and flags are their own."""
    texts = [str(word) for word in words] if isinstance(words, list) else []
    pairs = {key: value if equals else "given" for key, equals, value in (text.partition("=") for text in texts)}
    return {key: value for key, value in pairs.items() if not {key, f"{key}.config_name"} & NOT_IN_HASH}


def is_done(folder: Path, state: dict[str, Any], stage: Stage, command: list[str]) -> bool:
    """True if a stage is done: its run is finished, or its evaluation was of the same runs."""
    if stage.verb == "train":
        return is_finished(folder / stage.name)
    record = state["stages"].get(stage.name, {})
    return record.get("status") == "finished" and record.get("command") == redact_command(command)


PAGE = "report.html"


def run(config: PipelineConfig, args: ParsedArgs) -> int:
    """Check every stage, run those that are not finished, print their results; return the exit code."""
    flags = args.config_dir()
    words = [*(word for word in args.words if not word.startswith("words=")), *config.words]
    stages = stages_of(config)
    check_stages(stages, flags)
    place = choose_folder(config, stages, ["pipeline", *flags, *words])
    _check_links(place.dir, stages)
    print(place.note)
    with RunLock(place.dir), children() as started:
        code = _run_stages(config, stages, flags, place, started)
        if code:
            again = [word for word in words if word.partition("=")[0] not in ("resume", "resume_from")]
            following = ["pipeline", *flags, *redact_command(again), option_word("resume_from", str(place.dir))]
            print(f"to continue: {command(following)}")
            return code
        place.state["finished"] = time.time()
        write_state(place.dir, place.state)
        rows = write_results(place.dir, stages, place.state)
        show_results(place.dir, rows)
        code = started.run(["report", str(place.dir), f"--to={place.dir / PAGE}"])
    print(f"next: {command(['list', 'runs', str(place.dir)])}")
    return code


def _check_links(folder: Path, stages: list[Stage]) -> None:
    """Raises UnsafePathError if something that the pipeline or a stage would write is a symbolic link."""
    problems = link_problems(folder, (STATE_FILE, LOCK_FILE, PAGE, *RESULT_FILES, *(stage.name for stage in stages)))
    if problems:
        raise UnsafePathError(*problems)


def check_stages(stages: list[Stage], flags: list[str]) -> None:
    """Compose the command of every stage, with empty runs to start from. Raises ConfigError with all problems."""
    having: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="sheeprlhf-") as place:
        folders = {stage.name: str(Path(place, stage.name)) for stage in stages}
        for stage in stages:
            args = parse_args([*flags, *stage.placed(folders)[1:]])
            source = Source(stage.verb, args.values.get("config-dir"))
            jobs, problems = compose_jobs(source, args.words, multirun="multirun" in args.values)
            failed = [folder for folder in folders.values() if not Path(folder).exists()]
            for problem in problems:
                if not any(folder in problem for folder in failed if folder != folders[stage.name]):
                    having.setdefault(problem, []).append(stage.name)
            if stage.verb == "train" and not problems:
                _write_placeholder_run(Path(folders[stage.name]), jobs[0].config)
    if having:
        raise ConfigError(*(f"{', '.join(names)}: {problem}" for problem, names in having.items()))


def _write_placeholder_run(folder: Path, config: RootConfig) -> None:
    """Attributes of a finished run that the checks read."""
    if isinstance(config, TrainConfig) and isinstance(config.task, BestOfNConfig):
        rows = make_folder(folder, "dataset")
        for split in ("train", "validation"):
            for name in (f"{split}.jsonl", f"{split}_pairs.jsonl"):
                create_file(rows, name)
    make_folder(folder, "final")
    create_file(folder, "config.yaml", yaml.safe_dump(config_to_dict(config)).encode())


def _run_stages(
    config: PipelineConfig, stages: list[Stage], flags: list[str], place: PipelineFolder, started: Children
) -> int:
    """Run what is not finished; the exit code of the stage that fails, else 0."""
    screen = Screen()
    folders = {stage.name: str(place.dir / stage.name) for stage in stages if stage.verb == "train"}
    skipped = [stage for stage in stages if stage.name in config.skip]
    absent = {stage.name for stage in skipped if not is_done(place.dir, place.state, stage, [])}
    wanted = [stage.without(absent) for stage in stages if stage.name not in config.skip]
    _reject_missing_stages(wanted, absent)
    for number, stage in enumerate(wanted, 1):
        head = f"[{number}/{len(wanted)}] {stage.name}:"
        words = [*stage.placed(folders)[:1], *flags, *stage.placed(folders)[1:]]
        record = place.state["stages"].setdefault(stage.name, {"seconds": 0.0})
        if is_done(place.dir, place.state, stage, words):
            record["status"] = "finished"
            screen.print(Text(f"{head} finished before", "faint"))
            continue
        extra = []
        if stage.verb == "train":
            going_on = (place.dir / stage.name / RUN_FILE).is_file()
            extra = [option_word("hydra.run.dir", folders[stage.name]), *(["resume=true"] if going_on else [])]
        record |= {"status": "running", "command": redact_command(words)}
        write_state(place.dir, place.state)
        screen.print(Text.assemble((f"{head} ", "head"), (command(redact_command([*words, *extra])), "name")))
        began = time.monotonic()
        note_seconds = partial(_note_seconds, place, record, record["seconds"], began)
        code = started.run([*words, *extra], while_it_runs=note_seconds)
        seconds = time.monotonic() - began
        if started.stopped_by is not None:
            code = 128 + started.stopped_by
        status = "stopped" if started.stopped_by is not None else "failed" if code else "finished"
        record |= {"status": status, "exit_code": code}
        note_seconds()
        style = "good" if status == "finished" else "odd" if status == "stopped" else "bad"
        exit_text = f" with exit code {code}" if status == "failed" else ""
        screen.print(Text.assemble((f"{head} ", "head"), (f"{status}{exit_text} after {seconds:.0f} s", style)))
        if code:
            return code
    return 0


def _note_seconds(place: PipelineFolder, record: dict[str, Any], before: float, began: float) -> None:
    """Keep how long a stage has taken so far: a pipeline that is killed cannot do so afterwards."""
    record["seconds"] = before + time.monotonic() - began
    write_state(place.dir, place.state)


def _reject_missing_stages(wanted: list[Stage], absent: set[str]) -> None:
    """Raises ConfigError if a stage needs one that is left out."""
    needed = {stage.name: sorted(stage.links() & absent) for stage in wanted}
    lacking = {name: names for name, names in needed.items() if names}
    if lacking:
        skip = ",".join([*sorted(absent), *lacking])
        raise ConfigError(
            *(
                f"skip leaves out {' and '.join(names)}, which {name} needs: leave out that too (skip=[{skip}]), or go "
                "on with a folder where it is finished"
                for name, names in lacking.items()
            )
        )
