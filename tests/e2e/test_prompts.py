"""Online tasks on rows that are a prompt alone, as a user runs them."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from sheeprlhf.cli import run
from tests.support.runs import figures, rejected, train_words, write_rows

ModelFolder = Callable[..., Path]
LENGTH = ("reward.path=length", "reward.target_length=3")


def files(folder: Path, *answered: bool) -> tuple[Path, Path]:
    """Training and held-out rows; of each file, whether its rows have responses."""
    made = []
    for name, keep in zip(("train", "held_out"), answered, strict=True):
        rows = [json.loads(line) for line in write_rows(folder / f"{name}.jsonl", 16).read_text().splitlines()]
        made.append(folder / f"{name}.jsonl")
        made[-1].write_text("".join(json.dumps(row if keep else {"prompt": row["prompt"]}) + "\n" for row in rows))
    return made[0], made[1]


def words(model: Path, data: tuple[Path, Path], run_dir: Path, *extra: str, task: str = "grpo") -> list[str]:
    held_out = [f"data.{split}_file={data[1]}" for split in ("validation", "test")]
    return [*train_words(model, data[0], run_dir, "task.max_num_steps=2", *held_out, task=task), *extra]


@pytest.mark.slow
def test_two_steps_on_prompts(tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]) -> None:
    data, run_dir = files(tmp_path, False, False), tmp_path / "run"
    run(words(model_folder(), data, run_dir, *LENGTH))
    told = capsys.readouterr().err.rpartition("next: python sheeprlhf.py ")[2].splitlines()[0]
    found = figures(run_dir)
    assert len(found["objective/scores"]) == 1 and len(found["val/scores"]) == 1
    assert "val/perplexity" not in found
    [table] = [path.read_text() for path in (run_dir / "samples").glob("*.txt")]
    assert "[prompt]" in table and "[model]" in table and "[reference]" not in table
    report = json.loads((run_dir / "data_report.json").read_text())
    assert report["splits"]["train"]["prompts_alone"] == 16
    run(shlex.split(told))  # against the start: there are no references
    result = json.loads((run_dir / "eval" / "reward-length-test-final.json").read_text())
    assert result["against"] == "start" and result["rows"] == 16
    run(["eval", "task=generate", f"experiment_dir={run_dir}", "generation.max_new_tokens=4"])
    written = (run_dir / "eval" / "generate-test-final.jsonl").read_text().splitlines()
    assert len(written) == 16 and json.loads(written[0])["reference"] is None
    assert "response" in rejected(["eval", "task=perplexity", f"experiment_dir={run_dir}"], capsys)


def test_held_out_responses_of_prompts_alone_have_a_perplexity(tmp_path: Path, model_folder: ModelFolder) -> None:
    run(words(model_folder(), files(tmp_path, False, True), tmp_path / "run", *LENGTH))
    assert figures(tmp_path / "run")["val/perplexity"][0] > 1


@pytest.mark.slow
def test_what_reads_responses_is_refused(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a model loads."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("nothing was to be loaded")

    monkeypatch.setattr("sheeprlhf.task.models.load_rl_models", load)
    model = model_folder()
    for number, answered in enumerate([(False, False), (True, False)]):
        (tmp_path / f"{number}").mkdir()
        data = files(tmp_path / f"{number}", *answered)
        told = rejected(words(model, data, tmp_path / f"rouge-{number}", "reward.path=rouge"), capsys)
        split = "validation" if answered[0] else "train"
        assert f"reward rouge needs a column 'reference' of the {split} rows; there is prompt: it is the row's" in told
    data = files(tmp_path / "0", False, True)
    told = rejected(words(model, data, tmp_path / "ptx", *LENGTH, "task.ptx_coeff=0.5", task="ppo"), capsys)
    assert "task.ptx_coeff=0.5" in told


def test_the_best_of_n_of_prompts(tmp_path: Path, model_folder: ModelFolder) -> None:
    """Of a file where some rows have a response."""
    data, run_dir = write_rows(tmp_path / "rows.jsonl", 8), tmp_path / "run"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[1::2] = [{"prompt": row["prompt"]} for row in rows[1::2]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(
        [
            *("train", "task=best_of_n", "model=auto", f"model.repo_name={model_folder()}", "data=local"),
            *(f"data.train_file={data}", f"data.validation_file={data}", f"data.test_file={data}"),
            *("task.num_generations=4", "generation.max_new_tokens=5", 'generation.stop_strings=["a","e","\ufffd"]'),
            *("reward=function", *LENGTH, f"hydra.run.dir={run_dir}"),
        ]
    )
    best = [json.loads(line) for line in (run_dir / "dataset" / "train.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in best} <= {row["prompt"] for row in rows} and best
