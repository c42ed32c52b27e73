"""Memory runs out in any phase: one clear error with options to change, exit code 1, and a run that can go on."""

import json
import shutil
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from safetensors.torch import load_file
from transformers import GenerationMixin

import sheeprlhf.agent.policy
import sheeprlhf.task.loop
import sheeprlhf.task.train.sft
from sheeprlhf.cli import run
from tests.support.models import ModelFolder
from tests.support.runs import digests, exit_code, train, train_words, write_rows


def cuda_is_full(*_: Any, **__: Any) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of ...")


def torch_is_refused(*_: Any, **__: Any) -> NoReturn:
    torch.empty(2**58, dtype=torch.uint8)
    raise AssertionError("an exabyte was to be had")


def numpy_is_refused(*_: Any, **__: Any) -> NoReturn:
    np.empty(2**58, dtype=np.uint8)
    raise AssertionError("an exabyte was to be had")


def break_loss(patch: pytest.MonkeyPatch, fail: Callable[..., NoReturn], *, grad: bool) -> None:
    loss = sheeprlhf.task.train.sft.sft_loss

    def broken(*words: Any, **options: Any) -> Any:
        return fail() if torch.is_grad_enabled() == grad else loss(*words, **options)

    patch.setattr(sheeprlhf.task.train.sft, "sft_loss", broken)


BREAK: dict[str, Callable[[pytest.MonkeyPatch, Callable[..., NoReturn]], None]] = {
    "loading the model": lambda patch, fail: patch.setattr(sheeprlhf.agent.policy, "load_causal_lm", fail),
    "forward pass": lambda patch, fail: break_loss(patch, fail, grad=True),
    "backward pass": lambda patch, fail: patch.setattr(Fabric, "backward", fail),
    "evaluation": lambda patch, fail: break_loss(patch, fail, grad=False),
    "generation": lambda patch, fail: patch.setattr(GenerationMixin, "generate", fail),
}
ADVICE = {
    "loading the model": ["model.finetune_mode=LORA model.dtype=bfloat16"],
    "forward pass": ["task.micro_batch_size=1", "model.gradient_checkpointing=true", "fabric.precision=bf16-mixed"],
    "backward pass": ["task.micro_batch_size=1", "model.gradient_checkpointing=true", "model.finetune_mode=LORA"],
    "evaluation": ["task.micro_batch_size=1"],
    "generation": ["generation.max_new_tokens=2", "task.num_sample_prompts=0"],
}
AMOUNT = {cuda_is_full: "20.00 GiB", torch_is_refused: "268435456.00 GiB", numpy_is_refused: "256. PiB"}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, model_folder: ModelFolder) -> Path:
    """A run that ran out of memory in its tenth step and left the checkpoints of the fourth and the eighth."""
    folder = tmp_path_factory.mktemp("stopped")
    update, steps = sheeprlhf.task.loop.update, iter(range(24))

    def failing(*words: Any, **options: Any) -> Any:
        return cuda_is_full() if next(steps) == 9 else update(*words, **options)

    data = write_rows(folder / "rows.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sheeprlhf.task.loop, "update", failing)
        with pytest.raises(SystemExit):
            train(model_folder(), data, folder / "run")
    return folder


@pytest.fixture
def words(stopped: Path, tmp_path: Path, model_folder: ModelFolder) -> list[str]:
    """The command that goes on with a copy of that run."""
    shutil.copytree(stopped / "run", tmp_path / "run")
    return train_words(model_folder(), stopped / "rows.jsonl", tmp_path / "run", "resume=true")


def message_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that fails with exit code 1; what it printed as its error, line by line."""
    assert exit_code(words) == 1
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text[text.index("sheeprlhf cannot continue:") :]


@pytest.mark.parametrize(("phase", "fail"), [*zip(BREAK, cycle(AMOUNT), strict=False)])
def test_memory_runs_out(
    phase: str,
    fail: Callable[..., NoReturn],
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = digests(tmp_path / "run" / "checkpoints")
    assert {name.split("/")[0] for name in before} == {"step-4", "step-8"}
    BREAK[phase](monkeypatch, fail)
    happened, *advice = message_of(words, capsys).splitlines()[1:]
    assert happened == f"  - out of memory: {phase} ({AMOUNT[fail]} more were asked for)"
    for change in ADVICE[phase]:
        assert change in " ".join(advice)
    assert "resume=true" in advice[0]
    after = digests(tmp_path / "run" / "checkpoints")
    assert after.items() >= {name: digest for name, digest in before.items() if "step-8" in name}.items()
    assert phase in ("evaluation", "generation") or after == before  # these come when step 12 or 16 is saved
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "running"


@pytest.mark.slow
def test_the_run_goes_on_with_what_was_advised(
    words: list[str], stopped: Path, tmp_path: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Smaller portions are summed up to the same steps: the weights are those of an undisturbed run, up to rounding."""
    whole = train(model_folder(), stopped / "rows.jsonl", tmp_path / "whole")
    run([*words, "task.micro_batch_size=1", "model.gradient_checkpointing=true"])
    said = capsys.readouterr().err
    assert "going on after step 8" in said and "task.micro_batch_size" in said
    expected = load_file(whole / "final" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "run" / "final" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)


def test_in_an_evaluation(
    stopped: Path, model_folder: ModelFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sheeprlhf.agent.policy.Policy, "forward", cuda_is_full)
    data = [f"data.{kind}_file={stopped / 'rows.jsonl'}" for kind in ("train", "validation", "test")]
    model = ["model=auto", f"model.repo_name={model_folder()}"]
    text = message_of(["eval", "task=perplexity", "data=local", *data, *model, "task.batching=padded"], capsys)
    assert "out of memory: evaluation" in text
    assert "task.mini_batch_size=32" in text and "resume" not in text


def test_another_failure_is_not_called_so(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Fabric, "backward", fail)
    assert exit_code(words) != 0
    assert "out of memory" not in capsys.readouterr().err
    assert (tmp_path / "run" / "error.log").is_file()
