import math

import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainingArguments, get_wsd_schedule

from sheeprlhf.engine.checkpoint import load_optimizer, optimizer_tensors
from sheeprlhf.engine.optim import build_optimizer, follow_schedule, lr_factor
from sheeprlhf.structure.run import AdamConfig, AdamW8bitConfig, AdamWConfig, SGDConfig
from sheeprlhf.structure.task import SFTConfig
from sheeprlhf.utils.errors import CheckpointError
from tests.unit.engine.toy import Net


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("cosine", 0, 0.25),
        ("cosine", 3, 1.0),
        ("cosine", 4, 1.0),
        ("cosine", 9, 0.1 + 0.9 * 0.5),  # half way of the fall
        ("cosine", 14, 0.1),
        ("cosine", 99, 0.1),
        ("linear", 9, 0.1 + 0.9 * 0.5),
        ("linear", 13, 0.1 + 0.9 * 0.1),
        ("linear", 14, 0.1),
        ("constant", 2, 0.75),
        ("constant", 13, 1.0),
    ],
)
def test_lr_factor_by_hand(schedule, step, expected):
    assert lr_factor(schedule, step, warmup=4, total=14, min_ratio=0.1) == pytest.approx(expected, abs=1e-12)


def test_lr_factor_without_warmup_and_with_warmup_longer_than_the_run():
    assert lr_factor("cosine", 0, warmup=0, total=10, min_ratio=0.0) == 1.0
    assert lr_factor("cosine", 1, warmup=10, total=2, min_ratio=0.0) == 0.2
    assert lr_factor("linear", 5, warmup=5, total=5, min_ratio=0.0) == 1.0
    assert math.isclose(lr_factor("cosine", 5, warmup=0, total=10, min_ratio=0.0), 0.5)


@pytest.mark.parametrize(("warmup", "total", "decay_ratio"), [(4, 20, 0.25), (0, 7, 0.5), (3, 10, 0.0), (2, 10, 1.0)])
def test_wsd_is_that_of_transformers_with_a_linear_fall(warmup, total, decay_ratio):
    num_decay = min(math.ceil(decay_ratio * total), total - warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    expected = get_wsd_schedule(optimizer, warmup, num_decay, total, decay_type="linear", min_lr_ratio=0.1)
    for step in range(total):
        factor = lr_factor("wsd", step, warmup=warmup, total=total, min_ratio=0.1, decay_ratio=decay_ratio)
        if step >= warmup:  # there the first step has a rate of 0, here 1 / warmup
            assert factor == pytest.approx(expected.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        expected.step()


@pytest.mark.parametrize(("ratio", "total", "expected"), [(0.0, 50, 0), (0.1, 50, 5), (0.1, 51, 6), (1.0, 3, 3)])
def test_warmup_as_a_share_is_that_of_transformers(ratio, total, expected):
    assert SFTConfig(lr_warmup_ratio=ratio).num_warmup_steps(total) == expected
    if ratio < 1:  # there 1.0 is one step
        assert TrainingArguments(warmup_steps=ratio, use_cpu=True).get_warmup_steps(total) == expected
    assert SFTConfig(lr_warmup_steps=7).num_warmup_steps(total) == 7


@pytest.mark.parametrize(
    "cfg", [AdamWConfig(weight_decay=0.1), AdamConfig(weight_decay=0.1), SGDConfig(weight_decay=0.1)]
)
def test_only_trained_matrices_decay(cfg):
    net = Net()
    optimizer = build_optimizer(cfg, (net.parameters(), 0.5))
    assert type(optimizer).__name__ == cfg.torch_name
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    expected = {id(p): 0.1 if p.ndim >= 2 else 0.0 for p in net.parameters() if p.requires_grad}
    assert decay == expected
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert follow_schedule(optimizer, cfg, 0, warmup=2, total=4) == 0.25
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


def test_options_reach_torch():
    optimizer = build_optimizer(AdamWConfig(betas=(0.8, 0.95), eps=1e-6), (Net().parameters(), 1e-3))
    assert optimizer.defaults["betas"] == (0.8, 0.95)
    assert optimizer.defaults["eps"] == 1e-6
    assert optimizer.defaults["fused"] is True
    assert build_optimizer(AdamWConfig(fused=False), (Net().parameters(), 1e-3)).defaults["fused"] is False
    optimizer = build_optimizer(SGDConfig(momentum=0.9, nesterov=True), (Net().parameters(), 1e-3))
    assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.9, True)


@pytest.mark.parametrize(("size", "tolerance"), [(50, 1e-6), (80, 0.05)])
def test_8bit_adamw_is_adamw_up_to_its_rounding(size, tolerance):
    """Moments of small tensors have 32 bits: there it is torch's AdamW."""
    pytest.importorskip("bitsandbytes")
    changes = []
    for cfg in (AdamWConfig(weight_decay=0.1), AdamW8bitConfig(weight_decay=0.1)):
        torch.manual_seed(0)
        net = torch.nn.Linear(size, size)
        first = net.weight.detach().clone()
        optimizer = build_optimizer(cfg, (net.parameters(), 1e-2))
        for _ in range(5):
            (net(torch.randn(16, size)) ** 2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        changes.append(net.weight.detach() - first)
    assert float((changes[1] - changes[0]).norm() / changes[0].norm()) < tolerance
    assert optimizer.state[net.weight]["state1"].dtype == (torch.float32 if size == 50 else torch.uint8)


def test_8bit_state_of_another_size_or_format_is_refused(tmp_path):
    """Native code reads the tables without a check of their sizes."""
    pytest.importorskip("bitsandbytes")
    net = torch.nn.Linear(80, 80)
    optimizer = build_optimizer(AdamW8bitConfig(), (net.parameters(), 1e-2))
    net(torch.ones(1, 80)).sum().backward()
    optimizer.step()
    tensors = optimizer_tensors(net, optimizer)
    assert tensors["absmax1/weight"].shape == (25,)  # of 6,400 numbers
    save_file(tensors, tmp_path / "whole")
    load_optimizer(tmp_path / "whole", net, optimizer)
    assert optimizer.state[net.weight]["step"] == 1
    for key, wrong in (
        ("absmax1", torch.zeros(24)),
        ("qmap2", torch.zeros(256).half()),
        ("state1", torch.zeros(80).byte()),
    ):
        save_file(tensors | {f"{key}/weight": wrong}, tmp_path / key)
        with pytest.raises(CheckpointError, match=f"{key}/weight"):
            load_optimizer(tmp_path / key, net, optimizer)
