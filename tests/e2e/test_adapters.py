"""Training that starts from an adapter of plain PEFT: what it begins as, is compared with, saves and resumes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from sheeprlhf.cli import run
from sheeprlhf.config.run_lookup import saved_group
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.task.models import load_policy_from_run
from tests.support.models import ModelFolder
from tests.support.runs import exit_code, killed, result_of, train, train_words, write_pairs

IDS = torch.arange(5, 30)[None]
LORA = "model.finetune_mode=LORA"
FROZEN = ["optim.lr=0", "task.max_num_steps=2"]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture
def adapter(tmp_path: Path, model_folder: ModelFolder) -> Path:
    """Made with plain PEFT: unusual options, weights that change the model visibly."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder("qwen2"), dtype=torch.float32),
        LoraConfig(  # without a task_type, PEFT adds auto_mapping
            r=3,
            lora_alpha=5,
            use_rslora=True,
            use_dora=True,
            target_modules=["q_proj", "up_proj"],
            modules_to_save=["lm_head"],
        ),
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def plain(model_folder: ModelFolder, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder("qwen2")), adapter)


@pytest.mark.parametrize(
    ("task", "mode"),
    [
        ("dpo", "LORA"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("ppo", "LORA"), ("sft", "ALL"))),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in (("grpo", "LORA"), ("dpo", "ALL"), ("ppo", "ALL"))
        ),
    ],
)
def test_training_starts_from_the_adapter_and_is_measured_against_it(
    task: str, mode: str, adapter: Path, tmp_path: Path, model_folder: ModelFolder
) -> None:
    """At a learning rate of 0 what is saved is the start, and the reference is equal to the policy."""
    data = write_pairs(tmp_path / "rows.jsonl")
    if task in ("grpo", "ppo"):
        rows = [json.loads(line) for line in data.read_text().splitlines()]
        data.write_text(
            "".join(json.dumps({"prompt": row["prompt"], "response": row["chosen"]}) + "\n" for row in rows)
        )
    words = [f"model.adapter={adapter}", f"model.finetune_mode={mode}", *FROZEN]
    run_dir = train(model_folder("qwen2"), data, tmp_path / "run", *words, task=task)
    expected = logits(plain(model_folder, adapter))
    final = run_dir / "final"
    assert (final / "adapter_config.json").is_file() == (mode == "LORA")
    auto = AutoPeftModelForCausalLM if mode == "LORA" else AutoModelForCausalLM
    assert_close(logits(auto.from_pretrained(final)), expected, rtol=0, atol=1e-5)
    if mode == "LORA":
        saved = json.loads((final / "adapter_config.json").read_text())
        assert (saved["r"], saved["lora_alpha"], saved["use_dora"]) == (3, 5, True)
        assert saved["base_model_name_or_path"] == str(model_folder("qwen2"))
    metrics = (run_dir / "metrics.csv").read_text()
    if task in ("grpo", "ppo"):
        kl = [float(line.split(",")[2]) for line in metrics.splitlines() if ",objective/kl," in line]
        assert kl and max(map(abs, kl)) < 1e-4


@pytest.mark.slow
def test_an_adapter_is_trained_saved_resumed_and_exported(
    adapter: Path, tmp_path: Path, model_folder: ModelFolder
) -> None:
    """A resumed run is the uninterrupted one bit for bit; every way to load it gives the logits of plain PEFT."""
    data = write_pairs(tmp_path / "rows.jsonl")
    words = [f"model.adapter={adapter}", LORA, "task.max_num_steps=8"]
    whole = train(model_folder("qwen2"), data, tmp_path / "whole", *words, task="dpo")
    cut = killed(shutil.copytree(whole, tmp_path / "cut"), 7)
    train(model_folder("qwen2"), data, cut, *words, "resume=true", task="dpo")
    assert result_of(cut, 8) == result_of(whole, 8)
    trained = logits(AutoPeftModelForCausalLM.from_pretrained(whole / "final"))
    assert float((trained - logits(plain(model_folder, adapter))).abs().max()) > 1e-3
    cfg = saved_group(str(whole), "model")
    assert isinstance(cfg, ModelConfig)
    tokenizer = AutoTokenizer.from_pretrained(whole / "final")
    for weights in ("final", "step-8"):
        policy = load_policy_from_run(cfg, whole, weights, tokenizer, longest=64, batching="auto", say=print)
        assert_close(logits(policy.causal_lm()), trained, rtol=0, atol=1e-5)
    run(["export", str(whole), "--to", str(tmp_path / "exported")])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    assert_close(logits(exported), trained, rtol=0, atol=1e-5)
    words = [f"model.adapter={whole / 'final'}", LORA, *FROZEN]
    again = train(model_folder("qwen2"), data, tmp_path / "again", *words, task="sft")
    assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(again / "final")), trained, rtol=0, atol=1e-5)


def test_a_reward_model_starts_from_the_merged_adapter(
    adapter: Path, tmp_path: Path, model_folder: ModelFolder
) -> None:
    data = write_pairs(tmp_path / "rows.jsonl")
    words = [f"model.adapter={adapter}", LORA, *FROZEN]
    run_dir = train(model_folder("qwen2"), data, tmp_path / "run", *words, task="rm")
    saved = AutoModelForCausalLM.from_pretrained(run_dir / "final").model
    wrapped = plain(model_folder, adapter).get_base_model().model
    with torch.no_grad():
        found, expected = (model.eval()(input_ids=IDS).last_hidden_state for model in (saved, wrapped))
    assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("model.adapter={adapter} model.lora_cfg.rank=4 model.lora_cfg.targets=[v_proj]", 2),
        ("model.adapter={adapter} model.lora_cfg.rank=3", 0),
        ("model.adapter={adapter} task.sft_experiment_dir={adapter}", 2),
        ("model.adapter={adapter} model.resize_embeddings=true", 2),
        ("model.adapter=/nowhere/at/all", 2),
        ("model.adapter={adapter}/..", 2),
    ],
)
def test_contradictions_end_training_before_anything_is_made(
    words: str, code: int, adapter: Path, tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pairs(tmp_path / "rows.jsonl")
    extra = words.format(adapter=adapter).split()
    line = train_words(model_folder("qwen2"), data, tmp_path / "run", LORA, "dry_run=true", *extra)
    assert exit_code(" ".join(line)) == code
    message = capsys.readouterr().err
    for key in {word.partition("=")[0] for word in extra[1:] or extra if code}:
        assert key in message
    assert (tmp_path / "run" / "final").exists() == (code == 0)


def test_an_adapter_of_another_model_is_rejected(
    adapter: Path, tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pairs(tmp_path / "rows.jsonl")
    line = train_words(model_folder("gpt2"), data, tmp_path / "run", LORA, f"model.adapter={adapter}")
    assert exit_code(" ".join(line)) == 2
    assert str(adapter) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
