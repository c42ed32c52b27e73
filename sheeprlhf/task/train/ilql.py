"""Implicit language Q-learning (arXiv 2206.11871): offline reinforcement learning from responses that have a reward.

Linear heads on the policy's hidden states estimate Q of every token and V of the state before it. A part of Q is the
same for all tokens, so that tokens which the data do not have are neither better nor worse than the others. V is an
expectile of the Q of the data's tokens, so that it approaches the best that the data allow without asking for tokens
that they do not have. The loss of an optimizer step is the mean over its response tokens, of all rows of the step and
all devices.

The trained policy samples from softmax(logits + advantage_coeff * Q), Q the mean of the target heads; V is the same for
all tokens. Q is linear in the hidden state, so this is one language head: `final/` holds an ordinary language model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sheeprlhf.agent.batches import Batches, Rows
from sheeprlhf.agent.policy import Policy
from sheeprlhf.data.example import Batch
from sheeprlhf.engine.run import open_run
from sheeprlhf.engine.shard import cut_like, gathered, whole
from sheeprlhf.engine.step import LossOutput, evaluate
from sheeprlhf.loss.ilql import expectile_losses, q_losses
from sheeprlhf.model.lm_head import at_least_float32, backbone_and_head, head_logprobs, head_scores
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.structure.task import ILQLConfig
from sheeprlhf.task.loop import TrainLoop
from sheeprlhf.task.models import with_adapters
from sheeprlhf.utils.errors import ModelError
from sheeprlhf.utils.lightning import Fabric


class TokenValues(NamedTuple):
    """Numbers of the targets of a batch: log-probabilities, Q by each head and by the targets, V before the token.

    `q_logprobs_HN` are the log-probabilities of the tokens if the Q of all tokens were logits.
    """

    logprobs_N: Tensor
    q_HN: Tensor
    q_logprobs_HN: Tensor
    target_q_N: Tensor
    values_N: Tensor


class ILQLModel(nn.Module):
    """A policy with heads of Q and V on its hidden states; the target heads are buffers."""

    targets_HVC: Tensor

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        head: Any = backbone_and_head(policy.causal_lm())[1]
        if getattr(head, "softcap", None) is not None:
            raise ModelError(
                f"{type(policy.causal_lm()).__name__} caps its logits, to which task=ilql adds Q: give another model"
            )
        self._logit_scale, weight = getattr(head, "scale", 1.0), cast(Tensor, head.weight)
        vocabulary, width = weight.shape
        self.q_heads = nn.ModuleList(nn.Linear(width, vocabulary, bias=False) for _ in range(ILQLConfig.num_q_heads))
        for weight_VC in self._q_weights():
            nn.init.normal_(weight_VC, std=1e-3)  # what tokens outside the data keep of it tilts the policy
        self.q_shared_HC = nn.Parameter(torch.zeros(len(self.q_heads), width))  # part of Q that all tokens have
        self.v_head = nn.Linear(width, 1)
        self.register_buffer("targets_HVC", torch.stack(self._q_weights()).detach())

    def _q_weights(self) -> list[Tensor]:
        return [cast(nn.Linear, head).weight for head in self.q_heads]

    def forward(self, batch: Batch) -> TokenValues:
        """Numbers of the targets of a batch, float32; those of the target heads without gradient."""
        index_N, ids_N = batch.logit_index_N, batch.target_ids_N
        hidden_RC = self.policy.hidden_at_head(batch)
        _, head = backbone_and_head(self.policy.causal_lm())
        wide_RC = at_least_float32(hidden_RC)
        hidden_NC = wide_RC[index_N]
        own_HN = [(hidden_NC * weight_VC[ids_N]).sum(dim=-1) for weight_VC in self._q_weights()]
        target_HN = torch.einsum("nc,hnc->hn", hidden_NC.detach(), self.targets_HVC[:, ids_N])
        return TokenValues(
            head_logprobs(hidden_RC, head, index_N, ids_N).target_N,
            torch.stack(own_HN) + self.q_shared_HC @ hidden_NC.T,
            torch.stack([head_logprobs(wide_RC, q, index_N, ids_N).target_N for q in self.q_heads]),
            target_HN.amin(dim=0),
            head_scores(hidden_RC, self.v_head)[index_N],
        )

    @torch.no_grad()
    def update_targets(self, rate: float) -> None:
        """All ranks: move the target heads towards the Q heads: target <- (1 - rate) target + rate Q."""
        weights = zip(self.targets_HVC, self._q_weights(), whole(self.q_shared_HC), strict=True)
        for target_VC, weight_VC, shared_C in weights:
            target_VC.lerp_(whole(weight_VC) + shared_C, rate)

    @contextmanager
    def weighted_by_q(self, coeff: float) -> Iterator[None]:
        """Within the block the language head of the policy has the logits log pi + coeff * Q, up to a constant."""
        model = self.policy.causal_lm()
        head, tied = model.get_output_embeddings(), model.config.tie_word_embeddings
        assert isinstance(head, nn.Linear)
        new = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)
        with torch.no_grad():
            tilt_VC = (coeff / self._logit_scale * self.targets_HVC.mean(dim=0)).to(head.weight.dtype)
            new.weight = nn.Parameter(head.weight + cut_like(tilt_VC, head.weight))
        if head.bias is not None:
            new.bias = head.bias
        model.set_output_embeddings(new)
        model.config.tie_word_embeddings = False
        try:
            yield
        finally:
            model.set_output_embeddings(head)
            model.config.tie_word_embeddings = tied


def ilql_loss(model: nn.Module, content: tuple[Batch, Tensor], *, task: ILQLConfig) -> LossOutput:
    """Losses of the tokens: of Q, of V, of the tokens that are not in the data (CQL), and the likelihood (AWAC)."""
    batch, rewards_S = content
    found = model(batch)
    advantages_N = found.target_q_N - found.values_N.detach()
    of_q = found.q_HN, found.values_N, rewards_S, batch.lengths_S
    parts_N = {
        "q_loss": q_losses(*of_q, width=max(batch.response_lengths), gamma=task.gamma, lam=task.td_lambda),
        "v_loss": expectile_losses(found.values_N, found.target_q_N, expectile=task.expectile),
        "cql_loss": -found.q_logprobs_HN.sum(dim=0),
        "nll": -found.logprobs_N,
    }
    likelihoods_N = (task.awac_beta * advantages_N).exp() * parts_N["nll"]
    losses_N = parts_N["q_loss"] + parts_N["v_loss"] + task.cql_coeff * parts_N["cql_loss"]
    metrics_N = parts_N | {"advantage": advantages_N, "value": found.values_N}
    total = (losses_N + task.awac_coeff * likelihoods_N).sum()
    return LossOutput(total, {name: values_N.detach().sum() for name, values_N in metrics_N.items()})


def rewards_of(rows: Rows, part: list[int]) -> Tensor:
    """(S,) rewards of some rows: that of the row for a desirable response, 0 for the rejected one of a pair."""
    return torch.tensor([example.margin * example.desirable for example in rows.examples(part)])


def train(fabric: Fabric, cfg: TrainConfig, run_dir: Path) -> None:
    """All ranks: prepare the data, train, validate, save, and leave `final/` in the run directory."""
    task = cfg.task
    assert isinstance(task, ILQLConfig)
    with open_run(fabric, cfg, run_dir) as run:
        loop = TrainLoop(fabric, run)
        policy = loop.load_policy()
        policy = with_adapters(policy, cfg.model)
        model = ILQLModel(policy)
        module = loop.set_up(model)
        batches = Batches(fabric, task, packed=policy.packed, targets="response", extras=rewards_of)
        loop.begin(lambda rows, _: partial(batches.of, rows))
        loss_fn = partial(ilql_loss, task=task)

        def validate() -> None:
            loop.record(evaluate(fabric, module, loop.validation_batches(batches), loss_fn))
            if task.num_sample_prompts:
                with gathered(fabric, model), model.weighted_by_q(task.advantage_coeff):
                    loop.log_samples(policy)

        if loop.validates_at_start:
            validate()
        for step in loop:
            if step.update(loss_fn)["items"]:
                model.update_targets(task.target_update_rate)
            if step.validates:
                validate()
        with model.weighted_by_q(task.advantage_coeff):
            loop.finish(policy)
