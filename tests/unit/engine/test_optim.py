import math

import pytest
import torch

from sheeprlhf.engine.optim import build_optimizer, follow_schedule, lr_factor
from sheeprlhf.structure.optim import AdamConfig, AdamWConfig, SGDConfig
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


@pytest.mark.parametrize(
    "cfg", [AdamWConfig(weight_decay=0.1), AdamConfig(weight_decay=0.1), SGDConfig(weight_decay=0.1)]
)
def test_decay_on_matrices_alone_and_only_what_trains(cfg):
    net = Net()
    optimizer = build_optimizer(cfg, net, 0.5)
    assert type(optimizer).__name__ == cfg.torch_name
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    expected = {id(p): 0.1 if p.ndim >= 2 else 0.0 for p in net.parameters() if p.requires_grad}
    assert decay == expected
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert follow_schedule(optimizer, cfg, 0, warmup=2, total=4) == 0.25
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


def test_options_reach_torch():
    optimizer = build_optimizer(AdamWConfig(betas=(0.8, 0.95), eps=1e-6), Net(), 1e-3)
    assert optimizer.defaults["betas"] == (0.8, 0.95)
    assert optimizer.defaults["eps"] == 1e-6
    assert optimizer.defaults["fused"] is True
    assert build_optimizer(AdamWConfig(fused=False), Net(), 1e-3).defaults["fused"] is False
    optimizer = build_optimizer(SGDConfig(momentum=0.9, nesterov=True), Net(), 1e-3)
    assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.9, True)


def test_fused_equals_plain():
    nets = []
    for fused in (True, False):
        torch.manual_seed(0)
        net = Net()
        optimizer = build_optimizer(AdamWConfig(fused=fused, weight_decay=0.1), net, 1e-2)
        for _ in range(5):
            net(torch.ones(3, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        nets.append(net)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
