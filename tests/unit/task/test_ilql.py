"""Implicit language Q-learning: the losses against loops and known optima, and the task."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from sheeprlhf.agent.policy import load_policy
from sheeprlhf.data.example import Example, collate_packed
from sheeprlhf.loss.ilql import expectile_losses, q_losses
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.structure.data import LocalDataConfig
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.structure.run import AdamWConfig, FabricConfig, TrainConfig
from sheeprlhf.structure.task import ILQLConfig
from sheeprlhf.task.scale_plan import step_plan
from sheeprlhf.task.train.ilql import ILQLModel, ilql_loss, rewards_of
from sheeprlhf.utils.errors import ModelError
from tests.support.models import EOS, ModelFolder

LENGTHS = (3, 1, 2)


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_q_losses_by_a_loop(lam: float) -> None:
    rng = torch.Generator().manual_seed(0)
    q, values = torch.randn(2, 6, generator=rng), torch.randn(6, generator=rng)
    rewards = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)  # any number format will do
    expected, place = [], 0
    for length, reward in zip(LENGTHS, rewards, strict=True):
        target = float(reward)
        for t in reversed(range(place, place + length)):
            expected.insert(place, sum((float(q[head, t]) - target) ** 2 for head in range(2)))
            target = 0.9 * ((1 - lam) * float(values[t]) + lam * target)
        place += length
    values.requires_grad_()
    q.requires_grad_()
    found = q_losses(q, values, rewards, torch.tensor(LENGTHS), width=max(LENGTHS), gamma=0.9, lam=lam)
    assert_close(found.tolist(), expected, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert values.grad is None and q.grad is not None  # the next value is a constant


@pytest.mark.parametrize(("share", "expectile", "optimum"), [(0.5, 0.7, 0.7), (0.25, 0.7, 0.4375), (0.25, 0.5, 0.25)])
def test_the_expectile_of_two_rewards(share: float, expectile: float, optimum: float) -> None:
    """tau p / (tau p + (1 - tau) (1 - p)) for the rewards 1, with share p, and 0: there the gradient is 0."""
    q = torch.tensor([0.0] * round(4 - 4 * share) + [1.0] * round(4 * share), dtype=torch.float64)

    def slope(at: float) -> float:
        values = torch.full((4,), at, dtype=torch.float64, requires_grad=True)
        [gradient] = torch.autograd.grad(expectile_losses(values, q, expectile=expectile).sum(), values)
        return float(gradient.sum())

    assert slope(optimum) == pytest.approx(0.0, abs=1e-6)
    assert slope(optimum - 0.1) < 0 < slope(optimum + 0.1)


PROMPT, GOOD, BAD = [3, 4, 5], 7, 9


class Rows:
    """Two responses to one prompt, with the rewards 0 and 1; the second is a rejected one whose reward is 5."""

    def examples(self, part: list[int]) -> list[Example]:
        rows = [(BAD, 0.0, True), (GOOD, 1.0, True), (BAD, 5.0, False)]
        return [
            Example(i, np.array(PROMPT, np.int32), (np.array([token, EOS], np.int32),), reward, desirable)
            for i, (token, reward, desirable) in enumerate(rows)
            if i in part
        ]


def test_values_and_the_weighted_policy_at_their_optimum(model_folder: ModelFolder) -> None:
    """Without discount Q is the reward and V its expectile; Q shifts the log-odds, 0 to .7311 for equal logits."""
    cfg = ModelConfig(config_name="auto", repo_name=str(model_folder()))
    torch.manual_seed(0)
    policy = load_policy(cfg, load_tokenizer(cfg), longest=16, batching="packed")
    policy.requires_grad_(False)
    model, task = ILQLModel(policy), ILQLConfig(gamma=1.0, cql_coeff=0.0, expectile=0.7, target_update_rate=1.0)
    rows: object = Rows()
    batch, rewards = collate_packed(Rows().examples([0, 1])), rewards_of(rows, [0, 1])  # type: ignore[arg-type]
    assert rewards.tolist() == [0.0, 1.0]
    assert rewards_of(rows, [2]).tolist() == [0.0]  # type: ignore[arg-type]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 600)
        output = ilql_loss(model, (batch, rewards), task=task)
        optimizer.zero_grad()
        output.total.backward()
        optimizer.step()
        model.update_targets(task.target_update_rate)
    with torch.no_grad():
        found = model(batch)
        assert_close(found.q_HN.mean(0), torch.tensor([0.0, 0.0, 1.0, 1.0]), rtol=0, atol=2e-2)
        assert_close(found.values_N[[0, 2]], torch.tensor([0.7, 0.7]), rtol=0, atol=2e-2)

        def log_odds() -> float:
            logits = policy.causal_lm()(torch.tensor([PROMPT])).logits[0, -1]
            return float(logits[GOOD] - logits[BAD])

        before, head = log_odds(), policy.causal_lm().get_output_embeddings()
        with model.weighted_by_q(1.0):
            shifted = log_odds() - before
            assert policy.causal_lm().config.tie_word_embeddings is False
        assert 1 / (1 + np.exp(-shifted)) == pytest.approx(0.7311, abs=1e-2)
        assert policy.causal_lm().get_output_embeddings() is head and log_odds() == before


@pytest.mark.parametrize("architecture", ["llama", "granite"])  # the second one divides its logits by 3
def test_q_is_added_to_the_logits_that_the_model_computes(architecture: str, model_folder: ModelFolder) -> None:
    cfg = ModelConfig(config_name="auto", repo_name=str(model_folder(architecture)), dtype="float32")
    model = ILQLModel(load_policy(cfg, load_tokenizer(cfg), longest=16, batching="packed"))
    model.targets_HVC.normal_(generator=torch.Generator().manual_seed(0))
    causal_lm = model.policy.causal_lm().eval()
    with torch.no_grad():
        plain = causal_lm(torch.tensor([PROMPT]), output_hidden_states=True)
        expected = plain.logits + 0.5 * plain.hidden_states[-1] @ model.targets_HVC.mean(0).T
        with model.weighted_by_q(0.5):
            assert_close(causal_lm(torch.tensor([PROMPT])).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_caps_its_logits_is_refused(model_folder: ModelFolder) -> None:
    cfg = ModelConfig(config_name="auto", repo_name=str(model_folder("gemma2")))
    policy = load_policy(cfg, load_tokenizer(cfg), longest=16, batching="packed")
    with pytest.raises(ModelError, match="task=ilql"):
        ILQLModel(policy)


def test_weights_of_half_precision_learn_with_heads_in_float32(model_folder: ModelFolder) -> None:
    cfg = ModelConfig(config_name="auto", repo_name=str(model_folder()), dtype="bfloat16")
    model = ILQLModel(load_policy(cfg, load_tokenizer(cfg), longest=16, batching="packed"))
    content = (collate_packed(Rows().examples([0, 1])), torch.tensor([0.0, 1.0]))
    ilql_loss(model, content, task=ILQLConfig(cql_coeff=0.3)).total.backward()
    grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert {grad.dtype for grad in grads} == {torch.bfloat16, torch.float32}
    assert all(grad.isfinite().all() for grad in grads)


def test_the_parts_of_the_loss_by_hand(model_folder: ModelFolder) -> None:
    """The sum of the parts with their weights; Q logits are compared with a plain softmax."""
    cfg = ModelConfig(config_name="auto", repo_name=str(model_folder()))
    torch.manual_seed(1)
    policy = load_policy(cfg, load_tokenizer(cfg), longest=16, batching="packed")
    model, rows = ILQLModel(policy), Rows().examples([0, 1])
    batch, rewards = collate_packed(rows), torch.tensor([0.5, -1.0])
    task = ILQLConfig(gamma=0.9, cql_coeff=0.3, awac_coeff=2.0, awac_beta=1.5, expectile=0.8)
    with torch.no_grad():
        model.targets_HVC.add_(0.1)
        model.q_shared_HC.normal_()
        found = ilql_loss(model, (batch, rewards), task=task)
        parts, likelihoods = Counter[str](), 0.0
        for row, reward in zip(rows, rewards.tolist(), strict=True):
            ids = torch.tensor([[*row.prompt_ids, *row.responses[0]]])
            output = policy.causal_lm()(ids, output_hidden_states=True)
            hidden = output.hidden_states[-1][0, len(PROMPT) - 1 : -1]
            values = model.v_head(hidden)[:, 0].tolist()
            targets = torch.stack([hidden @ target.T for target in model.targets_HVC]).amin(0)
            for t, token in enumerate(row.responses[0].tolist()):
                weights = [head.weight + own for head, own in zip(model.q_heads, model.q_shared_HC, strict=True)]
                q = [float((hidden @ weight.T)[t, token]) for weight in weights]
                nexts = reward if t == 1 else 0.9 * values[t + 1]
                advantage = float(targets[t, token]) - values[t]
                nll = -float(output.logits[0, len(PROMPT) - 1 + t].log_softmax(-1)[token])
                parts["q_loss"] += sum((one - nexts) ** 2 for one in q)
                parts["v_loss"] += (0.8 if advantage >= 0 else 0.2) * advantage**2
                parts["cql_loss"] -= sum(float((hidden @ h.weight.T)[t].log_softmax(-1)[token]) for h in model.q_heads)
                parts["nll"] += nll
                parts["advantage"] += advantage
                parts["value"] += values[t]
                likelihoods += np.exp(1.5 * advantage) * nll
    total = parts["q_loss"] + parts["v_loss"] + 0.3 * parts["cql_loss"] + 2.0 * likelihoods
    assert float(found.total) == pytest.approx(total, rel=1e-5)
    assert {name: float(value) for name, value in found.metrics.items()} == pytest.approx(parts, rel=1e-5)
    gradients = []
    for awac_coeff in (1.0, 2.0):  # V does not learn from the weights of the likelihoods
        output = ilql_loss(model, (batch, rewards), task=replace(task, awac_coeff=awac_coeff))
        gradients.append(torch.autograd.grad(output.total, model.v_head.weight)[0])
        assert not any(value.requires_grad for value in output.metrics.values())
    assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_the_memory_plan_counts_the_heads(model_folder: ModelFolder) -> None:
    """Weights, gradients and moments are those of the module; its target heads are buffers."""
    cfg = ModelConfig(config_name="auto", repo_name=str(model_folder()))
    data, fabric = LocalDataConfig(train_file="rows.jsonl", max_length=64), FabricConfig()
    parts = step_plan(
        TrainConfig(task=ILQLConfig(), model=cfg, data=data, fabric=fabric, optim=AdamWConfig()), device="cpu"
    )
    policy = load_policy(cfg, load_tokenizer(cfg), longest=16, batching="packed")
    model = ILQLModel(policy)
    trainable = [p.numel() for p in model.parameters() if p.requires_grad]
    assert parts.weights == 4 * sum(p.numel() for p in (*model.parameters(), *model.buffers()))
    assert parts.gradients == 4 * sum(trainable)
    assert parts.optimizer == 8 * sum(trainable) + 4 * len(trainable)
