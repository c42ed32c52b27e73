"""Files that can be read, whatever they look like; how many rows they have; and where a dataset's files are."""

import bz2
import gzip
import json
import re
from collections import deque
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from sheeprlhf.config.path_checks import data_file_problems, dataset_problem
from sheeprlhf.data import source
from sheeprlhf.data.layout import RowLayout
from sheeprlhf.data.read import BATCH_CHARS, open_data, read_batches
from sheeprlhf.data.report import render_report
from sheeprlhf.structure.data import DataConfig, SummarizationConfig
from sheeprlhf.utils.errors import DataError
from tests.unit.data.toy import TEMPLATE, byte_tokenizer, local, prepare, texts, write_jsonl


def known_columns(*more: str) -> RowLayout:
    """The columns of a dataset from the hub."""
    return RowLayout(DataConfig(config_name="x"), "sft", more)


GOOD = b'{"prompt": "p", "response": "r"}\n'
UNREADABLE = {  # tests/faults/test_bad_data.py has the others
    "messages empty": ("a.jsonl", b'{"messages": []}', "assistant message"),
    "answer first": ("a.jsonl", b'{"messages": [{"role": "assistant", "content": "a"}]}', "assistant message"),
    "ending": ("a.md", GOOD, r"data\.train_file="),
    "not packed": ("a.jsonl.gz", GOOD, r"a\.jsonl\.gz"),
    "packed without a kind": ("rows.gz", GOOD, r"ends in .jsonl.gz"),
    "packed parquet": ("a.parquet.gz", GOOD, r"ends in .jsonl.gz"),
    "archive": ("a.zip", GOOD, r"has an unknown ending"),
    "cut": ("a.jsonl.gz", gzip.compress(GOOD)[:-9], r"a.jsonl.gz: damaged"),
    "script": ("a.py", b"print(1)", "has an unknown ending"),
    "lists in an object": ("a.json", b'{"train": [{"prompt": "p"}], "test": [{"prompt": "q"}]}', "a list, "),
    "columns": ("a.json", b'{"prompt": ["p", "q"], "response": ["r", "s"], "label": [1, 0]}', "records"),
    "columns by number": ("a.json", b'{"prompt": {"0": "p", "1": "q"}, "response": {"0": "r", "1": "s"}}', "records"),
    "no list in an object": ("a.json", b'{\n "name": "x"\n}', "no list of objects, only name"),
    "bad item in an object": (
        "a.json",
        b'{"data": [{"prompt": "p", "response": "r"}, {"prompt": "q"}]}',
        "data item 2",
    ),
    "commas in tsv": ("a.tsv", b"prompt,response\np,r\n", r"\.csv"),
    "tabs in csv": ("a.csv", b"prompt\tresponse\np\tr\n", r"\.tsv"),
    "lines of objects": ("a.jsonl", b'{\n"prompt": "p"\n}', r"\.json\b"),
}


