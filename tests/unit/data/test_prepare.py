"""From files to splits: what is counted, where rows go, and a cache that is whole or not there."""

import hashlib
import itertools
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.utils import chat_template_utils

from sheeprlhf.config.registry import choices
from sheeprlhf.data import prepare as prepare_module
from sheeprlhf.data import source
from sheeprlhf.data.prepare import PreparedData, SeenDigests, prepare_data
from sheeprlhf.data.report import render_report
from sheeprlhf.data.store import SplitWriter
from sheeprlhf.utils import output
from sheeprlhf.utils.errors import DataError
from tests.unit.data.toy import TEMPLATE, byte_tokenizer, local, prepare, texts, write_jsonl

FORK = multiprocessing.get_context("fork")


def rows(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"prompt {i}", "response": f"response {i}"} for i in range(start, start + count)]


def test_every_row_is_kept_or_counted(tmp_path: Path) -> None:
    pair = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    data = [
        pair,
        pair,  # duplicate
        pair | {"prompt": ""},
        pair | {"rejected": " "},
        pair | {"rejected": "good"},
        pair | {"rejected": "b"},  # too short
        pair | {"prompt": "a long prompt of 30 characters"},  # its prompt is cut
        pair | {"prompt": "q", "chosen": "a response that is too long"},
        pair | {"prompt": "say <s>"},
    ]
    cfg = local(tmp_path, data, max_prompt_length=19, max_length=24, minimum_response_length=2)
    train = prepare(cfg, byte_tokenizer(), "preference").report["splits"]["train"]
    assert (train["read"], train["kept"]) == (9, 4)
    expected = {"duplicate": 1, "empty_prompt": 1, "empty_response": 1, "same_responses": 1, "too_short": 1}
    assert train["dropped"] == expected
    assert train["truncated"] == {"prompt": 1, "response": 1}
    assert (train["duplicates"], train["special_token_rows"]) == (1, 1)
    assert train["eos_share"] == 7 / 8
    # "good$" and "bad$" are 5 and 4 tokens; the cut response is 23 long behind a prompt of one
    assert train["trained_tokens"] == 3 * 9 + 23 + 4
    assert train["tokens"]["prompt"] == {"p5": 1, "p50": 1, "p95": 19, "max": 19}
    assert train["tokens"]["response"]["max"] == 23


@pytest.mark.parametrize("num_repeated", [1, 2])
def test_responses_that_begin_with_their_prompts_are_reported(num_repeated: int, tmp_path: Path) -> None:
    texts = [("Q: a\nA:", "Q: a\nA: "), ("Q: b\nA:", "Q: b\nA: "), ("Q: c\nA:", "yes "), ("Q: d\nA:", "Q: d ")]
    data = [{"prompt": prompt, "chosen": f"{start}x", "rejected": f"{start}y"} for prompt, start in texts]
    data[0]["rejected"] = data[0]["rejected"] if num_repeated == 2 else "y"
    report = prepare(local(tmp_path, data), byte_tokenizer(), "preference").report
    assert report["splits"]["train"]["repeated_prompt_rows"] == num_repeated
    assert sum("begin with their prompt" in note for note in report["notes"]) == (num_repeated == 2)


@pytest.mark.slow
def test_duplicates_far_apart_and_in_other_processes_are_removed(tmp_path: Path) -> None:
    data = [*rows(1500), *rows(3), *rows(10, start=1490)]
    cfg = local(tmp_path, data)
    tokenizer = byte_tokenizer()
    prepared = prepare(cfg, tokenizer)
    assert len(prepared.splits["train"]) == 1500
    assert len(set(texts(prepared, tokenizer))) == 1500
    assert prepared.report["splits"]["train"]["dropped"] == {"duplicate": 13}
    parallel = prepare(local(tmp_path, data, num_proc=2, cache_dir=str(tmp_path / "other")), tokenizer)
    assert parallel.fingerprint == prepared.fingerprint
    assert parallel.report == prepared.report
    assert (parallel.folder / "train.arrow").read_bytes() == (prepared.folder / "train.arrow").read_bytes()
    kept = prepare(local(tmp_path, data, remove_same_inputs=False), tokenizer)
    assert len(kept.splits["train"]) == 1513
    assert kept.report["splits"]["train"]["duplicates"] == 13


