"""Runs that start from runs: whole or with adapters, what each leaves is complete and loads by plain libraries."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors.numpy import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from sheeprlhf.config.run_lookup import saved_group
from sheeprlhf.engine.optim import lr_factor
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.task.models import load_policy_from_run, load_trained_reward_model
from tests.support.models import ModelFolder
from tests.support.plain import response_logprobs
from tests.support.runs import digests, exit_code, figures_at, result_of, train, train_words, write_pairs, write_rows

LORA = ["model.finetune_mode=LORA", "model.lora_cfg.rank=4", "model.lora_cfg.dropout=0.1"]
MODES = {"ALL": [], "LORA": LORA}
CHAINS = [("ALL", "LORA"), ("LORA", "LORA")]
Chain = Callable[[str, tuple[str, str]], tuple[Path, Path]]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, model_folder: ModelFolder) -> Chain:
    """A function (task, modes) -> a fine-tuning and a run of the task that starts from it, each made once.

    The learning rate moves the weights visibly. The second run has its own cache below its directory's folder.
    """
    folder, base = tmp_path_factory.mktemp("chains"), model_folder()
    data, short = write_pairs(folder / "rows.jsonl"), ["optim.lr=1e-2", "task.num_sample_prompts=0"]

    @functools.cache
    def fine_tuned(mode: str) -> Path:
        return train(base, data, folder / mode, "task.max_num_steps=8", *short, *MODES[mode])

    @functools.cache
    def make(task: str, modes: tuple[str, str]) -> tuple[Path, Path]:
        sft, place = fine_tuned(modes[0]), folder / "-".join((task, *modes))
        before = digests(sft)
        words = [f"task.sft_experiment_dir={sft}", "task.max_num_steps=6", f"data.cache_dir={place / 'cache'}"]
        words += short[: 1 if task == "rm" else 2]
        run_dir = train(base, data, place / "run", *words, *MODES[modes[1]], task=task)
        assert digests(sft) == before
        return sft, run_dir

    return make


def plain(final: Path, adapters: bool, task: str) -> PreTrainedModel:
    """What transformers and PEFT alone make of the folder."""
    if task == "rm":
        pad = json.loads((final / "config.json").read_text())["pad_token_id"]
        auto = AutoPeftModelForSequenceClassification if adapters else AutoModelForSequenceClassification
        return auto.from_pretrained(final, num_labels=1, pad_token_id=pad).eval()
    return (AutoPeftModelForCausalLM if adapters else AutoModelForCausalLM).from_pretrained(final).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modes", "task"), [(CHAINS[0], "dpo"), (CHAINS[0], "rm"), (CHAINS[1], "dpo")], ids=["rows", "scores", "merged"]
)
def test_every_form_of_a_chained_run_is_the_same_model(
    modes: tuple[str, str], task: str, model_folder: ModelFolder, chain: Chain
) -> None:
    sft, run_dir = chain(task, modes)
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
        ours = load(cfg, run_dir, weights, tokenizer, longest=100, batching="padded", say=lambda line: None)
        model = ours.classifier() if task == "rm" else ours.causal_lm()
        outputs.append(model.eval()(input_ids=ids).logits)
    outputs.append(plain(final, adapters, task)(input_ids=ids).logits)
    assert_close(outputs[1:], [outputs[0]] * 2, rtol=0, atol=1e-5)
    start = AutoModelForCausalLM.from_pretrained(model_folder()).eval()(input_ids=ids).logits
    assert task == "rm" or float((start - outputs[0]).detach().abs().max()) > 0.1


def test_the_reference_is_the_fine_tuned_model(chain: Chain) -> None:
    """Trap 7: with dropout in the adapters, and a fine-tuning whose own adapters must not be lost."""
    sft, run_dir = chain("dpo", ("LORA", "LORA"))
    files = (run_dir.parent / "cache").rglob("reference-train-*.safetensors")
    (stored,) = (load_file(path)["logprobs"] for path in files)
    cfg = saved_group(str(sft), "model")
    assert isinstance(cfg, ModelConfig)
    model = AutoPeftModelForCausalLM.from_pretrained(sft / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(sft / "final")
    rows = [json.loads(line) for line in (sft.parent / "rows.jsonl").read_text().splitlines()]
    expected = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        for text in (row["chosen"], row["rejected"]):
            response = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                expected.append(float(response_logprobs(model, prompt, response).double().sum()))
    stored = torch.tensor(stored).flatten()
    read = ~stored.isnan()  # of rows that no step reads, nothing is computed
    assert read.sum() >= 48
    assert_close(stored[read], torch.tensor(expected)[read], rtol=0, atol=2e-4)  # sums of about 30 tokens


@pytest.mark.slow
def test_an_offset_comes_back_with_the_adapters(chain: Chain) -> None:
    _, run_dir = chain("rm", ("ALL", "LORA"))
    cfg, tokenizer = saved_group(str(run_dir), "model"), AutoTokenizer.from_pretrained(run_dir / "final")
    assert isinstance(cfg, ModelConfig)
    model = load_trained_reward_model(
        cfg, run_dir, "final", tokenizer, longest=100, batching="auto", say=lambda line: None
    )
    stored = json.loads((run_dir / "final" / "config.json").read_text())["reward_offset"]
    assert model.offset == stored != 0.0
    assert f"`{stored:.6g}`" in (run_dir / "final" / "README.md").read_text()


CONSTANT = "optim.schedule=constant"


@pytest.mark.parametrize(
    ("task", "short", "long", "last_step"),
    [
        ("sft", ["task.max_num_steps=6"], ["task.max_num_steps=11"], 11),
        pytest.param("dpo", ["task.epochs=1"], ["task.epochs=2"], 16, marks=pytest.mark.nightly),
        pytest.param("grpo", ["task.max_num_steps=4"], ["task.max_num_steps=8"], 8, marks=pytest.mark.nightly),
    ],
)
def test_an_extended_run_is_the_longer_run_bit_for_bit(
    task: str, short: list[str], long: list[str], last_step: int, tmp_path: Path, model_folder: ModelFolder
) -> None:
    data = (write_rows if task == "grpo" else write_pairs)(tmp_path / "rows.jsonl")
    base = model_folder()
    whole = train(base, data, tmp_path / "whole", CONSTANT, *long, task=task)
    finished = train(base, data, tmp_path / "finished", CONSTANT, *short, task=task)
    before = digests(finished)
    extended = train(base, data, tmp_path / "extended", CONSTANT, *long, f"resume_from={finished}", task=task)
    assert result_of(extended, last_step) == result_of(whole, last_step)
    assert digests(finished) == before
    again = train(base, data, extended, CONSTANT, *long, "resume=true", task=task)
    assert result_of(again, last_step) == result_of(whole, last_step)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: ModelFolder) -> Path:
    """A run of six steps, beside its rows."""
    folder = tmp_path_factory.mktemp("finished")
    return train(model_folder(), write_rows(folder / "rows.jsonl"), folder / "run", "task.max_num_steps=6")


@pytest.mark.parametrize("newest", [6, 4])
def test_another_schedule_is_that_of_the_longer_run(
    newest: int, finished: Path, tmp_path: Path, model_folder: ModelFolder
) -> None:
    """From the newest checkpoint that is whole on."""
    run = shutil.copytree(finished, tmp_path / "run")
    if newest == 4:
        (run / "checkpoints" / "step-6" / "model.safetensors").write_bytes(b"damaged")
    words = ["task.max_num_steps=12", f"resume_from={run}"]
    extended = train(model_folder(), finished.with_name("rows.jsonl"), tmp_path / "extended", *words)
    rates = {step: value for (tag, step), value in figures_at(extended).items() if tag == "train/lr"}
    totals = {step: 6 if step <= newest else 12 for step in range(1, 13)}
    expected = {
        step: 1e-3 * lr_factor("cosine", step - 1, warmup=3, total=total, min_ratio=0.0)
        for step, total in totals.items()
    }
    assert rates == pytest.approx(expected, rel=1e-6)


def test_what_cannot_be_extended(
    finished: Path, tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    data = finished.with_name("rows.jsonl")
    for words in (["task.max_num_steps=3"], ["task.max_num_steps=12", "optim.lr=1e-4"], ["task.epochs=2"]):
        line = train_words(model_folder(), data, tmp_path / "new", *words, f"resume_from={finished}")
        assert exit_code(" ".join(line)) == 2
        assert words[-1].partition("=")[0] in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_run_that_ended_within_a_rollout_cannot_be_extended(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    finished = train(model_folder(), data, tmp_path / "finished", "task.max_num_steps=3", task="grpo")
    words = ["task.max_num_steps=8", f"resume_from={finished}"]
    assert exit_code(" ".join(train_words(model_folder(), data, tmp_path / "new", *words, task="grpo"))) == 2
    assert "task.max_num_steps" in capsys.readouterr().err
