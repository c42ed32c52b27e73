"""The language model that is trained, from a batch to the log-probabilities of its targets; its reference and average.

Letters: B rows, T positions, R positions where the head runs, N targets, C hidden width.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Unpack, cast

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sheeprlhf.agent.batches import choose_packed
from sheeprlhf.data.example import Batch
from sheeprlhf.engine.checkpoint import saved_tensors
from sheeprlhf.model.adapter import (
    POLICY,
    REFERENCE,
    adapter_in_use,
    adapters_off,
    add_second_adapter,
    copy_adapter,
    load_lora,
    merge_lora,
    save_model,
    with_adapter,
)
from sheeprlhf.model.attention import logits_at, placeholder_mask
from sheeprlhf.model.folder.load import load_causal_lm
from sheeprlhf.model.lm_head import (
    LogprobOptions,
    TokenLogprobs,
    backbone_and_head,
    head_logprobs,
    head_scores,
    last_block_at_tails,
    logprobs_from_logits,
)
from sheeprlhf.model.locate import locate_adapter
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.utils.end_tokens import add_end_ids
from sheeprlhf.utils.errors import Notify
from sheeprlhf.utils.memory import phase
from sheeprlhf.utils.modes import accepted, inputs_of
from sheeprlhf.utils.vocabulary import num_rows_needed, undefined_ids


class Policy(nn.Module):
    """A causal language model, whole or with adapters, that scores the targets of a packed or padded batch."""

    forward_methods = ("hidden_at_head",)  # further entries, for fsdp2

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model
        self.value_head: nn.Linear | None = None  # (C -> 1), makes the trunk a critic too
        self.packed = True  # its batches are packed; set when it is loaded
        self.undefined_U: Tensor | None = None  # ids that have probability 0, on the host
        self.neftune_alpha: float | None = None  # of the noise on embeddings in training mode; see `noisy_embeddings`

    def exclude_undefined(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """From now on, ids that the tokenizer does not define have probability 0, as in sampling.

        What samples, or learns from samples, calls this first; a reference is copied afterwards.
        """
        rows = cast(Tensor, self.causal_lm().get_output_embeddings().weight).shape[0]
        undefined = undefined_ids(tokenizer, rows)
        self.undefined_U = None if undefined is None else torch.from_numpy(undefined)

    def causal_lm(self) -> PreTrainedModel:
        """The Hugging Face model; with adapters, the one that they sit in."""
        return cast(PreTrainedModel, self.model.get_base_model()) if isinstance(self.model, PeftModel) else self.model

    def in_use(self) -> AbstractContextManager[None]:
        """Inside, of all weights those of the policy alone can get gradients: others may have adapters on its model."""
        return adapter_in_use(self.model, POLICY) if isinstance(self.model, PeftModel) else nullcontext()

    def forward(self, batch: Batch, router: bool = False, **options: Unpack[LogprobOptions]) -> TokenLogprobs:
        """Log-probabilities of the batch's targets, float32, nats; those of packed and padded batches are equal.

        `router` adds the logits of a mixture of experts' routers, of all tokens but padding.
        """
        model, found = self.causal_lm(), None
        with ExitStack() as stack:
            if self.training and self.neftune_alpha is not None:
                stack.enter_context(noisy_embeddings(model.get_input_embeddings(), batch, self.neftune_alpha))
            if router:
                backbone, _ = backbone_and_head(model)
                found = stack.enter_context(router_logits_of(backbone, batch.attention_mask_BT))
            options["undefined_U"] = self.undefined_U
            logprobs = self._logprobs(batch, **options)
        return logprobs if found is None else logprobs._replace(router_logits=tuple(found))

    def _logprobs(self, batch: Batch, **options: Unpack[LogprobOptions]) -> TokenLogprobs:
        model = self.causal_lm()
        if batch.layout is None:
            head_mask_BT = torch.zeros_like(batch.input_ids_BT, dtype=torch.bool)
            head_mask_BT.view(-1)[batch.head_positions_R] = True
            with inputs_of(model.get_output_embeddings()) as inputs:
                logits_RV = logits_at(
                    model,
                    head_mask_BT,
                    input_ids=batch.input_ids_BT,
                    attention_mask=batch.attention_mask_BT,
                    position_ids=batch.position_ids_BT,
                )
            logprobs = logprobs_from_logits(logits_RV, batch.logit_index_N, batch.target_ids_N, **options)
            hidden = inputs[0][head_mask_BT] if inputs[0].shape[:2] == head_mask_BT.shape else inputs[0]
            hidden_RC = hidden.flatten(0, -2)
        else:
            backbone, head = backbone_and_head(model)
            hidden_RC = hidden_at_head(backbone, batch)
            logprobs = head_logprobs(hidden_RC, head, batch.logit_index_N, batch.target_ids_N, **options)
        if self.value_head is None:
            return logprobs
        return logprobs._replace(value_N=head_scores(hidden_RC, self.value_head)[batch.logit_index_N])

    def hidden_at_head(self, batch: Batch) -> Tensor:
        """(R, C) last hidden states where the batch's head runs, for another head than the policy's."""
        return hidden_at_head(backbone_and_head(self.causal_lm())[0], batch)

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write what `from_pretrained` loads: the model, or its adapters, and the tokenizer."""
        add_end_ids(self.causal_lm().generation_config, tokenizer)
        save_model(self.model, folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def noisy_embeddings(embedding: nn.Module, batch: Batch, alpha: float) -> Iterator[None]:
    """Add NEFTune's noise to the embeddings of a batch during the block (arXiv 2310.05914, algorithm 1).

    Each number e of an embedding becomes e + alpha / sqrt(L * C) * u with u ~ Uniform(-1, 1), where L is the number of
    tokens of the row that the token belongs to, its prompt and response, however the batch is laid out.
    """
    if batch.layout is None:
        assert batch.attention_mask_BT is not None
        lengths_BT = batch.attention_mask_BT.sum(dim=1, keepdim=True)
    else:
        sizes = torch.tensor([num_prompt + sum(responses) for num_prompt, responses in batch.layout.segments])
        lengths_BT = sizes.repeat_interleave(sizes)[None].to(batch.input_ids_BT.device, non_blocking=True)

    def add_noise(_: nn.Module, __: Any, embeddings_BTC: Tensor) -> Tensor:
        scale_BT = alpha / (lengths_BT * embeddings_BTC.shape[-1]).sqrt()
        noise_BTC = torch.empty_like(embeddings_BTC).uniform_(-1.0, 1.0)
        return embeddings_BTC + noise_BTC * scale_BT[..., None].to(noise_BTC.dtype)

    with embedding.register_forward_hook(add_noise):
        yield


@contextmanager
def router_logits_of(backbone: nn.Module, real_BT: Tensor | None) -> Iterator[list[Tensor]]:
    """Collect the (T, E) router logits of each layer within the block, of tokens that `real_BT` tells from padding."""
    found: list[Tensor] = []

    def ask(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"output_router_logits": True}

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        layers = [logits.flatten(0, -2) for logits in output.router_logits]
        found.extend(layers if real_BT is None else [logits[real_BT.flatten()] for logits in layers])

    with backbone.register_forward_pre_hook(ask, with_kwargs=True), backbone.register_forward_hook(keep):
        yield found


def hidden_at_head(backbone: nn.Module, batch: Batch) -> Tensor:
    """(R, C) last hidden states of a model without its head, where the batch's head runs."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids_BT, "position_ids": batch.position_ids_BT}
    if batch.layout is None:
        inputs = accepted(backbone, **inputs, attention_mask=batch.attention_mask_BT)
        hidden_BTC = backbone(use_cache=False, **inputs).last_hidden_state
    else:
        inputs |= {"attention_mask": placeholder_mask(batch.input_ids_BT), "layout": batch.layout}
        with last_block_at_tails(backbone, batch.layout):
            hidden_BTC = backbone(use_cache=False, **inputs).last_hidden_state
        if hidden_BTC.shape[1] != batch.input_ids_BT.shape[1]:
            return hidden_BTC[0].index_select(0, torch.searchsorted(batch.layout.tail_index, batch.head_positions_R))
    return hidden_BTC.flatten(0, 1).index_select(0, batch.head_positions_R)


@phase("loading the model")
def load_policy(
    cfg: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest: int,
    batching: str,
    say: Notify = lambda _: None,
    new_head: bool = False,
    in_files: bool = False,
) -> Policy:
    """Load the model, with adapters if asked, and decide whether its batches are packed; see `choose_packed`.

    `new_head` and `in_files` are those of `load_causal_lm`.
    Raises ModelError if the model cannot be loaded, is too small for the data, or batching=packed and it cannot do it.
    """
    rows = num_rows_needed(tokenizer)
    model = load_causal_lm(cfg, vocabulary=rows, longest=longest, new_head=new_head, in_files=in_files, say=say)
    policy = Policy(model)
    if cfg.finetune_mode == "LORA" and cfg.lora_cfg is not None:
        policy.model = with_adapter(model, cfg, say)
    elif cfg.adapter is not None:
        policy.model = adapted = load_lora(model, locate_adapter(cfg.adapter), say)
        if cfg.quantization is None:
            say(f"model.adapter={cfg.adapter} is merged into the weights")
            policy.model = merge_lora(adapted).model
    policy.packed = choose_packed(policy, policy.causal_lm(), longest=longest, batching=batching, say=say)
    return policy


class SharedReference(nn.Module):
    """Reference of a policy with adapters, on its base: without them, or with a copy of those that it started from.

    Args:
        policy: a policy with adapters.
        adapter: name of the adapter that holds the copy; None computes without adapters.
    """

    def __init__(self, policy: Policy, adapter: str | None = None) -> None:
        super().__init__()
        self._policy = (policy,)  # hidden from torch: its weights are not this module's
        self._adapter = adapter

    @property
    def policy(self) -> Policy:
        """The policy with the adapters."""
        [policy] = self._policy
        return policy

    def forward(self, batch: Batch, temperature: float = 1.0) -> TokenLogprobs:
        """As `Policy.forward`; also after an error the adapters are on again."""
        policy = self.policy
        assert isinstance(policy.model, PeftModel)
        with adapters_off(policy.model) if self._adapter is None else adapter_in_use(policy.model, self._adapter):
            return policy(batch, temperature=temperature)


def reference_of(policy: Policy, *, new_adapter: bool = True) -> Policy | SharedReference:
    """The policy as it is now, for later, when it has moved; before training and before a checkpoint is restored.

    Args:
        policy: the policy.
        new_adapter: its adapters, if it has some, are new: they change nothing yet.
    """
    if isinstance(policy.model, PeftModel):
        if new_adapter:
            return SharedReference(policy)
        config = cast(LoraConfig, copy.deepcopy(policy.model.peft_config[POLICY]))
        add_second_adapter(policy.model, REFERENCE, config, trains=False)
        copy_adapter(policy.model, POLICY, REFERENCE)
        return SharedReference(policy, REFERENCE)
    reference = copy.deepcopy(policy).eval()
    reference.requires_grad_(False)
    return reference


class EMA(nn.Module):
    """Exponential moving average of the trained weights: average <- decay * average + (1 - decay) * weight.

    It starts as a copy of the policy. Its weights have the policy's names, so that a checkpoint's load into a policy.

    Args:
        policy: only its trained weights are held a second time. Made inside `policy.in_use()`.
        decay: between 0 and 1.
    """

    def __init__(self, policy: Policy, decay: float) -> None:
        super().__init__()
        self._decay = decay
        self._averages: list[Tensor] = []
        self._weights: list[Tensor] = []  # a list: these weights are not this module's
        for name, tensor in saved_tensors(policy.model).items():
            *path, leaf = f"model.{name}".split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_buffer(leaf, tensor.detach().clone())
            if tensor.is_floating_point():
                self._averages.append(getattr(module, leaf))
                self._weights.append(tensor)

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights after an optimizer step."""
        for average, weight in zip(self._averages, self._weights, strict=True):
            average.lerp_(weight, 1.0 - self._decay)

    @contextmanager
    def swap_in(self) -> Iterator[None]:
        """Give the policy the averaged weights within the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, weight in zip(self._averages, self._weights, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
