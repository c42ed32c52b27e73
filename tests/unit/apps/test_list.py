"""`list` tells what there is, and what became of every run, whatever lies about in its directory."""

import fcntl
import json
import os
import threading
import time
from pathlib import Path

import pytest

from sheeprlhf.apps.runs import find_past_runs, past_run
from sheeprlhf.cli import run
from sheeprlhf.config.registry import choices
from sheeprlhf.engine.rundir import RunLock, is_locked
from tests.support.past_runs import write_evaluation
from tests.support.runs import exit_code

STARTED = 1_700_000_000.0


def make_run(root: Path, number: int = 0, *, name: str = "default", **info: object) -> Path:
    """A run directory as training leaves it, with a run.json of this content besides the usual."""
    folder = root / "docstrings" / "tiny" / "sft" / f"time-{number}" / name
    folder.mkdir(parents=True)
    usual = {"status": "running", "config_hash": "h", "data": "docstrings", "model": "tiny", "task": "sft"}
    (folder / "run.json").write_text(json.dumps(usual | {"started": STARTED + number} | info))
    return folder


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    run(["list", *words])
    return capsys.readouterr().out


def listed_run(folder: Path):
    """What `list runs` knows of one run."""
    (found,) = find_past_runs(folder).runs
    return past_run(*found)


