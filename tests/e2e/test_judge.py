"""`reward=judge` on the command line, with a real server on loopback."""

import re
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sheeprlhf.cli import run
from tests.e2e.test_online import figures
from tests.support.judge_server import judge_server
from tests.support.runs import train_words, write_rows

ModelFolder = Callable[..., Path]
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


def test_a_server_that_is_not_there_is_reported_before_anything_is_made(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    words = words_of(url, model_folder(), tmp_path)
    began = time.monotonic()
    with pytest.raises(SystemExit) as info:
        run(words)
    assert time.monotonic() - began < 30  # about 1; this machine may be busy with other tests
    assert info.value.code == 2 and f"reward.url={url}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit) as info:
        run(["doctor", *(word for word in words[1:] if not word.startswith("hydra."))])
    assert info.value.code == 1 and re.search(rf"problem +judge +reward\.url={re.escape(url)}", capsys.readouterr().out)


def test_a_file_names_no_receiver_of_texts_or_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiment").mkdir()
    recipe = "# @package _global_\ndefaults:\n  - override /reward: judge\nreward:\n  url: http://127.0.0.1:9/v1\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(f"{recipe}  judge_model: judge-1\n")
    with pytest.raises(SystemExit) as info:
        run(["train", "task=grpo", "experiment=mine", "--config-dir", str(tmp_path)])
    assert info.value.code == 2 and "reward.url" in capsys.readouterr().err
