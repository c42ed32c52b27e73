"""Log-probabilities at the head, and a last block that computes the needed positions alone."""

from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from sheeprlhf.agent.policy import Policy
from sheeprlhf.data.example import Example, collate_packed
from sheeprlhf.model import lm_head as head_module
from sheeprlhf.model import lm_head as trim
from sheeprlhf.model.folder.load import load_causal_lm
from sheeprlhf.model.lm_head import backbone_and_head, head_logprobs, logprobs_from_logits
from sheeprlhf.structure.model import ModelConfig
from tests.support.batches import random_examples
from tests.support.models import VOCAB, ModelFolder


def reference(
    hidden_RC: torch.Tensor, head: nn.Linear, index_N: torch.Tensor, ids_N: torch.Tensor, e: float
) -> torch.Tensor:
    return F.cross_entropy(head(hidden_RC)[index_N], ids_N, reduction="none", label_smoothing=e)


@pytest.mark.parametrize("chunk", [1 << 18, 35, 1])  # all rows, three at a time, one
@pytest.mark.parametrize("max_logits", [1 << 20, 50, 11])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_values_and_gradients_equal_cross_entropy(
    max_logits: int, smoothing: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "_CPU_CHUNK", chunk)
    torch.manual_seed(0)
    head = nn.Linear(6, 11)
    index_N = torch.tensor([0, 1, 4, 4, 2, 6, 0])  # rows repeat and rows 3 and 5 predict nothing
    ids_N = torch.tensor([3, 0, 10, 10, 5, 7, 2])
    results = []
    for ours in (True, False):
        torch.manual_seed(1)
        hidden_RC = torch.randn(7, 6, requires_grad=True)
        head.zero_grad()
        if ours:
            logprobs = head_logprobs(hidden_RC, head, index_N, ids_N, mean=smoothing > 0, max_logits=max_logits)
            losses = -(1 - smoothing) * logprobs.target_N
            if logprobs.mean_N is not None:
                losses = losses - smoothing * logprobs.mean_N
        else:
            losses = reference(hidden_RC, head, index_N, ids_N, smoothing)
        (losses * torch.arange(1.0, 8.0)).sum().backward()
        results.append((losses.detach(), hidden_RC.grad, head.weight.grad.clone(), head.bias.grad.clone()))
    assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_logits", [1 << 20, 11])
def test_entropy_is_that_of_the_distribution(max_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "_CPU_CHUNK", 30)
    torch.manual_seed(0)
    head, hidden_RC = nn.Linear(6, 11), torch.randn(5, 6)
    with torch.no_grad():
        head.bias[3] = -torch.inf  # a probability of 0 adds nothing
        index_N, ids_N = torch.tensor([4, 0, 0, 2]), torch.tensor([1, 2, 4, 10])
        found = head_logprobs(hidden_RC, head, index_N, ids_N, mean=False, entropy=True, max_logits=max_logits)
        probs_RV = head(hidden_RC).double().softmax(-1)
    expected = torch.stack([-sum(p * p.log() for p in probs_RV[row] if p > 0) for row in index_N])
    assert_close(found.entropy_N, expected.float(), rtol=0, atol=1e-6)
    assert found.mean_N is None


@pytest.mark.parametrize("max_logits", [1 << 20, 11])
def test_the_gradient_of_log_probabilities_and_entropies_together(
    max_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "_CPU_CHUNK", 30)
    torch.manual_seed(0)
    head = nn.Linear(6, 11)
    with torch.no_grad():
        head.bias[3] = -100.0  # a probability of 0 in float32
    index_N, ids_N, weights_N = torch.tensor([4, 0, 0, 2]), torch.tensor([1, 2, 4, 10]), torch.tensor([1.0, -2, 3, 0.5])
    results = []
    for ours in (True, False):
        torch.manual_seed(1)
        hidden_RC = torch.randn(5, 6, requires_grad=True)
        if ours:
            found = head_logprobs(hidden_RC, head, index_N, ids_N, mean=False, entropy=True, max_logits=max_logits)
            logprobs_N, entropy_N = found.target_N, found.entropy_N
        else:
            logprobs_NV = head(hidden_RC)[index_N].log_softmax(-1)
            logprobs_N, entropy_N = logprobs_NV[range(4), ids_N], -(logprobs_NV.exp() * logprobs_NV).sum(-1)
        (0.3 * logprobs_N + weights_N * entropy_N).sum().backward()
        results.append((entropy_N.detach(), hidden_RC.grad))
    assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_half_precision_logits_are_scored_in_float32() -> None:
    """Trap 12: 150,000 words, logits in bf16: no NaN, probabilities sum to one, log-probabilities at most 0."""
    torch.manual_seed(0)
    logits_RV = (torch.randn(2, 150_000) * 20).bfloat16()
    ids = torch.arange(150_000)
    logprobs = logprobs_from_logits(logits_RV, torch.zeros_like(ids), ids, mean=False).target_N
    assert logprobs.dtype == torch.float32
    assert bool((logprobs <= 0).all()) and not bool(logprobs.isnan().any())
    assert_close(logprobs.exp().sum(), torch.tensor(1.0), rtol=0, atol=1e-4)
    assert_close(logprobs, logits_RV[0].float().log_softmax(-1), rtol=0, atol=1e-5)


