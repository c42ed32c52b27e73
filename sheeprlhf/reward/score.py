"""The score of a response: a weighted sum of functions and models, normalised, clipped, less its penalties."""

import math
from collections.abc import Callable, Collection
from typing import NamedTuple

from sheeprlhf.reward.call import RewardFunction, Texts
from sheeprlhf.reward.load import load_function
from sheeprlhf.reward.moments import RunningMoments
from sheeprlhf.reward.penalties import penalty
from sheeprlhf.reward.state import state_warning
from sheeprlhf.structure.data import KeptColumns
from sheeprlhf.structure.reward import BUILTINS, MODEL, RewardSourceConfig, terms_of
from sheeprlhf.utils.errors import ConfigError

ModelScores = Callable[[list[str], list[str]], list[float]]


class RawScores(NamedTuple):
    """What the sources say of each response, before normalisation and penalties.

    Attributes:
        total: the weighted sum, one a response.
        of_term: the unweighted scores of each source by its name.
    """

    total: list[float]
    of_term: dict[str, list[float]]


class Scorer:
    """Scores of responses. `moments` is its only state, which a checkpoint carries.

    With several ranks, either each calls it with all responses in one order, or one rank calls `raw` and sends the
    result to all, which call `shape` with it; the moments are equal everywhere in both ways. The second also holds
    for functions that answer the same question differently.

    Args:
        cfg: how scores are normalised, clipped and penalised.
        terms: weight and function of each summand.
        max_tokens: the most that a response may have.
    """

    def __init__(self, cfg: RewardSourceConfig, terms: list[tuple[float, RewardFunction]], max_tokens: int) -> None:
        self._cfg, self._terms, self._max_tokens = cfg, terms, max_tokens
        self.moments = RunningMoments()

    def __call__(self, texts: Texts) -> list[float]:
        """The final score of each response; the moments learn from these responses first.

        Raises:
            RewardError: a function raises or does not return one finite number a response.
        """
        return self.shape(self.raw(texts).total, texts)

    def raw(self, texts: Texts) -> RawScores:
        """What the sources say; changes no state. Also what a validation reports, comparable over the whole run.

        Raises:
            RewardError: a function raises or does not return one finite number a response.
        """
        of_term = {function.name: function(texts) for _, function in self._terms}
        weights = [weight for weight, _ in self._terms]
        rows = zip(*of_term.values(), strict=True)
        total = [math.fsum(weight * score for weight, score in zip(weights, row, strict=True)) for row in rows]
        return RawScores(total, of_term)

    def shape(self, total: list[float], texts: Texts) -> list[float]:
        """Weighted sums as the final scores: normalised, then clipped, then less the penalties.

        Args:
            total: of `raw`, for all responses of the step.
            texts: those responses.
        """
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


def wanted_columns(cfg: RewardSourceConfig, *, default: str | None) -> KeptColumns:
    """The columns of the data that the functions of a configuration name, or all.

    Args:
        cfg: valid.
        default: as for `build_scorer`.

    Raises:
        ConfigError: a function cannot be imported, or its signature is not that of a reward function.
    """
    signatures = [function.signature for function in _functions(cfg, default)]
    names = dict.fromkeys(name for signature in signatures for name in signature.columns)
    return KeptColumns(tuple(names), any(signature.every_column for signature in signatures))


def state_warnings(cfg: RewardSourceConfig, *, default: str | None) -> list[str]:
    """One line for each function of the user's that seems to keep state between calls.

    Args:
        cfg: valid.
        default: as for `build_scorer`.
    """
    own = [function for function in _functions(cfg, default) if function.name not in BUILTINS]
    return [line for function in own if (line := state_warning(function.name, function.function)) is not None]


def check_columns(
    cfg: RewardSourceConfig, columns: Collection[str], *, default: str | None, rows: str = "the data"
) -> None:
    """Before anything is loaded: whether the functions can be called with what the rows have.

    Args:
        cfg: valid.
        columns: names of what there is of each row.
        default: as for `build_scorer`.
        rows: which rows these are, for messages.

    Raises:
        ConfigError: a function cannot be imported, or asks for a column that there is not; all that do are named.
    """
    functions = _functions(cfg, default)
    problems = [problem for function in functions if (problem := function.lacks(columns, rows)) is not None]
    if problems:
        raise ConfigError(*problems)


def _functions(cfg: RewardSourceConfig, default: str | None) -> list[RewardFunction]:
    return [load_function(source, cfg) for _, source in terms_of(cfg, default) if source != MODEL]


def build_scorer(
    cfg: RewardSourceConfig, model_scores: ModelScores | None, *, default: str | None, max_tokens: int
) -> Scorer:
    """The scorer of a configuration.

    Args:
        cfg: valid.
        model_scores: a reward model as `scores = model_scores(prompts, responses)`; None where `needs_model` says no.
        default: the dataset's own rule, which `reward=auto` takes: a built-in without options; None if it has none.
        max_tokens: the most that a response may have.

    Raises:
        ConfigError: a function cannot be imported, or a model is needed and there is none.
    """
    terms = []
    for weight, source in terms_of(cfg, default):
        if source != MODEL:
            terms.append((weight, load_function(source, cfg)))
        elif model_scores is not None:
            of_model = _named(model_scores)
            terms.append((weight, RewardFunction(MODEL, of_model, guarded=False)))
        else:
            raise ConfigError(
                f"reward={cfg.config_name} needs a reward model: give task.rm_experiment_dir=<run of task=rm>, "
                "reward.folder=<folder>, or a function: reward=function reward.path=<name>"
            )
    return Scorer(cfg, terms, max_tokens)


def _named(model_scores: ModelScores) -> ModelScores:
    """The same function with the parameter names of a reward function."""

    def scores(prompts: list[str], responses: list[str]) -> list[float]:
        return model_scores(prompts, responses)

    return scores
