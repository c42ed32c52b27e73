"""Linear layers that keep 4 or 8 bits of each weight, by bitsandbytes; adapters train on them (QLoRA).

- nf4 (Dettmers et al., 2023, arXiv 2305.14314): 4 bits of each weight, and a float32 scale for every 64 weights.
- int8 (Dettmers et al., 2022, arXiv 2208.07339): 8 bits of each weight, and a float32 scale for every output.

Both compute with the dequantised weights in the number format of their input, in training and in evaluation.
Activations are not quantised, so that a row has the same result in every batch. The language head, a score head and
the embedding stay as they are.
"""

from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.utils.errors import ModelError

_BLOCK = 64  # weights that share a scale in nf4
_FLAGS = {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}  # attributes by which PEFT chooses its layers


@cache
def _layers() -> dict[str, type[nn.Linear]]:
    """The linear layer of each format; bitsandbytes is optional, and slow to import."""
    import bitsandbytes as bnb
    from bitsandbytes.autograd._functions import MatMul8bitFp

    class NF4Linear(bnb.nn.Linear4bit):
        """Replaces a forward pass that, in evaluations on some CPUs, makes the weights unusable for training."""

        def forward(self, x: Tensor) -> Tensor:
            x = _as_computed(x)
            weight: Any = self.weight
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return bnb.matmul_4bit(x, weight, bias=bias, quant_state=weight.quant_state)

    class Int8Linear(bnb.nn.Linear8bitLt):
        """Replaces a forward pass that quantises the activations too: always on GPUs, and in evaluations on CPUs."""

        def forward(self, x: Tensor) -> Tensor:
            x = _as_computed(x)
            weight: Any = self.weight
            weight.SCB = weight.SCB.to(x.device)  # torch moves the weight alone
            bias = None if self.bias is None else self.bias.to(x.dtype)
            state = SimpleNamespace(CB=weight.data, SCB=weight.SCB, has_fp16_weights=False)
            return cast(Tensor, MatMul8bitFp.apply(x, weight, None, bias, state))

    return {"nf4": NF4Linear, "int8": Int8Linear}


def _as_computed(x: Tensor) -> Tensor:
    """In the number format that torch's own linear layer would compute in."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def quantization_options(cfg: ModelConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise each weight as it is read; none without `model.quantization`."""
    if cfg.quantization is None:
        return {}
    config = BitsAndBytesConfig(
        load_in_4bit=cfg.quantization == "nf4", load_in_8bit=cfg.quantization == "int8", bnb_4bit_quant_type="nf4"
    )
    return {"quantization_config": config, "device_map": {"": "cpu"}}


def use_quantized_layers(model: PreTrainedModel, cfg: ModelConfig) -> None:
    """Give a model that was loaded with `quantization_options` the layers of this module, and no traces of loading."""
    if cfg.quantization is None:
        return
    own = _layers()[cfg.quantization]
    for module in model.modules():
        if isinstance(module, cast(type, own.__base__)):
            module.__class__ = own
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.clone()  # a part of a mapped file keeps the whole file in memory
    del model.config.quantization_config
    plain: Any = model
    plain.hf_quantizer, plain.is_quantized = None, False
    _mark(model, cfg.quantization)


def _mark(model: PreTrainedModel, scheme: str | None) -> None:
    for name, flag in _FLAGS.items():
        setattr(model, flag, name == scheme)


def quantization_of(model: nn.Module) -> str | None:
    """The format of the linear layers of a model; None if they are as usual."""
    return next((name for name, flag in _FLAGS.items() if getattr(model, flag, False)), None)


