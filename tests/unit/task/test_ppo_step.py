"""One whole PPO update against a slow one: one response at a time, padded to the left, loops instead of tensors."""

import copy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sheeprlhf.agent.batches import Batches
from sheeprlhf.agent.policy import Policy
from sheeprlhf.agent.reward import RewardModel
from sheeprlhf.data.example import Example
from sheeprlhf.engine.fabric import make_fabric
from sheeprlhf.engine.optim import build_optimizer
from sheeprlhf.engine.step import add_gradients, update
from sheeprlhf.model.attention import PACKED, register
from sheeprlhf.model.folder.account import HEAD
from sheeprlhf.model.folder.load import scalar_model
from sheeprlhf.model.lm_head import backbone_and_head
from sheeprlhf.rollout.rollout import Rollout, token_values
from sheeprlhf.structure.rollout import PPOConfig, ReinforcePPConfig
from sheeprlhf.structure.run import AdamWConfig, FabricConfig
from sheeprlhf.task.train import reinforce_pp
from sheeprlhf.task.train.ppo import policy_loss, ptx_loss, value_loss, with_advantages
from tests.support.models import ModelFolder

TEMPERATURE, KL_COEFF, CLIP_NORM = 0.7, 0.3, 0.8
ACTOR_LR, CRITIC_LR = 3e-3, 7e-3


class Setting(NamedTuple):
    """The models, what was sampled, and the options."""

    policy: PreTrainedModel
    critic: PreTrainedModel
    rollout: Rollout
    task: PPOConfig
    after: Tensor | None


def make_setting(folder: Path, task: PPOConfig) -> Setting:
    register()
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    policy.set_attn_implementation(PACKED)
    torch.manual_seed(3)
    critic = scalar_model(copy.deepcopy(policy), AutoTokenizer.from_pretrained(folder))
    rng = np.random.default_rng(5)

    def ids(low: int, high: int) -> np.ndarray:
        return rng.integers(0, 250, int(rng.integers(low, high))).astype(np.int32)

    rows = tuple(Example(i, ids(1, 9), (ids(1, 9), ids(1, 9))) for i in range(4))
    counts = [sum(map(len, row.responses)) for row in rows]

    def numbers(scale: float, shift: float = 0.0) -> tuple[np.ndarray, ...]:
        return tuple((shift + scale * rng.standard_normal(count)).astype(np.float32) for count in counts)

    with torch.no_grad():  # sampled by a policy that was a little different, so that ratios leave the clip's range
        old = tuple(
            np.concatenate([slow_logprobs(policy, row.prompt_ids, r).numpy() for r in row.responses]) for row in rows
        )
    shifts = numbers(0.3)
    tokens = {
        "logprobs": tuple((a + b).astype(np.float32) for a, b in zip(old, shifts, strict=True)),
        "reference": tuple((a + b).astype(np.float32) for a, b in zip(old, numbers(0.3), strict=True)),
        "values": numbers(0.5),
    }
    scores, finished = rng.standard_normal((4, 2)), rng.random((4, 2)) < 0.6
    after = torch.from_numpy(np.where(finished, 0.0, rng.standard_normal((4, 2))).astype(np.float32)).flatten()
    rollout = Rollout(rows, scores, finished, tokens)
    return Setting(policy, critic, rollout, task, after if task.bootstrap_truncated else None)


def padded(prompt: np.ndarray, response: np.ndarray, pad: int) -> dict[str, Tensor]:
    ids = torch.tensor([[0] * pad + prompt.tolist() + response.tolist()])
    mask = torch.tensor([[0] * pad + [1] * (len(prompt) + len(response))])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def slow_logprobs(
    model: PreTrainedModel, prompt: np.ndarray, response: np.ndarray, pad: int = 3, temperature: float = TEMPERATURE
) -> Tensor:
    logits = model(**padded(prompt, response, pad)).logits[0] / temperature
    first = pad + len(prompt) - 1
    return torch.stack([logits[first + i].log_softmax(-1)[int(token)] for i, token in enumerate(response)])


