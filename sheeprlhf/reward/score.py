"""The score of a response: a weighted sum of functions and models, normalised, clipped, less its penalties."""

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from pkgutil import resolve_name
from typing import Any, NamedTuple, Protocol

from sheeprlhf.reward.functions import repeated_share
from sheeprlhf.security.user_calls import state_warning
from sheeprlhf.structure.data import KeptColumns
from sheeprlhf.structure.reward import (
    BUILTINS,
    JUDGE,
    MODEL,
    ListRewardConfig,
    RewardSourceConfig,
    is_model,
    model_sources,
    terms_of,
)
from sheeprlhf.utils.errors import ConfigError

ModelScores = Callable[[list[str], list[str]], list[float]]
SMALLEST_DEVIATION = 1e-8
_LOADER = "sheeprlhf.reward.call:load_term"


class Texts(NamedTuple):
    """Responses to score, in the same order on all ranks."""

    prompts: list[str]  # one for each response
    responses: list[str]  # without end token and stop string
    finished: list[bool]  # an end token or a stop string ended the response; False if it was cut
    num_tokens: list[int]  # tokens of each response, the end token not counted, those of a stop string counted
    columns: Mapping[str, list[Any]]  # other columns, with an entry for each response: {"answer": [...]}
    completion_ids: Sequence[list[int]] = ()  # all tokens of each response, the end token too


class RewardTerm(Protocol):
    """A summand of the reward: a model, a judge or a function, as `reward/call.py` calls them."""

    name: str  # in the configuration
    function: Callable[..., Any]
    signature: Any  # names of its parameters that get columns of the data
    of_tokens: list[list[float]] | None  # of the newest call, rewards of each response's tokens; None if it gave scores

    @property
    def failures(self) -> int | None:
        """Responses of the newest call that a judge gave no score; None for another function."""

    def missing_column(self, columns: Collection[str], rows: str = "the data") -> str | None:
        """Return a message about a required column that is not among these; None if it can be called."""

    def __call__(self, texts: Texts) -> list[float]:
        """Return one finite score for each response. Raises RewardError."""


class RawScores(NamedTuple):
    """Scores of the sources, before normalisation and penalties."""

    total: list[float]  # the weighted sum, one for each response
    by_term: dict[str, list[float]]  # the unweighted scores of each source by its name
    failures: int | None = None  # responses that the judge gave no score; None without a judge
    # the weighted parts of `total` that single tokens have, for all tokens of each response; None if there are none
    of_tokens: list[list[float]] | None = None


