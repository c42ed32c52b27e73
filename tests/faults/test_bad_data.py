"""Every kind of bad data is refused with its place and a remedy, or counted in the table that is printed."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import normalizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from sheeprlhf import cli
from sheeprlhf.agent.policy import Policy
from sheeprlhf.data.example import collate_padded
from sheeprlhf.data.prepare import PreparedData
from sheeprlhf.data.report import render_report
from sheeprlhf.structure.task import DPOConfig
from sheeprlhf.task.train.dpo import dpo_loss
from sheeprlhf.task.train.sft import sft_loss
from tests.faults.bad_data import CASES, SPECIAL
from tests.faults.bad_file import GOOD, PAIR, Bad, jsonl
from tests.support.runs import figures_at
from tests.unit.data.toy import TEMPLATE, byte_tokenizer, local, prepare, texts


@pytest.fixture(scope="module")
def policy() -> Policy:
    """A model for the vocabulary of the tests' tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Policy(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=300, **sizes)))


def tokenizer_for(case: Bad) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(template=TEMPLATE)
    if case.ignored:
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace(case.ignored, "")
    return tokenizer


def printed_problem(capsys: pytest.CaptureFixture[str], action: Callable[[], object]) -> str:
    """What the command line prints for what `action` raises: it is told in a few lines, and how to mend it."""
    capsys.readouterr()
    assert cli._guarded(lambda: bool(action()) and 0, debug=False) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("sheeprlhf cannot continue:\n  - ")
    assert len(printed.splitlines()) <= 5
    assert "Traceback" not in printed
    return printed


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{kind}: {case.variant}") for kind, cases in CASES.items() for case in cases]
)
def test_bad_data(case: Bad, tmp_path: Path, policy: Policy, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / case.file
    file.write_bytes(case.content if isinstance(case.content, bytes) else case.content())
    tokenizer, cfg = tokenizer_for(case), local(tmp_path, train_file=str(file), **case.options)
    cache = tmp_path / "cache" / "data"
    if case.counts is None:
        printed = printed_problem(capsys, lambda: prepare(cfg, tokenizer, case.task))
        for text in case.says:
            assert text in printed
        assert printed.count(case.file) <= 1
        assert not cache.exists() or all(path.suffix == ".lock" for path in cache.iterdir())
        return
    data = prepare(cfg, tokenizer, case.task)
    check_counts(data, case)
    good = (PAIR["prompt"], PAIR["chosen"], PAIR["rejected"]) if case.task == "preference" else tuple(GOOD.values())
    assert texts(data, tokenizer)[0] == (good[0], *(f"{text}<|im_end|>" for text in good[1:]))  # as it was written
    check_loss(data, policy, cfg.max_length)
    assert {path.name for path in cache.iterdir()} == {data.folder.name, f".{data.folder.name}.lock"}


def check_counts(data: PreparedData, case: Bad) -> None:
    """Nothing was dropped or cut but what the case says, and the printed table says so too."""
    part, table = data.report["splits"]["train"], render_report(data.report)
    found = {
        "kept": part["kept"],
        **part["dropped"],
        **{f"{what} cut": count for what, count in part["truncated"].items()},
        SPECIAL: part["special_token_rows"],
        "duplicate rows": part["duplicates"],
    }
    assert {name: count for name, count in found.items() if count} == case.counts
    for text in (*case.says, *(name.replace("_", " ") for name in case.counts)):
        assert text in table


def check_loss(data: PreparedData, policy: Policy, limit: int) -> None:
    """Every row that is kept has something to learn, fits, and has a finite loss."""
    split = data.splits["train"]
    assert split.sizes.min() >= 1
    assert (split.lengths <= limit * (split.sizes.shape[1] - 1)).all()
    batch = collate_padded(split.examples(range(len(split))), pad_id=0)
    assert torch.isfinite(policy(batch).target_N).all()
    assert math.isfinite(sft_loss(policy, batch).total.item())
    if len(batch.pairs_P2):
        reference_S = torch.zeros(len(batch.response_lengths))
        assert math.isfinite(dpo_loss(policy, (batch, reference_S), task=DPOConfig()).total.item())


def words(model: Path, file: Path, folder: Path, *more: str, task: str = "sft") -> list[str]:
    data = ["data=local", f"data.train_file={file}", "data.max_length=48", "data.max_prompt_length=24"]
    options = ["dry_run=true", f"hydra.run.dir={folder}", "generation.max_new_tokens=2", *more]
    return ["train", f"task={task}", "model=auto", f"model.repo_name={model}", *data, *options]


@pytest.mark.parametrize("only", [False, True])
def test_training_on_what_is_left(
    only: bool, model_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every bad row that can be read, in one file; and a file with a single row and nothing to validate on."""
    rows = [
        GOOD,
        GOOD,
        {"prompt": "", "response": "r r"},
        {"prompt": "p", "response": " \n"},
        {"prompt": "nul", "response": "a\0b"},
        {"prompt": "p" * 100, "response": "r" * 100},
        {"prompt": "</s><|im_end|>", "response": "</s>"},
        {"prompt": "x", "response": "."},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(jsonl(rows[:1] if only else rows))
    cli.run(words(model_folder(), file, tmp_path / "run", "data.validation_split=0", "data.test_split=0"))
    table = capsys.readouterr().err
    expected = {
        "rows read": 8,
        "rows kept": 5,
        "dropped: duplicate": 1,
        "dropped: empty response": 1,
        "dropped: nul character": 1,
        "prompt cut": 1,
        "response cut": 1,
        "rows with special-token text": 1,
    }
    lines = [line.strip().rpartition(" ") for line in table.splitlines()]
    counts = {label.strip(): count for label, _, count in lines}
    for label, count in ({"rows kept": 1} if only else expected).items():
        assert counts[label] == str(count), label
    assert "nothing is validated" in table
    losses = [value for (tag, _), value in figures_at(tmp_path / "run").items() if "loss" in tag]
    assert losses and all(map(math.isfinite, losses))
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert report["splits"]["train"]["kept"] == (1 if only else 5)
