"""Memory estimate of a training step, computed from a model's config.json: no weight is loaded.

`measure` lets the model's own code run once on tensors that have shapes and no content, and counts what it would keep;
`plan` is arithmetic on those counts. With P parameters of which Q train, N tokens in a forward pass and V in the
vocabulary, the bytes of

    weights      size(P), and buffers; of quantised layers 4.5 bits (nf4) or 8 bits (int8) for each weight
    gradients    size(Q)
    optimizer    2 size(Q) + 4 per tensor for Adam and AdamW; size(Q) for SGD with momentum, else nothing;
                 (1/2 + 1/128) size(Q) for adamw_8bit
    activations  fixed + N * per_token: what autograd keeps in all layers from the forward to the backward pass, and as
                 much as it keeps in one layer for the gradients inside one; with gradient checkpointing fixed + N *
                 checkpointed: the inputs of all layers, and one layer with its gradients. On a CPU, plus N times the
                 bytes of the attention's weights that `_DenseAttention` keeps for a token, in all layers or in one
    logits       4 M, in half precision 2 M, with M = min(N V, MAX_LOGITS); a reward model has none
    allocator    holes that freed tensors leave in the heap of the C library: a share of activations and logits
    libraries    the process before it has a model

The first three are exact. The sum is the peak of a step, the end of the forward pass of its last
micro-batch, with rows as long as the data allows and a target at every token. A pair of responses is one row: of
preference tasks, N is that of both. Their reference is no second model, but numbers on the disk.
"""

import dataclasses
import os
from collections.abc import Iterable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from sheeprlhf.model.adapter import add_lora, with_adapter
from sheeprlhf.model.attention import placeholder_mask
from sheeprlhf.model.folder.account import HEAD
from sheeprlhf.model.folder.architecture import decoder_blocks, num_positions_of, packing_limit
from sheeprlhf.model.folder.load import load_causal_lm, with_score_head
from sheeprlhf.model.folder.quantize import check_quantizable, quantized_savings
from sheeprlhf.model.lm_head import MAX_LOGITS, backbone_and_head
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.structure.run import AdamW8bitConfig, OptimizerConfig, SGDConfig
from sheeprlhf.utils.errors import ModelError
from sheeprlhf.utils.processes import interrupts_wait

LIBRARIES = 520_000_000  # of a process that has imported torch, transformers and peft; a CUDA context is as large
HOLES = {"ALL": 0.8, "LORA": 1.4}  # measured with glibc: docs/performance.md
NO_HOLES = "MALLOC_MMAP_THRESHOLD_"  # environment variable of glibc: larger tensors than that are given back when freed
_TOKENS = 251  # a prime: a tensor has one dimension for tokens exactly if its size is a multiple
MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_TRUE = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


class ModelSize(NamedTuple):
    """Sizes of a model's weights and of the activations of its forward pass; in bytes unless another unit is given."""

    parameters: int  # P, a number
    weights: int  # all parameters and buffers
    trainable: int  # the parameters that train
    trainable_tensors: int  # how many tensors these are
    saved: int  # what `final/` holds: the model, or its adapters only
    fixed: int  # kept for the backward pass whatever the number of tokens
    per_token: int  # needed for each token
    checkpointed: int  # needed for each token with gradient checkpointing
    vocabulary: int  # V, a number; 0 for a model whose head gives a score
    half: bool  # the head computes in half precision
    positions: int | None  # the longest row that it can read, in tokens; None where nothing limits it
    trainable_numbers: int = 0  # Q
    block: int = 0  # parameters of the largest decoder block, a number
    outside: int = 0  # parameters around the decoder blocks, a number
    head: int = 0  # weights of the language head, a number
    attention: int = 0  # needed on a CPU for a token and each key whose weight attention keeps, in all layers
    attention_layers: int = 1  # a number


