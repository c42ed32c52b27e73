"""Sources of rewards for reinforcement learning: one dataclass per source, and the names of the built-ins."""

import math
import string
from dataclasses import dataclass
from typing import NamedTuple, Optional, TypeGuard

from sheeprlhf.structure.option import MISSING, Config, option

MODEL = "model"  # the term that is a reward model's score
_MODEL_PREFIX = "model:"  # of a term that is a further reward model: model:<folder or hub id>
JUDGE = "judge"  # the term that is the score of a language model at a server
JUDGE_CALLS = 8  # requests at once unless reward.num_workers says otherwise
JUDGE_TIMEOUT = 60.0  # seconds of a request unless reward.timeout says otherwise
JUDGE_PROMPT = (
    "Rate the response to the prompt from 0 (useless) to 10 (perfect). Answer with the number alone.\n\n"
    "Prompt:\n{prompt}\n\nResponse:\n{response}"
)


@dataclass(eq=False, repr=False)
class RewardSourceConfig(Config):
    """Options of every source. Scores are normalised, then clipped; penalties are subtracted last."""

    config_name: str = option("???", "Name of this choice.")
    normalize: bool = option(False, "Subtract the running mean of all scores, divide by their standard deviation.")
    clip: Optional[float] = option(None, "Largest absolute score, before penalties; null: no limit.", above=0.0)
    missing_eos_penalty: float = option(0.0, "Subtracted from the score of a response that was cut.", minimum=0.0)
    min_response_length: int = option(0, "Shorter responses lose reward.short_penalty.", unit="tokens", minimum=0)
    short_penalty: float = option(1.0, "Subtracted from the score below reward.min_response_length.", minimum=0.0)
    overlong_buffer: int = option(
        0,
        "The last so many tokens before generation.max_new_tokens cost ever more, up to 1 (DAPO, arXiv 2503.14476, "
        "eq. 13; end token not counted); 0: nothing.",
        unit="tokens",
        minimum=0,
    )
    ngram_repetition_penalty: float = option(
        0.0,
        "Times the share of runs of three words in a response that repeat earlier ones: subtracted from its score.",
        minimum=0.0,
    )


@dataclass(eq=False, repr=False)
class RewardRunConfig(Config):
    """Options of a task whose responses are scored."""

    rm_experiment_dir: Optional[str] = option(
        "newest",
        "Run directory of a reward model, or newest: the newest finished one of this model under root_dir. Read where "
        "the reward has a model.",
    )
    rm_model_name: str = option("final", "Weights of that run: final, best, last, or step-<n>.")


@dataclass(eq=False, repr=False)
class AutoRewardConfig(RewardSourceConfig):
    """The dataset's own rule where it has one, else a reward model."""

    config_name: str = "auto"


@dataclass(eq=False, repr=False)
class NoRewardConfig(RewardSourceConfig):
    """No score: every response gets 0 (task=distill)."""

    config_name: str = "none"


@dataclass(eq=False, repr=False)
class CallOptionsConfig(RewardSourceConfig):
    """Options of calls of your own functions and of requests to a judge."""

    num_workers: int = option(
        0,
        "Calls at once, each with one response: processes for a plain function of yours, tasks for an async one, "
        f"requests to a judge. 0: one call with all responses, and {JUDGE_CALLS} requests.",
        minimum=0,
    )
    timeout: Optional[float] = option(
        None,
        "Longest time of a call of an async function, of a call in a process (reward.num_workers), or of a request; "
        f"null: no limit, and {JUDGE_TIMEOUT:g} for a request.",
        unit="seconds",
        above=0.0,
    )


