"""Runs that start from runs: whole or with adapters, what each leaves is complete and loads by plain libraries."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors.numpy import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from sheeprlhf.config.run_lookup import saved_group
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.task.models import load_policy_from_run, load_trained_reward_model
from tests.support.runs import digests, train, write_pairs

ModelFolder = Callable[..., Path]
LORA = ["model.finetune_mode=LORA", "model.lora_cfg.rank=4", "model.lora_cfg.dropout=0.1"]
MODES = {"ALL": [], "LORA": LORA}
CHAINS = [("ALL", "LORA"), ("LORA", "LORA")]


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory: pytest.TempPathFactory, model_folder: ModelFolder) -> Callable[[str], Path]:
    """A function (mode) -> a fine-tuning, made once; a learning rate that moves the weights visibly."""
    folder = tmp_path_factory.mktemp("fine-tuned")
    data = write_pairs(folder / "rows.jsonl")
    words = ["optim.lr=1e-2", "task.max_num_steps=8", "task.num_sample_prompts=0"]
    return functools.cache(lambda mode: train(model_folder(), data, folder / mode, *words, *MODES[mode]))


def chain(
    task: str,
    modes: tuple[str, str],
    tmp_path: Path,
    model_folder: ModelFolder,
    fine_tuned: Callable[[str], Path],
    *extra: str,
) -> tuple[Path, Path]:
    """A fine-tuning and a run of `task` that starts from it."""
    base, data = model_folder(), write_pairs(tmp_path / "rows.jsonl")
    sft = fine_tuned(modes[0])
    before = digests(sft)
    words = [f"task.sft_experiment_dir={sft}", "task.max_num_steps=6", "optim.lr=1e-2", *MODES[modes[1]], *extra]
    run_dir = train(base, data, tmp_path / task, *words, task=task)
    assert digests(sft) == before
    return sft, run_dir


def plain(final: Path, adapters: bool, task: str) -> PreTrainedModel:
    """What transformers and PEFT alone make of the folder."""
    if task == "rm":
        pad = json.loads((final / "config.json").read_text())["pad_token_id"]
        auto = AutoPeftModelForSequenceClassification if adapters else AutoModelForSequenceClassification
        return auto.from_pretrained(final, num_labels=1, pad_token_id=pad).eval()
    return (AutoPeftModelForCausalLM if adapters else AutoModelForCausalLM).from_pretrained(final).eval()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dpo", "rm"])
@pytest.mark.parametrize(
    "modes",
    CHAINS,
    ids="-".join,
)
def test_every_form_of_a_chained_run_is_the_same_model(
    modes: tuple[str, str], task: str, tmp_path: Path, model_folder: ModelFolder, fine_tuned: Callable[[str], Path]
) -> None:
    sft, run_dir = chain(task, modes, tmp_path, model_folder, fine_tuned)
    final = run_dir / "final"
    cfg, tokenizer = saved_group(str(run_dir), "model"), AutoTokenizer.from_pretrained(final)
    assert isinstance(cfg, ModelConfig)
    adapters = modes == ("ALL", "LORA")
    assert (final / "adapter_config.json").is_file() == adapters
    if adapters:  # they sit in what the fine-tuning left
        named = json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert Path(named).resolve() == (sft / "final").resolve()
    ids = torch.tensor([tokenizer("0 the quick brown fox? well, seven wizards.")["input_ids"]])
    load = load_trained_reward_model if task == "rm" else load_policy_from_run
    outputs = []
    for weights in ("final", "last"):
        ours, _ = load(cfg, run_dir, weights, tokenizer, longest=100, batching="padded", say=lambda line: None)
        model = ours.classifier() if task == "rm" else ours.causal_lm()
        outputs.append(model.eval()(input_ids=ids).logits)
    outputs.append(plain(final, adapters, task)(input_ids=ids).logits)
    assert_close(outputs[1:], [outputs[0]] * 2, rtol=0, atol=1e-5)
    start = AutoModelForCausalLM.from_pretrained(model_folder()).eval()(input_ids=ids).logits
    assert task == "rm" or float((start - outputs[0]).detach().abs().max()) > 0.1


def test_the_reference_is_the_fine_tuned_model(
    tmp_path: Path, model_folder: ModelFolder, fine_tuned: Callable[[str], Path]
) -> None:
    """Trap 7: with dropout in the adapters, and a fine-tuning whose own adapters must not be lost."""
    cache = tmp_path / "cache"
    sft, _ = chain("dpo", ("LORA", "LORA"), tmp_path, model_folder, fine_tuned, f"data.cache_dir={cache}")
    (stored,) = (load_file(path)["logprobs"] for path in cache.rglob("reference-train-*.safetensors"))
    cfg = saved_group(str(sft), "model")
    assert isinstance(cfg, ModelConfig)
    model = AutoPeftModelForCausalLM.from_pretrained(sft / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(sft / "final")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    expected = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        for text in (row["chosen"], row["rejected"]):
            response = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                logprobs = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
            expected.append(sum(float(logprobs[i, token]) for i, token in zip(places, response, strict=True)))
    stored = torch.tensor(stored).flatten()
    read = ~stored.isnan()  # of rows that no step reads, nothing is computed
    assert read.sum() >= 48
    assert_close(stored[read], torch.tensor(expected)[read], rtol=0, atol=2e-4)  # sums of about 30 tokens


def test_an_offset_comes_back_with_the_adapters(
    tmp_path: Path, model_folder: ModelFolder, fine_tuned: Callable[[str], Path]
) -> None:
    _, run_dir = chain("rm", ("ALL", "LORA"), tmp_path, model_folder, fine_tuned)
    cfg, tokenizer = saved_group(str(run_dir), "model"), AutoTokenizer.from_pretrained(run_dir / "final")
    assert isinstance(cfg, ModelConfig)
    model, _ = load_trained_reward_model(
        cfg, run_dir, "final", tokenizer, longest=100, batching="auto", say=lambda line: None
    )
    stored = json.loads((run_dir / "final" / "config.json").read_text())["reward_offset"]
    assert model.offset == stored != 0.0
    assert f"`{stored:.6g}`" in (run_dir / "final" / "README.md").read_text()
