"""Models: one dataclass each."""

from dataclasses import dataclass
from typing import Any, Optional

from sheeprlhf.structure.option import Config, option


@dataclass(eq=False, repr=False)
class HuggingFaceConfig(Config):
    """Options of loading the weights."""

    revision: Optional[str] = option(None, "Commit, tag or branch of the hub repository.")
    trust_remote_code: bool = option(False, "Run Python code of the model; needs library_cfg.revision=<40-digit hash>.")
    local_files_only: bool = option(False, "Never ask the hub; use the local cache only.")


@dataclass(eq=False, repr=False)
class LORAConfig(Config):
    """Low-rank adapters (Hu et al., 2021)."""

    targets: Any = option(
        "all-linear",
        "Linear layers that get an adapter: 'all-linear', or a list of names such as [q_proj,v_proj] and of regular "
        r"expressions of whole names such as '.*\.[qv]_proj'.",
    )
    rank: int = option(16, "Rank of the update matrices.", minimum=1)
    alpha: float = option(32.0, "The update is scaled by alpha / rank.", above=0.0)
    dropout: float = option(0.0, "Dropout before the adapter.", minimum=0.0, maximum=0.99)
    use_rslora: bool = option(False, "Scale the update by alpha / sqrt(rank) (rsLoRA; Kalajdzievski, 2023).")
    use_dora: bool = option(False, "Train the length of each weight vector apart from its direction (DoRA; Liu, 2024).")
    init: str = option("default", "First values of the matrices: default, gaussian or orthogonal.")
    layers_to_transform: list[int] = option(help="Layers, from 0, that get adapters; empty: all.", factory=list)
    modules_to_save: list[str] = option(help="Modules that train whole, next to adapters.", factory=list)
    lr: float = option(2e-4, "Learning rate of adapters when optim.lr is null.", minimum=0.0)


