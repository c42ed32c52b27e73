"""Which of n responses is kept, against a loop; what a row says; and the bound on the KL, against sampling."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from sheeprlhf.config.run_lookup import resolve_runs
from sheeprlhf.config.validate import validate
from sheeprlhf.data.example import Example
from sheeprlhf.reward.score import Texts
from sheeprlhf.rollout.rollout import Rollout, kl_bound
from sheeprlhf.task.train.best_of_n import (
    RowWriter,
    SelectionStats,
    best_of,
    select_rows,
    selection_stats,
    selection_table,
    write_splits,
)
from tests.unit.config.test_registry import composed, to_typed


def test_the_best_that_ended_is_kept() -> None:
    """Against a loop over the responses, with many ties."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        scores = rng.integers(-2, 3, size=rng.integers(1, 6)).astype(float)
        finished = rng.random(len(scores)) < 0.6
        for min_score in (None, 0.0, 2.0):
            best = None
            for number, score in enumerate(scores):
                if finished[number] and (best is None or score > scores[best]):
                    best = number
            if best is None:
                expected: tuple[int | None, str] = (None, "cut")
            elif min_score is not None and scores[best] < min_score:
                expected = (None, "low")
            else:
                expected = (best, "kept")
            assert best_of(scores, finished, min_score) == expected


def example_rows() -> list[dict]:
    rows = tuple(Example(i, np.array([1]), (np.array([2]), np.array([3]))) for i in range(3))
    scores = np.array([[1.0, 3.0], [5.0, 4.0], [0.0, -1.0]])
    finished = np.array([[True, True], [False, True], [False, False]])
    texts = Texts(["p0", "p0", "p1", "p1", "p2", "p2"], ["a", "b", "c", "d", "e", "f"], [True] * 6, [1] * 6, {})
    return select_rows(Rollout(rows, scores, finished, {}), texts, 4.0)


def test_a_row_is_its_prompt_with_its_best_response(tmp_path: Path) -> None:
    rows = example_rows()
    assert [row["status"] for row in rows] == ["low", "kept", "cut"]
    assert selection_stats(rows) == SelectionStats(3, 1, 1, 1, first=2.0, best=7 / 3, mean=2.0)
    write_splits(tmp_path, {"train": rows})
    [line] = (tmp_path / "train.jsonl").read_text().splitlines()
    expected = {"prompt": "p1", "response": "d", "score": 4.0, "n": 2, "mean_score": 4.5, "first_score": 5.0}
    assert json.loads(line) == expected
    table = selection_table({"train": selection_stats(rows)}, 2)
    assert "66.7%" in table and "2.0000" in table and "2.3333" in table and f"{math.log(2) - 0.5:.3f}" in table


def test_pairs_are_of_responses_that_ended_with_different_scores_and_texts(tmp_path: Path) -> None:
    responses = [["a", "b", "c"], ["d", "e", "e"], ["f", "f", "g"], ["h", "i", "j"]]
    scores = np.array([[1.0, 3.0, 0.0], [2.0, 2.0, 2.0], [4.0, 3.0, 5.0], [1.0, 7.0, 2.0]])
    finished = np.array([[True, True, False], [True] * 3, [True, True, False], [True, False, False]])
    examples = tuple(Example(i, np.array([1]), (np.array([2]),) * 3) for i in range(4))
    texts = Texts(
        [f"p{i}" for i in range(4) for _ in range(3)],
        [text for row in responses for text in row],
        [True] * 12,
        [1] * 12,
        {},
    )
    write_splits(tmp_path, {"train": select_rows(Rollout(examples, scores, finished, {}), texts, None)})
    lines = (tmp_path / "train_pairs.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"prompt": "p0", "chosen": "b", "rejected": "a"}]


def test_parts_are_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, rows = RowWriter(tmp_path / "parts"), example_rows()
    messages: list[str] = []
    assert not parts.has("train", 0, 3, messages.append)
    parts.write("train", 0, rows)
    parts.write("train", 1, rows[:1])
    assert parts.has("train", 0, 3, messages.append) and not parts.has("validation", 0, 3, messages.append)
    assert parts.read("train", 2) == [*rows, rows[0]]
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        parts.write("train", 2, rows)
    assert not parts.has("train", 2, 3, messages.append) and len(list((tmp_path / "parts").iterdir())) == 2
    assert messages == []
    file = tmp_path / "parts" / "train-000000.jsonl"
    whole = file.read_text()
    for damaged in (whole[:-9], whole.replace('"kept"', '"odd"'), whole.replace("4.0", "1e999"), whole + whole):
        file.write_text(damaged)
        assert not parts.has("train", 0, 3, messages.append) and str(file) in messages.pop() and not messages


@pytest.mark.parametrize("n", [1, 2, 8])
def test_the_bound_is_the_kl_of_the_best_of_n_of_different_numbers(n: int) -> None:
    """Of continuous scores it is exact: the best of n has density n u^(n-1); the integral by the midpoint rule."""
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    density = n * u ** (n - 1)
    assert kl_bound(n) == pytest.approx(float((density * np.log(density)).mean()), abs=1e-5)


def test_alone_and_as_a_dry_run_it_is_complete() -> None:
    for words in ([], ["dry_run=true"], ["dry_run=true", "task.num_generations=5", "task.rollout_size=100"]):
        assert validate(resolve_runs(to_typed(composed("train", "task=best_of_n", *words)), None)) == []
