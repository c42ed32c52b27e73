"""Training rows that are prepared file by file."""

from pathlib import Path

import numpy as np
import pytest

from sheeprlhf.data.sampler import StepPlan
from sheeprlhf.data.stream import Stream
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
