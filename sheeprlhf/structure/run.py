"""The roots: what each verb that takes a configuration composes; devices, optimizers and sampling."""

from dataclasses import dataclass
from typing import Any, ClassVar, Optional

from sheeprlhf.structure.data import DataConfig
from sheeprlhf.structure.evaluation import EvalTaskConfig
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.structure.option import MISSING, Config, option
from sheeprlhf.structure.reward import RewardSourceConfig
from sheeprlhf.structure.rollout import RolloutSourceConfig
from sheeprlhf.structure.task import TrainTaskConfig

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true")
STRATEGIES = ("auto", "ddp", "fsdp2")


@dataclass(eq=False, repr=False)
class FabricConfig(Config):
    """On the CPU, one process."""

    config_name: str = option("cpu", "Name of this choice.")
    accelerator: str = option("cpu", "Kind of device.", choices=("cpu", "cuda", "auto"))
    devices: Optional[str] = option(
        None,
        "Number of devices (processes) on each machine, or 'auto' for all that are there; null is what the launcher "
        "(torchrun, srun, mpirun) has started, else 1.",
    )
    num_nodes: Optional[int] = option(None, "Number of machines; null: that of the launcher, else 1.", minimum=1)
    strategy: str = option("auto", "Work of several devices; fsdp2 cuts the weights up too.", choices=STRATEGIES)
    replicas: int = option(
        1,
        "Groups of devices that each hold all weights, cut up within the group; fsdp2. As many as machines keep the "
        "gathering inside a machine.",
        minimum=1,
    )
    tensor_parallel: int = option(
        1,
        "Devices that compute the same rows together, each with a part of the heads and of the MLP of every block; "
        "fsdp2.",
        minimum=1,
    )
    offload: str = option("none", "Place of sharded tensors between passes; fsdp2.", choices=("none", "cpu"))
    timeout: int = option(
        1800,
        "Longest wait of a process for the others, at the start and in each collective; then the run ends.",
        unit="seconds",
        minimum=1,
    )
    precision: str = option("32-true", "Number format: weights stay float32 under the mixed ones.", choices=PRECISIONS)


@dataclass(eq=False, repr=False)
class AutoCudaConfig(FabricConfig):
    """On one CUDA device, in bf16-mixed precision."""

    config_name: str = "auto_cuda"
    accelerator: str = "cuda"
    precision: str = "bf16-mixed"


@dataclass(eq=False, repr=False)
class AutoConfig(FabricConfig):
    """On a CUDA device if there is one, else on the CPU."""

    config_name: str = "auto"
    accelerator: str = "auto"


@dataclass(eq=False, repr=False)
class GenConfig(Config):
    """Sampling of shown texts, and of rollouts, which always sample; a model's own generation defaults never apply."""

    max_new_tokens: int = option(64, "Longest generated response.", unit="tokens", minimum=1)
    num_beams: int = option(1, "Beams of beam search; 1 is plain decoding.", minimum=1)
    do_sample: bool = option(False, "Sample; false takes the likeliest token.")
    top_k: int = option(0, "Sample among the k likeliest tokens; 0 is all.", minimum=0)
    top_p: float = option(1.0, "Sample among the likeliest tokens of this total probability.", above=0.0, maximum=1.0)
    temperature: float = option(1.0, "Divides the logits before sampling.", above=0.0)
    engine: str = option(
        "native",
        "Sampler of rollouts: this project's, or transformers' generate, whose responses also depend on the number of "
        "processes and on task.token_budget.",
        choices=("native", "hf"),
    )
    stop_strings: list[str] = option(
        help="A response ends, and counts as finished, when its text contains one of them; what is shown and scored is "
        "the text before it.",
        factory=list,
    )


@dataclass(eq=False, repr=False)
class OptimizerConfig(Config):
    """Options of every optimizer."""

    torch_name: ClassVar[str] = ""  # class in torch.optim

    config_name: str = option("???", "Name of this choice.")
    lr: Optional[float] = option(None, "Peak learning rate; null: model.lr or model.lora_cfg.lr.", minimum=0.0)
    weight_decay: float = option(0.0, "Weight decay of matrices (biases and norms have none).", minimum=0.0)
    schedule: str = option(
        "cosine",
        "Shape of the learning rate after the warm-up; wsd is constant and then falls linearly.",
        choices=("cosine", "linear", "constant", "wsd"),
    )
    decay_ratio: float = option(0.1, "Share of the steps in which wsd falls, rounded up.", minimum=0.0, maximum=1.0)
    min_lr_ratio: float = option(0.0, "Last learning rate as a share of the peak.", minimum=0.0, maximum=1.0)


