"""The surroundings of a run change nothing: network, other data, hash seeds, closed or ASCII streams."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sheeprlhf.cli import run
from tests.support.jobs import JobServer
from tests.support.models import ModelFolder
from tests.support.past_runs import make_past_run
from tests.support.runs import digests, killed, result_of, train, train_words, write_rows

SHORT = ["task.epochs=1", "task.num_sample_prompts=0"]  # 8 steps
LORA = ["model.finetune_mode=LORA", "model.lora_cfg.rank=4", "model.lora_cfg.dropout=0.1"]


def test_no_socket_is_opened(tmp_path: Path, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and evaluation of a local model, with the hub's offline switch off."""
    asked: list[str] = []

    def refused(*words: object, **_: object) -> None:
        asked.append(str(words[:2]))
        raise OSError("no network in this test")

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket.socket, "connect_ex", refused)
    run_dir = train(model_folder(), write_rows(tmp_path / "rows.jsonl"), tmp_path / "run", *SHORT)
    run(["eval", "task=perplexity", f"experiment_dir={run_dir}"])
    assert (run_dir / "eval").is_dir()
    assert asked == []


def test_other_data_is_refused_and_the_run_unchanged(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file has other rows under the same name when the run is gone on with."""
    data = write_rows(tmp_path / "rows.jsonl")
    run_dir = train(model_folder(), data, tmp_path / "run", *SHORT)
    killed(run_dir)
    before, rows = digests(run_dir / "checkpoints"), data.read_text()
    write_rows(data, seed=1)
    with pytest.raises(SystemExit) as stopped:
        train(model_folder(), data, run_dir, *SHORT, "resume=true")
    assert stopped.value.code != 0
    message = capsys.readouterr().err
    assert "other data" in message and "Traceback" not in message
    assert digests(run_dir / "checkpoints") == before and not (run_dir / "final").exists()
    data.write_text(rows)
    train(model_folder(), data, run_dir, *SHORT, "resume=true")
    assert (run_dir / "final").is_dir()


@pytest.mark.slow
def test_the_seed_of_hashes_and_the_directory_change_no_weight(
    server: JobServer, tmp_path: Path, model_folder: ModelFolder
) -> None:
    """The server's process has its own seed of hashes. Workers and intervals: tests/e2e/test_sft.py."""
    data = write_rows(tmp_path / "rows.jsonl")
    expected = result_of(train(model_folder(), data, tmp_path / "first", *SHORT, *LORA), 8)
    (tmp_path / "elsewhere").mkdir()
    words = train_words(model_folder(), data, tmp_path / "second", *SHORT, *LORA)
    job = server.start(words, tmp_path / "elsewhere" / "log")
    assert job.wait(400) == 0, job.text()
    assert result_of(tmp_path / "second", 8) == expected


ROOT = Path(__file__).parents[2]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of a shell in which `$S` is the program."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONUTF8", "PYTHONIOENCODING")}
    env |= {"S": f"{sys.executable} {ROOT / 'sheeprlhf.py'}", **environment}
    done = subprocess.run(["bash", "-c", line], capture_output=True, env=env, check=False, timeout=300)
    assert b"Traceback" not in done.stderr + done.stdout and b"Exception ignored" not in done.stderr, done.stderr
    return done


PRINTING = ["list tasks", "show lr", "--help", "list runs $R"]
MORE = [
    "doctor model=tiny data=docstrings",
    "inspect model=tiny data=docstrings",
    "train --help",
    "report $R --to $R/r.html",
]


@pytest.mark.parametrize(
    "command",
    [*PRINTING[:2], *(pytest.param(command, marks=pytest.mark.nightly) for command in [*PRINTING[2:], *MORE])],
)
@pytest.mark.parametrize("output", ["> /dev/full", ">&-"])
def test_output_that_cannot_be_written_is_an_error(command: str, output: str, tmp_path: Path) -> None:
    done = shell(f"$S {command} {output}", R=str(make_past_run(tmp_path / "run")))
    assert done.returncode == 1
    assert done.stderr.count(b"standard output cannot be written") == 1


def test_closed_streams() -> None:
    whole = shell("$S list tasks")
    assert shell("$S list tasks <&- 2>&-").stdout == whole.stdout and whole.returncode == 0
    asked = shell("$S chat tiny <&-")
    assert asked.returncode == 2 and asked.stdout == b"" and b"standard input is closed" in asked.stderr
    silent = shell("$S list nothing 2>&- >&-")
    assert silent.returncode == 2 and silent.stderr == silent.stdout == b""


@pytest.mark.parametrize("environment", [ASCII, pytest.param({"PYTHONIOENCODING": "ascii"}, marks=pytest.mark.nightly)])
def test_other_letters_are_printed_where_only_ascii_can_be(environment: dict[str, str], tmp_path: Path) -> None:
    folder = make_past_run(tmp_path / "läufe", model="größe")
    for command in ("list runs $R", "report $R --to $R/seite-ü.html"):
        done = shell(f"$S {command}", R=str(folder), **environment)
        assert done.returncode == 0 and b"l" in done.stdout and done.stdout.isascii(), done.stderr
    assert "größe" in (folder / "seite-ü.html").read_text(encoding="utf-8")
    wrong = shell("$S list 'größe'", **environment)
    assert wrong.returncode == 2 and wrong.stderr
