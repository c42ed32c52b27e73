"""One object that makes rollouts: it knows the policy, the reference and the reward, and what the reward has seen."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sheeprlhf.agent.batches import Batches
from sheeprlhf.agent.policy import Policy
from sheeprlhf.agent.reward import RewardModel
from sheeprlhf.agent.shared import SharedScore
from sheeprlhf.data.example import Batch, Example
from sheeprlhf.engine.run import Run
from sheeprlhf.reward.call import Texts
from sheeprlhf.reward.score import RawScores, RunningMoments, build_reward
from sheeprlhf.rollout.collect_steps import (
    as_rollout,
    as_text,
    drawn_numbers,
    figures_of,
    read_targets,
    refuse_non_finite,
    sample,
)
from sheeprlhf.rollout.rollout import Rollout
from sheeprlhf.rollout.stop import StopStrings
from sheeprlhf.rollout.text_exchange import TextExchange, read_scores
from sheeprlhf.structure.rollout import OnlineTaskConfig
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.utils.end_tokens import end_token_ids
from sheeprlhf.utils.errors import ModelError, RewardError
from sheeprlhf.utils.lightning import Fabric

_ROUNDED = (
    0.1  # nats a token: in bf16 a whole model's logits of 20 are rounded to eighths, in another order when cached
)


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
        columns: of the texts, those that the reward is given; the same in every rollout.
        exchange: makes the texts the reward model's tokens, if it has another tokenizer.

    Attributes:
        policy: who writes.
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
        columns: Collection[str] = ("reference",),
        exchange: TextExchange | None = None,
    ) -> None:
        self._fabric, self._cfg, self._tokenizer = fabric, cfg, tokenizer
        self.policy, self._reference, self._reward, self._packed = policy, reference, reward, packed
        self._columns, self._exchange = columns, exchange
        self._stop = StopStrings(cfg.generation.stop_strings, tokenizer)
        self._model_scores: list[float] = []
        given = None if reward is None else lambda *_: self._model_scores
        self._scorer = build_reward(
            cfg.reward, given, default=cfg.data.rule_reward, max_tokens=cfg.generation.max_new_tokens
        )
        self.tokens = Batches(fabric, cfg.task, packed=packed, targets="response")
        self.ends = Batches(fabric, cfg.task, packed=packed, targets="last")
        self.figures: dict[str, float] = {}
        self.texts = Texts([], [], [], [], {})

    def __call__(
        self, prompts: list[Example], number: int, *, group: int | None = None, validates: bool = False
    ) -> Rollout:
        """All ranks: the rollout with "sampled", "logprobs" and "reference" of each token, and scores.

        "sampled" are the sampler's log-probabilities; "logprobs" those that the ratio of an update begins with.

        Args:
            prompts: rows whose prompts are answered.
            number: which rollout of the run it is; it decides what is sampled.
            group: responses to each prompt; None takes the task's.
            validates: scores are comparable over the whole run, and leave no trace in it.

        Raises:
            NonFiniteError: a model's log-probabilities are not finite.
            RewardError: the reward fails; on all ranks.
        """
        cfg, task = self._cfg, self._cfg.task
        assert isinstance(task, OnlineTaskConfig)
        shape = (len(prompts), group or task.num_generations, cfg.generation.max_new_tokens)
        numbers = drawn_numbers(cfg.seed, number, shape)
        sampled = sample(
            self._fabric,
            self.policy,
            prompts,
            numbers,
            cfg.generation,
            end_ids=end_token_ids(self._tokenizer),
            stop=self._stop,
            token_budget=task.token_budget,
            packed=self._packed,
        )
        rollout = as_rollout(prompts, sampled)
        old_N = rollout.flat("sampled")
        if cfg.fabric.precision != "32-true":  # there the sampler's differ from those that the update computes
            old_N = self.logprobs(self.policy, rollout, "log-probabilities")
        rollout = rollout.with_tokens(logprobs=old_N, reference=self.logprobs(self._reference, rollout, "reference"))
        refuse_non_finite(rollout, "validation" if validates else "training")
        texts = as_text(rollout, prompts, self._tokenizer, self._stop)
        given = {name: values for name, values in texts.columns.items() if name in self._columns}
        self.texts = texts._replace(columns=given)
        self.figures = {}
        scores = np.array(self._scores(rollout, validates), dtype=np.float64)
        rollout = dataclasses.replace(rollout, scores=scores.reshape(rollout.finished.shape))
        self.figures |= figures_of(rollout)
        return rollout

    def _scores(self, rollout: Rollout, validates: bool) -> list[float]:
        if isinstance(self._reward, RewardModel) and self._exchange is not None:
            of_reward = self._exchange(rollout, self.texts)  # of any length: padded, which every model can read
            self._model_scores = read_scores(
                self._fabric, self._cfg.task, self._reward, of_reward, packed=False
            ).tolist()
        elif self._reward is not None:
            self._model_scores = self.scores_of(self._reward, rollout, "scoring", at_end=True).tolist()
        # Rank zero alone asks the user's functions, which may answer the same question differently.
        asked: RawScores | RewardError = RawScores([], {})
        if self._fabric.is_global_zero:
            try:
                asked = self._scorer.raw(self.texts)
            except RewardError as error:
                asked = error
        asked = self._fabric.broadcast(asked)
        if isinstance(asked, RewardError):  # on all ranks: none waits for the others
            raise asked
        total, by_term = asked
        if len(by_term) > 1:
            self.figures = {f"objective/scores/{name}": sum(of) / len(of) for name, of in by_term.items()}
        return total if validates else self._scorer.shape(total, self.texts)

    def logprobs(self, module: nn.Module, rollout: Rollout, label: str) -> Tensor:
        """All ranks: (N,) log-probabilities of all responses' tokens at the sampling temperature."""
        temperature = self._cfg.generation.temperature

        def call(batch: Batch) -> Tensor:
            return module(batch, temperature=temperature).target_N

        return read_targets(self._fabric, self.policy, call, self.tokens, rollout, label)

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
            self._scorer.moments = RunningMoments(**mine)