class MemoryPlan(NamedTuple):
    """Peak bytes of one process in a step.

    `others`: of models besides the one that learns; `gathered`: whole weights and gradients of sharded blocks.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    allocator: int
    libraries: int
    others: int = 0
    gathered: int = 0

    def total(self) -> int:
        """All of them together."""
        return sum(self)


def build_on_meta(cfg: ModelConfig, *, scores: bool, vocabulary: int = 0) -> tuple[PreTrainedModel, nn.Module]:
    """Build what a run trains out of tensors without content; no weight is read.

    Args:
        cfg: the model's configuration.
        scores: it becomes a reward model.
        vocabulary: rows that the tokenizer's ids need.

    Returns:
        The causal language model, and the model that trains, with its adapters or its score head.

    Raises:
        ModelError: its config.json cannot be found or read, its adapters or the tokenizer do not fit it, or it cannot
            be quantised as asked.
    """
    plain = dataclasses.replace(cfg, random_init=True, gradient_checkpointing=False, quantization=None)
    if scores:
        plain = dataclasses.replace(plain, freeze_transformer=False)
    with torch.device("meta"):
        causal_lm = load_causal_lm(plain, vocabulary=vocabulary, longest=0)
        if cfg.quantization is not None:
            check_quantizable(causal_lm, cfg)
        whole = with_score_head(causal_lm, 0) if scores else causal_lm
        if scores and cfg.freeze_transformer:
            whole.requires_grad_(False)
            getattr(whole, HEAD).requires_grad_(True)
        freeze_layers(whole, cfg.frozen_layers)
        if cfg.finetune_mode == "LORA" and cfg.lora_cfg is not None:
            return causal_lm, add_lora(whole, cfg.lora_cfg, head=HEAD) if scores else with_adapter(causal_lm, cfg)
    return causal_lm, whole


def measure(cfg: ModelConfig, precision: str, scores: bool = False) -> ModelSize:
    """The size of a model as it is trained in one of the precisions of `fabric.precision`.

    Args:
        cfg: the model's configuration.
        precision: that of the training.
        scores: it becomes a reward model.

    Raises:
        ModelError: its config.json cannot be had or read, its adapters do not fit it, or its code reads tensors.
    """
    causal_lm, model = build_on_meta(cfg, scores=scores)
    adapted = cfg.finetune_mode == "LORA" and cfg.lora_cfg is not None
    if precision in _TRUE:
        model = model.to(_TRUE[precision])
    try:
        fixed, per_token, hidden, attention = _kept_bytes(causal_lm, MIXED.get(precision))
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # a way that needs the tensors' content
        raise ModelError(f"{type(causal_lm).__name__} cannot be run on tensors without content: {error}") from error
    layers = int(getattr(causal_lm.config.get_text_config(), "num_hidden_layers", 1))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    blocks = [sum(p.numel() for p in block.parameters()) for block in decoder_blocks(model)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    head = cast(Tensor, backbone_and_head(causal_lm)[1].weight)
    return ModelSize(
        parameters=parameters,
        weights=_size([*model.parameters(), *model.buffers()]) - quantized_savings(causal_lm, cfg.quantization),
        trainable=_size(trainable),
        trainable_tensors=len(trainable),
        saved=_size(trainable if adapted else model.parameters()),
        fixed=fixed,
        per_token=per_token + per_token // layers,
        checkpointed=layers * hidden.shape[-1] * hidden.itemsize + 2 * per_token // layers,
        vocabulary=0 if scores else head.shape[0],
        half=precision in MIXED or next(backbone_and_head(causal_lm)[0].parameters()).itemsize == 2,
        positions=num_positions_of(causal_lm.config),
        trainable_numbers=sum(parameter.numel() for parameter in trainable),
        block=max(blocks, default=0),
        outside=parameters - sum(blocks),
        head=head.numel(),
        attention=sum(attention),
        attention_layers=max(1, len(attention)),
    )


def freeze_layers(model: nn.Module, number: int) -> None:
    """Freeze the embeddings and the first layers of a model, as trlX does in reward models; nothing if `number` is 0.

    Raises ModelError if no layer is left to train.
    """
    blocks = decoder_blocks(model) if number else []
    if number and number >= len(blocks):
        raise ModelError(
            f"model.frozen_layers={number} leaves no layer to train: the model has {len(blocks)}, give at most "
            f"model.frozen_layers={max(0, len(blocks) - 1)}"
        )
    embeddings = [part for part in model.modules() if isinstance(part, nn.Embedding)] if number else []
    for part in (*embeddings, *blocks[:number]):
        part.requires_grad_(False)


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _kept_bytes(model: Any, mixed: torch.dtype | None) -> tuple[int, int, Tensor, list[int]]:
    """Bytes that autograd keeps of a forward pass besides the weights: in all, and for each token; the hidden states.

    The tensors without content go the way that real ones go on the CPU, in short rows. The last result is the bytes for
    each token and key of each layer that keeps its attention's weights in longer ones.
    """
    kept: dict[int, Tensor] = {}  # by storage: what shares one is counted once

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    backbone, _ = backbone_and_head(model)
    with interrupts_wait(), FakeTensorMode(allow_non_fake_inputs=True):  # cut short, it would end the process
        own = {
            name: torch.empty_like(tensor, device="cpu").requires_grad_(tensor.requires_grad)
            for name, tensor in [*backbone.named_parameters(), *backbone.named_buffers()]
        }
        ids = torch.zeros(1, _TOKENS, dtype=torch.long)
        inputs: dict[str, Any] = {"input_ids": ids, "position_ids": torch.arange(_TOKENS)[None], "use_cache": False}
        if not packing_limit(model, _TOKENS):
            # num_tokens=0: the way of short rows
            layout = SimpleNamespace(segments=((1, (_TOKENS - 1,)),), max_key=_TOKENS, num_tokens=0)
            inputs |= {"layout": layout, "attention_mask": placeholder_mask(ids)}
        autocast = torch.autocast("cpu", mixed) if mixed is not None else nullcontext()
        calls = _ObservedCalls()
        with autocast, calls, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            hidden = functional_call(backbone, own, kwargs=inputs).last_hidden_state
        weights = {tensor.untyped_storage()._cdata for tensor in own.values()}
        sizes = [tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights]
    of_tokens = sum(size for size in sizes if size % _TOKENS == 0)
    return sum(sizes) - of_tokens, of_tokens // _TOKENS, hidden, calls.attention if "layout" in inputs else []


class _ObservedCalls(TorchFunctionMode):
    """Notes calls of attention that keep weights in longer rows, and replaces products with the matrices of experts.

    The product with one of their matrices has the same shape. torch has shapes for its own function in bfloat16 only.
    For tensors without content in another number format it prints a traceback, although it computes such products of
    real ones. Both keep the rows for the backward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attention: list[int] = []  # bytes of the weights of a token and a key, of each call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The product of rows and matrices as (S, K) @ (K, N), with one of the matrices; other calls as they are."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention" and kwargs.get("is_causal") and not kwargs.get("enable_gqa"):
            query_BHTD = args[0]
            if args[4] == 0.0 and any(x.requires_grad for x in args[:3]):  # without dropout; something learns
                self.attention.append(query_BHTD.shape[1] * query_BHTD.itemsize)
        if name not in ("grouped_mm", "_grouped_mm"):
            return func(*args, **kwargs)
        rows_SK, weight_EKN = args[:2]
        with torch.autocast(rows_SK.device.type, enabled=False):  # torch does not cast these
            return rows_SK @ weight_EKN[0]