@pytest.mark.parametrize(("name", "content", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(local(tmp_path, train_file=str(tmp_path / name)), byte_tokenizer(template=TEMPLATE))


def test_a_missing_file_and_messages_without_a_template(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.train_file=nowhere"):
        prepare(local(tmp_path, train_file="nowhere.jsonl"), byte_tokenizer())
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    with pytest.raises(DataError, match="chat template"):
        prepare(local(tmp_path, rows), byte_tokenizer())
    with pytest.raises(DataError, match="conversation: no"):
        prepare(local(tmp_path, rows), byte_tokenizer(template="{{ raise_exception('no') }}"))
    with pytest.raises(DataError, match="chosen and rejected"):
        prepare(local(tmp_path, [{"prompt": "a", "response": "b"}]), byte_tokenizer(), "preference")


STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns') }}"
    "{% endif %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
)


@pytest.mark.parametrize("num_refused", [1, 5, 6])
def test_rows_that_the_template_refuses_are_dropped_counted_and_named(tmp_path: Path, num_refused: int) -> None:
    """Up to half of the rows; the reason is the template's."""
    rows = []
    for number in range(10):
        roles = ["system"] * (2 <= number < 2 + num_refused) + ["user", "assistant"]
        rows.append({"messages": [{"role": role, "content": f"{role} {number}"} for role in roles]})
    cfg = local(tmp_path, rows)
    if num_refused > 5:
        with pytest.raises(DataError, match=r"line 3: .*take turns.*6 of 10"):
            prepare(cfg, byte_tokenizer(template=STRICT))
        return
    data = prepare(cfg, byte_tokenizer(template=STRICT))
    part = data.report["splits"]["train"]
    assert len(data.splits["train"]) == part["kept"] == 10 - num_refused
    assert part["dropped"] == {"refused_by_template": num_refused}
    [first] = part["first_dropped"].values()
    assert "line 3: " in first and "take turns" in first and first in render_report(data.report)


READABLE = {
    "no newline at the end": ("a.jsonl", GOOD.rstrip()),
    "blank line": ("a.jsonl", b"\n" + GOOD + b"\n"),
    "other columns of any type": ("a.jsonl", b'{"prompt": "p", "response": "r", "id": [1, "x", {}]}'),
    "null column": ("a.jsonl", b'{"prompt": "p", "response": "r", "chosen": null, "messages": null}'),
    "json array": ("a.json", b'\xef\xbb\xbf [{"prompt": "p", "response": "r"}]'),
    "json lines": ("a.json", GOOD),
    "upper case": ("A.JSONL", GOOD),
    "ndjson": ("a.ndjson", GOOD),
    "gz": ("a.jsonl.gz", gzip.compress(GOOD)),
    "bz2": ("a.csv.bz2", bz2.compress(b"prompt,response\np,r\n")),
    "zst": ("a.json.zst", pa.compress(b"[" + GOOD + b"]", codec="zstd", asbytes=True)),
    "tsv": ("a.tsv", b'prompt\tresponse\np\t"r"\n'),
    "list in an object": ("a.json", b'{\n "version": 1,\n "data": [{"prompt": "p",\n "response": "r"}]\n}'),
    "list in an object, one line": (
        "a.json.gz",
        gzip.compress(b'{"rows": [{"prompt": "p", "response": "r"}], "n": 1}'),
    ),
    "one object over lines": ("a.json", b'{\n "prompt": "p",\n "response": "r"\n}'),
    "csv": ("a.csv", b"\xef\xbb\xbfprompt,response,n\r\np,r,1\r\n"),
}


@pytest.mark.parametrize(("name", "content"), READABLE.values(), ids=READABLE)
def test_readable_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    tokenizer = byte_tokenizer()
    prepared = prepare(local(tmp_path, train_file=str(tmp_path / name)), tokenizer)
    assert texts(prepared, tokenizer) == [("p", "r<|im_end|>")]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_dataset_may_read_columns_of_its_own(tmp_path: Path, kind: str) -> None:
    row = {"question": "q", "response": "r", "id": 1}
    file = tmp_path / f"a.{kind}"
    write_jsonl(file, [row]) if kind == "jsonl" else parquet(file, **{name: [value] for name, value in row.items()})
    [[plain]] = read_batches([file], None, layout=known_columns())
    [[more]] = read_batches([file], None, layout=known_columns("question"))
    assert (plain.values, plain.others) == ({"response": "r"}, ("question", "id"))
    assert (more.values, more.others) == ({"response": "r", "question": "q"}, ("id",))


def test_a_batch_ends_with_its_rows_or_its_text(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * size, "response": "r"} for size in (1, 1, 1, BATCH_CHARS, 1, BATCH_CHARS - 3, 1, 1)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    batches = read_batches([tmp_path / "a.jsonl"], None, size=3, layout=known_columns())
    assert [[row.number for row in batch] for batch in batches] == [[0, 1, 2], [3], [4, 5], [6, 7]]


def test_csv_keeps_line_ends_quotes_and_what_looks_like_a_number_or_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b'prompt,response\n"a\nb,""c""",NA\n1.0,2020-01-01\n')
    tokenizer = byte_tokenizer()
    prepared = prepare(local(tmp_path, train_file=str(file)), tokenizer)
    assert texts(prepared, tokenizer) == [('a\nb,"c"', "NA<|im_end|>"), ("1.0", "2020-01-01<|im_end|>")]


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of text do not shrink to a two-hundredth: 2 MB of rows in a few kilobytes, where 1 MB is free."""
    monkeypatch.setattr("sheeprlhf.data.read.FREE_UNPACKED", 2**20)
    content = GOOD * (2**21 // len(GOOD))
    bombs = {"a.jsonl.gz": gzip.compress(content, 9), "a.jsonl.bz2": bz2.compress(b"\n" * len(content))}
    for name, packed in bombs.items():
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(DataError, match=f"{name}: .* 200 times"):
            deque(open_data(tmp_path / name), maxlen=0)


def folder_of(folder: Path, *names: str) -> Path:
    """A folder of files with one row each, whose prompt is the file's name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / name, [{"prompt": name, "response": "r"}])
    return folder


def test_a_folder_a_pattern_and_a_list_are_read_as_a_whole(tmp_path: Path) -> None:
    folder, tokenizer = (
        folder_of(tmp_path / "f[1]", "b.jsonl", "a.ndjson", "sub/c.jsonl", ".hidden.jsonl"),
        byte_tokenizer(),
    )
    (folder / "notes.md").write_text("about")
    values: dict[str, tuple[Any, list[str]]] = {
        "folder": (str(folder), ["a.ndjson", "b.jsonl", "sub/c.jsonl"]),
        "pattern": (f"{tmp_path}/f*/*.*son*", ["a.ndjson", "b.jsonl"]),
        "deep pattern": (f"{tmp_path}/**/*.jsonl", ["b.jsonl", "sub/c.jsonl"]),
        "list": ([f"{folder}/sub", f"{folder}/b.jsonl"], ["sub/c.jsonl", "b.jsonl"]),
        "name with brackets": (f"{folder}/b.jsonl", ["b.jsonl"]),
    }
    for value, names in values.values():
        prepared = prepare(local(tmp_path, train_file=value), tokenizer)
        assert [prompt for prompt, _ in texts(prepared, tokenizer)] == names
        notes = [note for note in prepared.report["notes"] if "not read" in note]
        assert notes == (["files that are not read: 1 (notes.md)"] if value == str(folder) else [])


def test_folders_patterns_and_lists_that_cannot_be_read_as_a_whole(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "f", "train.jsonl", "test.jsonl", "more.jsonl")
    (folder / "notes.md").write_text("about")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "a.jsonl").symlink_to(folder / "more.jsonl")
    folder_of(tmp_path / "shards", "a-00000-of-00002.jsonl")
    refused: dict[str, tuple[Any, str]] = {
        "splits": (str(folder), r"several splits \(train, test\): give each .*'data.train_file=\[.*more.jsonl,.*train"),
        "splits of a pattern": (f"{folder}/*.jsonl", r"several splits"),
        "other kind": (f"{folder}/[mn]*", r"notes.md has an unknown ending"),
        "no match": (f"{folder}/x*.jsonl", r"matches no file"),
        "twice": ([f"{folder}/more.jsonl", f"{folder}/../f/more.jsonl"], r"names .* twice"),
        "empty": (str(tmp_path / "empty"), r"folder without a file that ends in"),
        "empty list": ([], r"must be a file, a folder or a pattern"),
        "number": (3, r"must be a file, a folder or a pattern"),
        "link": (str(tmp_path / "link"), r"a link that leads out"),
        "link of a pattern": (f"{tmp_path}/link/*.jsonl", r"a link that leads out"),
        "shard": (str(tmp_path / "shards"), r"1 of the 2 files"),
        "commas": (f"{folder}/more.jsonl,{folder}/train.jsonl", r"give a list, 'data.train_file=\["),
    }
    for name, (value, message) in refused.items():
        with pytest.raises(DataError, match=message):
            prepare(local(tmp_path, train_file=value), byte_tokenizer())
        if name != "shard":
            [problem] = data_file_problems("data.train_file", value)
            assert re.search(message, problem)
    split = [f"{folder}/more.jsonl", f"{folder}/train.jsonl"]
    tokenizer = byte_tokenizer()
    prepared = prepare(local(tmp_path, train_file=split, test_file=[f"{folder}/test.jsonl"]), tokenizer)
    assert [prompt for prompt, _ in texts(prepared, tokenizer)] == ["more.jsonl", "train.jsonl"]


