"""The last block runs where the head runs; that nothing else changes is shown by the parity tests."""

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from sheeprlhf.agent.policy import Policy
from sheeprlhf.data.example import Example, collate_packed
from sheeprlhf.model import lm_head as trim
from sheeprlhf.model.folder.load import load_causal_lm
from sheeprlhf.model.lm_head import backbone_and_head
from sheeprlhf.structure.model import ModelConfig
from tests.support.batches import random_examples
from tests.support.models import VOCAB

LAST_MLP = {"llama": "layers.1.mlp", "phi": "layers.1.mlp", "gpt_neox": "layers.1.mlp", "gpt2": "h.1.mlp", "opt": ""}
BATCH = collate_packed(random_examples(4, 2))


def policy_of(folder: Path, **options: Any) -> Policy:
    cfg = ModelConfig(config_name="auto", repo_name=str(folder), **options)
    return Policy(load_causal_lm(cfg, vocabulary=VOCAB, longest=64))


def positions_seen(policy: Policy) -> dict[str, int]:
    """How many positions each MLP computes for `BATCH`, by the name of the MLP."""
    seen: dict[str, int] = {}
    backbone, _ = backbone_and_head(policy.causal_lm())
    modules = [(name, module) for name, module in backbone.named_modules() if name.endswith(".mlp")]
    hooks = [
        linear.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0].shape[1]}))
        for name, module in modules
        for linear in [next(child for child in module.modules() if not list(child.children()))]
    ]
    policy(BATCH).target_N.sum().backward()
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("architecture", list(LAST_MLP))
def test_only_the_last_one_and_only_where_the_head_runs(architecture: str, model_folder: Callable[..., Path]) -> None:
    seen, layout = positions_seen(policy_of(model_folder(architecture))), BATCH.layout
    assert layout is not None and layout.num_tokens == BATCH.input_ids_BT.shape[1]
    tails, last = len(layout.tail_index), LAST_MLP[architecture]
    assert seen.pop(last, tails) == tails < layout.num_tokens
    assert set(seen.values()) <= {layout.num_tokens} and (architecture == "opt" or seen)


@torch.no_grad()
def test_multiplications(model_folder: Callable[..., Path]) -> None:
    """By hand: of the last block all tokens compute keys and values only."""
    policy, layout = policy_of(model_folder("llama")), BATCH.layout
    assert layout is not None
    weights = {name: weight.numel() for name, weight in policy.causal_lm().named_parameters() if weight.dim() == 2}
    of_block = [sum(n for name, n in weights.items() if f"layers.{i}." in name) for i in range(2)]
    keys = sum(weights[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "kv")
    rows = layout.num_tokens * (of_block[0] + keys) + len(layout.tail_index) * (of_block[1] - keys)
    rows += len(BATCH.head_positions_R) * weights["model.embed_tokens.weight"]  # the head has the same
    with FlopCounterMode(display=False) as counter:
        policy(BATCH)
    assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == 2 * rows


@pytest.mark.parametrize(
    ("targets", "tails"), [("last", (1, 1, 1, 1)), ("response", (3, 2, 3, 1)), ("scores", (2, 2, 2, 1))]
)
def test_tails_begin_with_the_first_token_that_is_read(targets: str, tails: tuple[int, ...]) -> None:
    sizes = [(4, (2, 2)), (3, (2, 1))]
    rows = [Example(i, np.ones(p, np.int32), tuple(np.ones(n, np.int32) for n in k)) for i, (p, k) in enumerate(sizes)]
    layout = collate_packed(rows, targets=targets).layout
    assert layout is not None and layout.tails == tails
    assert layout.tail_starts.tolist() == [0, *accumulate(tails)]
    ends = [6, 8, 13, 14]
    assert layout.tail_index.tolist() == [i for end, n in zip(ends, tails, strict=True) for i in range(end - n, end)]


def test_not_under_gradient_checkpointing(model_folder: Callable[..., Path]) -> None:
    seen = positions_seen(policy_of(model_folder("llama"), gradient_checkpointing=True).train())
    assert seen["layers.1.mlp"] == BATCH.input_ids_BT.shape[1]


@pytest.mark.parametrize("targets", ["response", "last"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_values_and_gradients(
    architecture: str, targets: str, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(model_folder(architecture))
    batch = collate_packed(random_examples(4, 2), targets=targets)

    def loss_and_gradients() -> tuple[Tensor, list[Tensor]]:
        policy.zero_grad()
        loss = policy(batch).target_N.mean()
        loss.backward()
        return loss, [p.grad.clone() for p in policy.parameters() if p.grad is not None]

    trimmed = loss_and_gradients()
    monkeypatch.setattr(trim, "_last_block", lambda _: None)
    assert_close(trimmed, loss_and_gradients(), rtol=0, atol=1e-6)


def test_afterwards_and_for_other_kinds_of_layer_nothing_is_left(model_folder: Callable[..., Path]) -> None:
    backbone, _ = backbone_and_head(policy_of(model_folder("llama")).causal_lm())
    layout = BATCH.layout
    assert layout is not None
    with trim.last_block_at_tails(backbone, layout):
        assert "forward" in vars(backbone.layers[1])
    assert not any("forward" in vars(module) for module in backbone.modules())
    backbone.layers[1].mlp.experts = nn.Identity()
    with trim.last_block_at_tails(backbone, layout):
        assert "forward" not in vars(backbone.layers[1])
