"""docs/extending.md as it stands: its files in an empty folder, its commands, on a tiny model."""

import json
import math
import re
from pathlib import Path

import pytest

from tests.support.jobs import JobServer
from tests.support.models import ModelFolder

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE, flags=re.DOTALL))
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL) for line in block.splitlines()]
# One process for all commands, which runs the page's program first.
DRIVER = """
import json, sys
__name__ = "__main__"
sys.path.insert(0, "")
sys.argv = json.load(open("program.json"))
exec(open(sys.argv[0]).read())
from my_losses import focal
import torch
for words in json.load(open("commands.json")):
    run(words)
json.dump(focal(torch.tensor([0.5, 1.0]).log(), 2.0).tolist(), open("focal.json", "w"))
sys.exit()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The page's files, and rows for them."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    rows = [
        {"question": f"What is {i} and {i}?", "answer": "unknown" if i % 10 == 9 else f"{2 * i}."} for i in range(60)
    ]
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_page_has_an_example_of_each_kind() -> None:
    assert set(FILES) == {
        *("my_sheep.py", "my_rows.py", "my_rewards.py", "my_losses.py", "my_focal.py"),
        *("mine/model/pythia.yaml", "mine/experiment/mine.yaml"),
    }
    assert {command.split()[1] for command in COMMANDS} == {"my_sheep.py", "sheeprlhf.py"}


@pytest.mark.slow
def test_every_command_works(server: JobServer, folder: Path, model_folder: ModelFolder) -> None:
    program, *words = next(command for command in COMMANDS if "my_sheep.py show" in command).split()
    assert program == "python"
    (folder / "program.json").write_text(json.dumps(words))
    small = ["data.max_length=120", "data.max_prompt_length=90"]
    tiny = {"model=pythia": "gpt_neox", "experiment=mine": "gpt_neox"}
    typed = []
    for command in COMMANDS:
        _, program, *words = command.replace("<run>", "focal_run").split()
        if words[0] == "show":
            continue
        if "task=focal" in words:
            words.append("hydra.run.dir=focal_run")
        if words[0] in ("train", "inspect"):
            architecture = next((tiny[word] for word in words if word in tiny), "llama")
            words += [f"model.repo_name={model_folder(architecture)}", *small]
        typed.append([*words, *([] if words[0] == "inspect" else ["dry_run=true"])])
    (folder / "commands.json").write_text(json.dumps(typed))
    job = server.start([], folder / "log", DRIVER)
    assert job.wait(300) == 0, job.text()
    assert "Fine-tuning in which tokens" in job.text()
    assert "task.gamma=2.0" in job.text()
    assert len(typed) == 7

    assert json.loads((folder / "focal.json").read_text()) == pytest.approx([math.log(2) / 4, 0.0], abs=1e-7)
    report = json.loads((folder / "focal_run" / "data_report.json").read_text())
    dropped = sum(split["dropped"].get("unknown_answer", 0) for split in report["splits"].values())
    assert (report["name"], dropped) == ("questions", 6)
    assert (folder / "focal_run" / "eval" / "perplexity-test-final.json").is_file()
    runs = {
        path.parent.relative_to(folder / "logs/runs").parts[:3] for path in folder.glob("logs/runs/*/*/*/*/*/final")
    }
    assert runs == {("questions", "tiny", "sft"), ("docstrings", "pythia", "sft"), ("docstrings", "tiny", "grpo")}
    assert len(list(folder.glob("logs/runs/docstrings/pythia/sft/*/*/final"))) == 2
