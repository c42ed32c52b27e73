"""The last MLP runs where the head runs; that nothing else changes is shown by the parity tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from sheeprlhf.agent.policy import Policy
from sheeprlhf.data.example import collate_packed
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
    seen = positions_seen(policy_of(model_folder(architecture)))
    last = LAST_MLP[architecture]
    assert seen.pop(last, len(BATCH.head_positions_R)) == len(BATCH.head_positions_R) < BATCH.input_ids_BT.shape[1]
    assert set(seen.values()) <= {BATCH.input_ids_BT.shape[1]} and (architecture == "opt" or seen)


def test_not_under_gradient_checkpointing(model_folder: Callable[..., Path]) -> None:
    seen = positions_seen(policy_of(model_folder("llama"), gradient_checkpointing=True).train())
    assert seen["layers.1.mlp"] == BATCH.input_ids_BT.shape[1]


def test_values_and_gradients(model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(model_folder("llama"))

    def loss_and_gradients() -> tuple[Tensor, list[Tensor]]:
        policy.zero_grad()
        loss = policy(BATCH).target_N.mean()
        loss.backward()
        return loss, [p.grad.clone() for p in policy.parameters() if p.grad is not None]

    trimmed = loss_and_gradients()
    monkeypatch.setattr(trim, "_last_mlp", lambda _: None)
    assert_close(trimmed, loss_and_gradients(), rtol=0, atol=1e-6)


def test_afterwards_and_for_other_kinds_of_layer_nothing_is_left() -> None:
    class Experts(nn.Module):
        """Returns more than its hidden states."""

        def forward(self, hidden: Tensor) -> tuple[Tensor, int]:
            return hidden, 0

    class MLP(nn.Identity):
        pass

    for mlp, rows in ((MLP(), 2), (Experts(), 5)):
        backbone = nn.Module()
        backbone.layers = nn.ModuleList([nn.Module()])
        backbone.layers[0].mlp = mlp
        hidden = torch.arange(5.0).view(1, 5, 1)
        with trim.sparse_last_mlp(backbone, torch.tensor([1, 3]), 5):
            inside = mlp(hidden)
        if rows == 2:
            assert_close(inside, torch.tensor([0.0, 1, 0, 3, 0]).view(1, 5, 1))
        else:
            assert inside[0] is hidden
        assert not mlp._forward_hooks and not mlp._forward_pre_hooks