def check_sampler(run: Run, collect: Collector, rollout: Rollout) -> None:
    """All ranks, before the first step: sampler, training forward and reference must say the same of each token.

    The ratio of new to old probability is 1 then, and the KL to the reference 0.

    Raises:
        ModelError: they differ by more than rounding, and `task.self_check` is "error".
    """
    task, precision = run.cfg.task, run.cfg.fabric.precision
    assert isinstance(task, OnlineTaskConfig)
    tolerance = 1e-5 if precision == "32-true" else 2e-2
    of_sampler = 1e-5 if precision == "32-true" else _ROUNDED
    sampled_N = rollout.flat("sampled")
    trained_N = collect.logprobs(collect.policy, rollout, "self-check")
    others = (rollout.flat(name) for name in ("sampled", "logprobs", "reference"))
    apart, ratio, kl = (float((trained_N - other_N).abs().mean()) for other_N in others)
    problem = ""
    if not apart <= of_sampler or not ratio <= tolerance:
        limit = of_sampler if apart > of_sampler else tolerance
        problem = (
            f"what was sampled has log-probabilities {max(apart, ratio):.2g} nats a token from those that the training "
            f"computes, more than {limit:g}: something besides weights and tokens changes them (random numbers in the "
            "model's code, positions, a cache), and a ratio of new to old probability means nothing"
        )
    elif not kl <= tolerance:
        problem = (
            f"before the first step the policy's log-probabilities are {kl:.2g} nats a token from the reference's, "
            f"more than {tolerance:g}: the reference is not what training starts from"
        )
    elif not float(-sampled_N.mean()) > 0:
        problem = "the policy has no entropy: every token is certain, so nothing else is ever tried"
    if problem and task.self_check == "error":
        raise ModelError(f"{problem}; or give task.self_check=warn")
    if problem:
        run.say(f"warning: {problem}")
