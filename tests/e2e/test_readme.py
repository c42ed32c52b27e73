"""Commands of the README, and the wheel in an environment of its own; CI itself installs a clone into a new one."""

import json
import os
import re
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sheeprlhf.cli import run
from tests.support.models import ModelFolder
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
    assert COMMANDS[0] == "pip install --no-compile -e . && python sheeprlhf.py train task=sft"
    assert COMMANDS[1] == 'pip install -e ".[dev]" && pytest'


@pytest.mark.slow
def test_every_other_command_works(tmp_path: Path, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
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


PROGRAM = """
import json, sheeprlhf
from sheeprlhf.cli import run
from pathlib import Path
from sheeprlhf.config.command_words import command
from sheeprlhf.config.registry import configs_directory
from sheeprlhf.utils.home import embedded_folder
places = Path(sheeprlhf.__file__).parent, configs_directory(), embedded_folder("embedded:tiny")
run(["train", "task=sft", "dry_run=true"])
run(["list"])
print(command(["eval", "task=perplexity"]))
print(json.dumps([str(place) for place in places]))
"""


def build_wheel(folder: Path) -> Path:
    """The wheel of what git tracks or would track; built from a copy, so that the checkout stays as it is."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.rstrip("\0").split("\0"):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    subprocess.run(build, cwd=folder / "source", check=True, env=os.environ | {"PIP_NO_INDEX": "1"})
    shutil.rmtree(folder / "source")  # nothing can be read from here any more
    return next(folder.glob("*.whl"))


def install(wheel: Path, folder: Path) -> Path:
    """Into a new environment that borrows this one's packages, but not this one's installation of ours."""
    venv.create(folder, with_pip=False)
    packages = next(folder.glob("lib/python*/site-packages"))
    # These folders are searched after the new one, and the .pth files in them (an editable checkout) are not obeyed.
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()))
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, env=clean_environment(folder))
    return folder / "bin"


KEPT = ("HOME", "TMPDIR", "LANG", "OMP_NUM_THREADS", "PYTHONPYCACHEPREFIX")


def clean_environment(folder: Path) -> dict[str, str]:
    """Of the tests' own environment, nothing that leads to the checkout."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    path = os.pathsep.join([str(folder / "bin"), "/usr/bin", "/bin"])
    return kept | {"PATH": path, "HF_HUB_OFFLINE": "1", "SHEEPRLHF_CACHE": str(folder / "cache")}


def test_the_wheel_has_what_a_run_reads_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    configs = {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert {"train.yaml", "eval.yaml", "experiment/pretrain_tiny.yaml"} <= configs
    assert {f"sheeprlhf/configs/{name}" for name in configs} <= names
    tiny = {
        f"sheeprlhf/assets/tiny/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md")
    }
    data = {f"sheeprlhf/assets/docstrings/{split}.parquet" for split in ("train", "validation", "test")}
    data |= {f"sheeprlhf/assets/docstrings/{name}" for name in ("NOTICE", "README.md")}
    assert tiny | data <= names
    [licence] = [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
    [facts] = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
    info = licence.partition("/")[0]
    assert info == facts.partition("/")[0]
    assert all(name.startswith(("sheeprlhf/", f"{info}/")) for name in names)
    for unwanted in ("__pycache__", ".pyc", "/tests/", "/.", "logs/", "bench"):
        assert not [name for name in names if unwanted in name], unwanted
    source = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sheeprlhf").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == source


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.mark.nightly
def test_installed_it_trains_and_lists_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    programs, elsewhere = install(wheel, tmp_path / "venv"), tmp_path / "elsewhere"
    elsewhere.mkdir()

    def call(*words: str) -> str:
        done = subprocess.run(
            words, cwd=elsewhere, env=clean_environment(tmp_path / "venv"), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    packages = next((tmp_path / "venv").resolve().glob("lib/python*/site-packages"))
    *listed, following, places = call(str(programs / "python"), "-c", PROGRAM).splitlines()
    names = ("sheeprlhf", "sheeprlhf/configs", "sheeprlhf/assets/tiny")
    assert json.loads(places) == [str(packages / name) for name in names]

    [run_dir] = elsewhere.glob("logs/runs/docstrings/tiny/sft/*/default")
    assert json.loads((run_dir / "run.json").read_text())["status"] == "finished"
    for name in ("sft", "smollm2", "docstrings", "pretrain_tiny", run_dir.parent.name):
        assert any(name in line for line in listed), name
    assert following == "sheeprlhf eval task=perplexity"  # the script: there is no sheeprlhf.py
    assert "train" in call(str(programs / "sheeprlhf"), "--help")
    assert {path.name for path in elsewhere.iterdir()} == {"logs"}
