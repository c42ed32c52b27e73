"""Models that score: the reward model, and scores by an adapter of the policy's own base.

Letters: N tokens that are scored.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from sheeprlhf.agent.batches import choose_packed
from sheeprlhf.agent.policy import Policy, hidden_at_head
from sheeprlhf.data.example import Batch
from sheeprlhf.model.adapter import adapter_in_use, add_lora, load_lora, save_model
from sheeprlhf.model.folder.account import HEAD
from sheeprlhf.model.folder.load import load_causal_lm, scalar_model
from sheeprlhf.model.folder.weights import read_score_bias
from sheeprlhf.model.lm_head import backbone_and_head, head_logprobs, head_scores
from sheeprlhf.model.memory import freeze_layers
from sheeprlhf.security.model_folder import read_json
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.utils.end_tokens import add_end_ids, padding_token
from sheeprlhf.utils.errors import ModelError, Notify
from sheeprlhf.utils.memory import phase
from sheeprlhf.utils.output import write_file
from sheeprlhf.utils.vocabulary import num_rows_needed

_MAX_OFFSET = 1e30
OFFSET = "reward_offset"  # in config.json: subtracted from the head's score
SEPARATOR = "step_separator"  # in config.json of a process reward model: the text between two steps
_CARD = """\
# A reward model

{load}

