"""The load-balancing loss of a mixture of experts, as a sum over the tokens of an optimizer step.

Switch Transformer (arXiv 2101.03961, eq. 4 to 6), as transformers computes it for one forward pass: E * sum f_e * P_e,
with f_e the picks of expert e for each token and P_e its mean probability, both over all tokens of all layers. This is
no mean over tokens: the loss of two forward passes together is not the mean of their losses. But f_e has no gradient,
so with the f_e of the whole step the rest is a sum over tokens, and the cut into micro-batches changes nothing.

Letters: T tokens, E experts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sheeprlhf.utils.errors import Notify
from sheeprlhf.utils.modes import eval_mode

_RELATIVE = {torch.bfloat16: 0.1, torch.float16: 0.02}  # transformers rounds probabilities to the weights' format


class RouterLoss(NamedTuple):
    """Settings of the router's loss in a model's configuration."""

    coefficient: float  # what the loss is multiplied by
    top_k: int  # experts that compute each token
    num_experts: int  # E

    def value(self, counts_E: Tensor, probabilities_E: Tensor, num_rows: float) -> Tensor:
        """() the loss, times its coefficient.

        Args:
            counts_E: (E,) how often each expert was picked, in all layers.
            probabilities_E: (E,) sums of its probability.
            num_rows: tokens times layers that both are of.
        """
        mean_E = probabilities_E / num_rows
        return self.coefficient * self.num_experts * (counts_E.to(mean_E.dtype) / num_rows * mean_E).sum()


def expert_counts(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """(E,) float64, how often each expert is among the likeliest of a token; all layers together.

    Args:
        router_logits: of each layer with experts, (T, E).
        top_k: picks of a token.
    """
    num_experts = router_logits[0].shape[-1]
    picks = [logits_TE.topk(top_k, dim=-1).indices.flatten() for logits_TE in router_logits]
    return torch.bincount(torch.cat(picks), minlength=num_experts).double()


def probability_sums(router_logits: Sequence[Tensor]) -> Tensor:
    """(E,) float32, the probability of each expert, summed over tokens and layers; with its graph."""
    return torch.stack([logits_TE.float().softmax(dim=-1).sum(dim=0) for logits_TE in router_logits]).sum(dim=0)


@contextmanager
def router_logits_of(backbone: nn.Module, real_BT: Tensor | None) -> Iterator[list[Tensor]]:
    """Collect the (T, E) router logits of each layer that the backbone computes inside.

    Args:
        backbone: the model without its head.
        real_BT: (B, T) bool, the tokens that are not padding; None: all.
    """
    found: list[Tensor] = []

    def ask(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"output_router_logits": True}

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        layers = [logits.flatten(0, -2) for logits in output.router_logits]
        found.extend(layers if real_BT is None else [logits[real_BT.flatten()] for logits in layers])

    hooks = [backbone.register_forward_pre_hook(ask, with_kwargs=True), backbone.register_forward_hook(keep)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def configured_router_loss(model: PreTrainedModel) -> float:
    """The coefficient of the router's loss; 0 where the configuration does not ask for one."""
    config = model.config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", None) or 0.0
    return float(coefficient) if getattr(config, "output_router_logits", False) else 0.0


def router_loss_of(model: PreTrainedModel) -> RouterLoss | None:
    """The router's loss, if it is the one that is computed here: the two are compared on a few tokens.

    Args:
        model: a causal language model whose configuration asks for the loss.
    """
    top_k = getattr(model, "num_experts_per_tok", None) or getattr(model.config, "num_experts_per_tok", None)
    if not isinstance(top_k, int):
        return None
    ids = (torch.arange(12, device=model.device) % 5 + 3)[None]
    with eval_mode(model), torch.no_grad():
        try:
            output = cast(Any, model)(input_ids=ids, output_router_logits=True, use_cache=False)
            logits = [layer.flatten(0, -2) for layer in output.router_logits]
            loss = RouterLoss(1.0, top_k, logits[0].shape[-1])
            ours = loss.value(expert_counts(logits, top_k), probability_sums(logits), sum(map(len, logits)))
            theirs = float(output.aux_loss)
        except (TypeError, ValueError, AttributeError, LookupError):  # it has no such loss, or another one
            return None
    same = abs(float(ours) - theirs) <= _RELATIVE.get(model.dtype, 1e-4) * abs(theirs)
    return loss._replace(coefficient=configured_router_loss(model)) if same else None


class StepRouterLoss(NamedTuple):
    """The router's loss of one step, of which each micro-batch computes its share."""

    loss: RouterLoss  # the model's
    counts_E: Tensor  # (E,) picks of each expert, over the step's tokens of all ranks
    num_rows: float  # tokens times layers, of all ranks
    num_items: float  # what the step divides its sums by

    def share(self, router_logits: tuple[Tensor, ...]) -> Tensor:
        """() a micro-batch's part of the step's loss, times the items that the step divides by."""
        return self.loss.value(self.counts_E, probability_sums(router_logits), self.num_rows) * self.num_items


def router_loss_in_training(model: PreTrainedModel, say: Notify) -> RouterLoss | None:
    """The loss that the model's configuration asks for; a line says that it counts, or that it cannot."""
    coefficient = configured_router_loss(model)
    if not coefficient:
        return None
    found = router_loss_of(model)
    if found is None:
        _say_left_out(coefficient, f"that of {type(model).__name__} is not computed here", say)
    else:
        say(f"the training loss includes the router's loss of the model's config, router_aux_loss_coef={coefficient:g}")
    return found


def say_router_loss_left_out(model: PreTrainedModel, task: str, say: Notify) -> None:
    """Report once that a task does not train with the router's loss although the model's configuration asks for it."""
    if coefficient := configured_router_loss(model):
        _say_left_out(coefficient, f"task={task} trains without it", say)


def _say_left_out(coefficient: float, why: str, say: Notify) -> None:
    say(
        f"the model's config asks for the router's loss (output_router_logits, router_aux_loss_coef={coefficient:g}): "
        f"{why}"
    )
