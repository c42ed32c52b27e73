"""Tasks that learn from responses which the model itself samples, one dataclass each; the programs that sample."""

from dataclasses import dataclass
from typing import ClassVar, Optional

from sheeprlhf.structure.option import Config, option
from sheeprlhf.structure.reward import RewardRunConfig
from sheeprlhf.structure.task import PolicyConfig, ReferenceConfig, TrainTaskConfig

ENVIRONMENTS = ("calculator", "python")  # the built-in ones
_MICRO_BATCH = "Most responses in one forward pass, at least those of one prompt; the token budget cuts further."


@dataclass(eq=False, repr=False)
class OnlineTaskConfig(PolicyConfig, ReferenceConfig, RewardRunConfig, TrainTaskConfig):
    """Options of every RL task. An epoch is a pass over the prompts; generation.* controls the sampling."""

    data_kind: ClassVar[str] = "prompts"
    val_metrics: ClassVar[tuple[str, ...]] = (
        *("objective", "scores", "kl", "entropy"),
        *("length", "finished", "distinct_2", "perplexity"),
    )

    rollout_size: int = option(64, "Responses sampled before they are learned from, all devices.", minimum=1)
    num_generations: int = option(1, "Responses sampled for each prompt.", minimum=1)
    mini_batch_size: int = option(32, "Responses of an optimizer step on all devices.", unit="responses", minimum=1)
    micro_batch_size: int = option(32, _MICRO_BATCH, unit="responses", minimum=1)
    num_iterations: int = option(1, "Passes over the responses of a rollout.", minimum=1)
    sft_experiment_dir: Optional[str] = option(
        "auto",
        "Run directory of a fine-tuning to start from; newest: the newest finished one of this model under root_dir; "
        "auto: the same if there is one; null starts from the model as it is.",
    )
    max_eval_batches: Optional[int] = option(4, "Most of a validation; null: all.", unit="mini-batches", minimum=1)
    eval_interval: int = option(20, "Between two validations, after a rollout.", unit="optimizer steps", minimum=1)
    save_interval: int = option(20, "Between two checkpoints, after a rollout.", unit="optimizer steps", minimum=1)

    save_rollouts: int = option(
        0,
        "Rollouts of the run that are saved as rollouts/rollout-<number>.parquet, a row for each response; the first, "
        "the last and others evenly between them. 0: none.",
        unit="rollouts",
        minimum=0,
    )

    def prompts_per_rollout(self) -> int:
        """Prompts of a rollout, all devices together."""
        return self.rollout_size // self.num_generations

    def prompts_per_step(self) -> int:
        """Prompts of an optimizer step, all devices together."""
        return self.mini_batch_size // self.num_generations

    def row_tokens(self, max_length: int) -> int:
        """Tokens of a prompt with its responses, if `max_length` are those of a prompt with one."""
        return self.num_generations * max_length

    def kl_price(self) -> float:
        """Weight of the KL in the objective that selects the best checkpoint, per nat."""
        return 0.0


@dataclass(eq=False, repr=False)
class RatioTaskConfig(OnlineTaskConfig):
    """Those that weigh what was sampled by how much likelier it has become since."""

    init_kl_coeff: float = option(0.05, "Weight of the KL divergence from the reference.", minimum=0.0)
    clip_coeff: float = option(0.2, "How far the ratio of new to old probability may leave 1.", above=0.0, maximum=1.0)
    entropy_coeff: float = option(0.0, "Weight of the entropy, nats a token, subtracted from the loss.", minimum=0.0)
    early_stop_kl: Optional[float] = option(
        None, "End the passes over a rollout when the policy is this far from the sampler.", unit="nats", above=0.0
    )

    def kl_price(self) -> float:
        """The weight of the KL."""
        return self.init_kl_coeff


