"""The README's commands, run as they stand; only names of hub repositories become local folders of the hub's layout."""

import json
import os
import re
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sheeprlhf.cli import run
from tests.support.runs import train, write_rows

ROOT = Path(__file__).parents[2]
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    for line in block.splitlines()
    if line and not line.startswith("#")
]


def summarization_folder(folder: Path) -> Path:
    """CarperAI/openai_summarize_comparisons in small: data/<split>-00000-of-00001-<hash>.parquet."""
    (folder / "data").mkdir(parents=True)
    for split, count in (("train", 40), ("valid1", 6), ("test", 6)):
        rows = [
            {
                "prompt": f"SUBREDDIT: r/a\nPOST: post {split} {i}",
                "chosen": f"TL;DR: good {i}",
                "rejected": f"TL;DR: bad {i}",
            }
            for i in range(count)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def test_the_first_two_commands_install_train_and_test() -> None:
    assert COMMANDS[0] == "pip install -e . && python sheeprlhf.py train task=sft"
    assert COMMANDS[1] == 'pip install -e ".[dev]" && pytest'


@pytest.mark.slow
def test_every_other_command_works(
    tmp_path: Path, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "my.jsonl")
    finished = train(model_folder(), tmp_path / "my.jsonl", tmp_path / "run", "task.max_num_steps=1")
    (tmp_path / "my_rewards.py").write_text(
        "def brevity(prompts, responses):\n    return [-len(r) for r in responses]\n"
    )
    hub_data = summarization_folder(tmp_path / "hub-data")
    seen = []
    for command in COMMANDS[2:]:
        program, *words = command.replace("<run>", str(finished)).split()
        if (program, words[0]) != ("python", "sheeprlhf.py"):
            assert command == "tensorboard --logdir logs/runs"
            continue
        words = [word.replace("<hub id or folder>", "") for word in words[1:] if word not in ("id", "or", "folder>")]
        if "model=opt" in words:
            assert "fabric=auto_cuda" in words
            words = [word for word in words if word != "fabric=auto_cuda"]
            words += [f"model.repo_name={model_folder('opt')}", f"data.dataset_name={hub_data}", "data.max_length=120"]
            words += ["data.max_prompt_length=90", "dry_run=true"]
        elif words[0] == "train":
            words = [word for word in words if not word.startswith("model.repo_name=")]
            words += [
                f"model.repo_name={model_folder()}",
                "dry_run=true",
                "data.max_length=120",
                "data.max_prompt_length=90",
            ]
        run(words)
        seen.append(next((word for word in words if word.startswith("task=")), words[0]))
    assert sorted(seen) == sorted(
        [*["task=sft"] * 3, "task=perplexity", "task=rm", "task=dpo", "task=ppo", "task=ppo", "task=rloo"]
    )
    for word in set(seen) - {"task=perplexity"}:
        finals = list(Path("logs/runs").glob(f"*/*/{word.removeprefix('task=')}/*/default*/final"))
        assert len(finals) == seen.count(word)


@pytest.mark.nightly  # CI itself installs into a clean environment
def test_install_and_train_in_a_fresh_clone_and_environment(tmp_path: Path) -> None:
    """The first command; the environment borrows this one's packages instead of fetching them again."""
    clone = tmp_path / "clone"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.rstrip("\0").split("\0"):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    # Python 3.11 puts an old setuptools into a new environment; the borrowed one is newer.
    subprocess.run([python, "-m", "pip", "uninstall", "-qy", "setuptools"], check=True)
    packages = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()))
    environment = os.environ | {
        # A borrowed package's program (pytest) is in the lender's folder.
        "PATH": os.pathsep.join([str(tmp_path / "venv" / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads "0" as: no isolation
        "SHEEPRLHF_CACHE": str(tmp_path / "cache"),
    }
    environment.pop("PYTHONPATH", None)  # it may lead to this checkout
    for command in (COMMANDS[0], COMMANDS[1] + " --collect-only -q tests/unit/loss"):
        done = subprocess.run(["bash", "-c", command], cwd=clone, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    run_dir = next((clone / "logs" / "runs").glob("docstrings/tiny/sft/*/default"))
    assert json.loads((run_dir / "run.json").read_text())["status"] == "finished"
    where = "import sheeprlhf; print(sheeprlhf.__file__)"
    found = subprocess.run(
        [python, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()).is_relative_to(clone)
    assert sys.prefix not in found.stdout
