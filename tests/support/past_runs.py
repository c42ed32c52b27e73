"""Run directories written by hand, as training and evaluation leave them."""

import json
from pathlib import Path
from typing import Any

STARTED = 1_700_000_000.0


def make_past_run(folder: Path, number: int = 0, *, task: str = "sft", **info: object) -> Path:
    """A finished run of 4 steps, 2 s each, with two samples and a data report."""
    (folder / "samples").mkdir(parents=True)
    usual = {
        "status": "finished",
        "data": "docstrings",
        "model": "tiny",
        "task": task,
        "run_name": "default",
        "step": 4,
    }
    times = {"started": STARTED + number, "finished": STARTED + number + 65, "command": ["train", f"task={task}"]}
    (folder / "run.json").write_text(json.dumps(usual | times | info))
    (folder / "config.yaml").write_text(
        f"task:\n  config_name: {task}\n  epochs: {number + 1}\nmodel:\n  config_name: tiny\n  finetune_mode: ALL\n"
        "data:\n  config_name: docstrings\nseed: 42\n"
    )
    rows = [f"{step},train/loss,{4 / step!r},{STARTED + 2 * step}" for step in (1, 2, 3, 4)]
    rows += [f"{step},train/items,50.0,{STARTED + 2 * step}" for step in (1, 2, 3, 4)]
    (folder / "metrics.csv").write_text("\r\n".join(["step,tag,value,wall_time", *rows, ""]))
    for step in (2, 4):
        (folder / "samples" / f"step-{step}.txt").write_text(
            f"--- samples\n[prompt]\n<|bos|>Say hello.\n[model] score 0.{step}\n{task} says {step}<|eos|>\n"
            "[reference]\n Hello!<|eos|>\n\n"
        )
    split = {"read": 9, "kept": 7, "dropped": {"too_long": 2}, "trained_tokens": 70, "tokens": {"total": {"p50": 11}}}
    report = {"name": "docstrings", "kind": "sft", "splits": {"train": split}, "notes": []}
    (folder / "data_report.json").write_text(json.dumps(report))
    return folder


def write_evaluation(folder: Path, name: str, rows: list[dict[str, Any]] | None = None, **record: object) -> None:
    """A result file, and the rows that it was made of."""
    (folder / "eval").mkdir(exist_ok=True)
    usual = {"weights": "final", "split": "test", "data": "docstrings", "time": "2026-01-01T00:00:00+0000"}
    (folder / "eval" / f"{name}.json").write_text(json.dumps(usual | record))
    if rows is not None:
        (folder / "eval" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
