"""`doctor`: every section is there, whatever is wrong, and the exit code says whether a run would work."""

import importlib.metadata
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sheeprlhf.apps import doctor
from sheeprlhf.structure.run import FabricConfig
from tests.support.composed import measure_once
from tests.support.models import ModelFolder
from tests.support.runs import exit_code, write_rows

PREFERENCE_WORDS = {"sft": "task=sft", "rm": "task=rm", "dpo": "task=dpo", "simpo": "task=dpo task.loss_type=simpo"}
TOPICS = ["versions", "device", "precision", "hub", "caches", "data", "model", "attention", "disk", "memory"]


class Report:
    """What `doctor` printed: level and text of each topic, and all of it."""

    def __init__(self, text: str, code: int) -> None:
        self.text, self.code, self.flat = text, code, re.sub(r"\s+", " ", text)
        found = re.findall(r"^(ok|warning|problem) +(\w+) +(.*(?:\n {20}.*)*)", text, re.MULTILINE)
        self.topics = [topic for _, topic, _ in found]
        self.level = {topic: level for level, topic, _ in found}
        self.said = {topic: re.sub(r"\s+", " ", body) for _, topic, body in found}


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """Runs `doctor` with these words; there are 64 GB of memory."""
    monkeypatch.setattr(doctor, "available_memory", lambda: 64 * 10**9)
    measure_once(monkeypatch)
    monkeypatch.setenv("COLUMNS", "120")

    def make(*words: str) -> Report:
        code = exit_code(["doctor", *words])
        captured = capsys.readouterr()
        assert captured.err == ""
        return Report(captured.out, code)

    return make


@pytest.fixture
def words(model_folder: ModelFolder, tmp_path: Path) -> list[str]:
    """A tiny model, and rows of one's own."""
    rows = write_rows(tmp_path / "rows.jsonl")
    model = ["model=auto", f"model.repo_name={model_folder()}"]
    data = ["data=local", f"data.train_file={rows}", "data.max_length=120", "data.max_prompt_length=70"]
    return [*model, *data, f"root_dir={tmp_path / 'runs'}"]


def test_all_is_well(report: Callable[..., Report], words: list[str], tmp_path: Path) -> None:
    started = time.process_time()
    found = report(*words)
    assert (found.code, found.topics) == (0, TOPICS), found.text
    assert set(found.level.values()) == {"ok"}
    assert "batches are packed" in found.said["attention"]
    assert "8,848 parameters" in found.said["memory"] and "sum" in found.said["memory"]
    assert found.text.endswith(f"\nnext: python sheeprlhf.py train task=sft {' '.join(words)}\n")
    assert time.process_time() - started < 30 and not (tmp_path / "runs").exists()


def test_a_plan_for_other_machines(report: Callable[..., Report], model_folder: ModelFolder, tmp_path: Path) -> None:
    """Of this machine, only config.json is read: no launcher, device, weights or tokenizer is needed."""
    (tmp_path / "shape").mkdir()
    shutil.copy(model_folder() / "config.json", tmp_path / "shape")
    plan = ["model=auto", f"model.repo_name={tmp_path / 'shape'}", "data.max_length=120", "data.max_prompt_length=70"]
    plan += ["fabric=auto_cuda", "fabric.num_nodes=2", "fabric.devices=2", "fabric.strategy=fsdp2"]
    found = report(*plan, "task.mini_batch_size=33", "cluster.bandwidth=1e-9")
    assert (found.code, found.topics) == (0, ["versions", "device", "hub", "model", "memory", "step", "sharding"])
    assert {topic for topic, level in found.level.items() if level != "ok"} == {"step"}, found.text
    assert "1/4 of them" in found.said["memory"] and "gathered" in found.said["memory"]
    assert "task.mini_batch_size=33" in found.said["step"] and "communication takes longer" in found.said["step"]
    assert "2,212 parameters" in found.said["sharding"]  # of 8,848
    assert found.text.splitlines()[-1].startswith("next: python sheeprlhf.py train task=sft model=auto")
    assert "cluster" not in found.text.splitlines()[-1]

    small = report(*plan[:-1], "cluster.memory=0.01", "dry_step=false")
    assert (small.code, small.level["memory"], "sharding" in small.topics) == (1, "problem", False)
    assert "fabric.strategy=fsdp2" in small.said["memory"]


def test_preferences_need_no_second_model(report: Callable[..., Report], words: list[str]) -> None:
    """Nor has a reward model logits; a loss without a reference says nothing of one."""
    said = {name: report(*words, *more.split()).said["memory"] for name, more in PREFERENCE_WORDS.items()}
    assert all("17 rows of 120" in text or "8 pairs of 240" in text for text in said.values())
    assert "17 rows of 120" in said["sft"] and "8 pairs of 240" in said["rm"]
    assert ["logits" in text for text in said.values()] == [True, False, True, True]
    second = "reference 0 MB no second model: its log-probabilities are kept on the disk"
    assert [second in text for text in said.values()] == [False, False, True, False]


