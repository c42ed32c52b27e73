"""From prompts to a rollout: sample, score, and read what every model says of each token. What all online tasks share.

Every rank samples and reads its share of the rows, and all ranks then know the whole rollout: statistics over it need
no further word between them. What is sampled is a function of the weights, the seed and the rollout's number, so ranks,
batches and a resumed run give the same responses.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sheeprlhf.agent.policy import Policy
from sheeprlhf.agent.reward import RewardModel
from sheeprlhf.agent.rollout import Rollout
from sheeprlhf.agent.shared import SharedScore
from sheeprlhf.data.example import Batch, Example
from sheeprlhf.engine.fabric import gather_objects
from sheeprlhf.engine.rng import isolated_rng
from sheeprlhf.model.sample import Sampled, sample_responses
from sheeprlhf.reward.call import Texts
from sheeprlhf.reward.moments import RunningMoments
from sheeprlhf.reward.score import build_scorer
from sheeprlhf.structure.generation import GenConfig
from sheeprlhf.structure.online import OnlineTaskConfig
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.task.batches import Batches
from sheeprlhf.utils.lightning import Fabric
from sheeprlhf.utils.modes import eval_mode

Call = Callable[[Batch], Tensor]  # a batch to a number for each of its targets


def drawn_numbers(seed: int, number: int, shape: tuple[int, int, int]) -> np.ndarray:
    """(prompts, K, tokens) uniform numbers that decide what a rollout samples; the same for equal seed and number."""
    return np.random.default_rng([seed, number]).random(shape)


def sample(
    fabric: Fabric,
    policy: Policy,
    prompts: Sequence[Example],
    uniforms: np.ndarray,
    cfg: GenConfig,
    *,
    eos_id: int | None,
    token_budget: int,
    packed: bool,
) -> list[Sampled]:
    """All ranks: responses to every prompt; each rank samples its share.

    Args:
        fabric: where it runs.
        policy: who writes.
        prompts: rows, of which the prompts are read.
        uniforms: (prompts, K, tokens) numbers of `drawn_numbers`.
        cfg: temperature and stop strings.
        eos_id: ends a response.
        token_budget: most tokens that are held at a time.
        packed: whether the policy's batches are packed.
    """
    mine = list(range(fabric.global_rank, len(prompts), fabric.world_size))
    hidden = None if fabric.is_global_zero else True  # None: shown in a terminal only
    num_responses = len(mine) * uniforms.shape[1]
    with fabric.autocast(), tqdm(total=num_responses, desc="sampling", leave=False, disable=hidden) as bar:
        sampled = sample_responses(
            policy.causal_lm(),
            [prompts[row].prompt_ids for row in mine],
            uniforms[mine],
            temperature=cfg.temperature,
            eos_id=eos_id,
            token_budget=token_budget,
            progress=bar.update,
            packed=packed,
        )
    found = dict(pair for part in gather_objects(fabric, list(zip(mine, sampled, strict=True))) for pair in part)
    return [found[row] for row in range(len(prompts))]


def as_rollout(prompts: Sequence[Example], sampled: Sequence[Sampled]) -> Rollout:
    """What was sampled after each prompt, with the sampler's log-probabilities and no score yet."""
    rows = tuple(
        prompt._replace(responses=one.responses, margin=0.0, desirable=True)
        for prompt, one in zip(prompts, sampled, strict=True)
    )
    finished = np.array([one.finished for one in sampled])
    logprobs = tuple(np.concatenate(one.logprobs) for one in sampled)
    return Rollout(rows, np.zeros(finished.shape), finished, {"logprobs": logprobs})