@dataclass(eq=False, repr=False)
class JudgeOptionsConfig(CallOptionsConfig):
    """Options of the term judge."""

    url: Optional[str] = option(
        None, "Address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1; it gets prompts and responses."
    )
    judge_model: Optional[str] = option(None, "Name of the server's model that scores.")
    judge_prompt: Optional[str] = option(
        None,
        "What the judge is asked; {prompt}, {response} and the names of columns are replaced. null asks for a number "
        "from 0 to 10.",
    )
    judge_pattern: str = option(
        r"(-?\d+(?:\.\d+)?)(?:\s*/\s*10\b)?",
        "Regular expression of the score in the judge's answer, its last group if it has groups. An answer with "
        "several different numbers, or none, is a failure.",
    )
    judge_range: list[float] = option(help="Lowest and highest score; others fail.", factory=lambda: [0.0, 10.0])
    judge_max_tokens: int = option(256, "Longest answer of the judge.", unit="tokens", minimum=1)
    judge_retries: int = option(
        3, "Attempts after no answer, status 408, 425, 429, 5xx, or a malformed one.", minimum=0
    )
    judge_failure_score: Optional[float] = option(None, "Score after a failed request; null: a failure ends the run.")
    api_key_variable: Optional[str] = option(None, "Environment variable with the key for the server; null sends none.")

    def question(self) -> str:
        """The template of what the judge is asked."""
        return JUDGE_PROMPT if self.judge_prompt is None else self.judge_prompt


@dataclass(eq=False, repr=False)
class BuiltinOptionsConfig(CallOptionsConfig):
    """Options of the built-in functions; one that no chosen function reads is rejected."""

    target_length: Optional[int] = option(None, "Length that scores 1 (length).", minimum=1)
    length_unit: str = option("words", "What target_length counts (length).", choices=("words", "characters"))
    pattern: Optional[str] = option(None, "Regular expression that a response has to contain (regex).")


@dataclass(eq=False, repr=False)
class FunctionRewardConfig(BuiltinOptionsConfig):
    """A Python function: a built-in or your own."""

    config_name: str = "function"
    path: str = option(
        "imperative",
        "imperative, length, regex, rouge, sentiment, environment, or a function of yours as package.module:function.",
    )


@dataclass(eq=False, repr=False)
class ModelOptionsConfig(RewardSourceConfig):
    """Options of reward models."""

    template: str = option(
        "plain",
        "Text that a reward model scores: the prompt as the policy reads it and the response, or both in the reward "
        "model's own chat template.",
        choices=("plain", "chat"),
    )
    step_score: str = option(
        "min",
        "Score of a response by a process reward model, of the probabilities that its steps are right: the lowest, the "
        "product, or the last one; each: every one of them, as the reward of the step's last token (ppo, "
        "reinforce_pp). Other reward models do not read it.",
        choices=("min", "product", "last", "each"),
    )


@dataclass(eq=False, repr=False)
class ModelRewardConfig(ModelOptionsConfig):
    """A reward model."""

    config_name: str = "model"
    folder: Optional[str] = option(None, "Sequence-classification folder or hub id; null: task.rm_experiment_dir.")


@dataclass(eq=False, repr=False)
class JudgeRewardConfig(JudgeOptionsConfig):
    """A language model at an OpenAI-compatible server."""

    config_name: str = JUDGE


@dataclass(eq=False, repr=False)
class ListRewardConfig(BuiltinOptionsConfig, JudgeOptionsConfig, ModelOptionsConfig):
    """A weighted sum of sources, or an ensemble of reward models."""

    config_name: str = "list"
    terms: list[str] = option(
        MISSING,
        "Sources and their weights, such as [model,0.5*length,-1*my_rewards:toxicity,0.1*judge]; model is a reward "
        "model, model:<folder or hub id> a further one, judge a language model at reward.url.",
    )
    folder: Optional[str] = option(None, "Folder or hub id of the term model; null: the run task.rm_experiment_dir.")
    combine: str = option(
        "sum",
        "Of the weighted scores of the reward models among the terms: their sum, the lowest, or their mean less "
        "reward.uncertainty_coeff times their variance; the other terms are added (arXiv 2310.02743).",
        choices=("sum", "min", "uncertainty"),
    )
    uncertainty_coeff: float = option(1.0, "Price of the variance with reward.combine=uncertainty.", minimum=0.0)