def parquet(file: Path, **columns: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)


def test_a_folder_in_the_hubs_layout(tmp_path: Path) -> None:
    for name, mark in [
        ("train-00000-of-00002", "a"),
        ("train-00001-of-00002", "b"),
        ("test-00000-of-00001", "c"),
        ("valid1-00000-of-00001", "d"),
        ("valid2-00000-of-00001", "e"),
    ]:
        columns = {"prompt": [f"POST: {mark}"], "chosen": ["TL;DR: x"], "rejected": ["TL;DR: y"]}
        parquet(tmp_path / "set" / "data" / f"{name}.parquet", **columns)
    (tmp_path / "set" / "set.py").write_text("raise SystemExit('a script ran')")
    (tmp_path / "set" / "README.md").write_text("---\nconfigs: []\n---\n")
    cfg = SummarizationConfig(
        dataset_name=str(tmp_path / "set"),
        cache_dir=str(tmp_path / "cache"),
        reward_model_split=0.0,
        minimum_response_length=1,
    )
    tokenizer = byte_tokenizer()
    prepared = prepare(cfg, tokenizer, "preference")
    prompts = {split: [row[0] for row in texts(prepared, tokenizer, split)] for split in prepared.splits}
    ending = "\nTL;DR:"
    assert prompts == {
        "train": [f"POST: a{ending}", f"POST: b{ending}"],
        "validation": [f"POST: d{ending}"],
        "test": [f"POST: c{ending}"],
    }
    (tmp_path / "set" / "data" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="1 of the 2 files"):
        prepare(cfg, tokenizer, "preference")