def keep_quantization(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Mark a model whose layers are those of another one."""
    _mark(model, quantization_of(other))


def quantize(model: PreTrainedModel, scheme: str | None) -> None:
    """Quantise the linear layers of a model in memory, where they are not quantised yet."""
    if scheme is None or quantization_of(model) == scheme:
        return
    import bitsandbytes as bnb

    for name, layer in [*_replaced(model)]:
        weight = layer.weight.data.T.contiguous() if isinstance(layer, Conv1D) else layer.weight.data
        with torch.device("meta"):
            new: Any = _layers()[scheme](weight.shape[1], weight.shape[0], bias=False)
        if scheme == "nf4":
            options = {"quant_type": "nf4", "compress_statistics": False, "module": new}
            new.weight = bnb.nn.Params4bit(weight, requires_grad=False, **options)
        else:
            new.weight = bnb.nn.Int8Params(weight, requires_grad=False)
        new.weight = new.weight.to(weight.device)
        new.bias, new.source_cls = layer.bias, type(layer)
        model.set_submodule(name, new.train(layer.training))
    _mark(model, scheme)


def dequantize(model: PreTrainedModel) -> None:
    """Replace the quantised layers of a model without adapters by usual ones, with the weights that they stand for."""
    import bitsandbytes as bnb

    scheme, dtype = quantization_of(model), cast(Tensor, model.get_input_embeddings().weight).dtype
    for name, layer in [*model.named_modules()] if scheme else ():
        if not isinstance(layer, _layers()[cast(str, scheme)]):
            continue
        weight: Any = layer.weight
        if scheme == "nf4":
            state = weight.quant_state
            options = {"blocksize": state.blocksize, "quant_type": "nf4", "shape": state.shape, "dtype": dtype}
            full = torch.ops.bitsandbytes.dequantize_4bit.default(weight.data.view(-1, 1), state.absmax, **options)
        else:
            full = bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB).to(dtype)
        with torch.device("meta"):
            of_gpt2 = cast(Any, layer).source_cls is Conv1D
            new: Any = Conv1D(*full.shape) if of_gpt2 else nn.Linear(full.shape[1], full.shape[0], bias=False)
        new.weight = nn.Parameter(full.T.contiguous() if of_gpt2 else full, requires_grad=False)
        new.bias = layer.bias
        model.set_submodule(name, new.train(layer.training))
    _mark(model, None)


def _replaced(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """The layers that are quantised, by name: those that transformers chooses."""
    kept = get_keys_to_not_convert(model)
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, Conv1D) and ".lora_" not in name and should_convert_module(name, kept):
            yield name, module


def check_quantizable(model: PreTrainedModel, cfg: ModelConfig) -> None:
    """Reject a model that cannot be quantised; tensors without content do.

    Raises ModelError if weights would stay as they are, or a module that is quantised is to be trained as a whole.
    """
    given = f"model.quantization={cfg.quantization}"
    experts = next((name for name, weight in model.named_parameters() if "experts" in name and weight.ndim == 3), None)
    if experts is not None:
        raise ModelError(
            f"{given}: {type(model).__name__} joins the weights of its experts in one tensor, {experts}, which "
            "bitsandbytes does not quantise: remove the option, or give another model"
        )
    names = [name for name, _ in _replaced(model)]
    whole = [] if cfg.lora_cfg is None or cfg.finetune_mode != "LORA" else cfg.lora_cfg.modules_to_save
    for wanted in whole:
        if any(f".{wanted}." in f".{name}." for name in names):
            raise ModelError(
                f"{given}: model.lora_cfg.modules_to_save={wanted} is quantised and cannot be trained as a whole: "
                "leave it out, and give it an adapter"
            )


def quantized_savings(model: PreTrainedModel, scheme: str | None) -> int:
    """Bytes by which quantisation would shrink the weights of a model, with or without adapters."""
    saved = 0
    for _, layer in _replaced(model) if scheme else ():
        weight, outputs = layer.weight, layer.nf if isinstance(layer, Conv1D) else layer.out_features
        count = weight.numel()
        saved += weight.nbytes - (count // 2 + 4 * -(-count // _BLOCK) if scheme == "nf4" else count + 4 * outputs)
    return saved