def test_the_gradient_of_half_precision_logits_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near certainty the gradient is 1 - p: rounding p first would leave nothing of it."""
    monkeypatch.setattr(head_module, "_CPU_CHUNK", 10)
    torch.manual_seed(0)
    leaf = (torch.randn(5, 4) * 6).bfloat16().requires_grad_()
    index_N, ids_N = torch.tensor([0, 1, 2, 3, 3, 4]), torch.tensor([0, 3, 2, 1, 1, 2])
    exact = leaf.detach().float().requires_grad_()
    exact.log_softmax(-1)[index_N, ids_N].sum().backward()
    logprobs_from_logits(leaf * 1.0, index_N, ids_N, mean=False).target_N.sum().backward()
    assert leaf.grad.dtype == torch.bfloat16
    assert_close(leaf.grad, exact.grad.bfloat16(), rtol=8e-3, atol=0)


def test_float64_logits_have_equal_logprobs_with_and_without_gradient() -> None:
    torch.manual_seed(0)
    logits_RV = torch.randn(3, 7, dtype=torch.float64)
    index_N, ids_N = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 3, 6, 1])
    expected_N = logits_RV.log_softmax(-1)[index_N, ids_N]
    for requires_grad in (False, True):
        leaf = logits_RV.clone().requires_grad_(requires_grad)
        found = logprobs_from_logits(leaf * 1.0, index_N, ids_N, mean=True, entropy=True)
        assert found.mean_N.dtype == found.entropy_N.dtype == torch.float64
        assert_close(found.target_N.detach(), expected_N, rtol=0, atol=1e-14)


def test_no_gradient_no_saved_logits() -> None:
    with torch.no_grad():
        logprobs = logprobs_from_logits(torch.zeros(2, 4), torch.tensor([1]), torch.tensor([3]), mean=True)
    assert_close(logprobs.target_N, torch.tensor([-1.3862944]))
    assert_close(logprobs.mean_N, torch.tensor([-1.3862944]))


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
def test_only_the_last_one_and_only_where_the_head_runs(architecture: str, model_folder: ModelFolder) -> None:
    seen, layout = positions_seen(policy_of(model_folder(architecture))), BATCH.layout
    assert layout is not None and layout.num_tokens == BATCH.input_ids_BT.shape[1]
    tails, last = len(layout.tail_index), LAST_MLP[architecture]
    assert seen.pop(last, tails) == tails < layout.num_tokens
    assert set(seen.values()) <= {layout.num_tokens} and (architecture == "opt" or seen)


@torch.no_grad()
def test_multiplications(model_folder: ModelFolder) -> None:
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


def test_not_under_gradient_checkpointing(model_folder: ModelFolder) -> None:
    seen = positions_seen(policy_of(model_folder("llama"), gradient_checkpointing=True).train())
    assert seen["layers.1.mlp"] == BATCH.input_ids_BT.shape[1]


@pytest.mark.parametrize("targets", ["response", "last"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_values_and_gradients(
    architecture: str, targets: str, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
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


def test_afterwards_and_for_other_kinds_of_layer_nothing_is_left(model_folder: ModelFolder) -> None:
    backbone, _ = backbone_and_head(policy_of(model_folder("llama")).causal_lm())
    layout = BATCH.layout
    assert layout is not None
    with trim.last_block_at_tails(backbone, layout):
        assert "forward" in vars(backbone.layers[1])
    assert not any("forward" in vars(module) for module in backbone.modules())
    backbone.layers[1].mlp.experts = nn.Identity()
    with trim.last_block_at_tails(backbone, layout):
        assert "forward" not in vars(backbone.layers[1])
