"""Mixtures: each dataset is read as it is alone, and gives its share of the training rows."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sheeprlhf.config.validate import mix_problems
from sheeprlhf.data.prepare import PreparedData, prepare_data
from sheeprlhf.data.report import render_report
from sheeprlhf.structure.data import KeptColumns, MixDataConfig
from tests.unit.data.toy import byte_tokenizer, local, prepare, texts, write_jsonl


def files(folder: Path) -> dict[str, str]:
    """A file of 10 rows in one layout and one of 30 in another, which is read by `data.columns`."""
    few = [{"instruction": f"a{n}", "output": "x"} for n in range(10)]
    many = [{"q": f"b{n}", "a": "y", "id": n} for n in range(30)]
    return {"few": write_jsonl(folder / "few.jsonl", few), "many": write_jsonl(folder / "many.jsonl", many)}


def mixture(folder: Path, *weights: float, **options: Any) -> PreparedData:
    """The two files with their weights."""
    found = files(folder)
    mix: list[dict[str, Any]] = [
        {"train_file": found["few"]},
        {"train_file": found["many"], "columns": {"prompt": "q", "response": "a"}},
    ]
    for given, weight in zip(mix, weights, strict=False):
        given["weight"] = weight
    options = {"validation_split": 0.0, "test_split": 0.0, "cache_dir": str(folder / "cache")} | options
    return prepare(MixDataConfig(mix=mix, **options), byte_tokenizer())


def prompts(data: PreparedData, split: str = "train") -> list[str]:
    return [prompt for prompt, _ in texts(data, byte_tokenizer(), split)]


@pytest.mark.parametrize(
    ("weights", "few", "many"),
    [((), 10, 30), ((1, 3), 10, 30), ((3, 1), 30, 10), ((30, 10), 30, 10), ((9, 11), 18, 22), ((1, 1e6), 1, 40)],
)
def test_weights_are_shares_of_the_training_rows(
    weights: tuple[float, ...], few: int, many: int, tmp_path: Path
) -> None:
    """The 40 rows of an epoch; rows are repeated, or left out at equal distances."""
    data = mixture(tmp_path, *weights)
    counts = Counter(prompts(data))
    for letter, rows, expected in (("a", 10, few), ("b", 30, many)):
        times = [counts[f"{letter}{n}"] for n in range(rows)]
        assert sum(times) == expected
        assert max(times) - min(times) <= 1
    used = [part["used"]["train"] for part in data.report["mix"]]
    assert used == [few, many]
    assert data.report["splits"]["train"]["mixed_rows"] == sum(used)
    assert mixture(tmp_path, *weights).fingerprint == data.fingerprint


def test_rows_are_mixed_evenly_and_have_their_own_numbers(tmp_path: Path) -> None:
    data = mixture(tmp_path)
    assert "".join(prompt[0] for prompt in prompts(data)) == "babb" * 10
    numbers = {
        row.row_id: prompt for row, prompt in zip(data.splits["train"].examples(range(40)), prompts(data), strict=True)
    }
    assert numbers == {n: f"a{n}" for n in range(10)} | {10 + n: f"b{n}" for n in range(30)}


def test_splits_are_those_of_the_datasets_alone(tmp_path: Path) -> None:
    """Validation and test rows are not weighted."""
    splits = {"validation_split": 0.3, "test_split": 0.2}
    data = mixture(tmp_path, 5, 1, **splits)
    found = files(tmp_path)
    alone = [
        prepare(local(tmp_path, train_file=found["few"], **splits), byte_tokenizer()),
        prepare(
            local(tmp_path, train_file=found["many"], columns={"prompt": "q", "response": "a"}, **splits),
            byte_tokenizer(),
        ),
    ]
    for split in ("validation", "test"):
        assert sorted(prompts(data, split)) == sorted(prompt for one in alone for prompt in prompts(one, split))
    assert set(prompts(data)) <= {prompt for one in alone for prompt in prompts(one)}
    for part, one in zip(data.report["mix"], alone, strict=True):
        assert part["columns"] == one.report["columns"]
        assert part["kept"] == {split: len(rows) for split, rows in one.splits.items()}
    total = data.report["splits"]["train"]
    assert (total["read"], total["eos_share"]) == (sum(len(one.splits["train"]) for one in alone), 1.0)


def test_the_report_lists_the_datasets(tmp_path: Path) -> None:
    text = render_report(mixture(tmp_path, 3, 1).report)
    for part in ("few.jsonl", "weight 3", "each 3.00 times", "75.0%", "many.jsonl", "prompt from q", "not read: id"):
        assert part in text


def test_a_change_of_weights_or_rows_is_another_fingerprint(tmp_path: Path) -> None:
    found = {mixture(tmp_path, *weights).fingerprint for weights in ((), (1, 3), (3, 1))}
    assert len({*found, mixture(tmp_path, num_samples=5).fingerprint}) == 4
    assert Counter(prompt[0] for prompt in prompts(mixture(tmp_path, num_samples=5))) == {"a": 5, "b": 5}


def test_reward_functions_get_the_columns_that_all_datasets_have(tmp_path: Path) -> None:
    rows = [[{"prompt": f"a{n}", "answer": n, "level": 1} for n in range(4)], [{"prompt": "b", "answer": [2]}]]
    mix = [{"train_file": write_jsonl(tmp_path / f"{n}.jsonl", of_file)} for n, of_file in enumerate(rows)]
    options = {"validation_split": 0.0, "test_split": 0.0, "cache_dir": str(tmp_path / "cache")}
    kept = KeptColumns(("answer", "level"))
    cfg = MixDataConfig(mix=mix, **options)
    data = prepare_data(cfg, byte_tokenizer(), kind="prompts", say=print, progress=False, kept=kept)
    columns = [row.columns for row in data.splits["train"].examples(range(5))]
    assert sorted(str(one) for one in columns) == sorted(str({"answer": n}) for n in (0, 1, 2, 3, [2]))
    [note] = [note for note in data.report["notes"] if "level" in note]
    assert "answer" not in note


def test_steps_keep_their_labels(tmp_path: Path) -> None:
    """Rows of two files of steps, each with the labels and the ends of its own."""
    steps = {"1?": (["a"], [True]), "2?": (["a", "b b"], [True, False]), "3?": (["b"], [False])}
    rows = [{"prompt": name, "completions": texts, "labels": labels} for name, (texts, labels) in steps.items()]
    files = [write_jsonl(tmp_path / f"{number}.jsonl", [row]) for number, row in enumerate(rows)]
    options = {"validation_split": 0.0, "test_split": 0.0, "cache_dir": str(tmp_path / "cache")}
    cfg = MixDataConfig(mix=[{"train_file": file} for file in files], **options)
    data = prepare_data(cfg, byte_tokenizer(), kind="stepwise", say=print, progress=False)
    found = data.splits["train"].examples(range(3))
    assert [(row.columns or {})["labels"] for row in found] == [labels for _, labels in steps.values()]
    assert [row.masks()[0].sum() for row in found] == [1, 2, 1]


BAD: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no list": ({"train_file": "{few}"}, ("data.mix=",)),
    "empty": ([], ("data.mix=",)),
    "no rows": ([{"weight": 1}], ("dataset 1", "train_file")),
    "unknown option": ([{"train_file": "{few}", "colums": {}}], ("dataset 1", "did you mean columns?")),
    "option of all": ([{"train_file": "{few}", "max_length": 3}], ("data.max_length",)),
    "weights": ([{"train_file": "{few}", "weight": 0}, {"train_file": "{many}", "weight": True}], ("=0", "=True")),
    "some weights": ([{"train_file": "{few}", "weight": 1}, {"train_file": "{many}"}], ("with and without weight",)),
    "missing file": (
        [{"train_file": "{few}"}, {"train_file": "gone.jsonl"}],
        ("dataset 2", "data.train_file=gone.jsonl"),
    ),
    "wrong type": ([{"dataset_name": "me/set", "subset": [1]}], ("data.mix", "subset")),
    "wrong columns": ([{"dataset_name": "me/set", "columns": {"promt": "a"}}], ("dataset 1", "data.columns.promt")),
    "in itself": ([{"data": "mix", "mix": []}], ("data=mix", "docstrings")),
    "all at once": (
        [{"train_file": "{few}", "wieght": 1}, {"train_file": "x.jsonl"}, {"data": "nope"}],
        ("dataset 1: wieght", "did you mean weight?", "dataset 2: data.train_file=x.jsonl", "dataset 3: data=nope"),
    ),
    "range": ([{"train_file": "{few}", "num_samples": 0}], ("dataset 1", "data.num_samples=0")),
}


@pytest.mark.parametrize("name", BAD)
def test_problems_are_found_before_anything_is_read(name: str, tmp_path: Path) -> None:
    mix, expected = BAD[name]
    found = files(tmp_path)
    if isinstance(mix, list):
        mix = [{k: v.format(**found) if isinstance(v, str) else v for k, v in given.items()} for given in mix]
    problems = "\n".join(mix_problems(MixDataConfig(mix=mix)))
    for part in expected:
        assert part in problems