def slow_values(critic: PreTrainedModel, prompt: np.ndarray, response: np.ndarray, pad: int = 2) -> Tensor:
    backbone, first = getattr(critic, critic.base_model_prefix), pad + len(prompt) - 1
    hidden = backbone(**padded(prompt, response, pad)).last_hidden_state[0]
    return torch.stack([getattr(critic, HEAD)(hidden[first + i])[0] for i in range(len(response))])


def split(setting: Setting, name: str) -> list[list[float]]:
    """The numbers of each response."""
    found = []
    for row, numbers in zip(setting.rollout.rows, setting.rollout.tokens[name], strict=True):
        left = numbers.tolist()
        for response in row.responses:
            found.append(left[: len(response)])
            left = left[len(response) :]
    return found


def slow_targets(setting: Setting) -> tuple[list[list[float]], list[list[float]]]:
    """Advantages and returns of every response's tokens, by their definition."""
    task, gamma, lam = setting.task, setting.task.gae_gamma, setting.task.gae_lambda
    old, reference, values = (split(setting, name) for name in ("logprobs", "reference", "values"))
    scores = setting.rollout.scores.flatten().tolist()
    rewards = []
    given = split(setting, "rewards") if "rewards" in setting.rollout.tokens else [[0.0] * len(row) for row in old]
    for k, score in enumerate(scores):
        apart = [a - b for a, b in zip(old[k], reference[k], strict=True)]
        kl = apart if task.kl_estimator == "k1" else [np.exp(-x) - 1 + x for x in apart]
        rewards.append([-KL_COEFF * x + y for x, y in zip(kl, given[k], strict=True)])
        rewards[-1][-1] += score - sum(given[k])
    if task.normalize_rewards:
        everything = [x for row in rewards for x in row]
        mean, deviation = np.mean(everything), np.sqrt(np.var(everything) + 1e-8)
        rewards = [[(x - mean) / deviation + mean for x in row] for row in rewards]
    advantages, returns = [], []
    for k, row in enumerate(rewards):
        last = 0.0 if setting.after is None else float(setting.after[k])
        v = [*values[k], last]
        deltas = [row[t] + gamma * v[t + 1] - v[t] for t in range(len(row))]
        of_row = [sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, len(row))) for t in range(len(row))]
        advantages.append(of_row)
        returns.append([a + b for a, b in zip(of_row, values[k], strict=True)])
    if task.normalize_advantages:
        everything = [x for row in advantages for x in row]
        mean, deviation = np.mean(everything), np.sqrt(np.var(everything) + 1e-8)
        advantages = [[(x - mean) / deviation for x in row] for row in advantages]
    return advantages, returns


def slow_terms(setting: Setting) -> tuple[list[Tensor], list[Tensor]]:
    """The loss of every token: the policy's and the critic's."""
    task = setting.task
    advantages, returns = slow_targets(setting)
    old, old_values = split(setting, "logprobs"), split(setting, "values")
    pairs = [(row.prompt_ids, response) for row in setting.rollout.rows for response in row.responses]
    policy_terms, value_terms = [], []
    for k, (prompt, response) in enumerate(pairs):
        logprobs, values = (
            slow_logprobs(setting.policy, prompt, response),
            slow_values(setting.critic, prompt, response),
        )
        for t in range(len(response)):
            ratio, a = (logprobs[t] - old[k][t]).exp(), advantages[k][t]
            clipped = ratio.clamp(1 - task.clip_coeff, 1 + task.clip_coeff)
            policy_terms.append(torch.max(-a * ratio, -a * clipped))
            error = (values[t] - returns[k][t]) ** 2
            if task.value_clip_coeff is not None:
                low, high = old_values[k][t] - task.value_clip_coeff, old_values[k][t] + task.value_clip_coeff
                error = torch.max(error, (values[t].clamp(low, high) - returns[k][t]) ** 2)
            value_terms.append(0.5 * task.vf_coeff * error)
    return policy_terms, value_terms


