"""Best of n as a user runs it: the dataset, what is fine-tuned on it, and a run that was stopped."""

import json
import os
import shlex
import signal
from pathlib import Path

import pytest

from sheeprlhf.cli import run
from sheeprlhf.task.train.best_of_n import RowWriter
from tests.support.jobs import JobServer
from tests.support.models import ModelFolder
from tests.support.runs import digests, exit_code, write_rows
from tests.support.vllm_server import vllm_server


def words(model: Path, data: Path, run_dir: Path, *extra: str) -> list[str]:
    """48 prompts in 4 rollouts, and 20 held out in 2."""
    held_out = write_rows(data.with_name("held_out.jsonl"), 20, seed=1)
    return [
        *("train", "task=best_of_n", "model=auto", f"model.repo_name={model}", "data=local"),
        *(f"data.train_file={data}", f"data.validation_file={held_out}", f"data.test_file={held_out}"),
        *("data.max_length=120", "data.max_prompt_length=70", "task.num_generations=4", "task.rollout_size=48"),
        *(
            "generation.max_new_tokens=5",
            'generation.stop_strings=["a","e","\ufffd"]',
            "data.minimum_response_length=1",
        ),
        *("reward=function", "reward.path=tests.support.rewards:spread", f"hydra.run.dir={run_dir}", *extra),
    ]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_signal_to_stop_is_not_kept_waiting_for_servers(tmp_path: Path, model_folder: ModelFolder) -> None:
    """No server answers in the second rollout of 12 prompts, in which the signal comes."""
    model, data = model_folder(), write_rows(tmp_path / "rows.jsonl")
    with vllm_server(model) as server:

        def fault(path: str, number: int) -> int | None:
            if path != "/inference/v1/generate" or number <= 14:  # a probe is asked too
                return None
            os.kill(os.getpid(), signal.SIGTERM)
            return 503

        server.fault = fault
        servers = ["rollout=vllm", f"rollout.urls=[{server.url}]", "rollout.timeout=240", "task.self_check=off"]
        assert exit_code(words(model, data, tmp_path / "run", *servers)) == 128 + signal.SIGTERM
    assert [path.name for path in (tmp_path / "run" / "parts").iterdir()] == ["train-000000.jsonl"]


@pytest.mark.slow
def test_fine_tuning_on_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded model and its rule; then the command that the run says comes next."""
    options = ["data.num_samples=40", "task.num_generations=4", "task.rollout_size=64", "generation.max_new_tokens=12"]
    run(["train", "task=best_of_n", *options, f"hydra.run.dir={tmp_path / 'best'}", "task.min_score=0.5"])
    printed = capsys.readouterr().err
    kept = rows(tmp_path / "best" / "dataset" / "train.jsonl")
    assert len(kept) > 5 and all(row["score"] == 1.0 and row["n"] == 4 and row["prompt"] for row in kept)
    pairs = rows(tmp_path / "best" / "dataset" / "train_pairs.jsonl")
    assert 0 < len(pairs) < len(kept) and all(pair["chosen"] != pair["rejected"] for pair in pairs)
    report = json.loads((tmp_path / "best" / "best_of_n.json").read_text())
    assert report["train"]["kept"] == len(kept) < report["train"]["prompts"]
    assert report["train"]["best"] > report["train"]["mean"]
    assert "[best] score" in printed and "below min_score" in printed
    assert json.loads((tmp_path / "best" / "run.json").read_text())["status"] == "finished"
    assert not (tmp_path / "best" / "parts").exists() and not (tmp_path / "best" / "checkpoints").exists()

    command = shlex.split(printed.split("next: ")[1])
    assert command[:4] == ["python", "sheeprlhf.py", "train", "task=sft"]
    run([*command[2:], "task.max_num_steps=2", f"hydra.run.dir={tmp_path / 'sft'}"])
    printed = capsys.readouterr().err
    data = json.loads((tmp_path / "sft" / "data_report.json").read_text())["splits"]["train"]
    assert data["kept"] == len(kept)
    assert (tmp_path / "sft" / "final").is_dir()
    assert exit_code(["train", "task=dpo", f"task.sft_experiment_dir={tmp_path / 'best'}"]) != 0
    assert "task=best_of_n" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_in_the_same_bytes(
    tmp_path: Path, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    run(words(model_folder(), data, tmp_path / "whole"))
    whole = digests(tmp_path / "whole" / "dataset")
    prompts = [row["prompt"] for row in rows(data)]
    kept = [row["prompt"] for row in rows(tmp_path / "whole" / "dataset" / "train.jsonl")]
    assert kept == [prompt for prompt in prompts if prompt in kept]  # in order, none twice
    plain, calls = RowWriter.write, []

    def stopped(self: RowWriter, split: str, number: int, rows: list) -> None:
        """By a signal after the second rollout, by an exception inside the fifth."""
        calls.append((split, number))
        if len(calls) == 5:
            raise KeyboardInterrupt
        plain(self, split, number, rows)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RowWriter, "write", stopped)
    for _ in range(2):
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            run(words(model_folder(), data, tmp_path / "stopped", "resume=true"))
        assert not (tmp_path / "stopped" / "dataset").exists()
    run(words(model_folder(), data, tmp_path / "stopped", "resume=true"))
    assert calls == [
        ("train", 0),
        ("train", 1),
        ("train", 2),
        ("train", 3),
        *[("validation", 0)] * 2,
        ("validation", 1),
    ]
    assert digests(tmp_path / "stopped" / "dataset") == whole
    for name in ("best_of_n.json", "samples/step-1.txt"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_nothing_kept_is_an_error(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    assert exit_code(words(model_folder(), rows, tmp_path / "run", "task.min_score=9")) != 0
    printed = capsys.readouterr().err
    assert "kept" in printed and "task.min_score=9" in printed
    assert not (tmp_path / "run" / "dataset").exists()


def test_prompts_alone_with_answers(tmp_path: Path, model_folder: ModelFolder) -> None:
    """Of a file where some rows have a response; the reward reads further columns."""
    data = write_rows(tmp_path / "rows.jsonl", 16)
    lines = rows(data)
    for number, line in enumerate(lines):
        line |= {"prompt": f"what is {number}?", "answer": str(number), "meta": {"level": number, "tags": [None, "a"]}}
        if number % 2:
            del line["response"]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = [f"data.{split}_file={data}" for split in ("validation", "test")]
    run(words(model_folder(), data, tmp_path / "run", *options, "reward.path=tests.support.rewards:by_answer"))
    assert json.loads((tmp_path / "run" / "best_of_n.json").read_text())["train"]["prompts"] == 16
    kept = {row["prompt"] for row in rows(tmp_path / "run" / "dataset" / "train.jsonl")}
    assert kept and kept <= {line["prompt"] for line in lines}


@pytest.mark.nightly
def test_two_processes_write_what_one_writes(server: JobServer, tmp_path: Path, model_folder: ModelFolder) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    job = server.start_ranks(words(model_folder(), data, tmp_path / "two"), tmp_path / "log", 2)
    run(words(model_folder(), data, tmp_path / "one"))
    assert job.wait(150) == 0, job.text()
    assert digests(tmp_path / "two" / "dataset") == digests(tmp_path / "one" / "dataset")
