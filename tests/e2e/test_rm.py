"""Reward models by the command line: what is saved, plain transformers' scores of it, and every shape of rows."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from sheeprlhf.agent.policy import load_policy
from sheeprlhf.agent.reward import reward_model_of
from sheeprlhf.cli import run
from sheeprlhf.data.example import Batch, Example, collate_packed
from sheeprlhf.engine.step import LossOutput
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.structure.model import AutoModelConfig
from sheeprlhf.task.train.rm import likelihood_loss
from tests.support.runs import figures, train, write_pairs

ModelFolder = Callable[..., Path]
TEXTS = ["0 the quick brown fox? well, seven wizards.", "1 lazy dog? strange potions brew.", "2 a?"]


def plain_scores(final: Path, base: str) -> list[list[float]]:
    """The scores of TEXTS by transformers (and PEFT) alone, from two states of the generators."""
    tokenizer = AutoTokenizer.from_pretrained(final)
    batch = tokenizer([text + tokenizer.eos_token for text in TEXTS], padding=True, return_tensors="pt")
    scores = []
    for seed in range(2):
        torch.manual_seed(seed)  # weights that were not saved would differ
        model = AutoModelForSequenceClassification.from_pretrained(
            base or final, num_labels=1, pad_token_id=tokenizer.pad_token_id
        )
        if base:
            model = PeftModel.from_pretrained(model, final)
        with torch.no_grad():
            scores.append(model.eval()(**batch).logits[:, 0].tolist())
    return scores


def our_scores(run_dir: Path, words: list[str], tmp_path: Path) -> list[float]:
    """The same through our own loader: pairs of one text and a filler, scored one by one."""
    from sheeprlhf.config.run_lookup import saved_group
    from sheeprlhf.structure.model import ModelConfig
    from sheeprlhf.task.models import load_trained_reward_model

    cfg = saved_group(str(run_dir), "model")
    assert isinstance(cfg, ModelConfig)
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "final")
    model = load_trained_reward_model(
        cfg, run_dir, "final", tokenizer, longest=100, batching="auto", say=lambda line: None
    )
    assert model.packed
    ids = [torch.tensor(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id], dtype=torch.int32) for text in TEXTS]
    examples = [Example(i, row[:2].numpy(), (row[2:].numpy(),)) for i, row in enumerate(ids)]
    with torch.no_grad():
        scores = model.eval()(collate_packed(examples, targets="last"))
    return (scores + model.offset).tolist()


@pytest.mark.parametrize(
    ("architecture", "mode"), [("llama", "LORA"), pytest.param("gpt2", "ALL", marks=pytest.mark.nightly)]
)
def test_plain_transformers_gives_our_scores(
    mode: str, architecture: str, tmp_path: Path, model_folder: ModelFolder
) -> None:
    base = model_folder(architecture)
    data = write_pairs(tmp_path / "rows.jsonl")
    words = [f"model.finetune_mode={mode}", "model.lora_cfg.rank=4", "task.max_num_steps=6"]
    run_dir = train(base, data, tmp_path / "run", *words, task="rm")
    final = run_dir / "final"
    config = json.loads((final / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert config["reward_offset"] != 0.0
    assert config["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
    first, second = plain_scores(final, "" if mode == "ALL" else str(base))
    assert first == second
    assert_close(torch.tensor(our_scores(run_dir, words, tmp_path)), torch.tensor(first), rtol=0, atol=1e-5)
    assert max(first) - min(first) > 1e-3


@pytest.mark.slow
def test_the_offset_makes_demonstrations_score_zero(tmp_path: Path, model_folder: ModelFolder) -> None:
    data = write_pairs(tmp_path / "rows.jsonl")
    words = ["task.max_num_steps=2", "data.shuffle=false"]  # steps of 6 rows
    run_dir = train(model_folder(), data, tmp_path / "run", *words, task="rm")
    run(["eval", "task=preference", f"experiment_dir={run_dir}", "task.data_split=train", "task.num_samples=12"])
    figures = json.loads((run_dir / "eval" / "preference-train-final.json").read_text())
    assert abs(figures["score_chosen"]) < 1e-5
    assert figures["pairs"] == 12  # those of the two steps
    assert (run_dir / "eval" / "preference-train-final.png").read_bytes().startswith(b"\x89PNG")
    raw = train(model_folder(), data, tmp_path / "raw", *words, "task.normalize_on=none", task="rm")
    assert "reward_offset" not in json.loads((raw / "final" / "config.json").read_text())
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (run_dir, raw))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_frozen_layers_keep_their_bytes(tmp_path: Path, model_folder: ModelFolder) -> None:
    """Weight decay, the likelihood term and the head do not move the embeddings and the first layer."""
    words = ["task.max_num_steps=3", "model.frozen_layers=1", "task.likelihood_coeff=0.5", "optim.weight_decay=0.1"]
    run_dir = train(model_folder(), write_pairs(tmp_path / "rows.jsonl"), tmp_path / "run", *words, task="rm")
    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder(), run_dir / "final"))
    same = {
        name for name in before if name in after and before[name].numpy().tobytes() == after[name].numpy().tobytes()
    }
    assert same == {name for name in before if "embed" in name or "layers.0." in name}
    assert len(same) < len(after) - 1


def test_the_likelihood_term_is_that_of_transformers(model_folder: ModelFolder) -> None:
    """On the chosen responses; with a language head of zeros it is ln V for each token."""
    cfg = AutoModelConfig(repo_name=str(model_folder()))
    tokenizer = load_tokenizer(cfg)
    policy = load_policy(cfg, tokenizer, longest=16, batching="packed")
    plain = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    prompt, response = [3, 4, 5], [7, 9, 11, 2]
    labels = torch.tensor([[*[-100] * len(prompt), *response]])
    with torch.no_grad():
        expected = float(plain(torch.tensor([[*prompt, *response]]), labels=labels).loss) * len(response)
    model = reward_model_of(policy, cfg, tokenizer)
    model.keep_language_head(policy.causal_lm())
    batch = collate_packed([Example(0, np.array(prompt, np.int32), (np.array(response, np.int32),))])
    assert float(likelihood_loss(model, batch).total.detach()) == pytest.approx(expected, abs=1e-5)
    assert model.language_head is not None
    with torch.no_grad():
        model.language_head.weight.zero_()
    uniform = len(response) * math.log(len(model.language_head.weight))
    assert float(likelihood_loss(model, batch).total) == pytest.approx(uniform, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], marks=pytest.mark.slow),
        pytest.param(["task.likelihood_coeff=0.5", "model.frozen_layers=1"], marks=pytest.mark.nightly),
    ],
    ids=["plain", "likelihood, frozen"],
)
def test_a_visible_preference_is_learnt(options: list[str], tmp_path: Path, model_folder: ModelFolder) -> None:
    data = write_pairs(tmp_path / "rows.jsonl")
    words = ["task.loss_type=average", "optim.lr=5e-3", *options]
    run_dir = train(model_folder(), data, tmp_path / "run", *words, task="rm")
    run(["eval", "task=preference", f"experiment_dir={run_dir}"])
    assert json.loads((run_dir / "eval" / "preference-test-final.json").read_text())["accuracy"] >= 0.95


def test_accuracy_of_subsets(tmp_path: Path, model_folder: ModelFolder) -> None:
    """Pairs with a visible preference are learned; labels that a coin chose are not, in pairs that were held out."""
    rng = random.Random(0)
    for split, count in (("train", 96), ("held-out", 80)):
        rows = []
        for number in range(count):
            subset = ("rule", "coin")[number % 2]
            chosen, rejected = (" good", " bad") if subset == "rule" else rng.sample([" left", " right"], 2)
            rows.append({"prompt": f"{split} {number}?", "chosen": chosen, "rejected": rejected, "subset": subset})
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = [f"data.{split}_file={tmp_path / 'held-out.jsonl'}" for split in ("validation", "test")]
    words = ["optim.lr=5e-3", "task.mini_batch_size=12", *held_out]
    run_dir = train(model_folder(), tmp_path / "train.jsonl", tmp_path / "run", *words, task="rm")
    run(["eval", "task=preference", f"experiment_dir={run_dir}", "task.subset_column=subset"])
    found = json.loads((run_dir / "eval" / "preference-test-final.json").read_text())["accuracy_by_subset"]
    print(found)
    assert found["rule"]["pairs"] == found["coin"]["pairs"] == 40
    assert found["rule"]["accuracy"] >= 0.95
    assert 0.3 <= found["coin"]["accuracy"] <= 0.7


def test_rankings_and_margins(tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"p{i}?", "responses": [" good good", " good", " bad"][: 2 + i % 2]} for i in range(20)]
    rows += [{"prompt": f"q{i}?", "chosen": " good", "rejected": " bad", "margin": 0.5} for i in range(20)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_dir = train(model_folder(), data, tmp_path / "run", "optim.lr=5e-3", task="rm")
    run(["eval", "task=preference", f"experiment_dir={run_dir}"])
    figures = json.loads((run_dir / "eval" / "preference-test-final.json").read_text())
    assert figures["pairs"] == 10 + 3 * 10 + 20
    assert figures["accuracy"] >= 0.95


def test_a_likelihood_that_is_not_finite_leaves_the_step_out(
    tmp_path: Path, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a loss of pairs does; the weights are those of before."""
    calls = []

    def once_infinite(model: nn.Module, batch: Batch) -> LossOutput:
        calls.append(batch)
        output = likelihood_loss(model, batch)
        return output._replace(total=output.total * math.inf) if len(calls) == 1 else output

    monkeypatch.setattr("sheeprlhf.task.train.rm.likelihood_loss", once_infinite)
    words = ["task.max_num_steps=2", "task.likelihood_coeff=0.5", "task.max_skipped_steps=1"]
    run_dir = train(model_folder(), write_pairs(tmp_path / "rows.jsonl"), tmp_path / "run", *words, task="rm")
    found = figures(run_dir)
    assert found["train/skipped_steps"] == [1.0, 1.0] and not math.isfinite(found["train/nll"][0])
    assert math.isfinite(found["train/nll"][1]) and found["train/loss"][1] > 0
