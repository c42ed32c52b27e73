"""Wrong command lines: one short message that names the key and the fix, exit code 2, nothing started or written."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sheeprlhf.config import path_checks as places
from sheeprlhf.config.option_checks import near_path
from sheeprlhf.utils import memory as machine
from tests.support.runs import exit_code
from tests.unit.cli.bad_lines import BAD, Asker


@pytest.fixture(scope="module")
def asker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    """One process that is asked all bad lines."""
    with Asker(tmp_path_factory.mktemp("bad-lines")) as started:
        yield started


@pytest.mark.parametrize(("line", "expected"), BAD, ids=[line for line, _ in BAD])
def test_a_bad_command_line_says_what_to_do(line, expected, asker):
    answer = asker.ask(line)
    assert answer.code == 2
    assert answer.out == ""
    for part in expected:
        assert part in answer.err
    assert "Traceback" not in answer.err
    problems = answer.err.count("\n  - ")
    assert 1 <= problems <= 3
    assert len(answer.err.splitlines()) <= 1 + 4 * problems
    assert answer.left == []  # no outputs/, no .hydra/, no run directory
    assert answer.heavy == []  # nothing that takes seconds is imported
    assert answer.seconds < 3  # of CPU: about 0.2


@pytest.mark.parametrize(
    ("word", "secret"),
    [
        ("hf_token=verysecretvalue", "verysecretvalue"),
        ("+model.api_key=verysecretvalue", "verysecretvalue"),
        ("data.password=verysecretvalue", "verysecretvalue"),
        ("hydra.job.env_set.HF_TOKEN=verysecretvalue", "verysecretvalue"),
        ("run_name=hf_abcdefghijklmnopqrstuvwxyzABCDEFGH", "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"),
        ("data.dataset_name='https://me:verysecretvalue@host/data'", "verysecretvalue"),
        ("verysecretvalue_token=a b", "a b"),
    ],
)
def test_a_secret_on_the_command_line_is_refused_by_name_and_never_repeated(
    word, secret, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    assert exit_code(["train", "task=sft", word]) == 2
    printed = capsys.readouterr()
    assert word.split("=")[0].lstrip("+") in printed.err
    assert "HF_TOKEN" in printed.err
    assert secret not in printed.err + printed.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", ["train --hf-token verysecret", "train --api_key=verysecret", "hf_token=verysecret"])
def test_a_secret_written_as_a_flag_is_not_repeated(line, capsys):
    assert exit_code(line) == 2
    assert "verysecret" not in capsys.readouterr().err


def test_the_nearest_name_of_a_file(tmp_path):
    (tmp_path / "chat.jsonl").touch()
    assert near_path(str(tmp_path / "chat.json")) == str(tmp_path / "chat.jsonl")
    assert [near_path(path) for path in (f"{tmp_path}/zzz", f"{tmp_path}/no/chat.jsonl", "/")] == [None] * 3


def test_all_problems_are_reported_at_once(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert exit_code(["train", "task=sft", "modle=opt", "optim.lr=abc", "generation.top_k=-1", "data=local"]) != 0
    message = capsys.readouterr().err
    for key in ("modle", "optim.lr=abc", "generation.top_k=-1", "data.train_file is missing"):
        assert key in message
    assert message.count("\n  - ") == 4


def test_a_cuda_machine_is_asked_for_the_number_of_devices(monkeypatch):
    monkeypatch.setattr(machine, "cuda_device_count", lambda: 1)
    monkeypatch.setattr(machine.importlib.metadata, "version", lambda name: "2.13.0")
    assert machine.cuda_problem(1) is None
    assert "fabric.devices=1" in (machine.cuda_problem(2) or "")
    assert "fabric.devices=1" in (machine.cuda_problem([0, 1]) or "")
    monkeypatch.setattr(machine.importlib.metadata, "version", lambda name: "2.13.0+cpu")
    assert "CPU build" in (machine.cuda_problem(1) or "")


def test_an_unwritable_folder_is_found_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(places.os, "access", lambda path, mode: False)
    assert f"root_dir={tmp_path / 'runs'}" in next(places.new_folder_problems("root_dir", str(tmp_path / "runs")))


WORDS = ["train", "task=ppo", "reward=function", "reward.path=sentiment"]


def test_a_missing_package_is_one_line_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.chdir(tmp_path)
    assert exit_code(WORDS) == 2
    assert capsys.readouterr().err.splitlines() == [
        "sheeprlhf cannot continue:",
        "  - reward.path=sentiment needs packages that are not installed (vaderSentiment): "
        'pip install "sheeprlhf[sentiment]"',
    ]
    assert list(tmp_path.iterdir()) == []