class RunningMoments:
    """Count, mean and sum of squared differences from the mean of all numbers seen so far, as plain floats.

    Batches are merged by the rule of Chan, Golub and LeVeque (1979), with sums rounded once (`math.fsum`). The same
    batches in the same order give the same bits, also when `to_dict` and JSON were in between.
    """

    def __init__(self, count: int = 0, mean: float = 0.0, m2: float = 0.0) -> None:
        self.count, self.mean, self.m2 = int(count), float(mean), float(m2)

    def update(self, values: list[float]) -> None:
        """Add the numbers of one more batch."""
        if not values:
            return
        count = len(values)
        mean = math.fsum(values) / count
        m2 = math.fsum((value - mean) ** 2 for value in values)
        total = self.count + count
        difference = mean - self.mean
        self.m2 += m2 + difference * difference * self.count * count / total
        self.mean += difference * count / total
        self.count = total

    @property
    def deviation(self) -> float:
        """The standard deviation of all numbers (their count in the denominator); 0.0 if there are none."""
        return math.sqrt(self.m2 / self.count) if self.count else 0.0

    def normalized(self, value: float) -> float:
        """Return by how many standard deviations the number exceeds the mean; unchanged while none was seen."""
        return (value - self.mean) / max(self.deviation, SMALLEST_DEVIATION) if self.count else value

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments of an equal object; JSON keeps the floats."""
        return {"count": self.count, "mean": self.mean, "m2": self.m2}


class CombinedReward:
    """The configured reward of responses. `moments` is its only state, which a checkpoint carries.

    With several ranks, either each calls it with all responses in one order, or one rank calls `raw` and sends the
    result to all, which call `shape` with it; the moments are equal everywhere in both ways. The second also works
    with functions that answer the same question differently.

    Args:
        cfg: how scores are normalised, clipped and penalised.
        terms: weight and function of each summand.
        max_tokens: the most that a response may have.
    """

    def __init__(self, cfg: RewardSourceConfig, terms: list[tuple[float, RewardTerm]], max_tokens: int) -> None:
        self._cfg, self._terms, self._max_tokens = cfg, terms, max_tokens
        self.moments = RunningMoments()

    def __call__(self, texts: Texts) -> list[float]:
        """Return the final score of each response, after an update of the moments with these responses.

        Raises:
            RewardError: a function raises or does not return one finite number for each response.
        """
        return self.shape(self.raw(texts).total, texts)

    def raw(self, texts: Texts) -> RawScores:
        """Return the scores of the sources without a change of state: validation reports them, too.

        Raises:
            RewardError: a function raises or does not return one finite number for each response.
        """
        by_term = {function.name: function(texts) for _, function in self._terms}
        weights = [weight for weight, _ in self._terms]
        rows = (
            [w * score for w, score in zip(weights, row, strict=True)] for row in zip(*by_term.values(), strict=True)
        )
        if not self._terms:
            total = [0.0] * len(texts.responses)
        elif getattr(self._cfg, "combine", "sum") == "sum":
            total = [math.fsum(row) for row in rows]
        else:
            total = [self._of_ensemble(row) for row in rows]
        failures = [function.failures for _, function in self._terms if function.failures is not None]
        parts = [(weight, function.of_tokens) for weight, function in self._terms if function.of_tokens is not None]
        of_tokens = [
            [
                math.fsum(w * value for (w, _), value in zip(parts, values, strict=True))
                for values in zip(*rows, strict=True)
            ]
            for rows in zip(*(of for _, of in parts), strict=True)
        ]
        return RawScores(total, by_term, sum(failures) if failures else None, of_tokens or None)

    def _of_ensemble(self, weighted: list[float]) -> float:
        """Return the combined score of the reward models, plus the scores of all other terms (arXiv 2310.02743)."""
        cfg, among = self._cfg, [is_model(function.name) for _, function in self._terms]
        assert isinstance(cfg, ListRewardConfig)
        members = [score for score, of_model in zip(weighted, among, strict=True) if of_model]
        others = math.fsum(score for score, of_model in zip(weighted, among, strict=True) if not of_model)
        if cfg.combine == "min":
            return min(members) + others
        return statistics.fmean(members) - cfg.uncertainty_coeff * statistics.pvariance(members) + others

    def shape(self, total: list[float], texts: Texts) -> list[float]:
        """Return the final scores of weighted sums of `raw`: normalised, then clipped, then less the penalties."""
        cfg = self._cfg
        if cfg.normalize:
            self.moments.update(total)
            total = [self.moments.normalized(score) for score in total]
        if cfg.clip is not None:
            total = [max(-cfg.clip, min(cfg.clip, score)) for score in total]
        rows = zip(total, texts.responses, texts.finished, texts.num_tokens, strict=True)
        return [
            score - penalty(cfg, response, finished=finished, num_tokens=num_tokens, max_tokens=self._max_tokens)
            for score, response, finished, num_tokens in rows
        ]


def overlong_penalty(num_tokens: int, max_tokens: int, buffer: int) -> float:
    """Penalty of a long response (DAPO, arXiv 2503.14476, eq. 13), in [0, 1].

    Nothing up to max_tokens - buffer tokens, from there linearly up to 1 at max_tokens.

    Args:
        num_tokens: of the response.
        max_tokens: the most that a response may have.
        buffer: the last tokens before it, in which the penalty grows; at least 1.
    """
    return min(1.0, max(0.0, (num_tokens - (max_tokens - buffer)) / buffer))


def penalty(cfg: RewardSourceConfig, response: str, *, finished: bool, num_tokens: int, max_tokens: int) -> float:
    """Penalty of one response (without end token and stop string), 0.0 or more; `finished`: the model ended it."""
    total = 0.0 if finished else cfg.missing_eos_penalty
    if num_tokens < cfg.min_response_length:
        total += cfg.short_penalty
    if cfg.overlong_buffer:
        total += overlong_penalty(num_tokens, max_tokens, cfg.overlong_buffer)
    if cfg.ngram_repetition_penalty:
        total += cfg.ngram_repetition_penalty * repeated_share(response)
    return total


def wanted_columns(cfg: RewardSourceConfig, *, default: str | None) -> KeptColumns:
    """The columns that the functions of a valid configuration name, or all. Raises ConfigError for wrong ones."""
    signatures = [function.signature for function in _functions(cfg, default)]
    names = dict.fromkeys(name for signature in signatures for name in signature.columns)
    return KeptColumns(tuple(names), any(signature.every_column for signature in signatures))


def state_warnings(cfg: RewardSourceConfig, *, default: str | None) -> list[str]:
    """Return one line for each function of the user that seems to keep state between calls; arguments as above."""
    own = [function for function in _functions(cfg, default) if function.name not in (*BUILTINS, JUDGE)]
    return [line for function in own if (line := state_warning(function.name, function.function)) is not None]


def check_columns(
    cfg: RewardSourceConfig, columns: Collection[str], *, default: str | None, rows: str = "the data"
) -> None:
    """Check that the functions can be called with the columns. Raises ConfigError with all that are missing."""
    problems = [message for function in _functions(cfg, default) if (message := function.missing_column(columns, rows))]
    if problems:
        raise ConfigError(*problems)


def _functions(cfg: RewardSourceConfig, default: str | None) -> list[RewardTerm]:
    load = resolve_name(_LOADER)
    return [load(source, cfg) for _, source in terms_of(cfg, default) if not is_model(source)]


def build_reward(
    cfg: RewardSourceConfig, model_scores: Mapping[str, ModelScores] | None, *, default: str | None, max_tokens: int
) -> CombinedReward:
    """Build the reward of a valid configuration. Raises ConfigError if a function or a model is missing."""
    terms, models = terms_of(cfg, default), dict(model_scores or {})
    if MODEL in model_sources(cfg, default) and MODEL not in models:
        raise ConfigError(
            f"reward={cfg.config_name} needs a reward model: give task.rm_experiment_dir=<run of task=rm>, "
            "reward.folder=<folder>, or a function: reward=function reward.path=<name>"
        )

    load = resolve_name(_LOADER)
    loaded = [(weight, load(source, cfg, models.get(source))) for weight, source in terms]
    return CombinedReward(cfg, loaded, max_tokens)