def test_a_model_that_is_not_to_be_had(report: Callable[..., Report], words: list[str]) -> None:
    found = report(*words[2:], "model=opt")
    assert found.code == 1
    assert found.topics == [topic for topic in TOPICS if topic not in ("attention", "disk")]
    assert found.level["model"] == "problem" and "cache" in found.said["model"]
    assert found.level["hub"] == "warning" and found.level["memory"] == "warning"
    assert "one problem" in found.text
    assert found.text.splitlines()[-1].startswith("next: python sheeprlhf.py doctor task=sft data=local")


def test_weights_that_do_not_fill_the_model(report: Callable[..., Report], words: list[str], tmp_path: Path) -> None:
    """Found in the headers, for the policy and for a reward model's folder."""
    folder = Path(words[1].partition("=")[2])
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    hole = Path(shutil.copytree(folder, tmp_path / "hole"))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, hole / "model.safetensors")
    found = report(words[0], f"model.repo_name={hole}", *words[2:])
    assert (found.code, found.level["weights"]) == (1, "problem") and name in found.said["weights"]
    assert found.text.count(name) == 1

    reward = ["task=grpo", "reward=model", f"reward.folder={folder}"]
    found = report(*words, *reward)
    assert (found.code, found.level["weights"], found.level["model"]) == (1, "problem", "ok")
    assert "score.weight" in found.said["weights"] and f"reward.folder={folder}" in found.said["weights"]

    more = Path(shutil.copytree(folder, tmp_path / "more"))
    save_file(tensors | {"score.weight": torch.ones(1, 16)}, more / "model.safetensors")
    found = report(words[0], f"model.repo_name={more}", *words[2:])
    assert (found.code, found.level["weights"]) == (0, "warning") and "score.weight" in found.said["weights"]


def test_data_that_is_not_to_be_had(report: Callable[..., Report], words: list[str]) -> None:
    found = report(*words[:2], "data=summarization", "data.max_length=128", "data.max_prompt_length=64")
    assert (found.code, found.level["data"], found.level["model"]) == (1, "problem", "ok")
    assert found.topics == TOPICS


@pytest.mark.slow
def test_too_little_memory(report: Callable[..., Report], words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    needs = re.search(r"sum (\d+) MB", report(*words).said["memory"])
    assert needs is not None
    monkeypatch.setattr(doctor, "available_memory", lambda: (int(needs[1]) + 2) * 10**6)
    found = report(*words)
    assert (found.code, found.level["memory"]) == (0, "warning")
    large = ["task.token_budget=200000", "task.micro_batch_size=2000", "task.mini_batch_size=2000"]
    monkeypatch.setattr(doctor, "available_memory", lambda: 10**9)
    found = report(*words, *large)
    assert (found.code, found.level["memory"]) == (1, "problem")
    assert "task.token_budget=100000" in found.said["memory"] and "MALLOC_MMAP_THRESHOLD_=" in found.said["memory"]
    assert re.search(r"MB would fit: task\.token_budget=\d+", found.said["memory"])


def test_a_model_that_cannot_be_packed(
    report: Callable[..., Report], words: list[str], model_folder: ModelFolder
) -> None:
    words[1] = f"model.repo_name={model_folder('falcon')}"
    found = report(*words)
    assert (found.code, found.level["attention"]) == (0, "ok") and "batches are padded" in found.said["attention"]
    found = report(*words, "task.batching=packed")
    assert (found.code, found.level["attention"]) == (1, "problem")


def test_a_version_outside_of_its_bounds(
    report: Callable[..., Report], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "0.20.0" if name == "peft" else real(name))
    found = report(*words)
    assert found.code == 1
    assert re.search(r"^problem  versions   peft 0\.20\.0 is outside of its bounds: pip install 'p", found.text, re.M)


def test_a_package_that_is_not_installed(
    report: Callable[..., Report], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left would need it."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    found = report(*words)
    assert (found.code, found.topics) == (1, ["versions"]) and "pip install 'peft" in found.text


def test_a_disk_that_is_too_small(
    report: Callable[..., Report], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    found = report(*words)
    assert (found.code, found.level["disk"]) == (1, "problem") and "task.keep_checkpoints=1" in found.said["disk"]


@pytest.mark.parametrize(
    ("able", "chosen", "level"),
    [(True, "32-true", "ok"), (False, "32-true", "ok"), (True, "bf16-true", "ok"), (False, "bf16-mixed", "warning")],
)
def test_precision(able: bool, chosen: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able, "avx2": True}, raising=False)
    found = doctor.precision(FabricConfig(precision=chosen), on_cuda=False)
    assert found.level == level
    assert ("fabric.precision=bf16-mixed" in found.text.removeprefix(f"fabric.precision={chosen}")) == (
        able and chosen == "32-true"
    )
