"""Evaluations: one dataclass each, which names its entry point."""

from dataclasses import dataclass
from typing import ClassVar, Optional

from sheeprlhf.structure.option import Config, option
from sheeprlhf.structure.reward import RewardRunConfig

REFERENCES, START, NOTHING = "references", "start", "none"  # values of task.against that name no run


@dataclass(eq=False, repr=False)
class EvalTaskConfig(Config):
    """Options of every evaluation."""

    entry_point: ClassVar[str] = ""  # "module:function", called as function(fabric, config)
    evaluates: ClassVar[tuple[str, ...]] = ("policy",)  # what a training task must have left (its `trains`)
    reads_start: ClassVar[bool] = False  # a policy is compared with what its run started from
    writes: ClassVar[str] = ""  # "text" as generation.* says, "samples" as rollouts do, or nothing
    unread: ClassVar[frozenset[str]] = frozenset()  # inherited options that it does not have: not shown, not taken

    config_name: str = option("???", "Name of this choice.")
    model_name: str = option("final", "Weights of the run: final, best, last, or step-<n>.")
    data_split: str = option("test", "Split to evaluate on.", choices=("train", "validation", "test", "reward"))
    num_samples: Optional[int] = option(None, "Evaluate on the first rows only.", unit="rows", minimum=1)
    mini_batch_size: int = option(64, "Most rows of a forward pass; token_budget cuts further.", unit="rows", minimum=1)
    token_budget: int = option(4096, "Most tokens in one forward pass.", unit="tokens", minimum=1)
    batching: str = option(
        "auto",
        "Rows of a forward pass laid end to end, or padded; auto packs if the model supports it.",
        choices=("auto", "packed", "padded"),
    )


@dataclass(eq=False, repr=False)
class PerplexityConfig(EvalTaskConfig):
    """exp of the mean negative log-likelihood of a token."""

    entry_point: ClassVar[str] = "sheeprlhf.task.eval.perplexity:evaluate"

    config_name: str = "perplexity"
    completion_only_loss: bool = option(True, "Count the response's tokens only; false counts the prompt's too.")


@dataclass(eq=False, repr=False)
class RougeConfig(EvalTaskConfig):
    """Wording that generated responses share with the references (ROUGE), next to what trivial answers get."""

    entry_point: ClassVar[str] = "sheeprlhf.task.eval.rouge:evaluate"
    writes: ClassVar[str] = "text"

    config_name: str = "rouge"
    use_stemmer: bool = option(False, "Compare the stems of English words, so that `returns` equals `return`.")


@dataclass(eq=False, repr=False)
class GenerateConfig(EvalTaskConfig):
    """Responses to the prompts of a split, as a file."""

    entry_point: ClassVar[str] = "sheeprlhf.task.eval.generate:evaluate"
    writes: ClassVar[str] = "text"

    config_name: str = "generate"


@dataclass(eq=False, repr=False)
class PreferenceConfig(EvalTaskConfig):
    """Accuracy on pairs of responses: of a reward model, or of a policy's implicit reward."""

    entry_point: ClassVar[str] = "sheeprlhf.task.eval.preference:evaluate"
    evaluates: ClassVar[tuple[str, ...]] = ("policy", "reward model")
    reads_start: ClassVar[bool] = True

    config_name: str = "preference"
    beta: Optional[float] = option(
        None,
        "Scale of a policy's implicit reward, beta * (its log-probability - its start's); null takes that of the run, "
        "else 0.1. Accuracy does not depend on it.",
        above=0.0,
    )
    subset_column: Optional[str] = option(None, "Column by whose values the accuracy is reported, too; null: none.")


@dataclass(eq=False, repr=False)
class StepsConfig(EvalTaskConfig):
    """Accuracy of a process reward model on the steps of responses."""

    entry_point: ClassVar[str] = "sheeprlhf.task.eval.preference:evaluate_steps"
    evaluates: ClassVar[tuple[str, ...]] = ("reward model",)

    config_name: str = "steps"


@dataclass(eq=False, repr=False)
class ScoredConfig(RewardRunConfig, EvalTaskConfig):
    """Options of evaluations that sample and score; `reward` selects the reward."""

    reads_start: ClassVar[bool] = True
    writes: ClassVar[str] = "samples"


@dataclass(eq=False, repr=False)
class RewardConfig(ScoredConfig):
    """Scores of sampled responses, their win rate, and the KL of the policy from its start."""

    entry_point: ClassVar[str] = "sheeprlhf.task.eval.reward:evaluate"

    config_name: str = "reward"
    against: str = option(
        REFERENCES,
        "Responses to compare with: references (the dataset's own), start (of the initial model), none, or those of "
        "another run, by its directory.",
    )


@dataclass(eq=False, repr=False)
class FrontierConfig(ScoredConfig):
    """Score against KL over the checkpoints of a run, next to the best of n responses of its start."""

    entry_point: ClassVar[str] = "sheeprlhf.task.eval.reward:evaluate_frontier"
    unread: ClassVar[frozenset[str]] = frozenset({"model_name"})

    config_name: str = "frontier"
    num_samples: Optional[int] = option(128, "Prompts: the first rows of the split; null takes all.", minimum=1)
    best_of: int = option(64, "Best of n for n = 1, 2, 4, ... up to this many; 1 leaves it out.", minimum=1)