@dataclass(eq=False, repr=False)
class ModelConfig(Config):
    """A causal language model, by hub name or folder."""

    config_name: str = option("???", "Name of this choice.")
    repo_name: Optional[str] = option("???", "Hub id (owner/name) or local folder in the hub's layout.")
    finetune_mode: str = option("ALL", "What trains: all weights, or LoRA adapters.", choices=("ALL", "LORA"))
    lora_cfg: Optional[LORAConfig] = LORAConfig()
    adapter: Optional[str] = option(
        None,
        "LoRA adapter of PEFT to start from, folder or hub id: trained further with finetune_mode=LORA (its own rank, "
        "alpha, ... apply), else merged into the weights first.",
    )
    library_cfg: HuggingFaceConfig = HuggingFaceConfig()
    chat_template: Optional[str] = option(
        None,
        "Chat template: a name of the tokenizer's own, a built-in one (chatml, gemma, llama3, mistral, phi3, vicuna, "
        "zephyr) or a .jinja file; null takes the tokenizer's, or that of the run that training starts from.",
    )
    resize_embeddings: bool = option(
        False,
        "Add an embedding row for each token of the tokenizer that the model has none for, and first the control "
        "tokens of model.chat_template to the tokenizer; LoRA trains the new rows too.",
    )
    extra_vocabulary: list[str] = option(
        help="Special tokens to add to the tokenizer (needs resize_embeddings=true). In the text of rows they are read "
        "with data.control_tokens=true. LoRA trains the rows of those that exist already too.",
        factory=list,
    )
    embedding_dim_name: Optional[str] = option(
        None, "Key of the width of the head's vectors in the model's config; null: it is found."
    )
    dtype: str = option("float32", "Number format of the loaded weights.", choices=("float32", "bfloat16", "float16"))
    quantization: Optional[str] = option(
        None,
        "Format of the linear layers of the frozen base model (QLoRA; training needs model.finetune_mode=LORA, and "
        "bitsandbytes): nf4 takes 4.5 bits for each weight, int8 8; null keeps model.dtype.",
        choices=("nf4", "int8"),
    )
    save_dtype: Optional[str] = option(
        None,
        "Number format of the whole model in final/; null keeps that of the model's files (float32 for model=tiny).",
        choices=("float32", "bfloat16", "float16"),
    )
    attn_implementation: Optional[str] = option(
        None,
        "Attention of transformers, on padded batches; null takes packed attention where the model permits it.",
        choices=("sdpa", "eager", "flash_attention_2", "flex_attention"),
    )
    disable_dropout: bool = option(True, "Switch off every dropout of the base model (a LoRA adapter keeps its own).")
    freeze_transformer: bool = option(False, "Train the language model's head only.")
    frozen_layers: int = option(
        0,
        "The embeddings and the first so many layers do not train (trlX's reward models: 70 % of the layers).",
        minimum=0,
    )
    neftune_alpha: Optional[float] = option(
        None,
        "Scale of the uniform noise on the embeddings in training (NEFTune, arXiv 2310.05914; 5 is usual); read by "
        "task=sft. null: none.",
        above=0.0,
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: less memory, slower.")
    lr: float = option(1e-5, "Learning rate of all weights when optim.lr is null.", minimum=0.0)
    random_init: bool = option(False, "Start from random weights of the model's shape (pretraining).")


@dataclass(eq=False, repr=False)
class TinyConfig(ModelConfig):
    """The embedded model: 5.8M parameters, made by this framework; offline, on a CPU."""

    config_name: str = "tiny"
    repo_name: Optional[str] = "embedded:tiny"
    lora_cfg: Optional[LORAConfig] = LORAConfig(lr=2e-3)
    lr: float = 5e-5


@dataclass(eq=False, repr=False)
class AutoModelConfig(ModelConfig):
    """A causal language model of your choice: give model.repo_name=<hub id or folder>."""

    config_name: str = "auto"


@dataclass(eq=False, repr=False)
class OPTConfig(ModelConfig):
    """OPT 350M (facebook/opt-350m)."""

    config_name: str = "opt"
    repo_name: Optional[str] = "facebook/opt-350m"
    embedding_dim_name: Optional[str] = option("word_embed_proj_dim", "Key of the head's width in the model's config.")
    lora_cfg: Optional[LORAConfig] = LORAConfig(targets="('q_proj','v_proj')")


@dataclass(eq=False, repr=False)
class GPT2Config(ModelConfig):
    """GPT-2 124M (openai-community/gpt2); medium with model.repo_name=openai-community/gpt2-medium."""

    config_name: str = "gpt2"
    repo_name: Optional[str] = "openai-community/gpt2"
    embedding_dim_name: Optional[str] = option("n_embd", "Key of the head's width in the model's config.")
    lora_cfg: Optional[LORAConfig] = LORAConfig(targets="('c_attn',)")


@dataclass(eq=False, repr=False)
class PhiConfig(ModelConfig):
    """Phi-1.5 1.3B (microsoft/phi-1_5)."""

    config_name: str = "phi"
    repo_name: Optional[str] = "microsoft/phi-1_5"
    lora_cfg: Optional[LORAConfig] = LORAConfig(targets="('q_proj','k_proj','v_proj','dense')")


@dataclass(eq=False, repr=False)
class FalconConfig(ModelConfig):
    """Falcon 7B (tiiuae/falcon-7b); runs on padded batches."""

    config_name: str = "falcon"
    repo_name: Optional[str] = "tiiuae/falcon-7b"
    lora_cfg: Optional[LORAConfig] = LORAConfig(targets="('query_key_value',)")


@dataclass(eq=False, repr=False)
class SmolLM2Config(ModelConfig):
    """SmolLM2 135M Instruct (HuggingFaceTB/SmolLM2-135M-Instruct); without the hub, after `tools/fetch_smollm2.py`."""

    config_name: str = "smollm2"
    repo_name: Optional[str] = "HuggingFaceTB/SmolLM2-135M-Instruct"
