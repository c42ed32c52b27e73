"""Sharded weights that no rank holds whole: loaded from files, saved and read again by another number of ranks.

The expected bytes are those that one process writes without sharding.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from sheeprlhf.agent.policy import Policy
from sheeprlhf.engine.checkpoint import BackgroundSaver, TrainState, restore_latest, save_checkpoint
from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.engine.optim import set_up
from sheeprlhf.engine.parts import keeps_parameters, write_model
from sheeprlhf.model.folder.load import load_causal_lm
from sheeprlhf.rollout.rollout import sample_on_all_ranks
from sheeprlhf.structure.model import AutoModelConfig
from sheeprlhf.structure.run import AdamWConfig, FabricConfig
from tests.unit.engine.toy import on_ranks

ModelFolder = Callable[..., Path]


def loaded(folder: Path, *, in_files: bool) -> Policy:
    return Policy(load_causal_lm(AutoModelConfig(repo_name=str(folder)), vocabulary=260, longest=64, in_files=in_files))


def step(policy: nn.Module, optimizer: Any) -> None:
    """One optimizer step on numbers that do not depend on the ranks."""
    for number, parameter in enumerate(policy.parameters()):
        parameter.grad = torch.full_like(parameter, 0.01 * (number + 1))
    optimizer.step()


def work(_: Any, size: int, folder: Path, model: Path) -> tuple[int, int, int]:
    """Restore step 1, save it again as step 2, export it; the numbers held and whole, and the step restored."""
    fabric = make_fabric(FabricConfig(devices=str(size), strategy="fsdp2"))
    fabric.launch()
    policy = loaded(model, in_files=True)
    module, optimizer = set_up(fabric, AdamWConfig(), policy, 1e-2)
    parameters = list(policy.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters)
    held = sum(parameter.to_local().numel() for parameter in parameters)
    save_checkpoint(fabric, folder / f"fresh-{size}", TrainState(1), module, optimizer, config_hash="h", keep=9)
    step(policy, optimizer)
    save_checkpoint(fabric, folder / f"stepped-{size}", TrainState(1), module, optimizer, config_hash="h", keep=9)
    state = restore_latest(fabric, folder, module, optimizer, config_hash="h", say=lambda _: None)
    assert state is not None
    state.step = 2
    background = BackgroundSaver(fabric)
    options: dict[str, Any] = {"config_hash": "h", "keep": 9, "background": background}
    save_checkpoint(fabric, folder / f"again-{size}", state, module, optimizer, **options)
    kept = [parameter.detach().clone() for parameter in parameters]
    step(policy, optimizer)  # while it is written
    background.wait()
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    assert keeps_parameters(policy.model)
    write_model(fabric, folder / f"final-{size}", policy, lambda target: policy.model.save_pretrained(target))
    return held, sum(parameter.numel() for parameter in parameters), state.step - 1


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("architecture", ["llama", pytest.param("gpt2", marks=pytest.mark.nightly)])
def test_any_number_of_ranks_writes_and_reads_the_same_bytes(
    size: int, architecture: str, tmp_path: Path, model_folder: ModelFolder
) -> None:
    fabric = make_fabric(FabricConfig())
    fabric.launch()
    model = model_folder(architecture)
    policy = loaded(model, in_files=False)
    module, optimizer = set_up(fabric, AdamWConfig(), policy, 1e-2)
    for name in ("fresh", "stepped", "again"):
        (tmp_path / f"{name}-{size}").mkdir()
    (tmp_path / "whole").mkdir()
    save_checkpoint(fabric, tmp_path / "whole", TrainState(0), module, optimizer, config_hash="h", keep=9)
    step(policy, optimizer)
    save_checkpoint(fabric, tmp_path, TrainState(1), module, optimizer, config_hash="h", keep=9)
    policy.model.save_pretrained(tmp_path / "final")

    ranks = on_ranks(size, work, size, tmp_path, model, timeout=300)

    assert [step for *_, step in ranks] == [1] * size
    assert sum(held for held, *_ in ranks) == ranks[0][1]
    assert max(held for held, *_ in ranks) < 1.2 * ranks[0][1] / size
    expected = tmp_path / "checkpoints/step-1"
    fresh = tmp_path / f"fresh-{size}/checkpoints/step-1/model.safetensors"
    assert fresh.read_bytes() == (tmp_path / "whole/checkpoints/step-0/model.safetensors").read_bytes()
    for folder in (f"stepped-{size}/checkpoints/step-1", f"again-{size}/checkpoints/step-2"):
        for name in ("model", "optimizer"):
            path = f"{name}.safetensors"
            assert (tmp_path / folder / path).read_bytes() == (expected / path).read_bytes(), folder
    for path in sorted((tmp_path / "final").iterdir()):
        assert (tmp_path / f"final-{size}" / path.name).read_bytes() == path.read_bytes()
    AutoModelForCausalLM.from_pretrained(tmp_path / f"final-{size}")


def num_gathers(_: Any, model: Path, passes: int) -> tuple[list[int], int]:
    """Sample the responses of four prompts in forward passes of which ranks have different numbers; count gathers."""
    fabric = make_fabric(FabricConfig(devices="2", strategy="fsdp2"))
    fabric.launch()
    policy = loaded(model, in_files=True)
    set_up(fabric, AdamWConfig(), policy, 1e-2)

    def sample(mine: list[int], _: Any) -> list[int]:
        with torch.no_grad():
            for _ in range(passes * (1 + fabric.global_rank)):
                policy.causal_lm()(torch.ones(1, 4, dtype=torch.long))
        return mine

    with patch.object(dist, "all_gather_single", wraps=dist.all_gather_single) as gather:
        sampled = sample_on_all_ranks(fabric, policy, sample, 4, 2, "")
    return sampled, gather.call_count


@pytest.mark.slow
def test_a_rollout_gathers_the_weights_once(model_folder: ModelFolder) -> None:
    """Of two blocks and what is around them, whatever the number of forward passes."""
    for passes in (1, 5):
        assert on_ranks(2, num_gathers, model_folder(), passes, timeout=300) == [([0, 1, 2, 3], 3)] * 2


def in_pieces(_: Any, folder: Path, model: Path) -> None:
    fabric = make_fabric(FabricConfig(devices="2", strategy="fsdp2"))
    fabric.launch()
    policy = loaded(model, in_files=True)
    set_up(fabric, AdamWConfig(), policy, 1e-2)
    write_model(
        fabric, folder / "pieces", policy, lambda target: policy.model.save_pretrained(target, max_shard_size="8KB")
    )


@pytest.mark.nightly
def test_a_large_model_is_written_as_several_files(tmp_path: Path, model_folder: ModelFolder) -> None:
    on_ranks(2, in_pieces, tmp_path, model_folder(), timeout=300)
    assert len(list((tmp_path / "pieces").glob("model-*.safetensors"))) > 1
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "pieces").state_dict()
    expected = AutoModelForCausalLM.from_pretrained(model_folder()).state_dict()
    assert list(ours) == list(expected)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
