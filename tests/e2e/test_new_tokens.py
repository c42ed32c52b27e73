"""A base model learns a chat template whose control tokens it lacks, beside adapters; every later step knows them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from sheeprlhf.cli import run
from sheeprlhf.config.model_lookup import find_trained
from sheeprlhf.config.run_lookup import read_run_config
from sheeprlhf.task.models import load_trained
from tests.support.models import make_model_folder
from tests.support.runs import digests, exit_code, result_of, train, train_words, write_pairs, write_rows

LORA = ("model.finetune_mode=LORA", "model.lora_cfg.rank=4", "optim.lr=0.01")
NEW = ("model.resize_embeddings=true", "model.chat_template=chatml", "model.extra_vocabulary=[<|a|>]")
START, END, OWN = 260, 261, 259  # ids; the model has 260 rows and 259 tokens
IDS = torch.tensor([[START, 9, END, OWN]])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def own_logits(run_dir: Path) -> torch.Tensor:
    policy, _ = load_trained(find_trained(str(run_dir)), print)
    return logits(policy.eval().model.cpu())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("extra_vocabulary")
    talks = [[("user", f"{number} times"), ("assistant", f"word {number}")] for number in range(24)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in talks]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = {"model": make_model_folder(folder / "model"), "chats": folder / "chats.jsonl"}
    made["pairs"] = write_pairs(folder / "pairs.jsonl", 24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHEEPRLHF_CACHE", str(folder / "cache"))
        made["sft"] = train(made["model"], made["chats"], folder / "sft", "task.max_num_steps=8", *LORA, *NEW)
    return made


def test_plain_peft_computes_what_the_run_does(runs: dict[str, Path], tmp_path: Path) -> None:
    expected = own_logits(runs["sft"])
    assert expected.shape[-1] == 262
    assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(runs["sft"] / "final")), expected, rtol=0, atol=1e-5)
    run(["export", str(runs["sft"]), "--to", str(tmp_path / "out")])
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected, rtol=0, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids(["<|a|>", "<|im_start|>", "<|im_end|>"]) == [OWN, START, END]


def test_a_stopped_run_goes_on_to_the_same_bits(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (runs["model"], runs["chats"], tmp_path / "again", "task.max_num_steps=8", "resume=true", *LORA, *NEW)
    step, steps = torch.optim.AdamW.step, iter(range(100))

    def fails_at_the_seventh(*args: Any, **options: Any) -> Any:
        if next(steps) == 6:
            raise RuntimeError("stopped by the test")
        return step(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", fails_at_the_seventh)
        with pytest.raises(SystemExit):
            train(*words)
    assert not (tmp_path / "again" / "final").exists()
    train(*words)
    assert result_of(tmp_path / "again", 8) == result_of(runs["sft"], 8)


@pytest.mark.slow
def test_dpo_goes_on_from_it_with_its_tokens(runs: dict[str, Path], tmp_path: Path) -> None:
    start = f"task.sft_experiment_dir={runs['sft']}"
    second = train(runs["model"], runs["pairs"], tmp_path / "dpo", "dry_run=true", start, *LORA, task="dpo")
    assert read_run_config(str(second))["model"]["extra_vocabulary"] == ["<|a|>"]
    merged = AutoModelForCausalLM.from_pretrained(second / "final")
    assert_close(logits(merged), own_logits(second), rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(second / "final").convert_tokens_to_ids("<|im_end|>") == END
    run(["eval", "task=perplexity", f"experiment_dir={second}"])
    other = f"{start} model.extra_vocabulary=[<|other|>] model.resize_embeddings=true"
    assert exit_code(f"train task=dpo model=auto model.repo_name={runs['model']} data=local {other}") == 2


@pytest.mark.nightly
def test_a_reward_model_and_ppo_on_one_base(runs: dict[str, Path], tmp_path: Path) -> None:
    start = f"task.sft_experiment_dir={runs['sft']}"
    rm = train(runs["model"], runs["pairs"], tmp_path / "rm", "dry_run=true", start, *LORA, task="rm")
    before = digests(rm / "final")
    rows = write_rows(tmp_path / "rows.jsonl", 24)
    words = train_words(runs["model"], rows, tmp_path / "ppo", "dry_run=true", start, *LORA, task="ppo")
    of_model = ["reward=model", f"task.rm_experiment_dir={rm}"]
    run([*(word for word in words if not word.startswith("reward")), *of_model])
    assert (tmp_path / "ppo" / "final").is_dir() and digests(rm / "final") == before


@pytest.mark.parametrize(
    "words",
    [
        "model.extra_vocabulary=[<|a|>]",
        "model.resize_embeddings=true model.extra_vocabulary=[<|a|>,<|a|>]",
        "model.resize_embeddings=true model.freeze_transformer=true",
        "model.resize_embeddings=true model.finetune_mode=LORA fabric.strategy=fsdp2",
    ],
)
def test_invalid_use_ends_before_a_model_loads(words: str) -> None:
    assert exit_code(f"train task=sft {words}") == 2
