"""The programs of benchmarks/ and the notebook of docs/ run to their end."""

import random
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.losses import LOSSES

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_attention_and_sampling(tmp_path: Path) -> None:
    from benchmarks import gpu_check

    device = torch.device("cpu")
    checks = [*gpu_check.check_attention(device, tmp_path / "a"), *gpu_check.check_sampling(device, tmp_path / "b")]
    assert len(checks) == 3 and all(check.passed() and check.limit is not None for check in checks)
    assert not checks[0]._replace(measured=1.0).passed()


@pytest.mark.nightly
def test_tiny_check_on_the_cpu() -> None:
    command = [sys.executable, "benchmarks/gpu_check.py", "--device", "cpu", "--tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    checks, speeds = done.stdout.split("| task |")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in checks.splitlines() if " | " in line][2:]
    assert len(lines) == len(LOSSES) + 6
    assert all(not limit or float(measured) <= float(limit) for _, measured, limit, _ in lines)
    assert {line.split("|")[1].strip() for line in speeds.splitlines()[2:] if line.startswith("| ")} == {
        "sft", "rm", "dpo", "ppo", "grpo"
    }  # fmt: skip


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import instruct
    import instruct_data

    return instruct, instruct_data


@pytest.mark.nightly
def test_every_experiment_runs(scripts: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    """The script itself compares log-probabilities to 1e-4 and the loss of PEFT's adapter to 1e-5."""
    instruct, data = scripts
    embedded = ROOT / "sheeprlhf" / "assets" / "tiny"
    AutoModelForCausalLM.from_pretrained(embedded).float().save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    data.write(tmp_path / "data")
    bench = instruct.Bench(tmp_path, str(tmp_path / "model"), quick=True)
    tables = {name: run(bench) for name, run in instruct.EXPERIMENTS.items()}
    peft, ours, _ = tables["adapter"]
    assert float(ours[1]) == pytest.approx(float(peft[2]), abs=1e-5) and float(ours[2]) < float(ours[1])
    assert all((tmp_path / run / "final").is_dir() for run in ("grpo", "sft", "rm", "dpo", "adapter"))


def test_word_problems_have_the_right_answer(scripts: tuple[ModuleType, ModuleType]) -> None:
    _, data = scripts
    signs = dict.fromkeys(("gets", "buys", "finds"), 1) | dict.fromkeys(("gives", "loses", "sells"), -1)
    for seed in range(50):
        row = data.problem(random.Random(seed), 2)
        words = row["prompt"][-1]["content"].replace(",", "").replace(".", "").split()
        total = int(words[2])
        for number, word in enumerate(words):
            if word in signs:
                total += signs[word] * int(next(w for w in words[number:] if w.isdigit()))
        assert row["answer"] == total >= 0
    assert data.correct(["3 + 4 = 7", "7 + 1", "none"], [7, 7, 7]) == [1.0, 0.0, 0.0]


@pytest.mark.nightly
def test_quick_tables() -> None:
    command = [sys.executable, "benchmarks/scale.py", "--quick"]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    tables = {}
    output, _, end = output.rpartition("\n\n")
    assert output.count(" cores\n") == 1 and re.fullmatch(r"\d+ s; load .* cores\n", end)  # before and after
    for text in output.split("\n### ")[1:]:
        title, header, _, *lines = text.strip().splitlines()
        names = [name.strip() for name in header.strip("|").split("|")]
        tables[title] = [
            dict(zip(names, (cell.strip() for cell in line.strip("|").split("|")), strict=True)) for line in lines
        ]
    assert {title: len(lines) for title, lines in tables.items()} == {
        "Weak scaling": 4,
        "Strong scaling": 4,
        "Rows of a step": 2,
        "Length of a row, 2,048 tokens a step": 2,
        "Responses of a prompt, 16 a step": 2,
        "Preparation of data": 2,
        "Memory": 2,
        "Start-up": 2,
    }
    for line in (
        line for title in ("Weak scaling", "Strong scaling") for line in tables[title] if line["ranks"] == "2"
    ):
        parts = [int(line[name]) for name in ("compute", "gather", "reduce", "wait")]
        assert abs(sum(parts) - int(line["sum ms"])) <= 4 and min(parts) >= 0  # rounded; one step, so medians add up
        assert (int(line["gather"]) > 0) == (line["strategy"] == "fsdp2") and int(line["reduce"]) > 0


@pytest.mark.nightly
def test_the_tour_improves_the_reward() -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = "".join(output.get("text", "") for output in outputs)
    rewards = {name: float(value) for name, value in re.findall(r"^(SFT|PPO|DPO): reward +(-?[\d.]+)", texts, re.M)}
    assert rewards["PPO"] > rewards["SFT"] and rewards["DPO"] > rewards["SFT"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 6
