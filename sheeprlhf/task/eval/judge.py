"""Judge of responses: `reward=`, and the accuracy of a reward model in it."""

from typing import NamedTuple

import numpy as np

from sheeprlhf.agent.batches import choose_packed, longest_row
from sheeprlhf.agent.reward import RewardModel
from sheeprlhf.data.example import Example
from sheeprlhf.engine.fabric import place
from sheeprlhf.reward.score import RawScores, build_reward
from sheeprlhf.rollout.rollout import TextExchange, has_same_tokens, longest_of, predict_scores
from sheeprlhf.structure.reward import model_sources, terms_of
from sheeprlhf.task.eval.answers import Answers
from sheeprlhf.task.eval.load import Evaluation
from sheeprlhf.task.eval.preference import pairs_of_rows, scores_of_rows
from sheeprlhf.task.eval.statistics import interval_of
from sheeprlhf.task.models import load_reward_tokenizer, load_separate_reward_model, own_prompts, reads_chat
from sheeprlhf.utils.errors import DataError


class RewardModelAccuracy(NamedTuple):
    """Accuracy of a reward model on held-out pairs.

    Attributes:
        accuracy: the share of pairs.
        interval: its 95 % interval.
        pairs: how many there are.
    """

    accuracy: float
    interval: list[float]
    pairs: int

    def at_chance(self) -> bool:
        """True if the accuracy is compatible with chance."""
        return self.interval[0] <= 0.5 <= self.interval[1]

    def warning(self) -> str:
        """Warning text for such a reward model."""
        low, high = self.interval
        return (
            f"warning: the reward model is right in {self.accuracy:.1%} of {self.pairs:,} held-out pairs ({low:.1%} to "
            f"{high:.1%}), no better than chance: its scores and win rates mean nothing"
        )


class Judge:
    """Scores responses by `reward=`. Reward models are loaded when they are first needed; ask for `trust` first.

    Args:
        job: the evaluation.
        longest: tokens of the longest prompt with a response.
    """

    def __init__(self, job: Evaluation, longest: int) -> None:
        self._job, self._fabric, self._cfg, self._longest = job, job.fabric, job.cfg, longest
        self._rule = job.data.rule_reward
        self._terms = model_sources(job.cfg.reward, self._rule)
        self._loaded: dict[str, tuple[RewardModel, bool, int]] = {}
        self._own_prompts: dict[str, list[Example]] = {}

    def name(self) -> str:
        """Name of the scores: their only source, or `list`."""
        terms = terms_of(self._cfg.reward, self._rule)
        source = terms[0].source if len(terms) == 1 else self._cfg.reward.config_name
        return source.replace(":", ".")

    def scores(self, answers: Answers) -> np.ndarray:
        """All ranks: (P * K,) float64, the score of every response, less the penalties of `reward`.

        Raises:
            SheepError: the reward model cannot be loaded, or a function fails.
        """
        of_models = {term: self._scores_of_model(answers, term) for term in self._terms}
        scorer = build_reward(
            self._cfg.reward,
            {term: lambda *_, scores=scores: scores for term, scores in of_models.items()},
            default=self._rule,
            max_tokens=self._cfg.generation.max_new_tokens,
        )
        # Rank zero alone asks the user's functions, which may answer the same question differently.
        asked = scorer.raw(answers.texts) if self._fabric.is_global_zero else RawScores([], {})
        total = self._fabric.broadcast(asked).total
        return np.array(scorer.shape(total, answers.texts), dtype=np.float64)

    def trust(self) -> RewardModelAccuracy | None:
        """All ranks: the reward model's accuracy on the pairs of the split; None without a model, or without pairs."""
        if not self._terms:
            return None
        if len(self._terms) > 1 or reads_chat(self._cfg):
            self._job.say("the accuracy on pairs is measured for one reward model with reward.template=plain only")
            return None
        cfg, task, [term] = self._cfg, self._cfg.task, self._terms
        try:
            split = self._job.split(self._job.prepare("preference", load_reward_tokenizer(cfg, term)))
        except DataError as error:
            self._job.say(f"the reward model's accuracy is unknown, as there are no pairs to ask it about: {error}")
            return None
        model, packed = self._model(term, max(self._longest, longest_row({"": split})))
        scores_S = scores_of_rows(self._fabric, model, task, split, packed=packed, num_rows=task.num_samples)
        chosen_P, rejected_P, _ = pairs_of_rows(scores_S, split.sizes[:, 1:], task.num_samples)
        right_P = (chosen_P > rejected_P) + 0.5 * (chosen_P == rejected_P)
        return RewardModelAccuracy(*interval_of(right_P, seed=cfg.seed), len(right_P))

    def _scores_of_model(self, answers: Answers, term: str) -> list[float]:
        rollout, tokenizer, job = answers.rollout, load_reward_tokenizer(self._cfg, term), self._job
        if reads_chat(self._cfg):
            prompts = own_prompts(self._cfg, tokenizer, job.prepare_scored(answers.tokenizer), say=job.say)
            rollout = TextExchange(answers.tokenizer, tokenizer, job.say, chat=True, own_prompts=prompts)(
                rollout, answers.texts
            )
        elif not has_same_tokens(answers.tokenizer, tokenizer):
            if term not in self._own_prompts:
                self._own_prompts[term] = job.rows_as(tokenizer, rollout.rows)
            exchange = TextExchange(answers.tokenizer, tokenizer, job.say)
            rollout = exchange(rollout, answers.texts, self._own_prompts[term])
        model, packed = self._model(term, max(self._longest, longest_of(rollout)))
        return predict_scores(self._fabric, self._cfg.task, model, rollout, packed=packed).double().tolist()

    def _model(self, term: str, longest: int) -> tuple[RewardModel, bool]:
        """The reward model, and whether rows of this length are packed; longer ones than before decide anew."""
        if term not in self._loaded:
            tokenizer = load_reward_tokenizer(self._cfg, term)
            model, packed = load_separate_reward_model(self._cfg, tokenizer, term, longest=longest, say=self._job.say)
            place(self._fabric, model)  # onto the device, in the precision asked for
            self._loaded[term] = model, packed, longest
        model, packed, before = self._loaded[term]
        if longest > before:
            batching, say = self._cfg.task.batching, self._job.say
            packed = packed and choose_packed(model, model.classifier(), longest=longest, batching=batching, say=say)
            self._loaded[term] = model, packed, longest
        return model, packed
