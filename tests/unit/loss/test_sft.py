"""Cross-entropy against hand-computed numbers, and the router's loss of a mixture of experts against transformers."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from sheeprlhf.agent.policy import Policy, load_policy
from sheeprlhf.data.example import Example, collate_packed, collate_padded
from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.engine.step import MicroBatch, update
from sheeprlhf.loss.sft import RouterLoss, StepRouterLoss, cross_entropy, expert_counts, probability_sums
from sheeprlhf.model.folder.architecture import configured_router_loss
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.structure.run import FabricConfig
from sheeprlhf.task.train.sft import router_loss_of, router_loss_of_step, sft_loss
from tests.support.batches import random_examples
from tests.support.models import EXPERTS, ModelFolder


def test_plain_loss_is_minus_the_logprob() -> None:
    assert_close(cross_entropy(torch.tensor([-0.5, -2.0])), torch.tensor([0.5, 2.0]))


def test_label_smoothing_by_hand() -> None:
    # p = (1/2, 1/4, 1/4): log p = (-0.693147, -1.386294, -1.386294), mean -1.155245; e = 0.1, target 0:
    # 0.9 * 0.693147 + 0.1 * 1.155245 = 0.739357
    logprobs = torch.tensor([0.5, 0.25, 0.25]).log()
    loss = cross_entropy(logprobs[:1], logprobs.mean()[None], label_smoothing=0.1)
    assert_close(loss, torch.tensor([0.739357]), rtol=0, atol=1e-6)
    expected = torch.nn.functional.cross_entropy(logprobs[None], torch.tensor([0]), label_smoothing=0.1)
    assert_close(loss[0], expected, rtol=0, atol=1e-6)


def test_smoothing_without_the_mean_is_refused() -> None:
    with pytest.raises(ValueError, match="mean_logprobs_N"):
        cross_entropy(torch.zeros(1), label_smoothing=0.1)


CUTS = ([(0, 1, 2, 3, 4)], [(0,), (1, 2), (), (3, 4)])


def load(folder: Path, **options: bool) -> Policy:
    cfg = ModelConfig(config_name="auto", repo_name=str(folder), **options)
    return load_policy(cfg, load_tokenizer(cfg), longest=32, batching="auto")


def step_of_transformers(folder: Path, rows: Sequence[Example]) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, auxiliary loss and gradients of one padded batch, by the model's own forward."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    batch = collate_padded(rows, pad_id=0)
    assert batch.attention_mask_BT is not None
    labels = batch.input_ids_BT.masked_fill(~batch.attention_mask_BT, -100)
    for row, example in enumerate(rows):
        labels[row, : len(example.prompt_ids)] = -100
    output = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT.long(), labels=labels)
    output.loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return output.loss.item(), output.aux_loss.item(), gradients


@pytest.mark.parametrize(("packed", "checkpointing"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("architecture", EXPERTS)
def test_loss_and_gradients_of_a_step_are_those_of_transformers(
    architecture: str, cut: list[tuple[int, ...]], packed: bool, checkpointing: bool, model_folder: ModelFolder
) -> None:
    folder, rows = model_folder(architecture), random_examples(5, seed=2)
    loss, auxiliary, gradients = step_of_transformers(folder, rows)
    policy = load(folder, gradient_checkpointing=checkpointing)
    lines: list[str] = []
    router = router_loss_of(policy.causal_lm(), lines.append)
    assert router is not None and len(lines) == 1
    fabric = make_fabric(FabricConfig())
    fabric.launch()
    before = {name: weight.detach().clone() for name, weight in policy.causal_lm().named_parameters()}
    module, optimizer = fabric.setup(policy, torch.optim.SGD(policy.parameters(), lr=1.0))
    collate = collate_packed if packed else partial(collate_padded, pad_id=0)
    micro_batches = []
    for part in filter(None, cut):
        batch = collate([rows[row] for row in part])
        micro_batches.append(MicroBatch(batch, len(batch.target_ids_N), batch.row_ids))
    of_step = router_loss_of_step(fabric, module, micro_batches, router)
    metrics = update(fabric, module, optimizer, micro_batches, partial(sft_loss, router=of_step), max_grad_norm=None)
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["router_loss"] == pytest.approx(router.coefficient * auxiliary, abs=1e-5)
    for name, weight in policy.causal_lm().named_parameters():
        assert_close(before[name] - weight.detach(), gradients[name], rtol=0, atol=1e-5)


def test_a_loss_by_hand() -> None:
    """Two tokens, three experts, one pick: f = (1/2, 1/2, 0)."""
    logits = [torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])]
    counts, sums = expert_counts(logits, 1), probability_sums(logits)
    assert counts.tolist() == [1, 1, 0]
    first, second = np.exp([2, 0, 0]) / (np.exp(2) + 2), np.exp([0, 1, 0]) / (np.exp(1) + 2)
    expected = 0.1 * 3 * (0.5 * (first + second)[0] / 2 + 0.5 * (first + second)[1] / 2)
    assert float(RouterLoss(0.1, 1, 3).value(counts, sums, 2)) == pytest.approx(expected, abs=1e-6)


def test_picks_and_probabilities_of_all_layers_are_added() -> None:
    layers = [torch.randn(5, 4, generator=torch.manual_seed(seed)).bfloat16() for seed in (0, 1)]
    counts, sums, rows = expert_counts(layers, 2), probability_sums(layers), torch.cat(layers)
    picked = torch.zeros(10, 4).double().scatter(1, rows.topk(2).indices, 1.0)
    assert_close(counts, picked.sum(0), rtol=0, atol=0)
    assert_close(sums, rows.float().softmax(-1).sum(0))
    loss = RouterLoss(0.5, 2, 4)
    assert_close(StepRouterLoss(loss, counts, 10.0, 3.0).share(tuple(layers)), 3 * loss.value(counts, sums, 10.0))
    assert loss.value(counts, sums, 10.0).dtype == torch.float32


def test_what_cannot_be_included_is_reported_once(model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(model_folder("mixtral")).causal_lm()
    lines: list[str] = []
    assert configured_router_loss(model, "dpo", lines.append) == pytest.approx(0.1)
    assert len(lines) == 1 and "router_aux_loss_coef=0.1" in lines[0] and "task=dpo" in lines[0]
    monkeypatch.setattr(model, "num_experts_per_tok", 3)  # another loss than that of its own forward
    plain = type(model).forward

    def other(self: object, **options: object) -> object:
        output = plain(self, **options)
        output.aux_loss = output.aux_loss + 1.0
        return output

    monkeypatch.setattr(type(model), "forward", other)
    assert router_loss_of(model, lines.append) is None
    assert len(lines) == 2 and "router_aux_loss_coef=0.1" in lines[1]


@pytest.mark.parametrize(("key", "value"), [("output_router_logits", False), ("router_aux_loss_coef", 0.0)])
def test_a_configuration_that_does_not_ask_for_it(key: str, value: object, model_folder: ModelFolder) -> None:
    lines: list[str] = []
    for architecture in ("mixtral", "llama"):
        model = load(model_folder(architecture)).causal_lm()
        if architecture == "mixtral":
            setattr(model.config, key, value)
        assert router_loss_of(model, lines.append) is None
        assert configured_router_loss(model, "rm", lines.append) == 0.0
    assert not lines
