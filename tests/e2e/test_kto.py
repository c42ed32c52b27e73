"""KTO by the command line: what it learns, what it logs, what it refuses, and where its reference comes from."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.support.runs import figures, rejected, train, train_words, write_labelled, write_pairs

ModelFolder = Callable[..., Path]
LORA = ["model.finetune_mode=LORA", "model.lora_cfg.rank=4", "model.lora_cfg.dropout=0.0"]
NAMES = {
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "kl",
    "share/chosen",
}


@pytest.mark.parametrize(
    "options",
    [[], pytest.param([*LORA, "task.batching=padded"], marks=pytest.mark.nightly)],
    ids=["all", "lora, padded"],
)
def test_it_begins_at_half_the_weight_and_learns_the_labels(
    options: list[str], tmp_path: Path, model_folder: ModelFolder
) -> None:
    data = write_labelled(tmp_path / "rows.jsonl")
    words = ["task.desirable_weight=1.2", "task.lr_warmup_steps=0", "task.max_eval_batches=null", *options]
    run_dir = train(model_folder(), data, tmp_path / "run", "optim.lr=3e-3", *words, task="kto")
    share = figures(run_dir)["train/share/chosen"][0]
    assert figures(run_dir)["train/loss"][0] == pytest.approx(0.5 * (1.2 * share + (1 - share)), abs=1e-5)
    assert figures(run_dir)["train/kl"][0] == pytest.approx(0.0, abs=1e-4)
    losses, margins = figures(run_dir)["val/loss"], figures(run_dir)["val/rewards/margins"]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0] < 0.55
    assert margins[2] > margins[1] > margins[0] > 0
    assert {f"{split}/{name}" for split in ("train", "val") for name in NAMES} <= figures(run_dir).keys()
    assert figures(run_dir)["val/share/chosen"] == [0.5] * 3
    assert len(list((run_dir / "samples").iterdir())) == 3  # one at each validation


def test_pairs_are_taken_and_both_references_are_computed_once(tmp_path: Path, model_folder: ModelFolder) -> None:
    data = write_pairs(tmp_path / "rows.jsonl", 12)
    words = ["task.max_num_steps=2", "task.lr_warmup_steps=0", f"data.cache_dir={tmp_path / 'cache'}"]
    one = train(model_folder(), data, tmp_path / "one", *words, task="kto")
    report = json.loads((one / "data_report.json").read_text())
    assert report["splits"]["train"]["labels"] == {"desirable": 12, "undesirable": 12, "pairs": 12}
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("reference-*.safetensors")}
    kinds = {path.name.rpartition("-")[0] for path in files}
    assert kinds == {
        f"reference-{name}" for name in ("train", "train-mismatched", "validation", "validation-mismatched")
    }
    assert all(load_file(path)["logprobs"].shape == (24, 1) for path in files)
    train(model_folder(), data, tmp_path / "two", *words, task="kto")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("reference-*.safetensors")} == files
    assert figures(one)["train/loss"] == figures(tmp_path / "two")["train/loss"]


def test_rows_of_one_prompt_are_refused_and_a_lonely_validation_row_is_not(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "p", "response": f"{i} words", "label": i % 2} for i in range(4)]
    lonely, data = tmp_path / "lonely.jsonl", write_labelled(tmp_path / "rows.jsonl", 8)
    lonely.write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = rejected(train_words(model_folder(), lonely, tmp_path / "one", task="kto"), capsys)
    assert "same prompt" in " ".join(printed.split())
    lonely.write_text(json.dumps(rows[0]) + "\n")
    words = [f"data.validation_file={lonely}", "task.max_num_steps=1"]
    run_dir = train(model_folder(), data, tmp_path / "two", *words, task="kto")
    assert "val/rewards/rejected" in figures(run_dir)
    assert "val/rewards/chosen" not in figures(run_dir)
