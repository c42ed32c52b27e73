"""Where training rows are: subsets and splits of hub datasets, and shards that are prepared one by one."""

import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from sheeprlhf.data import source
from sheeprlhf.data.layout import RowLayout
from sheeprlhf.data.prepare import Stream
from sheeprlhf.data.read import read_batches, read_jsonl, read_parquet
from sheeprlhf.data.source import Part
from sheeprlhf.structure.data import HubDataConfig, LocalDataConfig
from sheeprlhf.utils.errors import DataError
from tests.support.hub import Hub, serve
from tests.unit.data.toy import byte_tokenizer, local, prepare, texts, write_jsonl

CARD = """---
configs:
- config_name: pairs
  default: true
  data_files:
  - split: train_sft
    path: pairs/train_sft-*.jsonl
  - split: test_sft
    path: [pairs/test_sft.jsonl]
  - split: train_gen
    path: pairs/gen.jsonl
- config_name: other
  data_files: other/*.jsonl
- config_name: folder
  data_dir: deep
---
# A dataset
"""
LINE = '{"prompt": "%s", "response": "r"}\n'


def row_file(file: Path, mark: str) -> None:
    """Two rows in a file of the kind that its name has."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"{mark}{n}", "response": "r"} for n in range(2)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".gz":
        file.write_bytes(gzip.compress(lines.encode()))
    elif file.suffix == ".csv":
        file.write_text("prompt,response\n" + "".join(f"{row['prompt']},r\n" for row in rows))
    else:
        file.write_text(lines)


REPOSITORIES: dict[str, tuple[list[str], str, list[str | None]]] = {  # files, card, subsets
    "card": (
        [
            *("pairs/train_sft-0.jsonl", "pairs/train_sft-1.jsonl", "pairs/test_sft.jsonl", "pairs/gen.jsonl"),
            *("other/a.jsonl", "deep/train.jsonl", "deep/dev.jsonl", "unlisted.jsonl"),
        ],
        CARD,
        [None, "pairs", "other", "folder"],
    ),
    "shards": (["data/train-00000-of-00001.parquet", "data/test_x-00000-of-00001.parquet"], "", [None]),
    "folders": (["train/a.csv", "train/b.csv", "validation/c.csv"], "# Text alone\n", [None]),
    "names": (["my-train.jsonl.gz", "my-eval.jsonl.gz", "script.py"], "", [None]),
    "one file": (["rows.jsonl"], "", [None]),
}


def repository(folder: Path, name: str) -> Path:
    """The files of a dataset in the hub's layout."""
    files, card, _ = REPOSITORIES[name]
    for file in files:
        row_file(folder / file, f"{Path(file).stem}-")
    if card:
        (folder / "README.md").write_text(card)
    return folder