def test_without_words_everything_is_listed(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    printed = listed(capsys)
    for group in ("task", "model", "data", "fabric", "optim"):
        assert all(f"  {name} " in printed for name in choices(group)), group
    assert "Runs in logs/runs" in printed
    assert "task=sft" in printed
    assert max(map(len, printed.splitlines())) <= 120
    assert list(tmp_path.iterdir()) == []


def test_runs_are_listed_newest_first_with_all_that_is_known(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    early = make_run(tmp_path, 0, status="finished", step=8, stopped_early=True)
    old = make_run(tmp_path, 1, status="finished", step=12_480, best_metric=2.44151)
    write_evaluation(old, "perplexity-test-final", perplexity=8.25, nll=2.11, tokens=9)
    new = make_run(tmp_path, 2, model="opt", data="summarization")
    (new / "metrics.csv").write_text("step,tag,value,wall_time\n5,train/loss,3.0,1\n10,train/loss,2.0,2\n15,tr")
    printed = listed(capsys, "runs", str(tmp_path))
    head, *lines = [line.split() for line in printed.splitlines()[1:]]
    assert head == "started data model task state step best val results directory".split()
    assert lines[0][2:] == ["summarization", "opt", "sft", "unfinished", "10", "-", "-", str(new)]
    assert lines[1][2:7] == ["docstrings", "tiny", "sft", "finished", "12,480"]
    assert " 2.4415  perplexity 8.25, nll 2.11  " in printed
    assert printed.splitlines()[-2].endswith(f"  {old}")
    assert lines[2][5:8] == ["stopped", "early", "8"] and lines[2][-1] == str(early)
    assert lines[1][:2] == time.strftime("%Y-%m-%d %H:%M", time.localtime(STARTED + 1)).split()


def test_a_run_that_works_is_shown_as_running_and_keeps_its_lock(tmp_path):
    folder = make_run(tmp_path)
    assert listed_run(folder).state == "unfinished"
    with RunLock(folder):
        assert listed_run(folder).state == "running"
        assert is_locked(folder)
    assert listed_run(folder).state == "unfinished"
    assert (folder / ".lock").exists()


def test_looking_does_not_keep_a_run_from_its_lock(tmp_path):
    """A look takes microseconds; this one lasts until a moment after the run has found its lock taken."""
    with RunLock(tmp_path):
        pass  # so that there is a file to look at
    with (tmp_path / ".lock").open() as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        end_of_look = threading.Timer(0.03, lambda: fcntl.flock(look, fcntl.LOCK_UN))
        end_of_look.start()
        with RunLock(tmp_path):
            assert is_locked(tmp_path)
        end_of_look.join()


def test_an_unfinished_run_stands_where_its_records_or_checkpoints_say(tmp_path):
    folder = make_run(tmp_path)
    assert (listed_run(folder).step, listed_run(folder).best) == (0, None)
    for step in (9, 100):
        (folder / "checkpoints" / f"step-{step}").mkdir(parents=True)
        state = {"step": step, "items_seen": 1, "best_metric": 100.0 / step, "best_step": step, "extra": {}}
        (folder / "checkpoints" / f"step-{step}" / "state.json").write_text(json.dumps(state))
    assert (listed_run(folder).step, listed_run(folder).best) == (100, 1.0)
    (folder / "metrics.csv").write_text("step,tag,value,wall_time\n" + "x" * 50_000 + "\n107,train/loss,1,1\n")
    assert (listed_run(folder).step, listed_run(folder).best) == (107, 1.0)
    (folder / "metrics.csv").unlink()
    (folder / "checkpoints" / "step-100" / "state.json").write_text('{"step": 100}')
    damaged = listed_run(folder)
    assert (damaged.step, damaged.best, len(damaged.problems)) == (9, 100.0 / 9, 1)
    assert "step-100" in damaged.problems[0] and "best_metric" in damaged.problems[0]


def test_the_newest_result_of_each_metric_counts_and_says_what_it_is_of(tmp_path):
    folder = make_run(tmp_path)
    write_evaluation(folder, "a", perplexity=9.0, nll=2.2, tokens=3, time="2026-01-02T00:00:00+0000")
    write_evaluation(folder, "b", perplexity=8.0, weights="best", split="validation", time="2026-01-03T01:00:00+0200")
    write_evaluation(folder, "c", perplexity=7.0, time="2026-01-01T00:00:00+0000")
    write_evaluation(folder, "d", rougeL=28.123456, data="local", table={"rougeL": [1.0]})
    assert listed_run(folder).results == ["perplexity 8 (best, validation)", "nll 2.2", "rougeL 28.12 (local)"]


HEAD = "step,tag,value,wall_time\n"


@pytest.mark.parametrize(
    ("rows", "shown"),
    [
        ("2,val/rewards/accuracies,0.5,1\n4,val/rewards/accuracies,0.875,1\n", ["accuracy 0.875"]),
        ("4,val/rewards/margins,0.03125,1\n4,val/rewards/accuracies,1.0,1\n", ["margin 0.03125", "accuracy 1"]),
        ("4,val/rewards/accuracies,nan,1\n4,val/rewards/margins,high,1\n4,val/loss,1,1\n4,val/loss\n", []),
        ("4,train/rewards/accuracies,0.5,1\n", []),
        ("4,val/rewards/accuracies,0.5", []),  # cut off
    ],
)
def test_a_run_on_pairs_shows_what_its_last_validation_reported(rows, shown, tmp_path):
    folder = make_run(tmp_path, task="rm", status="finished", step=4)
    (folder / "metrics.csv").write_text(HEAD + rows)
    assert listed_run(folder).results == [f"{text} (validation)" for text in shown]


STRANGE = {
    "torn": "{",
    "empty": "",
    "list": "[]",
    "deep": "[" * 100_000,
    "no start": "{}",
    "large": '{"started": 1, "x": "' + "x" * 2_000_000 + '"}',
}


@pytest.mark.parametrize("kind", STRANGE)
def test_an_unreadable_run_file_is_shown_as_such(kind, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "300")  # enough for any temporary directory
    folder = make_run(tmp_path)
    (folder / "run.json").write_text(STRANGE[kind])
    (folder / "config.yaml").write_text("data: {config_name: mine}\nmodel: {config_name: opt}\ntask: [1]\n")
    printed = listed(capsys, "runs", str(tmp_path))
    assert printed.splitlines()[2].split() == ["?", "mine", "opt", "?", "unreadable", "?", "-", "-", str(folder)]
    assert str(folder / "run.json") in " ".join(printed.splitlines()[3:])


def test_values_that_are_no_values_are_left_out(tmp_path):
    folder = make_run(tmp_path, status="finished")
    (folder / "eval").mkdir()
    texts = ['{"perplexity": NaN, "nll": Infinity, "a": 1e999, "b": true}', '{"c": "1.0"}', "[" * 100_000, "{", "5"]
    for number, text in enumerate(texts):
        (folder / "eval" / f"{number}.json").write_text(text)
    write_evaluation(folder, "good", good=1.5)
    write_evaluation(folder, "odd time", good=2.5, time=["2026"])
    run_ = listed_run(folder)
    assert (run_.state, run_.step, run_.best, run_.results) == ("finished", 0, None, ["good 1.5"])
    assert len(run_.problems) == 5 and sum(str(folder / "eval") in problem for problem in run_.problems) == 5
    for field, value in (
        ("step", True),
        ("best_metric", "low"),
        ("started", 1e300),
        ("data", ["x"]),
        ("step", 10**400),
    ):
        (folder / "run.json").write_text(json.dumps({"started": 1, "status": "finished"} | {field: value}))
        run_ = listed_run(folder)
        assert (run_.state, run_.step, run_.best) == ("unreadable", None, None)
        assert f"field {field} " in run_.problems[0]


def test_text_of_a_stranger_cannot_speak_to_the_terminal(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "300")  # enough for any temporary directory
    evil = "\x1b]0;title\x07\x1b[31mred[/bold]\n\u202ehf_abcdefghijklmnopqrstuvwxyzABCDEFGH"
    folder = make_run(tmp_path, name="a\x1b[2Jb\nc", data=evil, model="[red]x[/red]", status="finished")
    write_evaluation(folder, "x", **{"[link=x]\x1b[1m": 1.5}, weights=evil)
    printed = listed(capsys, "runs", str(tmp_path))
    assert not set("\x1b\x07\x9b\u202e") & set(printed)
    assert "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH" not in printed
    assert "[red]x[/red]" in printed
    assert "[link=x] 1.5" in printed
    assert len(printed.splitlines()) == 3


def test_what_is_no_plain_file_is_not_waited_for(tmp_path):
    folder = make_run(tmp_path)
    (folder / "eval").mkdir()
    for name in ("metrics.csv", "eval/x.json", ".lock"):
        os.mkfifo(folder / name)
    os.symlink("/dev/zero", folder / "eval" / "zero.json")
    start = time.perf_counter()
    assert listed_run(folder)[4:7] == (0, None, []) and len(listed_run(folder).problems) == 2
    (folder / "run.json").unlink()
    os.mkfifo(folder / "run.json")
    assert listed_run(folder).state == "unreadable"
    assert time.perf_counter() - start < 60  # this machine may be busy with other tests


def test_links_are_not_followed_and_the_search_ends(tmp_path, monkeypatch):
    folder = make_run(tmp_path)
    os.symlink(tmp_path, tmp_path / "docstrings" / "loop")
    assert [found for found, _ in find_past_runs(tmp_path).runs] == [folder]
    monkeypatch.setattr("sheeprlhf.apps.runs.MAX_FOLDERS", 3)
    assert "3 folders" in find_past_runs(tmp_path).note


def test_many_runs_are_cut_and_counted(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(5):
        make_run(tmp_path / "logs" / "runs", number)
    printed = listed(capsys)
    assert "(the newest 3 of 5)" in printed
    assert [f"time-{number}" in printed for number in range(5)] == [False, False, True, True, True]
    assert "`list runs`" in printed
    assert listed(capsys, "runs").count("time-") == 5
    assert listed(capsys, "root_dir=logs").count("time-") == 5


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("modls", "`list models`"),
        ("opt", "`show opt`"),
        ("model=opt", "`show model=opt`"),
        ("zzzz", "tasks, models,"),
        ("runs nowhere", "nowhere is neither a folder nor a section"),
        ("runs mai", "main?"),
        ("root_dir=mai", "main?"),
        ("--hlep", "--hlep"),
    ],
)
def test_a_wrong_word_is_answered(words, expected, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "main").mkdir()
    assert exit_code(["list", *words.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert expected in printed.err