@dataclass(eq=False, repr=False)
class PPOConfig(RatioTaskConfig):
    """Proximal policy optimisation: a critic tells each token's share of the reward (arXiv 1707.06347, 2203.02155)."""

    entry_point: ClassVar[str] = "sheeprlhf.task.train.ppo:train"
    config_name: str = "ppo"
    num_iterations: int = 4
    kl_estimator: str = option("k1", "KL of a token in the reward: k1 unbiased, k3 positive.", choices=("k1", "k3"))
    adaptive_kl_coeff: bool = option(False, "Move the weight of the KL so that it comes to target_kl.")
    target_kl: float = option(6.0, "KL that adaptive_kl_coeff aims at.", unit="nats a response", above=0.0)
    kl_horizon: int = option(10_000, "How slowly it moves.", unit="responses", minimum=1)
    normalize_rewards: bool = option(False, "Divide a rollout's rewards by their standard deviation; their mean stays.")
    normalize_advantages: bool = option(True, "Advantages of a rollout get mean 0 and standard deviation 1.")
    gae_gamma: float = option(1.0, "Discount of a token.", minimum=0.0, maximum=1.0)
    gae_lambda: float = option(0.95, "Lambda of generalised advantage estimation.", minimum=0.0, maximum=1.0)
    bootstrap_truncated: bool = option(False, "After a response that was cut comes the critic's value; false: nothing.")
    value_clip_coeff: Optional[float] = option(0.2, "Clip of values around the rollout's; null: none.", above=0.0)
    vf_coeff: float = option(0.1, "Weight of the critic's loss.", minimum=0.0)
    actor_learning_rate: Optional[float] = option(None, "Peak of the policy's; null takes optim.lr.", minimum=0.0)
    critic_learning_rate: Optional[float] = option(None, "Peak of the critic's; null takes the policy's.", minimum=0.0)
    critic_warmup_steps: int = option(0, "Only the critic learns meanwhile.", unit="optimizer steps", minimum=0)
    init_critic_with_reward: bool = option(
        True, "Make the critic of the reward model, where the reward is one; else of the policy, with a new head."
    )
    share_trunk: bool = option(
        False,
        "The critic is a new head on the policy itself, and both learn in one pass: no second model, but the values "
        "pull at the policy too. task.init_critic_with_reward is not read then.",
    )
    ptx_coeff: float = option(
        0.0,
        "Weight of the negative log-likelihood of the dataset's own responses, nats a token, in every step of the "
        "policy (PPO-ptx, arXiv 2203.02155, eq. 2); 0: not computed.",
        minimum=0.0,
    )
    ptx_batch_size: int = option(32, "Rows of task.ptx_coeff in a step, all devices together.", unit="rows", minimum=1)
    ema_decay: Optional[float] = option(
        None,
        "Average the policy over its steps, each counting this much less than the next; validations and final/ are of "
        "the average (InstructGPT: 0.992). null: they are of the policy as it is.",
        above=0.0,
        maximum=1.0,
    )

    def policy_part(self) -> str:
        """Checkpoints hold the critic too, and the average."""
        return "actor." if self.ema_decay is None else "average."


@dataclass(eq=False, repr=False)
class GRPOConfig(RatioTaskConfig):
    """Group relative policy optimisation: a response is judged against the others of its prompt (arXiv 2402.03300)."""

    entry_point: ClassVar[str] = "sheeprlhf.task.train.grpo:train"

    config_name: str = "grpo"
    num_generations: int = option(8, "Responses sampled for each prompt.", minimum=2)
    micro_batch_size: int = 256
    init_kl_coeff: float = option(0.04, "Weight of the KL divergence from the reference in the loss (k3).", minimum=0.0)
    clip_high: Optional[float] = option(None, "How far the ratio may rise above 1; null: clip_coeff.", above=0.0)
    max_ratio: Optional[float] = option(None, "Largest ratio where the advantage is negative; null: none.", above=1.0)
    kl_estimator: str = option("k3", "KL of a token in the loss: k2 has the KL's gradient.", choices=("k2", "k3"))
    scale_rewards: bool = option(True, "Divide by the standard deviation of the prompt's scores (Dr. GRPO does not).")
    max_advantage: Optional[float] = option(None, "Cut advantages to this in both directions; null: no cut.", above=0.0)
    mask_truncated: bool = option(False, "Cut responses get the advantage 0; they count in the statistics of a prompt.")
    max_resamples: int = option(
        0,
        "Replace prompts whose responses all score alike by other ones, drawn at random, at most so many times in a "
        "rollout (DAPO's dynamic sampling: 10). Scores are compared before penalties. 0: they stay.",
        unit="times",
        minimum=0,
    )
    loss_type: str = option(
        "grpo",
        "Mean over the tokens of each response, then over responses (grpo); over all tokens (dapo); sum of tokens by "
        "generation.max_new_tokens (dr_grpo); one ratio for a response (gspo); clipped weights instead of clipped "
        "losses (cispo).",
        choices=("grpo", "dapo", "dr_grpo", "gspo", "cispo"),
    )


