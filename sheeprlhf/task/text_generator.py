"""A trained model that is ready to write text for people, or to score it."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sheeprlhf.agent.policy import Policy
from sheeprlhf.agent.reward import RewardModel
from sheeprlhf.config.model_lookup import Trained
from sheeprlhf.data.example import Example, collate_padded
from sheeprlhf.data.prompt_encoder import FORMS, Asker, Turn, form_of, template_args_of
from sheeprlhf.model.folder.architecture import num_positions_of
from sheeprlhf.rollout.engines import StopStrings, stream_ids
from sheeprlhf.structure.run import GenConfig
from sheeprlhf.task.models import load_trained
from sheeprlhf.utils.end_tokens import end_token_ids
from sheeprlhf.utils.errors import ConfigError, DataError, Notify
from sheeprlhf.utils.lightning import move_data_to_device
from sheeprlhf.utils.memory import phase
from sheeprlhf.utils.vocabulary import undefined_ids

_UNFINISHED = "\ufffd"  # how a decoder shows the first bytes of a character whose others are still to come


class TextGenerator:
    """Answers in one form of `FORMS`, on the device where its model is, which is unwrapped and in eval mode."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        form: str,
        template_args: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.form_name, self.form = model, tokenizer, form, FORMS[form]
        self._template_args = template_args
        self._asker = Asker(self.form, tokenizer, template_args)
        undefined = undefined_ids(tokenizer, model.get_output_embeddings().weight.shape[0])
        self._undefined_U = None if undefined is None else torch.from_numpy(undefined)
        self.positions = num_positions_of(model.config)

    def in_form(self, form: str) -> "TextGenerator":
        """The same model, asked in another form."""
        return TextGenerator(self.model, self.tokenizer, form, self._template_args)

    def fit(self, turns: Sequence[Turn]) -> tuple[list[Turn], Example]:
        """The turns that fit, the newest and a system turn, and their prompt. Raises DataError if the last does not."""
        kept = list(turns) if self.form.turns else list(turns[-1:])
        while True:
            example = self._asker.example(kept)
            num_tokens = len(example.prompt_ids)
            if self.positions is None or num_tokens < self.positions:
                return kept, example
            first = 1 if kept[0].role == "system" else 0
            if len(kept) - first < 3:
                raise DataError(f"the prompt has {num_tokens:,} tokens, more than {self.positions - 1:,}: shorten it")
            del kept[first : first + 2]  # the oldest question with its answer

    def answer(self, turns: Sequence[Turn], cfg: GenConfig, seed: int) -> Iterator[str]:
        """The text of the answer, again whenever it has grown; the last turn is a user's. Raises as `fit`."""
        _, example = self.fit(turns)
        if self.positions is not None:
            room = self.positions - len(example.prompt_ids)
            cfg = dataclasses.replace(cfg, max_new_tokens=min(cfg.max_new_tokens, room))
        stop = StopStrings(self.form.stop, self.tokenizer, as_message=self.form_name == "template")
        end_ids = end_token_ids(self.tokenizer)
        ids: list[int] = []
        text = ""
        with phase("generation"):
            for token in stream_ids(
                self.model, example.prompt_ids, cfg, end_ids=end_ids, seed=seed, undefined_U=self._undefined_U
            ):
                ids.append(token)
                written = np.array(ids)
                ended = stop(written)
                grown = stop.text(written)
                if grown != text and not grown.endswith(_UNFINISHED):
                    text = grown
                    yield text
                if ended:
                    break
        whole = stop.text(np.array(ids))
        if whole != text:
            yield whole


class RewardScorer:
    """A reward model in eval mode that scores answers, in the form of `FORMS` in which it was trained."""

    def __init__(
        self,
        model: RewardModel,
        tokenizer: PreTrainedTokenizerBase,
        form: str,
        template_args: Mapping[str, Any] | None = None,
    ) -> None:
        self._template_args = template_args
        self.model, self.tokenizer, self.form_name = model, tokenizer, form

    @torch.no_grad()
    def score(self, form: str, turns: Sequence[Turn], answer: str) -> float:
        """Score of the answer after its end, less the model's offset. Raises DataError if it cannot be asked."""
        if not answer.strip():
            raise DataError("there is no answer to score")
        kind = FORMS[form]
        example = Asker(kind, self.tokenizer, self._template_args).example(turns if kind.turns else turns[-1:], answer)
        positions = num_positions_of(self.model.classifier().config)
        if positions is not None and example.num_tokens() > positions:
            raise DataError(f"prompt and answer are longer than the {positions:,} tokens of the reward model")
        batch = collate_padded([example], pad_id=0, targets="last")
        return float(self.model(move_data_to_device(batch, self.model.classifier().device))[0])


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_text_generator(trained: Trained, say: Notify) -> TextGenerator:
    """A policy in the form in which it was trained, on the GPU if there is one. Raises SheepError."""
    policy, tokenizer = load_trained(trained, say)
    assert isinstance(policy, Policy)
    model = policy.eval().to(_device()).causal_lm()
    form = form_of(trained, tokenizer)
    if trained.template_args is not None and form != "template":
        raise ConfigError(f"--template-args: {trained.word} is asked without a chat template: leave it out")
    return TextGenerator(model, tokenizer, form, template_args_of(trained))


def load_reward_scorer(trained: Trained, say: Notify) -> RewardScorer:
    """A reward model that scores answers, on the GPU if there is one. Raises SheepError."""
    model, tokenizer = load_trained(trained, say)
    assert isinstance(model, RewardModel)
    return RewardScorer(model.eval().to(_device()), tokenizer, form_of(trained, tokenizer), template_args_of(trained))
