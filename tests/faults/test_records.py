"""Our own JSON files, damaged in every field: each command that reads them names the file and ends as it should.

A mutation removes a field, gives it another type or a number that is too large, nests it too deeply, or cuts the file.
`SEED` and `TRIALS` choose the mutations of the nightly campaign; every one is tried there by default.
"""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sheeprlhf.engine.checkpoint import read_state
from sheeprlhf.engine.manifest import MANIFEST, read_manifest, write_manifest
from sheeprlhf.security.json_records import MAX_DEPTH
from tests.support.models import ModelFolder
from tests.support.past_runs import make_past_run, write_evaluation
from tests.support.pipelines import Pretended, pipeline, write_recipe
from tests.support.runs import exit_code, killed, train_words, write_rows

Mutation = tuple[str, str]  # name, text of the file
HUGE = {"1e400": "1e400", "integer of 400 digits": "9" * 400, "integer of 5000 digits": "9" * 5_000}
WRONG: dict[str, Any] = {"null": None, "list": [[]], "object": {"x": []}, "text": "x", "number": -1.5, "bool": True}


def fields(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every field, and of every first entry of a list."""
    inner = (
        content.items() if isinstance(content, dict) else enumerate(content[:1]) if isinstance(content, list) else ()
    )
    for name, value in inner:
        yield (*path, name)
        yield from fields(value, (*path, name))


def changed(content: Any, path: tuple[Any, ...], value: Any, *, remove: bool = False) -> Any:
    content = copy.deepcopy(content)
    place = content
    for name in path[:-1]:
        place = place[name]
    if remove:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return content


def mutations(text: str) -> Iterator[Mutation]:
    """Every mutation of a file's text."""
    content = json.loads(text)
    for path in fields(content):
        name = ".".join(map(str, path))
        yield f"{name} removed", json.dumps(changed(content, path, None, remove=True))
        for kind, value in WRONG.items():
            yield f"{name} = {kind}", json.dumps(changed(content, path, value))
        for kind, digits in HUGE.items():
            yield f"{name} = {kind}", json.dumps(changed(content, path, "HUGE")).replace('"HUGE"', digits)
        deep = "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)
        yield f"{name} nested", json.dumps(changed(content, path, "DEEP")).replace('"DEEP"', deep)
    for kind, odd in {"empty": "", "list": "[]", "number": "7", "deep": "[" * 100_000, "NUL": "\0" * 99}.items():
        yield kind, odd
    yield "bytes that are no text", "\udcff{}"
    yield from ((f"cut after {end}", text[:end]) for end in range(1, len(text) - 1, max(1, len(text) // 20)))
    first = next(iter(content))
    yield "repeated key", f"{text.rstrip()[:-1]}, {json.dumps(first)}: {json.dumps(content[first])}}}"


def chosen(text: str, number: int | None) -> list[Mutation]:
    """A sample of the mutations; None takes all, or `TRIALS` of the environment."""
    found = list(mutations(text))
    number = number or int(os.environ.get("TRIALS", str(len(found))))
    return random.Random(os.environ.get("SEED", "2026")).sample(found, min(number, len(found)))


def write(path: Path, text: str) -> None:
    path.write_bytes(text.encode(errors="surrogateescape"))


@pytest.fixture
def outcome(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """A function (words) -> exit code and all that was printed, which has no traceback and no unexpected failure."""

    def call(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        code = exit_code(list(words))
        printed = " ".join("".join(capsys.readouterr()).split())  # lines are wrapped at the terminal's width
        assert "Traceback" not in printed and "failed unexpectedly" not in printed, printed
        return code, printed

    return call


AMOUNTS = [pytest.param(3, marks=pytest.mark.slow), pytest.param(None, marks=pytest.mark.nightly)]
FILES = ("run.json", "data_report.json", "eval/perplexity-test-final.json", "checkpoints/step-4/state.json")


@pytest.mark.parametrize("amount", AMOUNTS)  # tests/unit/apps/test_list.py and test_report.py have a few of each file
@pytest.mark.parametrize("name", FILES)
def test_list_and_report_show_the_other_run(name, amount, outcome, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    root = tmp_path / "runs"
    odd = make_past_run(root / "odd", status="running" if "checkpoints" in name else "finished", config_hash="h")
    make_past_run(root / "good", 1, task="dpo")
    write_evaluation(odd, "perplexity-test-final", task="perplexity", perplexity=8.5, nll=2.1)
    state = {"step": 4, "items_seen": 9, "best_metric": 1.5, "best_step": 2, "extra": {"kl_coeff": 0.5}}
    (odd / "checkpoints" / "step-4").mkdir(parents=True)
    (odd / "checkpoints" / "step-4" / "state.json").write_text(json.dumps(state))
    text = (odd / name).read_text()
    for kind, mutated in chosen(text, amount):
        write(odd / name, mutated)
        code, listed = outcome("list", "runs", str(root))
        assert code == 0 and str(root / "good") in listed and str(odd) in listed, kind
        code, reported = outcome("report", str(root), "--to", str(tmp_path / "report.html"))
        page = (tmp_path / "report.html").read_text()
        assert code == 0 and "dpo says 4" in page, kind
        for shown in (listed, reported) if name != "data_report.json" else (reported,):
            printed = shown.count(f"{odd / name} is damaged")
            assert printed == (f"{odd / name} is damaged" in listed + reported), (kind, shown)


@pytest.mark.parametrize("amount", AMOUNTS)  # tests/unit/engine/test_rundir.py has a few
def test_a_run_that_is_resumed(amount, outcome, tmp_path: Path) -> None:
    folder = make_past_run(tmp_path / "run")
    before = sorted(path.name for path in folder.iterdir())
    usual = {"status": "running", "started": 1.7e9, "config_hash": "other", "command": ["train"], "step": 3}
    for kind, mutated in chosen(json.dumps(usual), amount):
        write(folder / "run.json", mutated)
        code, printed = outcome("train", f"resume_from={folder}")
        assert code == 2 and (f"{folder}/run.json is damaged" in printed or "other" in printed), (kind, printed)
        assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("amount", [3, pytest.param(None, marks=pytest.mark.nightly)])
def test_a_pipeline_that_is_resumed(amount, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sheeprlhf.apps.pipeline.check_stages", lambda *_: None)
    small = [write_recipe(tmp_path / "own"), "experiment=small"]
    pretended = Pretended(monkeypatch)
    pretended.codes["task=rm"] = 1
    assert pipeline(*small) == 1
    [file] = (tmp_path / "logs" / "pipelines").glob("*/pipeline.json")
    pretended.commands.clear()
    pretended.codes["task=sft"] = 1  # so that none gets farther
    for kind, mutated in chosen(file.read_text(), amount):
        write(file, mutated)
        code = pipeline(*small, f"resume_from={file.parent}")
        printed = capsys.readouterr().err
        assert "Traceback" not in printed and "failed unexpectedly" not in printed, kind
        assert code == (2 if "pipeline.json is damaged" in printed or "another recipe" in printed else 1), (
            kind,
            printed,
        )


def rehash(folder: Path) -> None:
    """Make what was changed in a checkpoint a part of it."""
    facts = read_manifest(folder)
    del facts["files"], facts["format"]
    (folder / MANIFEST).unlink()
    write_manifest(folder, facts)


@pytest.mark.nightly
def test_all_readers_of_a_real_run(outcome, tmp_path: Path, model_folder: ModelFolder, monkeypatch) -> None:
    """Resume, evaluate, export and chat, with each file of a real run damaged in turn."""
    rows, whole = write_rows(tmp_path / "rows.jsonl"), tmp_path / "whole"
    amount = int(os.environ.get("TRIALS", "12"))

    def words(folder: Path, *more: str) -> list[str]:
        return train_words(model_folder(), rows, folder, "task.max_num_steps=8", *more)

    assert outcome(*words(whole))[0] == 0
    assert outcome("eval", "task=perplexity", f"experiment_dir={whole}")[0] == 0
    for name in ("state.json", MANIFEST):
        text = (whole / "checkpoints" / "step-8" / name).read_text()
        for kind, mutated in chosen(text, amount):
            folder = killed(shutil.copytree(whole, tmp_path / "run"))
            write(folder / "checkpoints" / "step-8" / name, mutated)
            if name == "state.json":
                rehash(folder / "checkpoints" / "step-8")
            code, printed = outcome(*words(folder, "resume=true"))
            assert code == 0 and ("after step 4" in printed or "skipping a damaged" not in printed), (kind, printed)
            assert read_state(folder / "checkpoints" / "step-8").step == 8
            shutil.rmtree(folder)
    for name in ("run.json", "data_report.json", "eval/perplexity-test-final.json"):
        text = (whole / name).read_text()
        for kind, mutated in chosen(text, amount):
            write(whole / name, mutated)
            message = f"{whole / name} is damaged"
            code, printed = outcome("export", str(whole), "--to", str(tmp_path / "exported"))
            assert code == (2 if message in printed else 0), (kind, printed)
            shutil.rmtree(tmp_path / "exported", ignore_errors=True)
            code, printed = outcome("eval", "task=perplexity", f"experiment_dir={whole}", f"data.train_file={rows}")
            assert code == (2 if message in printed else 0), (kind, printed)
        (whole / name).write_text(text)
