"""Responses in the tokens of a reward model that has another tokenizer: text is what the two models exchange."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sheeprlhf.agent.batches import Batches, BatchOptions
from sheeprlhf.agent.reward import RewardModel
from sheeprlhf.data.encoding import PairEncoder, decode, encode
from sheeprlhf.data.example import Example
from sheeprlhf.data.tokenize import SpecialIds
from sheeprlhf.engine.checkpoint import Say
from sheeprlhf.reward.call import Texts
from sheeprlhf.rollout.collect_steps import read_targets
from sheeprlhf.rollout.rollout import Rollout
from sheeprlhf.utils.end_tokens import control_tokens, response_end
from sheeprlhf.utils.errors import RewardError
from sheeprlhf.utils.lightning import Fabric

_NEW_LINE = "\n"  # stands for a prompt whose ids are known


def has_same_tokens(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether ids of one tokenizer mean the same to the other."""
    return bool(first.get_vocab() == second.get_vocab())


class TextExchange:
    """Encodes prompts and responses anew, with the tokenizer of the model that scores them.

    Args:
        writer: the policy's tokenizer.
        reader: the reward model's.
        say: prints a line for the user.
    """

    def __init__(self, writer: PreTrainedTokenizerBase, reader: PreTrainedTokenizerBase, say: Say) -> None:
        self._writer, self._reader, self._say = writer, reader, say
        self._of_writer, self._of_reader = SpecialIds(writer), SpecialIds(reader)
        self._encode = PairEncoder(reader)
        self._control, self._known = control_tokens(writer), set(control_tokens(reader).values())
        self._told = False

    def __call__(self, rollout: Rollout, texts: Texts, prompts: Sequence[Example] | None = None) -> Rollout:
        """The rollout in the reward model's tokens; a response that ended has the reward model's end token.

        Args:
            rollout: in the policy's tokens.
            texts: of the rollout.
            prompts: the rows as the reward model's own chat template renders them; None encodes the policy's prompts.
        """
        group, rows = rollout.finished.shape[1], []
        for number, row in enumerate(rollout.rows):
            part = slice(number * group, (number + 1) * group)
            written = texts.responses[part]
            if prompts is None:
                prompt_ids, ids = self._of_text(row.prompt_ids, written)
            else:
                prompt_ids, ids = prompts[number].prompt_ids, self._behind(_NEW_LINE, written)
            end = response_end(self._reader, prompt_ids)
            responses = tuple(
                np.array([*response, end] if ended or not response else response, dtype=np.int32)
                for response, ended in zip(ids, texts.finished[part], strict=True)
            )
            rows.append(row._replace(prompt_ids=prompt_ids, responses=responses))
        return dataclasses.replace(rollout, rows=tuple(rows), tokens={})

    def _of_text(self, prompt_ids: np.ndarray, responses: list[str]) -> tuple[np.ndarray, list[list[int]]]:
        """Ids of a prompt of the policy's and of its responses; control tokens of a chat template stay such tokens."""
        bos, ids = self._of_writer.bos, prompt_ids.tolist()
        ids = ids[len(bos) :] if ids[: len(bos)] == bos else ids
        [prompt] = decode(self._writer, [ids])
        control = {self._control[token] for token in ids if token in self._control}
        self._warn(control)
        if control:
            [head] = encode(self._reader, [prompt], control_tokens=True)
            behind = self._behind(_NEW_LINE, responses)
        else:
            [(head, behind, _)] = self._encode([prompt], [responses], control_tokens=False)
        own = self._of_reader.bos
        head = head if control and head[: len(own)] == own else [*own, *head]
        return np.array(head, dtype=np.int32), behind

    def _behind(self, text: str, responses: list[str]) -> list[list[int]]:
        """Ids of responses as they follow a text."""
        [pair] = self._encode([text], [responses], control_tokens=False)
        return pair.responses

    def _warn(self, control: set[str]) -> None:
        """Say once that control tokens of the policy's template mean nothing to the reward model."""
        unknown = sorted(control - self._known)
        if unknown and not self._told:
            self._told = True
            self._say(
                f"warning: the reward model's tokenizer lacks control tokens of the prompts ({', '.join(unknown[:4])}) "
                "and reads them as plain text; give a reward model with the policy's chat template, or rows with a "
                "prompt instead of messages"
            )


def read_scores(
    fabric: Fabric, options: BatchOptions, model: RewardModel, rollout: Rollout, *, packed: bool, label: str = "scoring"
) -> Tensor:
    """All ranks: (S,) the score after the last token of each response, which is in the reward model's own tokens.

    Raises:
        RewardError: a prompt with its response has more tokens than the reward model has positions.
    """
    positions = getattr(model.classifier().config, "max_position_embeddings", None)
    longest = longest_of(rollout)
    if isinstance(positions, int) and longest > positions:
        raise RewardError(
            f"a prompt with its response has {longest} tokens of the reward model, which has {positions} positions: "
            "lower generation.max_new_tokens or data.max_prompt_length"
        )
    batches = Batches(fabric, options, packed=packed, targets="last")
    return read_targets(fabric, model, model, batches, rollout, label)


def longest_of(rollout: Rollout) -> int:
    """Tokens of the longest prompt with one of its responses."""
    return max(len(row.prompt_ids) + max(map(len, row.responses)) for row in rollout.rows)
