"""Tasks: one dataclass each, which names its entry point."""

import math
from dataclasses import dataclass
from typing import ClassVar, Optional

from sheeprlhf.structure.option import Config, option

_PAIR_METRICS = tuple(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies"))
NO_REFERENCE = ("simpo", "orpo")  # losses of DPO
_HIGHER_IS_BETTER = ("rewards/chosen", "rewards/margins", "rewards/accuracies", "scores", "objective", "logps", "share")


@dataclass(eq=False, repr=False)
class TrainTaskConfig(Config):
    """Options of every training task. All intervals count optimizer steps."""

    entry_point: ClassVar[str] = ""  # "module:function", called as function(fabric, config, run_dir)
    data_kind: ClassVar[str] = "sft"  # what it takes from a row, one of data.tokenize.KINDS (see data.prepare)
    train_splits: ClassVar[tuple[str, ...]] = ("train",)  # it trains on the first of these that has rows
    trains: ClassVar[str] = "policy"  # what its run leaves: "policy" writes text, "reward model" gives a score
    unread: ClassVar[frozenset[str]] = frozenset()  # inherited options that it does not have: not shown, not taken
    val_metrics: ClassVar[tuple[str, ...]] = ("loss",)  # what a validation measures, for task.early_stopping_metric

    config_name: str = option("???", "Name of this choice.")
    epochs: int = option(1, "Passes over the training rows.", minimum=1)
    max_num_steps: Optional[int] = option(None, "Stop after this many.", unit="optimizer steps", minimum=1)
    mini_batch_size: int = option(32, "Rows of one optimizer step, all devices together.", unit="rows", minimum=1)
    micro_batch_size: int = option(32, "Most rows of a pass; token_budget cuts further.", unit="rows", minimum=1)
    token_budget: int = option(2048, "Most tokens in one forward pass.", unit="tokens", minimum=1)
    batching: str = option(
        "auto",
        "Rows of a forward pass laid end to end, or padded; auto packs if the model supports it.",
        choices=("auto", "packed", "padded"),
    )
    num_workers: int = option(0, "Threads that collate batches ahead; 0 collates in the training thread.", minimum=0)
    pin_memory: bool = option(False, "Collate batches in pinned memory, copied while the device computes; CUDA only.")
    max_grad_norm: Optional[float] = option(1.0, "Largest gradient norm; null does not clip.", above=0.0)
    max_skipped_steps: int = option(
        0,
        "Leave out so many steps of a run whose loss or gradient is not finite; one more, or a rollout that is not, "
        "ends it. Not part of what a resumed run has to have alike.",
        unit="optimizer steps",
        minimum=0,
    )
    lr_warmup_steps: int = option(0, "Linear rise of the learning rate.", unit="optimizer steps", minimum=0)
    lr_warmup_ratio: float = option(
        0.0,
        "Linear rise of the learning rate as a share of the run's steps, rounded up; instead of lr_warmup_steps.",
        minimum=0.0,
        maximum=1.0,
    )
    log_interval: int = option(5, "Between two lines of metrics.", unit="optimizer steps", minimum=1)
    eval_interval: int = option(100, "Between two validations.", unit="optimizer steps", minimum=1)
    eval_at_start: bool = option(False, "Validate also before the first step, logged as step 0.")
    early_stopping_metric: Optional[str] = option(
        None,
        "End the run when this metric of the validation (val/<metric>) stops improving; it also selects the best step. "
        "null trains to the end.",
    )
    early_stopping_patience: int = option(3, "End after so many without a new best.", unit="validations", minimum=1)
    early_stopping_direction: str = option(
        "auto",
        "Values of that metric that are better; auto: highest for rewards, scores, objective, logps and share, lowest "
        "for all others.",
        choices=("auto", "lowest", "highest"),
    )
    max_eval_batches: Optional[int] = option(None, "Most of a validation; null: all.", unit="mini-batches", minimum=1)
    save_interval: int = option(100, "Between two checkpoints.", unit="optimizer steps", minimum=1)
    keep_checkpoints: int = option(2, "Newest checkpoints kept (in addition to the best one).", minimum=1)
    async_checkpoints: bool = option(
        False,
        "Write checkpoints in a thread while training goes on, from a copy in the host's memory, as large as what "
        "trains and its optimizer state.",
    )

    def has_fixed_reference(self) -> bool:
        """True if the loss compares with the policy before its first step."""
        return False

    def policy_part(self) -> str:
        """Prefix of the names of the policy's weights in a checkpoint."""
        return ""

    def num_warmup_steps(self, num_steps: int) -> int:
        """Optimizer steps of the warm-up in a run of `num_steps`."""
        return self.lr_warmup_steps or math.ceil(self.lr_warmup_ratio * num_steps)

    def stops_at_highest(self) -> bool:
        """Return True if the highest values of `early_stopping_metric` are the best."""
        if self.early_stopping_direction == "auto":
            return str(self.early_stopping_metric).startswith(_HIGHER_IS_BETTER)
        return self.early_stopping_direction == "highest"

    def stops_early(self, stale_validations: int) -> bool:
        """Return True if the run ends after so many validations in a row without a new best value."""
        return self.early_stopping_metric is not None and stale_validations >= self.early_stopping_patience

    def row_tokens(self, max_length: int) -> int:
        """Tokens of a row at most, if `max_length` are those of a prompt with one response; of a pair, nearly twice."""
        return 2 * max_length if self.data_kind == "preference" else max_length


@dataclass(eq=False, repr=False)
class StartConfig(Config):
    """Options of a task that can start from a fine-tuning."""

    sft_experiment_dir: Optional[str] = option(
        None,
        "Run directory of a fine-tuning to start from, or newest: the newest finished one of this model under "
        "root_dir; null starts from the model as it is.",
    )
    sft_model_name: str = option("final", "Weights of that run: final, best, last, or step-<n>.")


@dataclass(eq=False, repr=False)
class PolicyConfig(StartConfig):
    """Options of a task that trains a policy."""

    num_sample_prompts: int = option(3, "Validation prompts whose responses are shown each time.", minimum=0)


@dataclass(eq=False, repr=False)
class ReferenceConfig(Config):
    """Options of a task whose loss compares the policy with a reference."""

    self_check: str = option(
        "error",
        "Before the first step the policy has to be its own reference: stop, warn, or do not look.",
        choices=("error", "warn", "off"),
    )


@dataclass(eq=False, repr=False)
class SFTConfig(PolicyConfig, TrainTaskConfig):
    """Supervised fine-tuning: learn to write the response, given the prompt."""

    entry_point: ClassVar[str] = "sheeprlhf.task.train.sft:train"
    val_metrics: ClassVar[tuple[str, ...]] = ("loss", "nll", "perplexity")

    config_name: str = "sft"
    completion_only_loss: bool = option(True, "Train on the response only; false trains on the prompt too.")
    label_smoothing: float = option(0.0, "Share of the target spread over the vocabulary.", minimum=0.0, maximum=0.99)


@dataclass(eq=False, repr=False)
class RMConfig(StartConfig, TrainTaskConfig):
    """Reward modelling: the better of two or more responses gets the higher score."""

    entry_point: ClassVar[str] = "sheeprlhf.task.train.rm:train"
    data_kind: ClassVar[str] = "preference"
    train_splits: ClassVar[tuple[str, ...]] = ("reward", "train")
    trains: ClassVar[str] = "reward model"
    of_last_tokens: ClassVar[tuple[str, ...]] = ("last_token", "plackett_luce")  # losses that read no other scores
    val_metrics: ClassVar[tuple[str, ...]] = ("loss", *_PAIR_METRICS)

    config_name: str = "rm"
    loss_type: str = option(
        "last_token",
        "Scores that are compared: after the last token, averaged over the tokens that differ, or token by token; "
        "plackett_luce is the likelihood of the whole ranking by scores after the last token.",
        choices=("last_token", "average", "per_sample", "plackett_luce"),
    )
    center_rewards_coefficient: float = option(0.0, "Weight of (better + worse score)^2; 0.01 is usual.", minimum=0.0)
    likelihood_coeff: float = option(
        0.0,
        "Weight of the negative log-likelihood of the preferred responses, nats a token, by the language head on the "
        "same layers (Secrets of RLHF: 1); 0: not computed.",
        minimum=0.0,
    )
    normalize_on: str = option(
        "demonstrations",
        "After training, shift scores so that the preferred responses that were trained on score 0 on average, or not.",
        choices=("demonstrations", "none"),
    )


@dataclass(eq=False, repr=False)
class PRMConfig(StartConfig, TrainTaskConfig):
    """Process reward modelling: the steps of a response get a score each, the log-odds that the step is right."""

    entry_point: ClassVar[str] = "sheeprlhf.task.train.prm:train"
    data_kind: ClassVar[str] = "stepwise"
    train_splits: ClassVar[tuple[str, ...]] = ("reward", "train")
    trains: ClassVar[str] = "reward model"
    val_metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy")

    config_name: str = "prm"


@dataclass(eq=False, repr=False)
class DPOConfig(PolicyConfig, ReferenceConfig, TrainTaskConfig):
    """Direct preference optimisation: the better response becomes the likelier one; no reward model."""

    entry_point: ClassVar[str] = "sheeprlhf.task.train.dpo:train"
    data_kind: ClassVar[str] = "preference"
    train_splits: ClassVar[tuple[str, ...]] = ("train", "reward")
    val_metrics: ClassVar[tuple[str, ...]] = (
        *("loss", *_PAIR_METRICS),
        *("logps/chosen", "logps/rejected", "kl/chosen", "entropy"),
    )

    config_name: str = "dpo"
    loss_type: str = option(
        "sigmoid",
        "Which paper's loss; simpo and orpo have no reference.",
        choices=(
            *("sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down", "simpo", "orpo"),
            *("sigmoid_norm", "exo", "nca", "sppo", "discopop", "bco", "aot", "aot_unpaired"),
        ),
    )
    beta: float = option(0.1, "Pull to the reference; the scale of simpo (2 is usual), orpo's weight.", above=0.0)
    label_smoothing: float = option(0.0, "Share of wrong pairs (sigmoid, robust, exo, aot).", minimum=0.0, maximum=0.49)
    reference_free: bool = option(False, "Take a reference that likes all responses alike.")
    simpo_gamma: float = option(1.0, "How much likelier the better response must be (simpo).", unit="nats", minimum=0.0)
    discopop_tau: float = option(0.05, "Temperature of the mix of two losses (discopop).", above=0.0)
    sft_coeff: float = option(
        0.0,
        "Weight of the negative log-likelihood of the better response, nats a token, added to the loss.",
        minimum=0.0,
    )
    f_divergence: str = option(
        "reverse_kl",
        "Divergence from the reference that the policy's optimum is penalised by (f-DPO).",
        choices=("reverse_kl", "forward_kl", "js", "alpha"),
    )
    f_alpha: float = option(0.5, "Order of f_divergence=alpha.", minimum=0.0, maximum=0.99)
    ld_alpha: float = option(
        1.0,
        "Weight of the tokens behind the length of the shorter response in its log-probability (LD-DPO; 0.5 is usual).",
        minimum=0.0,
        maximum=1.0,
    )
    use_weighting: bool = option(False, "Weigh pairs by their probability under the policy, relative to others (WPO).")
    ref_sync_interval: Optional[int] = option(
        None,
        "Move the reference towards the policy each time so many steps have passed (TR-DPO: 512); null keeps it.",
        unit="optimizer steps",
        minimum=1,
    )
    ref_mixup_alpha: float = option(0.6, "Share of the policy in a moved reference.", above=0.0, maximum=1.0)

    def policy_part(self) -> str:
        """Checkpoints hold a reference that moves, too."""
        return "" if self.ref_sync_interval is None else "policy."

    def has_fixed_reference(self) -> bool:
        """False for the losses without a reference, and for one that moves."""
        return self.loss_type not in NO_REFERENCE and not self.reference_free and self.ref_sync_interval is None


@dataclass(eq=False, repr=False)
class KTOConfig(PolicyConfig, ReferenceConfig, TrainTaskConfig):
    """KTO: desirable responses become likelier and undesirable ones less likely; they need not come in pairs."""

    entry_point: ClassVar[str] = "sheeprlhf.task.train.kto:train"
    data_kind: ClassVar[str] = "unpaired"
    val_metrics: ClassVar[tuple[str, ...]] = (*("loss", *_PAIR_METRICS[:3]), *("logps/chosen", "logps/rejected", "kl"))
    train_splits: ClassVar[tuple[str, ...]] = ("train", "reward")

    config_name: str = "kto"
    beta: float = option(0.1, "Pull towards the reference.", above=0.0)
    desirable_weight: float = option(1.0, "Weight of the losses of desirable responses.", above=0.0)
    undesirable_weight: float = option(1.0, "Weight of the losses of undesirable responses.", above=0.0)

    def has_fixed_reference(self) -> bool:
        """True for every configuration."""
        return True


@dataclass(eq=False, repr=False)
class ILQLConfig(PolicyConfig, TrainTaskConfig):
    """Implicit language Q-learning: offline reinforcement learning from responses with a reward (arXiv 2206.11871)."""

    entry_point: ClassVar[str] = "sheeprlhf.task.train.ilql:train"
    data_kind: ClassVar[str] = "rewarded"
    num_q_heads: ClassVar[int] = 2  # the smaller estimate is the target of V
    val_metrics: ClassVar[tuple[str, ...]] = ("loss", "q_loss", "v_loss", "cql_loss", "nll", "advantage")
    train_splits: ClassVar[tuple[str, ...]] = ("train", "reward")

    config_name: str = "ilql"
    gamma: float = option(0.99, "Discount of a token.", minimum=0.0, maximum=1.0)
    td_lambda: float = option(
        0.0,
        "Weight of the reward itself in the targets of Q: 0 takes V of the next token, 1 the reward, which reaches the "
        "first token at once.",
        minimum=0.0,
        maximum=1.0,
    )
    expectile: float = option(0.7, "Expectile of its tokens' Q as value of a state (tau).", minimum=0.5, maximum=0.999)
    cql_coeff: float = option(0.1, "Weight of the loss that lowers the Q of tokens outside the data.", minimum=0.0)
    awac_coeff: float = option(1.0, "Weight of the likelihood of the responses by the language head.", above=0.0)
    awac_beta: float = option(0.0, "Tokens there weigh exp(this * advantage).", unit="1/reward", minimum=0.0)
    target_update_rate: float = option(0.005, "Share of Q heads in their targets after a step.", above=0.0, maximum=1.0)
    advantage_coeff: float = option(1.0, "Weight of Q in the logits of the saved model.", unit="1/reward", minimum=0.0)

    def policy_part(self) -> str:
        """Checkpoints hold the heads of Q and V, too."""
        return "policy."