def slow_update(setting: Setting) -> None:
    """Change the two models in place, as one optimizer step on the whole rollout."""
    policy_terms, value_terms = slow_terms(setting)
    for model, terms, lr in ((setting.policy, policy_terms, ACTOR_LR), (setting.critic, value_terms, CRITIC_LR)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, eps=1e-5)
        torch.stack(terms).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()


def fast_update(setting: Setting) -> dict[str, float]:
    fabric = make_fabric(FabricConfig(config_name="cpu", accelerator="cpu"))
    policy, critic = Policy(setting.policy), RewardModel(setting.critic)
    groups = [(policy.parameters(), ACTOR_LR), (critic.parameters(), CRITIC_LR)]
    optimizer: Any = fabric.setup_optimizers(build_optimizer(AdamWConfig(eps=1e-5), *groups))
    rollout = with_advantages(setting.rollout, setting.task, KL_COEFF, setting.after)
    extras = partial(token_values, names=("logprobs", "advantages", "values", "returns"))
    batches = Batches(fabric, setting.task, packed=True, targets="response", extras=extras)
    micro_batches = batches.of(rollout, np.array([2, 0, 3, 1]))
    assert len(micro_batches) > 1
    messages: dict[str, float] = {}
    actor_module, critic_module = fabric.setup_module(policy), fabric.setup_module(critic)
    for module, loss_fn in (
        (critic_module, partial(value_loss, task=setting.task)),
        (actor_module, partial(policy_loss, task=setting.task, temperature=TEMPERATURE)),
    ):
        messages |= update(fabric, module, optimizer, micro_batches, loss_fn, max_grad_norm=CLIP_NORM)
    return messages


OPTIONS: dict[str, dict[str, Any]] = {
    "published values": {},
    "everything else": {
        "kl_estimator": "k3",
        "normalize_rewards": True,
        "normalize_advantages": False,
        "gae_gamma": 0.9,
        "gae_lambda": 0.7,
        "bootstrap_truncated": True,
        "value_clip_coeff": None,
        "vf_coeff": 1.3,
        "clip_coeff": 0.1,
    },
}