`model(**tokenizer(prompt + response + end, return_tensors="pt")).logits` is the raw score of a response, where `end`
is `tokenizer.eos_token`, or the token with which the chat template closes a turn if it wrote the prompt:
its head reads the last token that is not padding, and has no bias. SheepRLHF subtracts `{offset:.6g}`
(`reward_offset` in config.json), so that the responses it was normalised on score 0 on average.
"""
_LOAD_WHOLE = "`AutoModelForSequenceClassification.from_pretrained(folder)` loads it."
_LOAD_ADAPTERS = (
    "PEFT's `AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id="
    "tokenizer.pad_token_id)` loads it: adapters and a head on the model that adapter_config.json names."
)


class RewardModel(nn.Module):
    """A classification model with one label, or a PEFT model around it."""

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model
        self.packed = True  # its batches are packed; set when it is loaded
        self.language_head: nn.Module | None = None  # computes log-probabilities; not saved in `final/`
        self.head_bias = 0.0  # of a head that was made elsewhere; `offset` has it with the sign changed

    def classifier(self) -> PreTrainedModel:
        """The Hugging Face model; with adapters, the one that they sit in."""
        found = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return cast(PreTrainedModel, found)

    def in_use(self) -> AbstractContextManager[None]:
        """Nobody else has adapters on its model."""
        return nullcontext()

    @property
    def offset(self) -> float:
        """Offset that is subtracted from the head's score, so that demonstrations score 0 on average."""
        return float(getattr(self.classifier().config, OFFSET, 0.0))

    @offset.setter
    def offset(self, value: float) -> None:
        setattr(self.classifier().config, OFFSET, value)

    @property
    def step_separator(self) -> str | None:
        """The text between two steps if the model scores steps, else None."""
        return _checked_separator(getattr(self.classifier().config, SEPARATOR, None))

    def keep_language_head(self, causal_lm: PreTrainedModel) -> None:
        """Keep the language head of the model whose layers this one has; unless it is the embedding, it stays as it is.

        Raises ModelError if the log-probabilities are more than its head's.
        """
        self.language_head = backbone_and_head(causal_lm)[1]
        if self.language_head.weight is not causal_lm.get_input_embeddings().weight:
            self.language_head.requires_grad_(False)

    def forward(self, batch: Batch, logprobs: bool = False) -> Tensor:
        """(N,) float32 scores at the targets of a batch made with targets of `data.example.SCORED`.

        With `logprobs`, log-probabilities of the targets of a batch of `targets="response"`, by the language head.
        """
        model = self.classifier()
        hidden_RC = hidden_at_head(getattr(model, model.base_model_prefix), batch)
        scores_R = head_scores(hidden_RC, getattr(model, HEAD))
        if not logprobs:
            return scores_R[batch.logit_index_N] - self.offset
        assert self.language_head is not None
        found = head_logprobs(hidden_RC, self.language_head, batch.logit_index_N, batch.target_ids_N)
        return found.target_N + 0.0 * scores_R.sum()  # all weights take part, or ranks would wait for its gradient

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write what `AutoModelForSequenceClassification` loads, or PEFT on top of it, and the tokenizer."""
        tokenizer.pad_token = padding_token(tokenizer)
        config, offset = self.classifier().config, self.offset
        add_end_ids(config, tokenizer)
        adapters = save_model(self.model, folder)
        if adapters:
            config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        card = _CARD.format(load=_LOAD_ADAPTERS if adapters else _LOAD_WHOLE, offset=offset)
        write_file(folder, "README.md", card.encode())  # over the one of PEFT


def read_score_options(folder: Path) -> tuple[float, str | None]:
    """Offset and step separator in the config.json that `RewardModel.save` has put next to adapters."""
    config = read_json(folder, "config.json")
    return _checked_offset(config.get(OFFSET, 0.0), folder), _checked_separator(config.get(SEPARATOR))


def _checked_offset(offset: Any, folder: object) -> float:
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not abs(offset) < _MAX_OFFSET:
        shown = "a huge number" if type(offset) is int else str(offset)[:40]
        raise ModelError(f"{folder}: {OFFSET} in config.json is {shown}: it must be a number below {_MAX_OFFSET:g}")
    return float(offset)


def _checked_separator(value: Any) -> str | None:
    if value is not None and not (isinstance(value, str) and 0 < len(value) <= 100):
        raise ModelError(f"{SEPARATOR} in a reward model's config.json is {str(value)[:40]!r}: it must be a short text")
    return value


@phase("loading the model")
def load_reward_model(
    cfg: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest: int,
    batching: str,
    say: Notify = lambda _: None,
    in_files: bool = False,
) -> RewardModel:
    """A reward model that is a whole folder.

    Raises ModelError if it cannot be loaded, or batching=packed and it cannot do that.
    """
    auto = AutoModelForSequenceClassification
    rows = num_rows_needed(tokenizer)
    model = load_causal_lm(cfg, vocabulary=rows, longest=longest, auto=auto, in_files=in_files, say=say)
    _checked_offset(getattr(model.config, OFFSET, 0.0), cfg.repo_name)
    getattr(model, HEAD).float()  # as a new one
    reward = RewardModel(model)
    bias = read_score_bias(cfg)
    if bias:  # transformers' class has none
        reward.offset -= bias
        reward.head_bias = bias
        say(f"{cfg.repo_name}: the bias of its score head, {bias:g}, is added to every score")
    reward.packed = choose_packed(reward, model, longest=longest, batching=batching, say=say)
    return reward


def reward_model_of(
    policy: Policy,
    cfg: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    adapter: Path | None = None,
    say: Notify = lambda _: None,
) -> RewardModel:
    """The language model with a score head instead of its own, and adapters if asked: new ones or those of a folder.

    The policy's backbone is used, not copied.
    Raises ModelError if the model cannot have a score head, or the folder's adapters do not fit.
    """
    model = scalar_model(policy.causal_lm(), tokenizer)
    for name in {OFFSET, SEPARATOR} & vars(model.config).keys():  # of another head, if that was a reward model
        delattr(model.config, name)
    reward = RewardModel(model)
    reward.packed = policy.packed
    if adapter is not None:
        reward.model = load_lora(model, adapter, say)
        reward.offset, separator = read_score_options(adapter)
        setattr(reward.classifier().config, SEPARATOR, separator)
        return reward
    if cfg.freeze_transformer:
        model.requires_grad_(False)
        getattr(model, HEAD).requires_grad_(True)
    if cfg.finetune_mode == "LORA" and cfg.lora_cfg is not None:
        reward.model = add_lora(model, cfg.lora_cfg, head=HEAD)
    else:
        freeze_layers(model, cfg.frozen_layers)
    return reward


class AdapterValueModel(nn.Module):
    """A score head (C -> 1) on the policy's model, with an adapter of its own if that has some. Call it in `in_use()`.

    The offset is subtracted from the head's score; `step_separator` as of `RewardModel`.
    """

    def __init__(
        self,
        policy: Policy,
        adapter: str | None,
        head: nn.Linear,
        offset: float = 0.0,
        step_separator: str | None = None,
    ) -> None:
        super().__init__()
        self.policy, self.adapter, self.head, self.offset = policy, adapter, head, offset
        self.step_separator = step_separator

    @property
    def packed(self) -> bool:
        """True if its batches are packed: those of the policy are."""
        return self.policy.packed

    def in_use(self) -> AbstractContextManager[None]:
        """Inside, the model computes with this adapter, and it and the head alone can get gradients."""
        if self.adapter is None:
            return nullcontext()
        return adapter_in_use(cast(PeftModel, self.policy.model), self.adapter)

    def forward(self, batch: Batch) -> Tensor:
        """As `RewardModel.forward`: (N,) float32 scores at the targets of a batch."""
        return head_scores(self.policy.hidden_at_head(batch), self.head)[batch.logit_index_N] - self.offset