def as_text(rollout: Rollout, prompts: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Texts:
    """The rollout's responses as text, each beside its prompt; `prompts` also have the dataset's own responses."""

    def text(ids: np.ndarray) -> str:
        return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    group, eos_id = rollout.finished.shape[1], tokenizer.eos_token_id
    responses = [response for row in rollout.rows for response in row.responses]
    return Texts(
        prompts=[one for prompt in prompts for one in [text(prompt.prompt_ids)] * group],
        responses=[text(response) for response in responses],
        finished=rollout.finished.reshape(-1).tolist(),
        num_tokens=[len(response) - int(response[-1] == eos_id) for response in responses],
        columns={"reference": [one for prompt in prompts for one in [text(prompt.responses[0])] * group]},
    )


def read_targets(
    fabric: Fabric, module: nn.Module, call: Call, batches: Batches, rollout: Rollout, label: str
) -> Tensor:
    """All ranks: a number for each target of all rows, end to end in the order of the rows.

    Args:
        fabric: where it runs.
        module: what `call` runs; in eval mode meanwhile, without gradient.
        call: a forward pass.
        batches: cuts the rows; says whether each token or each response is a target.
        rollout: the rows.
        label: what the progress bar says.

    Returns:
        float32, on the host.
    """
    mine: list[tuple[int, np.ndarray]] = []
    with isolated_rng(), eval_mode(module), torch.no_grad(), fabric.autocast():
        for part, micro in batches.numbered(rollout, None, label):
            batch = fabric.to_device(micro.batch)
            values_N = call(batch).float().cpu().numpy()
            mine += zip(part, np.split(values_N, _borders(len(values_N), rollout.examples(part))), strict=True)
    found: dict[int, np.ndarray] = dict(pair for rank in gather_objects(fabric, mine) for pair in rank)
    return torch.from_numpy(np.concatenate([found[row] for row in range(len(rollout))]))


def _borders(num_values: int, rows: list[Example]) -> np.ndarray:
    """Where the values of each row but the first begin: one for each token of its responses, or for each response."""
    sizes = [sum(map(len, row.responses)) for row in rows]
    if num_values != sum(sizes):
        sizes = [len(row.responses) for row in rows]
    return np.cumsum(sizes)[:-1]


class Collector:
    """Makes rollouts: the policy samples, the reward scores, the reference reads.

    Args:
        fabric: where it runs.
        cfg: the run's.
        tokenizer: the policy's.
        policy: who writes.
        reference: what the policy was before training.
        reward: the reward model, if the reward has one.
        packed: how batches are laid out.

    Attributes:
        tokens: cuts a rollout into batches whose targets are the responses' tokens.
        ends: into batches whose targets are the last tokens.
        figures: numbers of the newest rollout, for the log.
        texts: its text.
    """

    def __init__(
        self,
        fabric: Fabric,
        cfg: TrainConfig,
        tokenizer: PreTrainedTokenizerBase,
        policy: Policy,
        reference: nn.Module,
        reward: RewardModel | SharedScore | None,
        *,
        packed: bool,
    ) -> None:
        self._fabric, self._cfg, self._tokenizer = fabric, cfg, tokenizer
        self._policy, self._reference, self._reward, self._packed = policy, reference, reward, packed
        self._model_scores: list[float] = []
        given = None if reward is None else lambda *_: self._model_scores
        self._scorer = build_scorer(cfg.reward, given, default=cfg.data.rule_reward)
        self.tokens = Batches(fabric, cfg.task, packed=packed, targets="response")
        self.ends = Batches(fabric, cfg.task, packed=packed, targets="last")
        self.figures: dict[str, float] = {}
        self.texts = Texts([], [], [], [], {})

    def __call__(
        self, prompts: list[Example], number: int, *, group: int | None = None, validates: bool = False
    ) -> Rollout:
        """All ranks: the rollout with "logprobs" and "reference" of each token, and scores.

        Args:
            prompts: rows whose prompts are answered.
            number: which rollout of the run it is; it decides what is sampled.
            group: responses to each prompt; None takes the task's.
            validates: scores are comparable over the whole run, and leave no trace in it.
        """
        cfg, task = self._cfg, self._cfg.task
        assert isinstance(task, OnlineTaskConfig)
        shape = (len(prompts), group or task.num_generations, cfg.generation.max_new_tokens)
        numbers = drawn_numbers(cfg.seed, number, shape)
        sampled = sample(
            self._fabric,
            self._policy,
            prompts,
            numbers,
            cfg.generation,
            eos_id=self._tokenizer.eos_token_id,
            token_budget=task.token_budget,
            packed=self._packed,
        )
        rollout = as_rollout(prompts, sampled)
        rollout = rollout.with_tokens(reference=self.logprobs(self._reference, rollout, "reference"))
        if cfg.fabric.precision != "32-true":  # there the sampler's differ from those that the update computes
            rollout = rollout.with_tokens(logprobs=self.logprobs(self._policy, rollout, "log-probabilities"))
        self.texts = as_text(rollout, prompts, self._tokenizer)
        scores = np.array(self._scores(rollout, validates), dtype=np.float64)
        rollout = dataclasses.replace(rollout, scores=scores.reshape(rollout.finished.shape))
        self.figures = figures_of(rollout)
        return rollout

    def _scores(self, rollout: Rollout, validates: bool) -> list[float]:
        if self._reward is not None:
            self._model_scores = self.scores_of(self._reward, rollout, "scoring", at_end=True).tolist()
        # Rank zero alone asks the user's functions, which may answer the same question differently.
        asked = self._scorer.raw(self.texts).total if self._fabric.is_global_zero else []
        total = self._fabric.broadcast(asked)
        return total if validates else self._scorer.shape(total, self.texts)

    def logprobs(self, module: nn.Module, rollout: Rollout, label: str) -> Tensor:
        """All ranks: (N,) log-probabilities of all responses' tokens at the sampling temperature."""
        temperature = self._cfg.generation.temperature

        def call(batch: Batch) -> Tensor:
            return module(batch, temperature=temperature).target_N

        return read_targets(self._fabric, self._policy, call, self.tokens, rollout, label)

    def scores_of(
        self, model: RewardModel | SharedScore, rollout: Rollout, label: str, *, at_end: bool = False
    ) -> Tensor:
        """All ranks: (N,) what a model with a score head says before each token; at the end: (S,) after the last."""
        with model.in_use():
            return read_targets(self._fabric, model, model, self.ends if at_end else self.tokens, rollout, label)

    def state(self) -> dict[str, float]:
        """What a checkpoint has to carry: the running moments of the scores."""
        return {f"reward_{name}": value for name, value in self._scorer.moments.to_dict().items()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on with what `state` gave; nothing is there in a new run."""
        mine = {name.removeprefix("reward_"): value for name, value in saved.items() if name.startswith("reward_")}
        if mine:
            self._scorer.moments = RunningMoments.from_dict(mine)


def figures_of(rollout: Rollout) -> dict[str, float]:
    """What there is to say of a rollout; KL and entropy are of a response, nats summed over its tokens."""
    num_responses = rollout.finished.size
    logprobs_N, reference_N = rollout.flat("logprobs").double(), rollout.flat("reference").double()
    return {
        "objective/scores": float(rollout.scores.mean()),
        "objective/kl": float((logprobs_N - reference_N).sum() / num_responses),
        "objective/entropy": float(-logprobs_N.sum() / num_responses),
        "rollout/length": len(logprobs_N) / num_responses,
        "rollout/finished": float(rollout.finished.mean()),
    }
