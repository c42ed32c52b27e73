"""Forward passes over padded rows, by models whose code may lack an argument that most have.

Letters: B rows, T positions, R positions that are kept, V vocabulary.
"""

import inspect
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel


def accepted(module: nn.Module, **inputs: Any) -> dict[str, Any]:
    """The arguments that a module's forward takes, by name or as any keyword."""
    parameters = inspect.signature(module.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return inputs
    return {name: value for name, value in inputs.items() if name in parameters}


def no_router_logits(model: PreTrainedModel) -> dict[str, bool]:
    """Arguments of a forward pass that make a mixture of experts skip its router's loss.

    With a cache, transformers would compare a mask of all tokens with the logits of the new ones, and fail.
    """
    name = "output_router_logits"
    asked = getattr(model.config.get_text_config(), name, False) and name in inspect.signature(model.forward).parameters
    return {name: False} if asked else {}


def logits_at(model: PreTrainedModel, keep_BT: Tensor, **inputs: Any) -> Tensor:
    """(R, V) logits at the kept positions, row after row, without a cache.

    Args:
        model: a language model.
        keep_BT: (B, T) bool.
        **inputs: `input_ids`, `attention_mask` and `position_ids`, (B, T). The last is left out where the model counts
            positions itself, which gives the same for rows padded on the right.
    """
    output = cast(Any, model)(
        **accepted(model, **inputs, logits_to_keep=keep_BT, use_cache=False), **no_router_logits(model)
    )
    logits: Tensor = output.logits
    return logits[keep_BT] if logits.shape[:2] == keep_BT.shape and logits.dim() == 3 else logits.flatten(0, -2)