def test_rewards_of_tokens(model_folder: ModelFolder) -> None:
    """They are in GAE at their tokens, and in REINFORCE++ in the sum of the rewards to come."""
    setting = make_setting(model_folder(), PPOConfig(num_generations=2, gae_gamma=0.9, gae_lambda=0.7))
    count = len(setting.rollout.flat("values"))
    rollout = setting.rollout.with_tokens(rewards=torch.randn(count, generator=torch.Generator().manual_seed(1)))
    advantages, returns = slow_targets(setting._replace(rollout=rollout))
    found = with_advantages(rollout, setting.task, KL_COEFF, None)
    for name, expected in {"advantages": advantages, "returns": returns}.items():
        assert_close(found.flat(name), torch.tensor([x for row in expected for x in row]).float(), rtol=0, atol=1e-5)
    assert not torch.allclose(
        found.flat("returns"), with_advantages(setting.rollout, setting.task, KL_COEFF, None).flat("returns")
    )
    sums = setting._replace(rollout=rollout.with_tokens(values=torch.zeros(count)), task=PPOConfig(gae_lambda=1.0))
    expected = torch.tensor([x for row in slow_targets(sums)[0] for x in row]).float()
    task = ReinforcePPConfig(init_kl_coeff=KL_COEFF)
    assert_close(reinforce_pp.with_advantages(rollout, task).flat("advantages"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("options", OPTIONS)
def test_an_update_is_the_slow_one(options: str, architecture: str, model_folder: ModelFolder) -> None:
    """float32: every parameter of actor and critic to 1e-5 after one step of AdamW with clipped gradients."""
    task = PPOConfig(mini_batch_size=8, num_generations=2, micro_batch_size=2, **OPTIONS[options])
    ours = make_setting(model_folder(architecture), task)
    slow = ours._replace(policy=copy.deepcopy(ours.policy).eval(), critic=copy.deepcopy(ours.critic).eval())
    ours.policy.eval(), ours.critic.eval()
    before = copy.deepcopy(ours.policy.state_dict())
    printed = fast_update(ours)
    slow_update(slow)
    assert 0.0 < printed["clipfrac"] < 1.0
    for mine, theirs in ((ours.policy, slow.policy), (ours.critic, slow.critic)):
        assert_close(dict(mine.named_parameters()), dict(theirs.named_parameters()), rtol=0, atol=1e-5)
    after = ours.policy.state_dict()
    moved = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert moved > 1e-3
    assert backbone_and_head(ours.policy)[1].weight.grad is None


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_shared_trunk_learns_the_datasets_texts_beside(
    architecture: str, packed: bool, model_folder: ModelFolder
) -> None:
    """One pass for policy and values, another for the texts, one step: 1e-5 of the sum of the three written out."""
    task = PPOConfig(mini_batch_size=8, num_generations=2, micro_batch_size=2, vf_coeff=0.6, ptx_coeff=0.7)
    ours = make_setting(model_folder(architecture), task)
    head = getattr(ours.critic, HEAD)
    slow = ours._replace(policy=copy.deepcopy(ours.policy).eval())
    critic = copy.deepcopy(ours.critic)
    setattr(critic, critic.base_model_prefix, backbone_and_head(slow.policy)[0])
    slow = slow._replace(critic=critic.eval())
    texts = Rollout(tuple(row._replace(responses=row.responses[:1]) for row in ours.rollout.rows[:3]), *[None] * 3)  # type: ignore[arg-type]

    fabric = make_fabric(FabricConfig(config_name="cpu", accelerator="cpu"))
    policy = Policy(ours.policy.eval())
    policy.value_head = head
    groups = [(policy.model.parameters(), ACTOR_LR), (head.parameters(), CRITIC_LR)]
    optimizer: Any = fabric.setup_optimizers(build_optimizer(AdamWConfig(eps=1e-5), *groups))
    module = fabric.setup_module(policy)
    rollout = with_advantages(ours.rollout, task, KL_COEFF, None)
    extras = partial(token_values, names=("logprobs", "advantages", "values", "returns"))
    cut = partial(Batches, fabric, task, packed=packed, targets="response")
    printed = add_gradients(fabric, module, cut().of(texts, np.arange(3)), ptx_loss, weight=task.ptx_coeff)
    printed |= update(
        fabric,
        module,
        optimizer,
        cut(extras=extras).of(rollout, np.array([2, 0, 3, 1])),
        partial(policy_loss, task=task, temperature=TEMPERATURE),
        max_grad_norm=CLIP_NORM,
    )

    policy_terms, value_terms = slow_terms(slow)
    nll = [-slow_logprobs(slow.policy, row.prompt_ids, row.responses[0], temperature=1.0) for row in texts.rows]
    loss = torch.stack(policy_terms).mean() + torch.stack(value_terms).mean() + task.ptx_coeff * torch.cat(nll).mean()
    slow_head = getattr(critic, HEAD)
    slow_groups = [
        {"params": list(slow.policy.parameters()), "lr": ACTOR_LR},
        {"params": list(slow_head.parameters()), "lr": CRITIC_LR},
    ]
    slow_optimizer = torch.optim.AdamW(slow_groups, weight_decay=0.0, eps=1e-5)
    loss.backward()
    weights = [weight for group in slow_groups for weight in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(weights, CLIP_NORM)
    slow_optimizer.step()
    assert printed["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert printed["policy"] + task.vf_coeff * printed["value"] == pytest.approx(printed["loss"], rel=1e-5)
    for mine, theirs in ((ours.policy, slow.policy), (head, slow_head)):
        assert_close(dict(mine.named_parameters()), dict(theirs.named_parameters()), rtol=0, atol=1e-5)
