"""A small pipeline of one's own, and stages that only pretend to run."""

import json
from pathlib import Path

import pytest

from sheeprlhf.cli import run

STAGES = """\
# @package _global_
# Three stages.
common:
  train: model=tiny task.max_num_steps=9
stages:
  sft: train task=sft task.epochs=2
  rm: train task=rm task.sft_experiment_dir=<sft>
  text: eval -m task=perplexity experiment_dir=<sft>,<dpo>
"""
SMALL = STAGES.replace("  text:", "  dpo: train task=dpo task.sft_experiment_dir=<sft>\n  text:")


def write_recipe(folder: Path, content: str = SMALL, name: str = "small") -> str:
    """A recipe in a folder for --config-dir; the flag that names it."""
    (folder / "experiment").mkdir(parents=True, exist_ok=True)
    (folder / "experiment" / f"{name}.yaml").write_text(content)
    return f"--config-dir={folder}"


class Pretended:
    """Stands in for `Children.run`: notes the commands and leaves a finished run where one trains.

    Attributes:
        commands: the commands so far.
        reports: the words of those that make a report.
        codes: exit code by what a command contains; 0 for all others.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commands: list[list[str]] = []
        self.reports: list[list[str]] = []
        self.codes: dict[str, int] = {}
        monkeypatch.setattr("sheeprlhf.utils.processes.Children.run", lambda children, words, **_: self(words))

    def __call__(self, words: list[str]) -> int:
        if words[0] == "report":
            self.reports.append(words[1:])
            return 0
        self.commands.append(words)
        code = next((code for part, code in self.codes.items() if part in " ".join(words)), 0)
        places = [Path(word.removeprefix("hydra.run.dir=")) for word in words if word.startswith("hydra.run.dir=")]
        for place in places:
            place.mkdir(exist_ok=True)
            info = {"started": 1.0, "status": "running" if code else "finished"}
            (place / "run.json").write_text(json.dumps(info))
        return code

    def stages(self) -> list[str]:
        """The stages that ran, by the folder of their run; evaluations by their task."""
        found = []
        for words in self.commands:
            options = dict(word.split("=", 1) for word in words[1:] if "=" in word)
            found.append(Path(options["hydra.run.dir"]).name if words[0] == "train" else options["task"])
        self.commands.clear()
        return found


def pipeline(*words: str) -> int:
    """The exit code of a pipeline that runs in this process."""
    try:
        run(["pipeline", *words])
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def folders(root: Path) -> list[Path]:
    """The folders of pipelines, oldest first."""
    return sorted(path.parent for path in root.glob("*/pipeline.json"))
