"""Rewards on the command line: a judge on loopback, and functions that read columns of the dataset."""

import json
import re
import socket
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sheeprlhf.cli import run
from tests.e2e.test_online import figures
from tests.support.judge_server import judge_server
from tests.support.models import ModelFolder
from tests.support.runs import digests, exit_code, rejected, train_words, write_rows

KEY = "a-key-of-nobody-1234567890"


def words_of(url: str, model: Path, tmp_path: Path, *more: str) -> list[str]:
    data = write_rows(tmp_path / "rows.jsonl")
    words = train_words(model, data, tmp_path / "run", "task.max_num_steps=4", task="grpo")
    judge = ["reward=judge", f"reward.url={url}", "reward.judge_model=judge-1"]
    return [*(word for word in words if not word.startswith("reward")), *judge, *more]


def test_a_run_learns_from_a_judge_and_counts_its_failures(
    tmp_path: Path, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An odd number of characters is a rating, an even one no number; the key is in the header and in no file."""
    monkeypatch.setenv("JUDGE_ACCESS", KEY)
    template = "reward.judge_prompt='{response}'"
    options = [template, "reward.judge_failure_score=1", "reward.api_key_variable=JUDGE_ACCESS", "task.save_rollouts=1"]
    with judge_server(lambda question, _: (200, "8" if len(question) % 2 else "no idea")) as server:
        run(words_of(server.url, model_folder(), tmp_path, *options))
    assert {request.authorization for request in server.requests} == {f"Bearer {KEY}"}
    rows = pq.read_table(tmp_path / "run" / "rollouts" / "rollout-000000.parquet").to_pylist()
    scores = [8.0 if len(row["response"]) % 2 else 1.0 for row in rows]
    assert [row["reward/judge"] for row in rows] == scores and {1.0, 8.0} == set(scores)
    found = figures(tmp_path / "run")
    assert found["objective/judge_failures"] == [scores.count(1.0)]
    assert found["objective/scores"] == pytest.approx([sum(scores) / len(scores)])
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_run_whose_judge_fails_saves_its_state_and_goes_on_where_it_was(
    tmp_path: Path, model_folder: ModelFolder
) -> None:
    """The second of two rollouts gets no scores; there is no other checkpoint than that of the failure."""
    model, options = model_folder(), ["reward.judge_prompt='{response}'", "reward.normalize=true"]
    options += ["task.rollout_size=12", "task.save_interval=99", "task.eval_interval=99"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    with judge_server(lambda question, _: (200, str(len(question) % 10))) as server:
        run(words_of(server.url, model, whole, *options))
        reply, asked = server.reply, len(server.requests)
        server.requests.clear()
        server.reply = lambda question, _: reply(question, 0) if len(server.requests) <= asked // 2 else (400, "")
        assert exit_code(words_of(server.url, model, stopped, *options)) == 1
        assert [path.name for path in (stopped / "run" / "checkpoints").iterdir()] == ["step-2"]
        server.reply = reply
        run(words_of(server.url, model, stopped, *options, "resume=true"))
    assert digests(stopped / "run" / "final") == digests(whole / "run" / "final")


def test_a_server_that_is_not_there_is_reported_before_anything_is_made(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    words = words_of(url, model_folder(), tmp_path)
    began = time.monotonic()
    assert f"reward.url={url}" in rejected(words, capsys)
    assert time.monotonic() - began < 30  # about 1; this machine may be busy with other tests
    assert not (tmp_path / "run").exists()
    assert exit_code(["doctor", *(word for word in words[1:] if not word.startswith("hydra."))]) == 1
    assert re.search(rf"problem +judge +reward\.url={re.escape(url)}", capsys.readouterr().out)


def rows_with_answers(path: Path, *columns: str) -> Path:
    rows = [{"prompt": f"what is {i}?", "answer": str(i), "meta": {"level": i, "tags": [None, "a"]}} for i in range(16)]
    path.write_text("".join(json.dumps({name: row[name] for name in ("prompt", *columns)}) + "\n" for row in rows))
    return path


def words(model: Path, data: Path, run_dir: Path, function: str, task: str, *extra: str) -> list[str]:
    path = f"reward.path=tests.support.rewards:{function}"
    return [*train_words(model, data, run_dir, "task.max_num_steps=2", path, *extra, task=task)]


@pytest.mark.slow
def test_prompts_alone_with_answers(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = model_folder(), rows_with_answers(tmp_path / "rows.jsonl", "answer", "meta")
    run(words(model, data, tmp_path / "run", "by_answer", "grpo"))
    capsys.readouterr()
    reward = ["reward=function", "reward.path=tests.support.rewards:by_answer", "generation.max_new_tokens=4"]
    for task in (["task=reward"], ["task=frontier", "task.best_of=2", "task.num_samples=4"]):
        run(["eval", *task, f"experiment_dir={tmp_path / 'run'}", *reward])
    found = {path.name.partition("-")[0] for path in (tmp_path / "run" / "eval").glob("*.json")}
    assert found == {"reward", "frontier"}
    run(words(model, data, tmp_path / "slow", "slow_answer", "rloo"))


@pytest.mark.parametrize("lacks", ["train", "validation"])
def test_a_column_that_is_missing_is_refused_before_anything_is_loaded(
    lacks: str,
    tmp_path: Path,
    model_folder: ModelFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("nothing was to be loaded")

    monkeypatch.setattr("sheeprlhf.task.models.load_rl_models", load)
    whole = rows_with_answers(tmp_path / "whole.jsonl", "answer", "meta")
    part = rows_with_answers(tmp_path / "part.jsonl", "answer")
    data = [f"data.{split}_file={part if split == lacks else whole}" for split in ("train", "validation")]
    printed = rejected(words(model_folder(), whole, tmp_path / "run", "by_answer", "grpo", *data), capsys)
    assert "'meta'" in printed and f"the {lacks} rows" in printed and "prompt, answer" in printed