@dataclass(eq=False, repr=False)
class MomentsConfig(Config):
    """Options of the optimizers of the Adam family."""

    betas: tuple[float, float] = option((0.9, 0.999), "Decay of the two moment averages.")
    eps: float = option(1e-8, "Added to the denominator.", above=0.0)


@dataclass(eq=False, repr=False)
class AdamWConfig(MomentsConfig, OptimizerConfig):
    """AdamW (Loshchilov and Hutter, 2019), fused."""

    torch_name: ClassVar[str] = "AdamW"

    config_name: str = "adamw"
    fused: bool = option(True, "Use torch's fused kernel.")


@dataclass(eq=False, repr=False)
class AdamConfig(MomentsConfig, OptimizerConfig):
    """Adam (Kingma and Ba, 2015), fused."""

    torch_name: ClassVar[str] = "Adam"

    config_name: str = "adam"
    fused: bool = option(True, "Use torch's fused kernel.")


@dataclass(eq=False, repr=False)
class AdamW8bitConfig(MomentsConfig, OptimizerConfig):
    """AdamW with moments of 8 bits (Dettmers et al., 2022), by bitsandbytes; tensors below 4,096 numbers have 32."""

    torch_name: ClassVar[str] = "AdamW8bit"  # class in bitsandbytes.optim

    config_name: str = option("adamw_8bit", "Name of this choice.")