def test_folders_and_names(tmp_path: Path) -> None:
    def located(name: str) -> dict[str, list[str]]:
        files = source.locate(SummarizationConfig(dataset_name=name))
        return {split: [file.name for file in found] for split, found in files.items()}

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "pairs.jsonl").touch()
    (tmp_path / "a" / "notes.txt").touch()
    assert located(str(tmp_path / "a")) == {"train": ["pairs.jsonl"]}
    for name in ("train.csv", "dev.csv", "test.csv", ".train.csv"):
        (tmp_path / "a" / name).touch()
    assert located(str(tmp_path / "a")) == {"train": ["train.csv"], "validation": ["dev.csv"], "test": ["test.csv"]}
    (tmp_path / "b").mkdir()
    for name, message in [
        (str(tmp_path / "b"), "no file that ends in"),
        (str(tmp_path / "a" / "train.csv"), "data.train_file="),
        (str(tmp_path / "nowhere"), "neither a folder nor a hub id"),
        ("../up", "neither a folder nor a hub id"),
        ("embedded:nothing", "no file that ends in"),
        ("", r"data\.dataset_name"),
    ]:
        with pytest.raises(DataError, match=message):
            located(name)


@pytest.mark.parametrize("files", [("state.json", "dataset_info.json", "a.arrow"), ("dataset_dict.json",)])
def test_folders_of_save_to_disk_are_named(files: tuple[str, ...], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    for key, problems in (
        ("data.dataset_name", [dataset_problem(str(tmp_path))]),
        ("data.train_file", data_file_problems("data.train_file", str(tmp_path))),
    ):
        [problem] = problems
        assert key in str(problem) and "to_parquet" in str(problem)
    (tmp_path / files[0]).unlink()
    assert dataset_problem(str(tmp_path)) is None


def test_a_cached_hub_dataset_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo, commit = tmp_path / "datasets--me--pairs", "a" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    folder = repo / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}))
    files = source.locate(SummarizationConfig(dataset_name="me/pairs"))
    assert files == {"train": [folder / "train.jsonl"]}