@dataclass(eq=False, repr=False)
class ReinforcePPConfig(RatioTaskConfig):
    """REINFORCE++: PPO's clipped loss without a critic, advantages whitened over the rollout (arXiv 2501.03262)."""

    entry_point: ClassVar[str] = "sheeprlhf.task.train.reinforce_pp:train"

    config_name: str = "reinforce_pp"
    gamma: float = option(1.0, "Discount of a token.", minimum=0.0, maximum=1.0)
    group_baseline: bool = option(
        False,
        "Subtract the mean score of the prompt's responses, and put the KL into the loss (k2) instead of the reward.",
    )


@dataclass(eq=False, repr=False)
class RLOOConfig(RatioTaskConfig):
    """REINFORCE with the mean of the prompt's other responses as baseline (arXiv 2402.14740)."""

    entry_point: ClassVar[str] = "sheeprlhf.task.train.rloo:train"

    config_name: str = "rloo"
    num_generations: int = option(4, "Responses sampled for each prompt.", minimum=2)
    micro_batch_size: int = 128
    normalize_advantages: bool = option(False, "Advantages of a rollout get mean 0 and standard deviation 1.")


@dataclass(eq=False, repr=False)
class OnlineDPOConfig(OnlineTaskConfig):
    """DPO on the best and the worst of the responses that the policy samples for each prompt (arXiv 2402.04792)."""

    entry_point: ClassVar[str] = "sheeprlhf.task.train.online_dpo:train"

    config_name: str = "online_dpo"
    num_generations: int = option(2, "Responses sampled for each prompt.", minimum=2)
    micro_batch_size: int = 64
    loss_type: str = option("sigmoid", "Which loss of a pair.", choices=("sigmoid", "hinge", "ipo"))
    beta: float = option(0.1, "Pull towards the reference.", above=0.0)

    def kl_price(self) -> float:
        """DPO's loss has its best where a nat of KL costs beta (arXiv 2305.18290, eq. 3)."""
        return self.beta


@dataclass(eq=False, repr=False)
class DistillConfig(RatioTaskConfig):
    """On-policy distillation: what the policy samples becomes likelier where a larger model likes it better."""

    entry_point: ClassVar[str] = "sheeprlhf.task.train.distill:train"
    unread: ClassVar[frozenset[str]] = frozenset({"init_kl_coeff"})

    config_name: str = "distill"
    teacher: Optional[str] = option(None, "Needed: folder or hub id of the model to learn from, of the same tokenizer.")

    def kl_price(self) -> float:
        """The divergence from the teacher is what is minimised."""
        return 1.0