@pytest.mark.parametrize("name", REPOSITORIES)
def test_subsets_and_splits_are_those_of_load_dataset(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = repository(tmp_path / "set", name)
    for subset in REPOSITORIES[name][2]:
        expected = datasets.load_dataset(str(folder), subset, cache_dir=str(tmp_path / "cache"))
        found = source.splits_of_subset(folder, subset)
        assert list(found) == list(expected)
        assert source.choose_splits(found, next(iter(found)))["train"] == found[next(iter(found))]
        for split, files in found.items():
            layout = RowLayout(HubDataConfig(), "sft")
            prompts = [row.values["prompt"] for rows in read_batches(files, None, layout=layout) for row in rows]
            assert prompts == expected[split]["prompt"]


@pytest.mark.parametrize(
    ("split", "used"),
    [
        ("train_sft", {"train": "train_sft", "test": "test_sft"}),
        ("train_gen", {"train": "train_gen"}),
        ("test_sft", {"train": "test_sft"}),
        (None, None),
    ],
)
def test_the_split_to_train_on_is_chosen(split: str | None, used: dict[str, str] | None, tmp_path: Path) -> None:
    folder = repository(tmp_path / "set", "card")
    splits = source.splits_of_subset(folder, None)
    if used is None:
        with pytest.raises(DataError, match=r"data\.split=null.*train_sft, test_sft, train_gen"):
            source.choose_splits(splits, split)
        return
    assert source.choose_splits(splits, split) == {role: splits[name] for role, name in used.items()}
    only = source.choose_splits({"everything": splits["train_gen"]}, None)
    assert only == {"train": splits["train_gen"]}


def hub_data(folder: Path, name: str, **options: Any) -> HubDataConfig:
    return HubDataConfig(dataset_name=name, cache_dir=str(folder / "cache"), validation_split=0.0, **options)


def test_rows_are_read_by_their_layout_and_what_is_left_is_reported(tmp_path: Path) -> None:
    folder = repository(tmp_path / "set", "card")
    tokenizer = byte_tokenizer()
    prepared = prepare(hub_data(tmp_path, str(folder), split="train_sft"), tokenizer)
    assert [prompt for prompt, _ in texts(prepared, tokenizer)] == [f"train_sft-{a}-{b}" for a in "01" for b in "01"]
    assert [prompt for prompt, _ in texts(prepared, tokenizer, "test")] == ["test_sft-0", "test_sft-1"]
    assert prepared.report["columns"]["layouts"] == {"prompt and response: prompt, response": 6}
    [note] = [note for note in prepared.report["notes"] if "data.split" in note]
    assert "train_gen" in note and "test_sft" not in note


BAD = {
    "unknown subset": (CARD, {"subset": "pears"}, r"data\.subset=pears.*pairs, other, folder"),
    "no default": (CARD.replace("  default: true\n", ""), {}, r"data\.subset=null.*pairs, other, folder"),
    "unknown split": (CARD, {"split": "train"}, r"data\.split=train"),
    "outside": (CARD.replace("pairs/gen", "../set/pairs/gen"), {"split": "train_sft"}, r"README\.md.*outside"),
    "web address": (CARD.replace("pairs/gen", "http://127.0.0.1:9/gen"), {"split": "train_sft"}, r"README\.md"),
    "no files": (CARD.replace("other/*", "others/*"), {"subset": "other"}, r"data\.dataset_name"),
    "damaged card": ("---\nconfigs: {a: [\n---\n", {}, r"README\.md"),
    "no subset in a card": (CARD.replace("config_name: pairs", "name: pairs"), {}, r"README\.md"),
    "no such folder": ("", {"subset": "nothing"}, r"data\.subset"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_chosen_is_refused(name: str, tmp_path: Path) -> None:
    card, options, message = BAD[name]
    folder = repository(tmp_path / "set", "card")
    (folder / "README.md").write_text(card)
    with pytest.raises(DataError, match=message):
        source.locate(hub_data(tmp_path, str(folder), **options))


@contextmanager
def served(folder: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """The dataset me/set on a hub that this process uses."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with serve({"datasets/me/set": folder}) as hub:
        template = hub.endpoint + constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def test_streamed_files_are_downloaded_one_by_one_and_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the card, the file that is trained on and held-out files take disk space; the rows are a local folder's."""
    folder = repository(tmp_path / "set", "card")
    cfg = hub_data(tmp_path, "me/set", split="train_sft", streaming=True)
    tokenizer = byte_tokenizer()
    with served(folder, monkeypatch, tmp_path / "hub") as hub:
        source._listing.cache_clear()
        stream = Stream(cfg, tokenizer, kind="sft", say=lambda line: None, leads=True)

        def fetched() -> set[str]:
            found = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
            hub.asked.clear()
            return found

        assert fetched() == {"README.md"}
        opened = [texts(stream.prepare(0), tokenizer)]
        assert fetched() - {"README.md"} == {"train_sft-0.jsonl", "test_sft.jsonl"}
        opened.append(texts(stream.prepare(1), tokenizer))
        assert fetched() - {"README.md"} == {"train_sft-1.jsonl"}
        on_disk = {file.name for file in source.locate(cfg)["train"] if file.read_bytes().strip(b"\0")}
        assert on_disk == {"train_sft-1.jsonl"}
        assert texts(stream.prepare(2), tokenizer) == opened[0]  # from the first file again, downloaded again
        assert fetched() - {"README.md"} == {"train_sft-0.jsonl"}
    local = hub_data(tmp_path, str(folder), split="train_sft", streaming=True)
    same = Stream(local, tokenizer, kind="sft", say=lambda line: None, leads=False)
    assert [texts(same.prepare(number), tokenizer) for number in range(2)] == opened
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source._listing.cache_clear()
    with pytest.raises(DataError, match="HF_HUB_OFFLINE"):
        source.locate(cfg)


def test_only_the_files_of_the_subset_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = repository(tmp_path / "set", "card")
    with served(folder, monkeypatch, tmp_path / "hub") as hub:
        cfg = hub_data(tmp_path, "me/set", split="train_sft")
        files = source.locate(cfg)
        fetched = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
    names = {split: [file.name for file in found] for split, found in files.items()}
    assert names == {"train": ["train_sft-0.jsonl", "train_sft-1.jsonl"], "test": ["test_sft.jsonl"]}
    assert fetched == {"README.md", *names["train"], *names["test"], "gen.jsonl"}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert source.locate(cfg) == files
    assert "train_gen" in str(source.left_out_note(cfg, files))


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
        with pytest.raises(DataError, match=r"part 3 of 4.* line 5: "):
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
