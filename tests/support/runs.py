"""Short real runs on a tiny model and a small file, through the command line's own code."""

import csv
import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest

from sheeprlhf.cli import run
from tests.support.composed import measure_once

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards brew strange potions".split()


def write_rows(path: Path, num_rows: int = 48, *, seed: int = 0) -> Path:
    """A jsonl file of prompts and responses of varying length."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    lines = [json.dumps({"prompt": f"{i} {text(1, 6)}?", "response": f" {text(1, 5)}."}) for i in range(num_rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_pairs(path: Path, num_rows: int = 48, *, seed: int = 0) -> Path:
    """The same with a better response, which is longer by a word, and a worse one."""
    rows = [json.loads(line) for line in write_rows(path, num_rows, seed=seed).read_text().splitlines()]
    for row in rows:
        row["rejected"] = row.pop("response")
        row["chosen"] = f" well,{row['rejected']}"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_labelled(path: Path, num_rows: int = 48, *, seed: int = 0) -> Path:
    """Unpaired rows: a better response (see `write_pairs`) and a worse one in turn, each with its label."""
    rows = [json.loads(line) for line in write_pairs(path, num_rows, seed=seed).read_text().splitlines()]
    unpaired = [
        {"prompt": row["prompt"], "response": row["rejected" if i % 2 else "chosen"], "label": not i % 2}
        for i, row in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in unpaired))
    return path


def write_steps(path: Path, num_rows: int = 48) -> Path:
    """Rows of one to four steps; a step with the word `fox` is wrong."""
    rng = random.Random(0)
    steps = [[" ".join(rng.choices(WORDS[:6], k=3)) for _ in range(rng.randint(1, 4))] for _ in range(num_rows)]
    rows = [
        {"prompt": f"{number}?", "completions": of_row, "labels": ["fox" not in step for step in of_row]}
        for number, of_row in enumerate(steps)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def exit_code(line: str | list[str]) -> int:
    """Run a command line, words or a text without quotes, in this process; its exit code."""
    try:
        run(line.split() if isinstance(line, str) else line)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def rejected(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command line that has to fail with exit code 2; what it printed as its error, which is no traceback."""
    capsys.readouterr()
    code, error = exit_code(words), capsys.readouterr().err
    assert code == 2 and "Traceback" not in error, error
    return error


WRITERS = {"sft": write_rows, "rm": write_pairs, "dpo": write_pairs, "kto": write_labelled, "ilql": write_labelled}
ONLINE_TASKS = ("ppo", "grpo", "rloo", "reinforce_pp", "online_dpo")
WRITERS["prm"] = write_steps
WRITERS |= dict.fromkeys((*ONLINE_TASKS, "distill"), write_rows)
ONLINE = [  # 6 rollouts of 12 prompts, 4 optimizer steps on each
    "task.rollout_size=24",
    "task.num_generations=2",
    "task.max_num_steps=24",
    "task.num_iterations=1",
]
REWARD = ["reward=function", "reward.path=tests.support.rewards:letters"]


def train_words(model: Path, data: Path, run_dir: Path, *extra: str, task: str = "sft") -> list[str]:
    """The command of a run of 24 optimizer steps in 3 epochs."""
    return [
        "train",
        f"task={task}",
        "model=auto",
        f"model.repo_name={model}",
        "data=local",
        f"data.train_file={data}",
        f"data.validation_file={data}",
        f"data.test_file={data}",
        "data.max_length=120",
        "data.max_prompt_length=70",
        "task.epochs=3",
        "task.mini_batch_size=6",
        "task.micro_batch_size=3",
        "task.log_interval=1",
        "task.eval_interval=8",
        "task.max_eval_batches=1",
        "task.save_interval=4",
        *([] if task in ("rm", "prm") else ["task.num_sample_prompts=1"]),
        "task.lr_warmup_steps=3",
        "generation.max_new_tokens=4",
        "optim.lr=1e-3",
        f"hydra.run.dir={run_dir}",
        *(ONLINE if task in (*ONLINE_TASKS, "distill") else []),
        *(REWARD if task in ONLINE_TASKS and not any(word.startswith("reward=") for word in extra) else []),
        *extra,
    ]


def train(model: Path, data: Path, run_dir: Path, *extra: str, task: str = "sft") -> Path:
    """Run it in this process, which measures each model for its memory plan once."""
    with pytest.MonkeyPatch.context() as patch:
        measure_once(patch)
        run(train_words(model, data, run_dir, *extra, task=task))
    return run_dir


def figures(run_dir: Path) -> dict[str, list[float]]:
    """The values in metrics.csv by their tag, in the order of the steps."""
    found: dict[str, list[float]] = {}
    with (run_dir / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["tag"], []).append(float(row["value"]))
    return found


def figures_at(run_dir: Path) -> dict[tuple[str, int], float]:
    """The same by tag and step."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return {(row["tag"], int(row["step"])): float(row["value"]) for row in csv.DictReader(file)}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def killed(run_dir: Path, step: int = 10**9) -> Path:
    """Make a finished run one that died after it saved `step`, or before it wrote `final/`."""
    shutil.rmtree(run_dir / "final")
    for path in (run_dir / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    info = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps(info | {"status": "running"}))
    return run_dir


def result_of(run_dir: Path, last_step: int = 24) -> dict[str, str]:
    """Digests of all that has to be bit-identical at a run's end: weights, optimizer, generators, final folder."""
    checkpoint = {
        k: v for k, v in digests(run_dir / "checkpoints" / f"step-{last_step}").items() if k.endswith("safetensors")
    }
    return checkpoint | {k: v for k, v in digests(run_dir / "final").items() if not k.endswith(".md")}