def test_equal_prompts_fall_on_one_side(tmp_path: Path) -> None:
    data = [{"prompt": f"prompt {i % 200}", "response": f"response {i}"} for i in range(1000)]
    options = {"validation_split": 0.2, "test_split": 0.1, "reward_model_split": 0.5}
    tokenizer = byte_tokenizer()
    prepared = prepare(local(tmp_path, data, **options), tokenizer)
    prompts = {split: {row[0] for row in texts(prepared, tokenizer, split)} for split in prepared.splits}
    assert set(prompts) == {"train", "reward", "validation", "test"}
    assert sum(map(len, prompts.values())) == 200 == len(set.union(*prompts.values()))
    assert 20 <= len(prompts["validation"]) <= 60
    assert 5 <= len(prompts["test"]) <= 40
    assert 40 <= len(prompts["reward"]) <= 100
    again = prepare(local(tmp_path, data[::-1], **options), tokenizer)  # order and other rows do not matter
    assert {row[0] for row in texts(again, tokenizer, "test")} == prompts["test"]
    other = prepare(local(tmp_path, data, **options, split_seed=1), tokenizer)
    assert {row[0] for row in texts(other, tokenizer, "test")} != prompts["test"]


def test_native_splits_are_used_whole(tmp_path: Path) -> None:
    files = {
        "validation_file": write_jsonl(tmp_path / "v.jsonl", rows(3, start=100)),
        "test_file": write_jsonl(tmp_path / "t.jsonl", rows(2, start=200)),
    }
    cfg = local(tmp_path, rows(20), **files, validation_split=0.5, test_split=0.4)
    assert {split: len(data) for split, data in prepare(cfg, byte_tokenizer()).splits.items()} == {
        "train": 20,
        "validation": 3,
        "test": 2,
    }
    limited = local(tmp_path, rows(20), **files, num_samples=2)
    assert {split: len(data) for split, data in prepare(limited, byte_tokenizer()).splits.items()} == {
        "train": 2,
        "validation": 2,
        "test": 2,
    }


def test_one_row_is_enough_and_the_empty_split_is_named(tmp_path: Path) -> None:
    prepared = prepare(local(tmp_path, rows(1), validation_split=0.0), byte_tokenizer())
    assert list(prepared.splits) == ["train"]
    assert any("validation split" in note for note in prepared.report["notes"])
    assert "validation split" in render_report(prepared.report)


def test_nothing_left_shows_the_reasons_and_leaves_no_folder(tmp_path: Path) -> None:
    cfg = local(tmp_path, rows(5), minimum_response_length=100)
    with pytest.raises(DataError, match=r"data\.minimum_response_length=100"):
        prepare(cfg, byte_tokenizer())
    assert not [path for path in (tmp_path / "cache" / "data").iterdir() if not path.name.endswith(".lock")]


def test_a_second_start_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, cfg = byte_tokenizer(), local(tmp_path, rows(30))
    first = prepare(cfg, tokenizer)
    monkeypatch.setattr(prepare_module, "_build", lambda *args: pytest.fail("prepared again"))
    tokenizer("x", padding=True, truncation=True, max_length=4)  # state that calls leave in a tokenizer
    second = prepare(cfg, tokenizer)
    assert (second.folder, second.report) == (first.folder, first.report)
    assert texts(second, tokenizer) == texts(first, tokenizer)


def test_the_fingerprint_covers_what_changes_the_rows(tmp_path: Path) -> None:
    base: dict[str, Any] = {}
    variants: list[tuple[dict[str, Any], dict[str, Any], list[dict[str, str]], str]] = [
        (base, {}, rows(5), "sft"),
        ({"max_length": 100}, {}, rows(5), "sft"),
        ({"split_seed": 1}, {}, rows(5), "sft"),
        ({"num_samples": 4}, {}, rows(5), "sft"),
        ({"minimum_response_length": 3}, {}, rows(5), "sft"),
        (base, {"bos": True}, rows(5), "sft"),
        (base, {"eos": "<|endoftext|>"}, rows(5), "sft"),
        (base, {"merges": ("a b",)}, rows(5), "sft"),
        (base, {"template": "x"}, rows(5), "sft"),
        (base, {}, rows(6), "sft"),
    ]
    prints = [prepare(local(tmp_path, data, **o), byte_tokenizer(**t), k).fingerprint for o, t, data, k in variants]
    assert len(set(prints)) == len(variants)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    assert prepare(local(moved, rows(5)), byte_tokenizer()).fingerprint == prints[0]
    assert prepare(local(moved, rows(5), shuffle=False), byte_tokenizer()).fingerprint == prints[0]