@dataclass(eq=False, repr=False)
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent."""

    torch_name: ClassVar[str] = "SGD"

    config_name: str = "sgd"
    lr: Optional[float] = option(1e-2, "Peak learning rate.", minimum=0.0)
    momentum: float = option(0.0, "Momentum.", minimum=0.0, maximum=1.0)
    nesterov: bool = option(False, "Nesterov's momentum; needs momentum above 0.")


TRACKER_MODULES = {  # what each tracker of `log` needs, of the extra with its name
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "trackio": ("trackio",),
}
_WEIGHTS_CHECK = "sheeprlhf.task.weight_checks:check_all_weights"  # called as function(config, say) before the task


@dataclass(eq=False, repr=False)
class TrainConfig(Config):
    """A training run."""

    weights_check: ClassVar[str] = _WEIGHTS_CHECK

    task: TrainTaskConfig = MISSING
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    fabric: FabricConfig = MISSING
    optim: OptimizerConfig = MISSING
    reward: RewardSourceConfig = MISSING
    rollout: RolloutSourceConfig = MISSING
    generation: GenConfig = GenConfig()
    experiment: Any = option(None, "Named recipe of configs/experiment.")
    seed: int = option(42, "Seed of everything random in the run.", minimum=0, maximum=2**32 - 1)
    dry_run: bool = option(False, "A complete run of two optimizer steps.")
    run_name: str = option("default", "Last part of the run directory.")
    root_dir: str = option("logs/runs", "Where run directories are made.")
    resume: bool = option(False, "Go on with the newest unfinished run of the same configuration.")
    resume_from: Optional[str] = option(None, "Go on with the run in this directory.")
    log: list[str] = option(
        help="Where metrics and samples go besides metrics.csv and samples/: tensorboard, wandb, mlflow, trackio.",
        factory=lambda: ["tensorboard"],
    )
    log_project: Optional[str] = option(
        None,
        "Project (wandb, trackio) or experiment (mlflow) of log; null takes WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME or "
        "TRACKIO_PROJECT of the environment, else sheeprlhf.",
    )
    torch_deterministic: bool = option(False, "Deterministic kernels on CUDA (slower); the CPU is deterministic.")
    debug: bool = option(False, "Show the traceback of an error.")

    def peak_lr(self) -> float:
        """The learning rate after the warm-up: the optimizer's, else the model's own for what trains."""
        if self.optim.lr is not None:
            return self.optim.lr
        if self.model.finetune_mode == "LORA" and self.model.lora_cfg is not None:
            return self.model.lora_cfg.lr
        return self.model.lr


@dataclass(eq=False, repr=False)
class EvalConfig(Config):
    """An evaluation of a run, or of a model on a dataset."""

    weights_check: ClassVar[str] = _WEIGHTS_CHECK

    task: EvalTaskConfig = MISSING
    fabric: FabricConfig = MISSING
    model: Optional[ModelConfig] = option(None, "Model to evaluate; null takes the run's.")
    data: Optional[DataConfig] = option(None, "Dataset to evaluate on; null takes the run's.")
    reward: RewardSourceConfig = MISSING
    rollout: RolloutSourceConfig = MISSING
    generation: GenConfig = GenConfig()
    experiment_dir: Optional[str] = option(None, "Run directory to evaluate; results go into its eval/ folder.")
    output_dir: str = option("logs/eval", "Where results go when there is no experiment_dir.")
    root_dir: str = option("logs/runs", "Where `newest` looks for runs.")
    plot: bool = option(False, "Draw the result as a PNG next to its JSON; the flag --plot says the same.")
    seed: int = option(42, "Seed of everything random.", minimum=0, maximum=2**32 - 1)
    dry_run: bool = option(False, "Evaluate on two mini-batches.")
    debug: bool = option(False, "Show the traceback of an error.")


@dataclass(eq=False, repr=False)
class CommandConfig(Config):
    """Parent of the commands that neither train nor evaluate: one process, no run directory."""

    entry_point: ClassVar[str] = ""  # "module:function", called as function(config, args); its result is the exit code


@dataclass(eq=False, repr=False)
class InspectConfig(CommandConfig):
    """The data as a task would see it."""

    entry_point: ClassVar[str] = "sheeprlhf.apps.inspect:run"

    task: TrainTaskConfig = MISSING
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    rollout: RolloutSourceConfig = MISSING
    split: Optional[str] = option(
        None,
        "Split to show; null shows the one that the task trains on.",
        choices=("train", "validation", "test", "reward"),
    )
    num_examples: int = option(3, "Examples to print.", minimum=0)
    output_dir: str = option("logs/inspect", "Where the histogram (PNG) and the data report (JSON) go.")
    debug: bool = option(False, "Show the traceback of an error.")


@dataclass(eq=False, repr=False)
class ClusterConfig(Config):
    """Machines to plan for, other than this one; the defaults are an H100 with 400 Gb/s of network for each device."""

    memory: Optional[float] = option(
        None,
        "Memory of a device. Giving it plans for other machines than this one; so does fabric.num_nodes above 1, "
        "with 80.",
        unit="GB",
        above=0.0,
    )
    bandwidth: float = option(50.0, "Speed at which a device sends and receives at once.", unit="GB/s", above=0.0)
    tflops: float = option(989.0, "Peak speed of a device in the precision of the run.", unit="TFLOP/s", above=0.0)
    mfu: float = option(0.4, "Share of the peak that training reaches.", above=0.0, maximum=1.0)


@dataclass(eq=False, repr=False)
class DoctorConfig(CommandConfig, TrainConfig):
    """Check that a training run would work on this machine: takes the options of `train`, and starts nothing."""

    entry_point: ClassVar[str] = "sheeprlhf.apps.doctor:run"

    cluster: ClusterConfig = ClusterConfig()
    dry_step: bool = option(True, "With fabric.strategy=fsdp2, check the plan by a step on tensors without content.")

    def plans_other_machines(self) -> bool:
        """True if nothing of this machine is checked, and the model needs no files but its config.json."""
        return self.cluster.memory is not None or (self.fabric.num_nodes or 1) > 1


@dataclass(eq=False, repr=False)
class FetchConfig(CommandConfig):
    """A model into the local cache, so that it works without the hub."""

    entry_point: ClassVar[str] = "sheeprlhf.apps.fetch:run"

    model: ModelConfig = MISSING
    cache_dir: Optional[str] = option(
        None,
        "Folder of weights that are converted from pytorch_model.bin; null: $SHEEPRLHF_CACHE, else ~/.cache/sheeprlhf. "
        "Files of the hub go into the hub's own cache (HF_HOME).",
    )
    debug: bool = option(False, "Show the traceback of an error.")


@dataclass(eq=False, repr=False)
class PipelineConfig(CommandConfig):
    """Trainings and evaluations one after the other; any other word goes to their commands."""

    entry_point: ClassVar[str] = "sheeprlhf.apps.pipeline:run"

    experiment: Any = option(None, "Named recipe of configs/experiment, which has the stages.")
    stages: dict[str, str] = option(
        help="Of a recipe: the command of each stage by its name, in their order; <name> is the run of an earlier one.",
        factory=dict,
    )
    common: dict[str, str] = option(
        help="Of a recipe: words of every stage of a command (train, eval), which the stage's own override.",
        factory=dict,
    )
    words: list[str] = option(
        help="Words for stages: option=value for all that take it, <stage>.option=value for one. They need not be "
        "collected here: `optim=adam ppo.task.max_num_steps=60` is words=[optim=adam,...].",
        factory=list,
    )
    skip: list[str] = option(help="Stages to leave out.", factory=list)
    seed: int = option(42, "Seed of every stage.", minimum=0, maximum=2**32 - 1)
    dry_run: bool = option(False, "Every stage does two steps.")
    root_dir: str = option("logs/pipelines", "Where folders of pipelines are made.")
    resume: bool = option(False, "Go on with the newest pipeline of the same recipe and words.")
    resume_from: Optional[str] = option(None, "Go on with the pipeline in this folder.")
    debug: bool = option(False, "Show the traceback of an error.")


RootConfig = TrainConfig | EvalConfig | CommandConfig
