"""Training rows that are prepared shard by shard."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sheeprlhf.data.prepare import Stream
from sheeprlhf.data.read import read_jsonl, read_parquet
from sheeprlhf.data.sampler import RolloutPlan, StepPlan
from sheeprlhf.data.source import Part
from sheeprlhf.structure.data import LocalDataConfig
from sheeprlhf.utils.errors import DataError
from tests.unit.data.toy import byte_tokenizer, local, prepare, texts, write_jsonl

NUM_FILES = 4


def write_files(folder: Path, num_rows: int = 8) -> list[Path]:
    files = [folder / f"rows-{number:05}-of-{NUM_FILES:05}.jsonl" for number in range(NUM_FILES)]
    for number, file in enumerate(files):
        write_jsonl(file, [{"prompt": f"{number} {row}", "response": f"r{number}"} for row in range(num_rows)])
    return files


def stream_of(cfg: LocalDataConfig, *, leads: bool = True) -> Stream:
    return Stream(cfg, byte_tokenizer(), kind="sft", say=lambda line: None, leads=leads)


@pytest.mark.parametrize("validation", ["cut", "file"])
def test_files_are_opened_in_turn_and_old_ones_deleted(validation: str, tmp_path: Path) -> None:
    files = write_files(tmp_path, 20)
    own = {"validation_split": 0.3}
    if validation == "file":
        own["validation_file"] = write_jsonl(tmp_path / "val.jsonl", [{"prompt": "v", "response": "w"}])
    cfg = local(tmp_path, train_file=str(tmp_path / "rows-*.jsonl"), streaming=True, **own)
    stream, tokenizer = stream_of(cfg), byte_tokenizer()
    opened = [stream.prepare(number) for number in range(NUM_FILES + 1)]
    whole = prepare(local(tmp_path, train_file=[str(file) for file in files], **own), tokenizer)
    learned = [set(texts(data, tokenizer)) for data in opened]
    assert set.union(*learned) == set(texts(whole, tokenizer))  # the validation rows of all files are left out
    assert all({text[1] for text in of} == {f"r{number % NUM_FILES}<|im_end|>"} for number, of in enumerate(learned))
    assert opened[NUM_FILES].folder == opened[0].folder
    assert [data.folder.exists() for data in opened[:NUM_FILES]] == [True, False, False, True]
    assert prepare(cfg, tokenizer).folder == opened[0].folder  # what `inspect` and evaluations read
    if validation == "file":
        assert texts(opened[0], tokenizer, "validation") == [("v", "w<|im_end|>")]
        assert len(learned[1]) == 20 and "validation" not in opened[1].splits


LARGE = [{"prompt": f"{row} {'p' * (row % 7)}", "response": f"r{row}"} for row in range(40)]


def write_large(folder: Path, kind: str) -> Path:
    if kind == "jsonl":
        return Path(write_jsonl(folder / "large.jsonl", LARGE))
    pq.write_table(pa.Table.from_pylist(LARGE), folder / "large.parquet", row_group_size=7, compression="none")
    return folder / "large.parquet"


@pytest.mark.parametrize(("kind", "read"), [("jsonl", read_jsonl), ("parquet", read_parquet)])
def test_the_parts_of_a_file_are_the_file(kind: str, read: Callable[..., Any], tmp_path: Path) -> None:
    file = write_large(tmp_path, kind)
    if kind == "jsonl":
        file.write_bytes(file.read_bytes().removesuffix(b"\n").replace(b"r7", b"\xc3\xa97") + b"\n\n")
    whole = [values for _, values in read(file)]
    assert len(whole) == 40
    for count in (2, 3, 5, 6, 7, 39, 40, 41, 50, *([file.stat().st_size] if kind == "jsonl" else [])):
        parts = [[values for _, values in read(file, part=Part(number, count))] for number in range(count)]
        assert [values for part in parts for values in part] == whole
        assert count > 5 or max(map(len, parts)) <= 1.5 * 40 / count


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_large_file_is_split_into_shards(kind: str, tmp_path: Path) -> None:
    file, tokenizer = write_large(tmp_path, kind), byte_tokenizer()
    own = {"train_file": str(file), "validation_split": 0.0, "test_split": 0.0}
    cfg = local(tmp_path, streaming=True, shard_size=file.stat().st_size / 3.5 / 2**20, **own)
    stream = stream_of(cfg)
    opened = [stream.prepare(number) for number in range(5)]
    rows = [text for number in range(4) for text in texts(stream.prepare(number), tokenizer)]
    assert rows == texts(prepare(local(tmp_path, **own), tokenizer), tokenizer)
    assert len(stream) == 4 and opened[4].folder == opened[0].folder
    assert [note for note in opened[0].report["notes"] if "3 other shards" in note and "part 1 of 4" in note]
    file.write_bytes(file.read_bytes().replace(b"r25", b"R25"))
    again = [stream.prepare(number).fingerprint == before.fingerprint for number, before in enumerate(opened[:4])]
    assert again == [True, True, False, True]
    if kind == "jsonl":
        file.write_bytes(file.read_bytes().replace(b'{"prompt": "25', b'["prompt": "25'))
        with pytest.raises(DataError, match=r"part 3 of 4, lines counted from byte .* line 5: malformed"):
            stream.prepare(2)


def test_files_that_cannot_be_split_are_reported(tmp_path: Path) -> None:
    file = tmp_path / "large.csv"
    file.write_text("prompt,response\n" + "".join(f"p{row},r{row}\n" for row in range(9)))
    data = stream_of(local(tmp_path, train_file=str(file), streaming=True, shard_size=1e-5)).prepare(0)
    [note] = [note for note in data.report["notes"] if "data.shard_size" in note]
    assert "large.csv" in note


def test_one_process_alone_deletes_and_null_keeps_all(tmp_path: Path) -> None:
    write_files(tmp_path)
    for keep, leads in ((2, False), (None, True), (3, True)):
        cfg = local(tmp_path, train_file=str(tmp_path / "rows-*.jsonl"), streaming=True, keep_shards=keep)
        opened = [stream_of(cfg, leads=leads).prepare(number) for number in range(NUM_FILES)]
        assert all(data.folder.exists() for data in opened)


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    files = write_files(tmp_path)
    stream = stream_of(local(tmp_path, train_file=str(tmp_path / "rows-*.jsonl"), streaming=True))
    first = stream.prepare(0)
    fingerprint = stream.fingerprint(first)
    files[2].write_text('{"question": 1}\n')
    assert stream.fingerprint(first) != fingerprint
    with pytest.raises(DataError, match=files[2].name):
        stream.prepare(2)


@pytest.mark.nightly
def test_the_next_file_is_prepared_by_another_process(tmp_path: Path) -> None:
    write_files(tmp_path)
    cfg = local(tmp_path, train_file=str(tmp_path / "rows-*.jsonl"), streaming=True)
    stream = stream_of(cfg)
    stream.prepare_ahead(1)
    stream.close(wait=True)
    [folder] = (tmp_path / "cache" / "data").glob("local-*")
    assert stream.prepare(1).folder == folder
    stream.prepare_ahead(2)
    stream.close()  # before it is done


def test_a_plan_that_begins_later_has_permutations_of_its_own() -> None:
    plan = StepPlan(10, 4, epochs=1, seed=3, first_step=7, first_epoch=2)
    order = np.random.default_rng([3, 2]).permutation(10)
    assert [plan.rows_of_step(step).tolist() for step in (7, 8, 9)] == [order[a : a + 4].tolist() for a in (0, 4, 8)]
    assert (plan.epoch_of(9), plan.epochs_before(7), plan.epochs_before(10)) == (2, 2.0, 3.0)
    assert plan.rows_until(8).tolist() == sorted(order[:4]) and plan.rows_until(10).tolist() == list(range(10))


def test_a_plan_of_rollouts_that_begins_later_counts_from_there() -> None:
    """Rollouts of 4 prompts, 2 prompts a step, twice; the third of a pass over 10 prompts has 2."""
    first = RolloutPlan(StepPlan(10, 4, 3, seed=3), 2, 2, 40)
    later = RolloutPlan(StepPlan(10, 4, 3, seed=3, first_step=7, first_epoch=2), 2, 2, 40, first_step=23)
    for number in range(9):
        assert later.steps_before(7 + number) == 23 + first.steps_before(number)
        assert later.rollout_after(23 + first.steps_before(number)) == 7 + number
    assert first.num_steps() == 30 and later.num_steps() == 40
