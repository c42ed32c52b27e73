"""Runs on quantised base models: what they save, resume, export, start from and share."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from sheeprlhf.cli import run
from sheeprlhf.config.run_lookup import saved_group
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.task.models import load_policy_from_run
from tests.support.models import ModelFolder
from tests.support.runs import figures, killed, result_of, train, train_words, write_pairs, write_rows

pytest.importorskip("bitsandbytes")

IDS = torch.arange(5, 30)[None]
NF4 = ["model.finetune_mode=LORA", "model.lora_cfg.rank=4", "model.quantization=nf4", "optim.lr=0.02"]


def logprobs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.log_softmax(-1)


def plain(folder: Path, scheme: str = "nf4") -> Any:
    options: dict[str, Any] = {"load_in_8bit": True} if scheme == "int8" else {"load_in_4bit": True}
    config = BitsAndBytesConfig(bnb_4bit_quant_type="nf4", **options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


@pytest.mark.slow  # tests/unit/model/test_quantize.py computes with quantised layers
@pytest.mark.parametrize("scheme", ["nf4", pytest.param("int8", marks=pytest.mark.nightly)])
def test_adapters_are_saved_resumed_and_exported(scheme: str, tmp_path: Path, model_folder: ModelFolder) -> None:
    """Plain PEFT on the quantised base computes what the run computes; an export, what it computes dequantised."""
    folder, data = model_folder(), write_pairs(tmp_path / "rows.jsonl")
    words = [*NF4, f"model.quantization={scheme}", "task.max_num_steps=8"]
    run_dir = train(folder, data, tmp_path / "run", *words, task="dpo")
    expected = result_of(run_dir, 8)
    with safe_open(run_dir / "checkpoints" / "step-8" / "model.safetensors", framework="pt") as file:
        assert all("lora_" in name for name in file.keys())  # noqa: SIM118
    train(folder, data, killed(run_dir, 7), *words, "resume=true", task="dpo")
    assert result_of(run_dir, 8) == expected

    dequantized = plain(folder, scheme).dequantize()
    adapted = PeftModel.from_pretrained(dequantized, run_dir / "final")
    run(["export", str(run_dir), "--to", str(tmp_path / "exported")])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    assert_close(logprobs(exported), logprobs(adapted), rtol=0, atol=1e-4)

    cfg, tokenizer = saved_group(str(run_dir), "model"), AutoTokenizer.from_pretrained(run_dir / "final")
    assert isinstance(cfg, ModelConfig)
    options: dict[str, Any] = {"longest": 64, "batching": "packed", "say": print}
    for weights in ("final", "step-8"):
        policy = load_policy_from_run(cfg, run_dir, weights, tokenizer, **options)
        assert_close(logprobs(policy.causal_lm()), logprobs(adapted), rtol=0, atol=1e-4)
    if scheme == "nf4":  # with 8 bits, plain layers quantise activations in evaluations
        adapted_plain = PeftModel.from_pretrained(plain(folder), run_dir / "final")
        assert_close(logprobs(policy.causal_lm()), logprobs(adapted_plain), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_run_starts_from_quantised_adapters(tmp_path: Path, model_folder: ModelFolder) -> None:
    """They are merged into the dequantised base, which is quantised again; an export takes the same way."""
    rows, pairs = write_rows(tmp_path / "rows.jsonl"), write_pairs(tmp_path / "pairs.jsonl")
    sft = train(model_folder(), rows, tmp_path / "sft", *NF4, "task.max_num_steps=3")
    run(["export", str(sft), "--to", str(tmp_path / "merged")])
    frozen = [*NF4, f"task.sft_experiment_dir={sft}", "optim.lr=0", "task.max_num_steps=1"]
    dpo = train(model_folder(), pairs, tmp_path / "dpo", *frozen, task="dpo")
    trained = AutoModelForCausalLM.from_pretrained(dpo / "final", dtype=torch.float32)
    assert_close(logprobs(trained), logprobs(plain(tmp_path / "merged")), rtol=0, atol=1e-4)


@pytest.mark.nightly  # tests/unit/model/test_quantize.py shares one base
def test_ppo_shares_one_quantised_base(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one step a rollout, sampling and training compute the same; the reference is the base that they share."""
    rows, pairs = write_rows(tmp_path / "rows.jsonl"), write_pairs(tmp_path / "pairs.jsonl")
    rm = train(model_folder(), pairs, tmp_path / "rm", *NF4, "task.max_num_steps=2", task="rm")
    ppo = tmp_path / "ppo"
    words = ["reward=model", "task.sft_experiment_dir=null", f"task.rm_experiment_dir={rm}", "task.max_num_steps=4"]
    capsys.readouterr()
    command = train_words(model_folder(), rows, ppo, *NF4, *words, "task.mini_batch_size=24", task="ppo")
    run([word for word in command if word not in ("reward=function", "reward.path=tests.support.rewards:letters")])
    assert "share the policy's base" in capsys.readouterr().err
    found = figures(ppo)
    assert abs(found["objective/kl"][0]) < 1e-5 and max(found["objective/kl"][1:]) > 1e-3
    assert len(found["policy/approxkl"]) == 4 and max(map(abs, found["policy/approxkl"])) < 1e-6
    PeftModel.from_pretrained(plain(model_folder()), ppo / "final")
