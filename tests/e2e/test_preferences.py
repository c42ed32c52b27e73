"""DPO and KTO by the command line: where they start, what they learn and log, and where the reference comes from."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.structure.model import TinyConfig
from sheeprlhf.task.models import load_initial_policy
from sheeprlhf.utils.errors import ConfigError
from tests.support.models import ModelFolder
from tests.support.runs import figures, rejected, train, train_words, write_labelled, write_pairs

LORA = ["model.finetune_mode=LORA", "model.lora_cfg.rank=4", "model.lora_cfg.dropout=0.0"]
AT_ZERO = {  # the loss of a pair that policy and reference like alike, beta 0.1
    "sigmoid": math.log(2),
    "ipo": 25.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "hinge": 1.0,
    "sppo": 50.0,
    "nca": 2 * math.log(2),
    "bco": 2 * math.log(2),
    "exo task.label_smoothing=0.2": 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2),
    "robust task.label_smoothing=0.2": math.log(2),
    # with the published 0.05 this loss rises with the margin at 0 (docs/dpo.md)
    "discopop task.discopop_tau=0.2": 0.5 * math.log(2) + 0.5,
    **dict.fromkeys(["sigmoid_norm", "aot", "aot_unpaired"], math.log(2)),
    **dict.fromkeys([f"sigmoid task.f_divergence={name}" for name in ("js", "forward_kl", "alpha")], math.log(2)),
    **dict.fromkeys(["sigmoid task.ld_alpha=0.5", "sigmoid task.ref_sync_interval=3"], math.log(2)),
}
IN_CI = ("sigmoid", "ipo")


@pytest.mark.parametrize(
    "loss_type", [pytest.param(x, marks=[] if x in IN_CI else pytest.mark.nightly) for x in AT_ZERO]
)
def test_the_first_loss_is_that_of_no_difference_and_then_it_falls(
    loss_type: str, tmp_path: Path, model_folder: ModelFolder
) -> None:
    data = write_pairs(tmp_path / "rows.jsonl")
    words = [*f"task.loss_type={loss_type}".split(), "task.max_num_steps=8", "task.lr_warmup_steps=0", *LORA]
    run_dir = train(model_folder(), data, tmp_path / "run", *words, task="dpo")
    found = figures(run_dir)
    losses, margins = found["train/loss"], found["train/rewards/margins"]
    assert losses[0] == pytest.approx(AT_ZERO[loss_type], abs=1e-5)
    assert losses[-1] < losses[0]
    assert margins[0] == pytest.approx(0.0, abs=1e-5)
    assert margins[-1] > 0
    assert found["train/rewards/accuracies"][0] == 0.5  # equal rewards count half
    names = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
    names += ["logps/chosen", "logps/rejected", "kl/chosen", "loss"]
    assert {f"{part}/{name}" for part in ("train", "val") for name in names} <= found.keys()
    assert 0 < found["val/entropy"][-1] < math.log(260)  # nats a token, of 260 tokens


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(words, marks=[] if words == "task.loss_type=orpo" else pytest.mark.nightly)
        for words in (
            "task.loss_type=orpo",
            "task.loss_type=simpo task.beta=2",
            "task.reference_free=true task.sft_coeff=1",  # CPO
            "task.sft_coeff=1",
            "task.use_weighting=true",
        )
    ],
)
def test_a_loss_that_begins_where_the_model_is_falls(options: str, tmp_path: Path, model_folder: ModelFolder) -> None:
    """The first loss depends on the likelihood of the responses; margins grow from what they are."""
    data, words = write_pairs(tmp_path / "rows.jsonl"), [*options.split(), f"data.cache_dir={tmp_path / 'cache'}"]
    run_dir = train(model_folder(), data, tmp_path / "run", *words, "task.max_eval_batches=null", task="dpo")
    found = figures(run_dir)
    assert found["val/loss"][-1] < found["val/loss"][0]
    assert found["val/rewards/margins"][-1] > found["val/rewards/margins"][0]
    assert found["val/rewards/accuracies"][-1] >= found["val/rewards/accuracies"][0]
    without = "orpo" in options or "simpo" in options or "reference_free" in options
    assert without is not bool(list((tmp_path / "cache").rglob("reference*")))


@pytest.mark.slow
def test_the_reference_is_computed_once_and_is_that_of_these_weights(tmp_path: Path, model_folder: ModelFolder) -> None:
    data = write_pairs(tmp_path / "rows.jsonl")
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    words = ["task.max_num_steps=2", cache]
    train(model_folder(), data, tmp_path / "one", *words, task="dpo")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("reference-*.safetensors")}
    assert len(files) == 2  # training and validation rows
    train(model_folder(), data, tmp_path / "two", *words, task="dpo")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("reference-*.safetensors")} == files
    sft = train(model_folder(), data, tmp_path / "sft", "task.max_num_steps=2", cache)
    train(model_folder(), data, tmp_path / "three", *words, f"task.sft_experiment_dir={sft}", task="dpo")
    there = sorted((tmp_path / "cache").rglob("reference-train-*.safetensors"))
    assert len(there) == 2
    first, second = (load_file(path)["logprobs"] for path in there)
    assert np.nanmax(np.abs(first - second)) > 1e-3


@pytest.mark.slow
def test_a_policy_that_leaves_the_data_is_reported(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pairs(tmp_path / "rows.jsonl")
    for name, lr in (("fast", "0.1"), ("slow", "1e-4")):
        words = [f"optim.lr={lr}", "task.lr_warmup_steps=0", "task.beta=0.01"]
        run_dir = train(model_folder(), data, tmp_path / name, *words, task="dpo")
        warned = "task.beta" in capsys.readouterr().err
        assert warned == (name == "fast")
        lost = [kl / n for kl, n in zip(*(figures(run_dir)[f"val/{x}/chosen"] for x in ("kl", "tokens")), strict=True)]
        assert (max(lost) > 0.5) == (name == "fast")  # nats a token, at any of the validations


def test_a_run_with_another_tokenizer_is_refused(tmp_path: Path, model_folder: ModelFolder) -> None:
    data = write_pairs(tmp_path / "rows.jsonl")
    sft = train(model_folder("llama"), data, tmp_path / "sft", "task.max_num_steps=1")
    tiny = TinyConfig()
    of = {"longest": 8, "batching": "auto", "say": print}
    with pytest.raises(ConfigError, match="embedded:tiny"):
        load_initial_policy(tiny, str(sft), "final", load_tokenizer(tiny), **of)


NAMES = {
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "kl",
    "share/chosen",
}


@pytest.mark.parametrize(
    "options",
    [[], pytest.param([*LORA, "task.batching=padded"], marks=pytest.mark.nightly)],
    ids=["all", "lora, padded"],
)
def test_it_begins_at_half_the_weight_and_learns_the_labels(
    options: list[str], tmp_path: Path, model_folder: ModelFolder
) -> None:
    data = write_labelled(tmp_path / "rows.jsonl")
    words = ["task.desirable_weight=1.2", "task.lr_warmup_steps=0", "task.max_eval_batches=null", *options]
    run_dir = train(model_folder(), data, tmp_path / "run", "optim.lr=3e-3", *words, task="kto")
    share = figures(run_dir)["train/share/chosen"][0]
    assert figures(run_dir)["train/loss"][0] == pytest.approx(0.5 * (1.2 * share + (1 - share)), abs=1e-5)
    assert figures(run_dir)["train/kl"][0] == pytest.approx(0.0, abs=1e-4)
    losses, margins = figures(run_dir)["val/loss"], figures(run_dir)["val/rewards/margins"]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0] < 0.55
    assert margins[2] > margins[1] > margins[0] > 0
    assert {f"{split}/{name}" for split in ("train", "val") for name in NAMES} <= figures(run_dir).keys()
    assert figures(run_dir)["val/share/chosen"] == [0.5] * 3
    assert len(list((run_dir / "samples").iterdir())) == 3  # one at each validation


def test_pairs_are_taken_and_both_references_are_computed_once(tmp_path: Path, model_folder: ModelFolder) -> None:
    data = write_pairs(tmp_path / "rows.jsonl", 12)
    words = ["task.max_num_steps=2", "task.lr_warmup_steps=0", f"data.cache_dir={tmp_path / 'cache'}"]
    one = train(model_folder(), data, tmp_path / "one", *words, task="kto")
    report = json.loads((one / "data_report.json").read_text())
    assert report["splits"]["train"]["labels"] == {"desirable": 12, "undesirable": 12, "pairs": 12}
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("reference-*.safetensors")}
    kinds = {path.name.rpartition("-")[0] for path in files}
    assert kinds == {
        f"reference-{name}" for name in ("train", "train-mismatched", "validation", "validation-mismatched")
    }
    assert all(load_file(path)["logprobs"].shape == (24, 1) for path in files)
    train(model_folder(), data, tmp_path / "two", *words, task="kto")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("reference-*.safetensors")} == files
    assert figures(one)["train/loss"] == figures(tmp_path / "two")["train/loss"]


def test_rows_of_one_prompt_are_refused_and_a_lonely_validation_row_is_not(
    tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "p", "response": f"{i} words", "label": i % 2} for i in range(4)]
    lonely, data = tmp_path / "lonely.jsonl", write_labelled(tmp_path / "rows.jsonl", 8)
    lonely.write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = rejected(train_words(model_folder(), lonely, tmp_path / "one", task="kto"), capsys)
    assert "same prompt" in " ".join(printed.split())
    lonely.write_text(json.dumps(rows[0]) + "\n")
    words = [f"data.validation_file={lonely}", "task.max_num_steps=1"]
    run_dir = train(model_folder(), data, tmp_path / "two", *words, task="kto")
    assert "val/rewards/rejected" in figures(run_dir)
    assert "val/rewards/chosen" not in figures(run_dir)
