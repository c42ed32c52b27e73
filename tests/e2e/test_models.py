"""The published table of architectures is what the program does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.compatibility import NAMES, published_rows, row_of
from tests.support.hub import serve
from tests.support.models import ModelFolder
from tests.support.runs import write_pairs


def test_every_architecture_is_published() -> None:
    assert [row.split("|")[1].strip() for row in published_rows()] == list(NAMES)


IN_CI = ("qwen3_5_text",)  # tests/unit has cheaper tests of all


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow if name in IN_CI else pytest.mark.nightly]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in NAMES])
def test_the_table_is_true(name: str, tmp_path: Path) -> None:
    assert row_of(name, tmp_path) in published_rows()


PROGRAM = Path(__file__).parents[2] / "sheeprlhf.py"


@pytest.mark.nightly
def test_the_first_example_from_a_hub_and_without_it(tmp_path: Path, model_folder: ModelFolder) -> None:
    model, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(model_folder("opt"), model, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(AutoModelForCausalLM.from_pretrained(model_folder("opt")).state_dict(), model / "pytorch_model.bin")
    data.mkdir()
    for split in ("train", "valid1", "test"):
        write_pairs(data / f"{split}.jsonl", 12)
    repositories = {"models/facebook/opt-350m": model, "datasets/CarperAI/openai_summarize_comparisons": data}
    env = os.environ | {
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HOME": str(tmp_path / "home"),
        "SHEEPRLHF_CACHE": str(tmp_path / "cache"),
    }

    def program(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, PROGRAM, *words], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    train = ["train", "data=summarization", "model=opt", "task=sft", "fabric=cpu"]
    train += ["task.max_num_steps=1", "data.max_length=120", "data.max_prompt_length=70", "generation.max_new_tokens=4"]
    with serve(repositories) as hub:
        env["HF_ENDPOINT"] = hub.endpoint
        assert "converted" in program(*train)
    assert any(path.endswith("pytorch_model.bin") for path in hub.asked)
    assert not any(part in path for path in hub.asked for part in ("refs", "discussions", "convert"))
    [converted] = [path for path in (tmp_path / "cache" / "converted").iterdir() if path.is_dir()]
    written = (converted / "model.safetensors").stat().st_mtime_ns

    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    assert str(converted) in program("fetch", "model=opt")
    assert "finished" in program(*train)
    assert (converted / "model.safetensors").stat().st_mtime_ns == written
    [config] = {path.read_text() for path in (tmp_path / "logs").rglob("final/config.json")}
    assert json.loads(config)["word_embed_proj_dim"] == 8