def test_rows_are_made_anew_when_the_code_of_their_format_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    code = "from sheeprlhf.data.formats import format_row  # {}"
    cfg = local(tmp_path, rows(5))
    object.__setattr__(cfg, "row_format", "format_of_the_test:format_row")
    prints = []
    for change in ("a", "bb", "a"):
        (tmp_path / "format_of_the_test.py").write_text(code.format(change))
        prints.append(prepare(cfg, byte_tokenizer()).fingerprint)
    assert prints[0] == prints[2] != prints[1]


def die_at(call: int) -> None:
    """In a child: SIGKILL at the n-th step of writing the cache."""
    calls = iter(range(10_000))

    def killing(function: Any, *, after: bool = False) -> Any:
        def wrapper(*args: Any, **options: Any) -> Any:
            mine = next(calls) == call
            if mine and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **options)
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapper

    SplitWriter.write = killing(SplitWriter.write)
    SplitWriter.close = killing(SplitWriter.close)
    output.fsync = killing(output.fsync)
    output.os.rename = killing(killing(os.rename), after=True)
    output.create_file = killing(output.create_file)


@pytest.mark.slow
def test_a_kill_at_any_step_leaves_no_torn_cache(tmp_path: Path) -> None:
    tokenizer, cfg = byte_tokenizer(), local(tmp_path, rows(1100), validation_split=0.1)
    reference = prepare(local(tmp_path, validation_split=0.1, train_file=cfg.train_file), tokenizer)
    expected = {path.name: path.read_bytes() for path in reference.folder.iterdir()}
    parent = tmp_path / "killed" / "data"
    bystander = parent / f".{reference.folder.name}.tmp-bystander"
    bystander.mkdir(parents=True)
    (bystander / "mine.txt").write_text("not made by us")
    cfg = local(tmp_path, validation_split=0.1, train_file=cfg.train_file, cache_dir=str(tmp_path / "killed"))
    for call in range(100):
        child = FORK.Process(target=lambda call=call: (die_at(call), prepare(cfg, tokenizer)))
        child.start()
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        folder = parent / reference.folder.name
        if folder.exists():  # killed after the rename: it must be whole
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
    assert 10 < call < 100
    prepared = prepare(cfg, tokenizer)
    assert {path.name: path.read_bytes() for path in prepared.folder.iterdir()} == expected
    assert (bystander / "mine.txt").read_text() == "not made by us"
    lock = f".{prepared.folder.name}.lock"
    assert {path.name for path in parent.iterdir()} == {prepared.folder.name, bystander.name, lock}


def test_processes_that_prepare_at_once_get_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, cfg = byte_tokenizer(), local(tmp_path, rows(1500))
    build, log = prepare_module._build, tmp_path / "built"

    def logged(*args: Any) -> Any:
        with log.open("a") as stream:
            stream.write("built\n")
        return build(*args)

    monkeypatch.setattr(prepare_module, "_build", logged)
    queue = FORK.Queue()

    def work() -> None:
        prepared: PreparedData = prepare(cfg, tokenizer)
        queue.put((str(prepared.folder), len(prepared.splits["train"]), json.dumps(prepared.report)))

    children = [FORK.Process(target=work) for _ in range(4)]
    for child in children:
        child.start()
    results = {queue.get(timeout=60) for _ in children}
    for child in children:
        child.join()
    assert len(results) == 1
    assert log.read_text() == "built\n"


