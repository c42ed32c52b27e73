"""The folder of a pipeline: what its stages are, how far they are, and which folder a command goes on with.

`<root_dir>/<time>-<experiment>/pipeline.json` says it all; a stage that trains has its run in `<stage>/` beside it.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import sheeprlhf
from sheeprlhf.config.pipeline import Stage
from sheeprlhf.config.registry import NOT_IN_HASH
from sheeprlhf.config.run_lookup import next_order, order_of
from sheeprlhf.engine.rundir import is_finished, make_unique_dir
from sheeprlhf.security.json_records import load_json
from sheeprlhf.security.record_schemas import PIPELINE
from sheeprlhf.security.redaction import redact_command
from sheeprlhf.structure.run import PipelineConfig
from sheeprlhf.utils.errors import ConfigError, RecordError
from sheeprlhf.utils.home import expand_home
from sheeprlhf.utils.output import write_file

STATE_FILE = "pipeline.json"
Recipe = Mapping[str, list[str]]  # of each stage the words of its command, where it runs left open


class Place(NamedTuple):
    """Directory of a pipeline.

    Attributes:
        dir: its folder, absolute; it exists.
        state: what its pipeline.json says.
        note: one line for the user.
    """

    dir: Path
    state: dict[str, Any]
    note: str


def recipe_of(stages: list[Stage]) -> dict[str, list[str]]:
    """Identity of a pipeline's recipe, without secrets."""
    return {stage.name: redact_command([stage.verb, *stage.flags, *stage.words]) for stage in stages}


def read_state(folder: Path) -> dict[str, Any]:
    """The content of pipeline.json; empty if it is missing.

    Raises:
        RecordError: it is damaged.
    """
    return load_json(folder / STATE_FILE, PIPELINE)


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """All of it, or what was there before."""
    write_file(folder, STATE_FILE, json.dumps(state, indent=1).encode())


def choose_folder(config: PipelineConfig, stages: list[Stage], command: list[str]) -> Place:
    """Find the pipeline to go on with, or make a new folder.

    Raises:
        ConfigError: there is none to go on with, or it has another recipe.
    """
    recipe = recipe_of(stages)
    if config.resume and config.resume_from is not None:
        raise ConfigError("resume=true and resume_from name two pipelines: give one of them")
    if config.resume_from is not None:
        folder = expand_home(config.resume_from).absolute()
        state = read_state(folder)
        if not state:
            raise ConfigError(
                f"resume_from={config.resume_from} is no pipeline's folder: it has no {STATE_FILE}; "
                f"{config.root_dir} has those that were made"
            )
        _refuse_changes(f"resume_from={config.resume_from}", state, recipe)
        return Place(folder, state, f"going on with {folder}")
    made = _made_pipelines(Path(config.root_dir).absolute())
    if config.resume:
        same = [(folder, state) for folder, state in made if state.get("experiment") == config.experiment]
        for folder, state in same:
            if not list(differences(state["recipe"], recipe)):
                return Place(folder, state, f"going on with {folder}")
        for folder, state in same:
            if "finished" not in state:
                _refuse_changes(f"resume=true: {folder}", state, recipe)
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
    return Place(folder, state, f"{fresh if config.resume else 'folder:'} {folder}")


def _made_pipelines(root_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Folder and state of every pipeline, newest first; one whose pipeline.json is damaged is named and left out."""
    made = []
    for path in root_dir.glob(f"*/{STATE_FILE}"):
        try:
            made.append((path.parent, read_state(path.parent)))
        except RecordError as error:
            print(f"warning: skipping a pipeline: {error}", file=sys.stderr)
    return sorted(made, key=lambda found: (order_of(found[1]), found[0].name), reverse=True)


def _refuse_changes(what: str, state: dict[str, Any], recipe: Recipe) -> None:
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
        old, new = _by_key(before[name]), _by_key(words)
        for key in dict.fromkeys([*old, *new]):
            if old.get(key) != new.get(key):
                yield f"{name}: {key} was {old.get(key, 'not given')} and is {new.get(key, 'not given')}"
    if not before.keys() ^ now.keys() and list(before) != list(now):
        yield f"the order was {', '.join(before)} and is {', '.join(now)}"


def _by_key(words: Any) -> dict[str, str]:
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