@dataclass(eq=False, repr=False)
class BestOfNConfig(OnlineTaskConfig):
    """Rejection sampling: of n sampled responses the best one, as a dataset to fine-tune on (arXiv 2112.09332)."""

    entry_point: ClassVar[str] = "sheeprlhf.task.train.best_of_n:train"
    trains: ClassVar[str] = "dataset"
    unread: ClassVar[frozenset[str]] = frozenset(
        {
            *("epochs", "max_num_steps", "mini_batch_size", "num_iterations", "max_grad_norm", "lr_warmup_steps"),
            *("lr_warmup_ratio", "max_skipped_steps", "eval_at_start"),
            *("early_stopping_metric", "early_stopping_patience", "early_stopping_direction"),
            *("log_interval", "eval_interval", "max_eval_batches", "save_interval", "keep_checkpoints", "num_workers"),
            *("save_rollouts", "async_checkpoints"),
        }
    )

    config_name: str = "best_of_n"
    num_generations: int = option(8, "Responses sampled for each prompt, of which the best is kept.", minimum=1)
    micro_batch_size: int = 256
    rollout_size: int = option(256, "Responses sampled before the best of them are written, all devices.", minimum=1)
    min_score: Optional[float] = option(None, "Keep the best response to a prompt only from this score on; null: all.")
    num_sample_prompts: int = option(3, "Prompts whose best and worst responses are shown.", minimum=0)


@dataclass(eq=False, repr=False)
class RolloutSourceConfig(Config):
    """Program that samples the responses of a rollout."""

    source: ClassVar[str] = ""  # "module:class" that is used in place of the sampler; see `rollout/sources.py`

    config_name: str = option("???", "Name of this choice.")


@dataclass(eq=False, repr=False)
class LocalRolloutConfig(RolloutSourceConfig):
    """The training processes sample, as `generation.engine` says."""

    source: ClassVar[str] = "sheeprlhf.rollout.episodes:EpisodeSampler"  # with an environment

    config_name: str = "local"
    environment: Optional[str] = option(
        None,
        "Environment whose tools the model calls in several turns: calculator, python, or a class of yours as "
        "package.module:Class (ppo, grpo, rloo, reinforce_pp). null: a response is one turn.",
    )
    max_turns: int = option(4, "Most messages of the model in a response with tool calls.", unit="messages", minimum=1)
    step_timeout: float = option(10.0, "Longest call; then the episode has failed.", unit="seconds", above=0.0)
    num_processes: int = option(2, "Processes with environments, on each device.", unit="processes", minimum=1)
    max_result_length: int = option(1000, "Longest result of a tool; the rest is cut.", unit="characters", minimum=1)


@dataclass(eq=False, repr=False)
class VLLMRolloutConfig(RolloutSourceConfig):
    """Servers of vLLM sample; they get the weights before each rollout."""

    source: ClassVar[str] = "sheeprlhf.rollout.server:RolloutServers"

    config_name: str = "vllm"
    urls: list[str] = option(help="Servers, such as http://127.0.0.1:8000, that share the prompts.", factory=list)
    sync: Optional[str] = option(
        None,
        "The servers read all weights, or only the adapter, from rollout.sync_dir, or get all weights from GPU to GPU "
        "(nccl; never run on GPUs). null: adapter if only it trains, else folder.",
        choices=("folder", "adapter", "nccl"),
    )
    sync_dir: Optional[str] = option(
        None,
        "Folder for the weights, at the same path on the machines of all servers; null: rollout_weights/ in the run "
        "directory.",
    )
    timeout: float = option(600.0, "Longest wait for an answer or a server that has failed.", unit="seconds", above=0.0)
    tolerance: Optional[float] = option(
        None,
        "Largest mean difference between the log-probabilities of a response by a server and by the trainer; null: "
        "0.001 in fabric.precision=32-true, else 0.2.",
        unit="nats a token",
        above=0.0,
    )

    max_staleness: int = option(
        0,
        "Sample up to so many rollouts ahead while training goes on, with the weights of that time; their tokens get "
        "truncated importance weights. 0: every rollout is sampled with the newest weights.",
        unit="rollouts",
        minimum=0,
    )

    def max_difference(self, precision: str) -> float:
        """The tolerance, in nats a token."""
        return self.tolerance or (1e-3 if precision == "32-true" else 0.2)


def environment_of(config: object) -> str | None:
    """The environment of a configuration; None without one."""
    return getattr(getattr(config, "rollout", None), "environment", None)