def test_a_waiting_process_takes_over_from_a_killed_one(tmp_path: Path) -> None:
    tokenizer, cfg, building = byte_tokenizer(), local(tmp_path, rows(30)), FORK.Event()

    def hold() -> None:
        prepare_module._build = lambda *_: (building.set(), time.sleep(600))
        prepare(cfg, tokenizer)

    holder = FORK.Process(target=hold)
    holder.start()
    assert building.wait(60)
    waiting = FORK.Process(target=prepare, args=(cfg, tokenizer))
    waiting.start()
    waiting.join(0.5)
    assert waiting.exitcode is None
    holder.kill()
    waiting.join(60)
    assert waiting.exitcode == 0
    whole = prepare(local(tmp_path, train_file=cfg.train_file, cache_dir=str(tmp_path / "other")), tokenizer)
    found = prepare(cfg, tokenizer)
    assert (found.folder / "train.arrow").read_bytes() == (whole.folder / "train.arrow").read_bytes()


def test_folders_that_are_not_ours_survive(tmp_path: Path) -> None:
    cfg, tokenizer = local(tmp_path, rows(3)), byte_tokenizer()
    folder = prepare(cfg, tokenizer).folder
    (folder / "report.json").unlink()
    (folder / output.MARKER).unlink()
    with pytest.raises(DataError, match="prepared dataset"):
        prepare(cfg, tokenizer)
    assert (folder / "train.arrow").exists()


def damaged(content: bytes, damage: str) -> bytes | None:
    """The content of a file with one bit flipped in its middle, its end cut off, or None for no file."""
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    return {"bit": flipped, "cut": content[:-3], "empty": b"", "gone": None}[damage]


@pytest.mark.parametrize("name", ["train.arrow", "validation.arrow", "report.json", "digests.json"])
@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "gone"])
def test_a_damaged_cache_is_prepared_again(name: str, damage: str, tmp_path: Path) -> None:
    cfg, tokenizer = local(tmp_path, rows(30), validation_split=0.3), byte_tokenizer()
    folder = prepare(cfg, tokenizer).folder
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    content = damaged(whole[name], damage)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    said: list[str] = []
    again = prepare_data(cfg, tokenizer, kind="sft", say=said.append, progress=False)
    assert {path.name: path.read_bytes() for path in again.folder.iterdir()} == whole
    [line] = said
    assert str(folder) in line
    assert name in line or (name, damage) == ("digests.json", "bit")  # then its file differs from what it says
    assert {path.suffix for path in folder.parent.iterdir()} == {"", ".lock"}
    assert prepare(cfg, tokenizer).report == again.report


def test_ids_that_the_tokenizer_lacks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, cfg = byte_tokenizer(), local(tmp_path, rows(3))
    prepared = prepare(cfg, tokenizer)
    few = {text: number for text, number in tokenizer.get_vocab().items() if number < 60}
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: few)
    monkeypatch.setattr(prepare_module, "fingerprint", lambda *_: prepared.fingerprint)
    with pytest.raises(DataError, match=r"token id \d+.*59"):
        prepare(cfg, tokenizer)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    with pytest.raises(DataError, match=r"set data\.cache_dir"):
        prepare(local(tmp_path, rows(3), cache_dir=str(in_the_way)), byte_tokenizer())


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    cfg, tokenizer = local(tmp_path, rows(3000)), byte_tokenizer()

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(DataError, match="free space"):
            prepare(cfg, tokenizer)

    child = FORK.Process(target=work)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert [path.suffix for path in (tmp_path / "cache" / "data").iterdir()] == [".lock"]