class Builtin(NamedTuple):
    """Requirements of a function of sheeprlhf.reward.functions."""

    reads: tuple[str, ...] = ()  # the options that it reads
    needs: tuple[str, ...] = ()  # those of them that have to be given
    columns: tuple[str, ...] = ()  # what a row must have besides its prompt
    requires: tuple[str, ...] = ()  # modules beyond the package's own dependencies
    extra: str = ""  # the extra of the package that installs them


EPISODE_COLUMNS = ("episode_reward", "final_answer")  # of responses with rollout.environment, for reward functions
BUILTINS = {
    "environment": Builtin(columns=EPISODE_COLUMNS[:1]),
    "imperative": Builtin(),
    "length": Builtin(reads=("target_length", "length_unit"), needs=("target_length",)),
    "regex": Builtin(reads=("pattern",), needs=("pattern",)),
    "rouge": Builtin(columns=("reference",)),
    "sentiment": Builtin(requires=("vaderSentiment",), extra="sentiment"),
}


class Term(NamedTuple):
    """One summand of the score: `model`, `judge`, a built-in or the dotted path of a function, times its weight."""

    weight: float
    source: str


def parse_term(text: str) -> Term:
    """`0.5*length` -> (0.5, "length"); the weight is 1 by default. Raises ValueError if it is not finite, or 0."""
    weight, star, source = text.rpartition("*")
    term = Term(float(weight) if star else 1.0, source.strip())
    if not term.source or not math.isfinite(term.weight) or term.weight == 0:
        raise ValueError(text)
    return term


def terms_of(cfg: RewardSourceConfig, default: str | None) -> tuple[Term, ...]:
    """The summands of the score; `default` is the dataset's own rule, which `auto` takes."""
    if isinstance(cfg, NoRewardConfig):
        return ()
    if isinstance(cfg, FunctionRewardConfig):
        return (Term(1.0, cfg.path),)
    if isinstance(cfg, ListRewardConfig):
        return tuple(parse_term(text) for text in cfg.terms)
    if isinstance(cfg, JudgeRewardConfig):
        return (Term(1.0, JUDGE),)
    return (Term(1.0, MODEL if isinstance(cfg, ModelRewardConfig) or default is None else default),)


def needs_model(cfg: RewardSourceConfig, default: str | None) -> bool:
    """True if the reward model of `reward.folder` or of a run has to be loaded; `default` as in `terms_of`."""
    return MODEL in model_sources(cfg, default)


def model_sources(cfg: RewardSourceConfig, default: str | None) -> list[str]:
    """The terms that are reward models: `model` and `model:<folder or hub id>`; `default` as in `terms_of`."""
    return [term.source for term in terms_of(cfg, default) if is_model(term.source)]


def is_model(source: str) -> bool:
    """True if a source is a reward model."""
    return source == MODEL or source.startswith(_MODEL_PREFIX)


def term_folder(source: str) -> str | None:
    """Folder or hub id of the source `model:<folder or hub id>`; None for `model`."""
    return source.removeprefix(_MODEL_PREFIX) if source.startswith(_MODEL_PREFIX) else None


def judge_fields(template: str) -> list[str]:
    """Return the names in braces of a judge's prompt, each once. Raises ValueError for other braces."""
    fields: dict[str, None] = {}
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is not None:
            if not name.isidentifier() or spec or conversion:
                raise ValueError(f"the field {{{name}}} is not a name")
            fields[name] = None
    return list(fields)


def uses_judge(cfg: RewardSourceConfig) -> TypeGuard[JudgeOptionsConfig]:
    """True if a server scores."""
    return isinstance(cfg, JudgeOptionsConfig) and any(term.source == JUDGE for term in terms_of(cfg, None))


def is_users_own(source: str) -> bool:
    """True if a source names Python code outside of this package, or `${...}`, which may resolve to such code."""
    return "$" in source or (not is_model(source) and any(sign in source for sign in ".:"))