def optimizer_bytes(cfg: OptimizerConfig, size: ModelSize) -> int:
    """Bytes of the optimizer's state after its first step."""
    if isinstance(cfg, SGDConfig):
        return size.trainable if cfg.momentum else 0
    if isinstance(cfg, AdamW8bitConfig):  # two moments of a byte, with a scale for every 256 numbers
        return size.trainable // 2 + size.trainable // 128
    return 2 * size.trainable + 4 * size.trainable_tensors  # two moments, and a count of steps per tensor


def allocator_share(device: str, finetune_mode: str) -> float:
    """Share of heap fragmentation in activations and logits; zero on CUDA, or where glibc's settings prevent it."""
    threshold = os.environ.get(NO_HOLES, "")
    small = threshold.isdigit() and int(threshold) <= 1 << 20
    return 0.0 if device == "cuda" or small else HOLES[finetune_mode]


def plan(
    size: ModelSize, optim: OptimizerConfig, *, tokens: int, checkpointing: bool, allocator_share: float, keys: int = 0
) -> MemoryPlan:
    """The memory of one process, by the formulas above.

    Args:
        size: the model's.
        optim: the optimizer.
        tokens: N, of one forward pass.
        checkpointing: activations are recomputed.
        allocator_share: what the allocator adds to activations and logits.
        keys: whose attention weights a token keeps, `most_kept_keys`.
    """
    attention = keys * size.attention // (size.attention_layers if checkpointing else 1)
    activations = size.fixed + tokens * ((size.checkpointed if checkpointing else size.per_token) + attention)
    logits = min(tokens * size.vocabulary, MAX_LOGITS) * (2 if size.half else 4)
    return MemoryPlan(
        weights=size.weights,
        gradients=size.trainable,
        optimizer=optimizer_bytes(optim, size),
        activations=activations,
        logits=logits,
        allocator=int(allocator_share * (activations + logits)),
        libraries=LIBRARIES,
    )