@pytest.mark.parametrize("quiet", [0.0, 60.0])
def test_a_long_preparation_shows_how_far_it_is(
    quiet: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(source, "QUIET_SECONDS", quiet)
    monkeypatch.setattr(source, "LOG_SECONDS", 0.0)
    cfg = local(tmp_path, rows(2500))
    prepare_data(cfg, byte_tokenizer(), kind="sft", say=print, progress=True)
    shown = capsys.readouterr().err
    parts = ("reading data:", "preparing train:  40%", "| 1000/2500 [", "preparing train: 100%")
    assert [part in shown for part in parts] == [quiet == 0.0] * 4


@pytest.mark.nightly
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from tests.unit.data.toy import TEMPLATE, byte_tokenizer, local, prepare\n"
        "cfg = local(Path(sys.argv[1]).parent, train_file=sys.argv[1])\n"
        "prepare(cfg, byte_tokenizer())\n"
        "assert 'pandas' not in sys.modules\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    peaks = {}
    for count in (20_000, 120_000):
        file = tmp_path / f"{count}.jsonl"
        with file.open("w") as stream:
            for i in range(count):
                stream.write(json.dumps({"prompt": f"prompt {i} " * 10, "response": f"response {i} " * 10}) + "\n")
        done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
        peaks[count] = int(done.stdout)
    assert peaks[120_000] - peaks[20_000] < 33_000  # kB: 100 bytes a row of the mapped files, 30 of lengths and digests


def long_answers(batch: list[dict[str, str]]) -> list[list[int]]:
    """Megabytes: a process spends its time writing them."""
    return [list(range(1000)) for _ in batch]


def tokenise_without_end(pids: Any) -> None:
    """In a process that will be killed."""
    rows = prepare_module._tokenized(long_answers, itertools.repeat([{"prompt": "x"}] * 100), num_proc=2)
    next(rows)
    pids.put([child.pid for child in multiprocessing.active_children()])
    for _ in rows:
        pass


def runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_the_tokenising_processes_end_with_a_killed_one() -> None:
    """They hold both ends of their queue: nothing else would tell them that nobody is there."""
    pids = FORK.Queue()
    parent = FORK.Process(target=tokenise_without_end, args=(pids,))
    parent.start()
    workers = pids.get(timeout=120)
    assert len(workers) == 2 and all(map(runs, workers))
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 20
    while any(map(runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in workers if runs(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def same_prompt(count: int, others: int = 0, prompt: str = "tell a story") -> list[dict[str, str]]:
    """Rows of one prompt, and rows of other prompts."""
    return [{"prompt": prompt, "response": f"story {i}"} for i in range(count)] + rows(others)


@pytest.mark.parametrize("others", [0, 30])
@pytest.mark.parametrize("prompt", ["tell a story", "tell of a dog"])
def test_rows_of_a_prompt_that_most_rows_have_are_divided(others: int, prompt: str, tmp_path: Path) -> None:
    data, options = same_prompt(60, others, prompt), {"validation_split": 0.2, "test_split": 0.2}
    tokenizer = byte_tokenizer()
    prepared = prepare(local(tmp_path, data, **options), tokenizer)
    of = {split: [row for row in texts(prepared, tokenizer, split) if row[0] == prompt] for split in prepared.splits}
    assert {split: len(found) >= 5 for split, found in of.items()} == dict.fromkeys(of, True)
    assert set(of) == {"train", "validation", "test"}
    assert sum(map(len, of.values())) == 60
    note = f"all {60:,} rows" if not others else f"60 of {60 + others} rows"
    assert sum(note in one and "data.validation_split=0" in one for one in prepared.report["notes"]) == 1
    alone = {row[0] for split in prepared.splits for row in texts(prepared, tokenizer, split)} - {prompt}
    held = {row[0] for row in texts(prepared, tokenizer, "test")} - {prompt}
    assert held == {row["prompt"] for row in data if row["prompt"] in alone and goes_to_test(row["prompt"], 0.2)}
    again = prepare(local(tmp_path, data[::-1], **options), tokenizer)
    for split in prepared.splits:
        assert set(texts(again, tokenizer, split)) == set(texts(prepared, tokenizer, split))


def goes_to_test(prompt: str, share: float) -> bool:
    """The rule of splits, written out: the hash of seed and prompt as a number in [0, 1)."""
    digest = hashlib.blake2b(f"0\0{prompt}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


@pytest.mark.parametrize(("count", "others"), [(40, 41), (3, 0)])
def test_rows_of_other_prompts_stay_together(count: int, others: int, tmp_path: Path) -> None:
    data, tokenizer = same_prompt(count, others), byte_tokenizer()
    prepared = prepare(local(tmp_path, data, validation_split=0.4), tokenizer)
    holding = [
        split for split in prepared.splits if any(r[0] == "tell a story" for r in texts(prepared, tokenizer, split))
    ]
    assert len(holding) == 1
    assert not any("same prompt" in note for note in prepared.report["notes"])


DATED = "[{{ strftime_now('%d %b %Y') }}]"


def chats(count: int) -> list[dict[str, Any]]:
    """Conversations of one question and its answer."""
    return [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"number {i}"}]}
        for i in range(count)
    ]


def rows_of_splits(prepared: PreparedData) -> dict[str, list[int]]:
    """The numbers of the rows in each split."""
    return {
        name: [example.row_id for example in split.examples(range(len(split)))]
        for name, split in prepared.splits.items()
    }


def test_rows_and_splits_do_not_depend_on_the_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"validation_split": 0.2, "test_split": 0.2}
    first = prepare(local(tmp_path, chats(40), **options), byte_tokenizer(template=DATED + TEMPLATE))

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime(2031, 5, 7)

    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    other = {**options, "cache_dir": str(tmp_path / "other")}
    second = prepare(local(tmp_path, chats(40), **other), byte_tokenizer(template=DATED + TEMPLATE))
    assert second.fingerprint == first.fingerprint
    assert second.report == first.report
    assert first.report["template_args"] == {"strftime_now": "2024-07-26"}
    assert any("strftime_now=2024-07-26" in note for note in first.report["notes"])
    for split in first.splits:
        assert (second.folder / f"{split}.arrow").read_bytes() == (first.folder / f"{split}.arrow").read_bytes()
    later = local(tmp_path, chats(40), **options, template_args={"strftime_now": "2025-03-01"})
    third = prepare(later, byte_tokenizer(template=DATED + TEMPLATE))
    assert third.fingerprint != first.fingerprint
    assert rows_of_splits(third) == rows_of_splits(first)
    assert texts(third, byte_tokenizer())[0][0].startswith("[01 Mar 2025]")


def test_conversations_are_identified_before_the_template(tmp_path: Path) -> None:
    """Another template, or keys in another order, moves no row; the same conversation twice is a duplicate."""
    options = {"validation_split": 0.2, "test_split": 0.2}
    data = [*chats(30), *chats(5)]
    mixed = [{"messages": [dict(reversed(message.items())) for message in row["messages"]]} for row in data]
    plain = prepare(local(tmp_path, data, **options), byte_tokenizer(template=TEMPLATE))
    assert sum(part["dropped"].get("duplicate", 0) for part in plain.report["splits"].values()) == 5
    for rows_, template in ((data, "begin " + TEMPLATE), (mixed, TEMPLATE)):
        again = prepare(local(tmp_path, rows_, **options), byte_tokenizer(template=template))
        assert rows_of_splits(again) == rows_of_splits(plain)


def test_answers_to_one_question_stay_in_one_split(tmp_path: Path) -> None:
    data = [
        {"messages": [row["messages"][0], {"role": "assistant", "content": f"answer {i} of {number}"}]}
        for number, row in enumerate(chats(30))
        for i in range(2)
    ]
    prepared = prepare(local(tmp_path, data, validation_split=0.4), byte_tokenizer(template=TEMPLATE))
    for numbers in rows_of_splits(prepared).values():
        assert numbers and all((number ^ 1) in numbers for number in numbers)


def test_rows_are_reserved_for_a_reward_model_where_asked(tmp_path: Path) -> None:
    """Every dataset but the embedded one is learned as a whole; reserved rows are reported."""
    rows = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b"} for n in range(40)]
    reserving = [name for name, cls in choices("data").items() if vars(cls())["reward_model_split"] > 0]
    assert reserving == ["docstrings"]
    for kind in ("sft", "preference"):
        whole = prepare(local(tmp_path, rows), byte_tokenizer(), kind)
        assert len(whole.splits["train"]) == 40
        assert not [note for note in whole.report["notes"] if "data.reward_model_split" in note]
        half = prepare(local(tmp_path, rows, reward_model_split=0.5), byte_tokenizer(), kind)
        assert len(half.splits["train"]) + len(half.splits["reward"]) == 40
        [note] = [note for note in half.report["notes"] if "data.reward_model_split=0.5" in note]
        assert note.startswith(f"{len(half.splits['reward'])} training rows")


@pytest.mark.parametrize("different", [1, 50, 5_000])
def test_like_a_set(different: int) -> None:
    rng = np.random.default_rng(different)
    seen, known = SeenDigests(), set()
    values = rng.integers(0, 2**64, different, np.uint64)
    for _ in range(200):
        digests = rng.choice(values, int(rng.integers(0, 40)))
        expected = []
        for digest in digests.tolist():
            expected.append(digest in known)
            known.add(digest)
        assert seen.add(digests).tolist() == expected
