"""Tensors of a model's files compared with its parameters, by transformers' own mapping.

First by the headers alone, before data is prepared, and again by the report of `from_pretrained`.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from sheeprlhf.security.model_folder import TensorFacts
from sheeprlhf.utils.errors import first_of

HEAD = "score"  # name of the score head in every decoder's classification model
SCORE_BIAS = "score.bias"  # transformers' decoders have none; it is added to every score
_HEAD_NAME = re.compile(
    r"(?:^|[._])(?:\w*head\d*|scores?|classifier|regression\w*|reward\w*|value|summary|embed_out|logits_proj)(?:[._]|$)"
)
_LANGUAGE_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.")
_SHOWN, _NAME_LENGTH = 4, 80
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


class Account(NamedTuple):
    """Tensors of the files compared with the parameters of a model."""

    model: str  # name of the model's class
    missing: list[str]  # parameters without a tensor, those of heads that the task makes left out
    # tensors of layers that the model has, and that have no place in them: `q_proj.bias`, a third layer
    misplaced: list[str]
    unread: list[str]  # the other tensors without a place
    # parameters with another shape in the files: name, shape in the files, shape in the model
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    torn: list[str]  # tensors of a group that the model joins into one, such as experts, whose other tensors are there

    def heads(self) -> list[str]:
        """The unread tensors that look like a head."""
        return [name for name in self.unread if _HEAD_NAME.search(name)]

    def problem(self) -> str:
        """The reason that the loaded model would differ from the saved one, and the fix; empty if there is none."""
        if not (self.missing or self.misplaced or self.mismatched or self.torn):
            return ""
        shapes = [f"{name} {_shape(files)} instead of {_shape(own)}" for name, files, own in self.mismatched]
        parts = [
            _part("missing", [*self.missing, *self.torn]),
            _part("of another shape", shapes),
            _part("without a place in a layer that the model has", self.misplaced),
            _part("there instead", self.heads() or self.unread) if self.missing else _part("not read", self.heads()),
        ]
        return f"its weights do not fit {self.model}: {'; '.join(filter(None, parts))}. {self._remedy()}"

    def _remedy(self) -> str:
        pairs = ((name, key) for name in self.unread for key in self.missing[:8] if name.endswith(f".{key}"))
        prefix = next((name.removesuffix(key) for name, key in pairs), "")
        if prefix:
            return f"In the files their names begin with {prefix[:_NAME_LENGTH]}: save them without it"
        if f"{HEAD}.weight" in self.missing:
            others = [name for name in self.heads() or self.unread if not _LANGUAGE_HEAD.search(name)]
            if others:
                return (
                    f"The head of a reward model is {HEAD}.weight: if {others[0][:_NAME_LENGTH]} is all of its head "
                    f"and of shape (1, hidden size), save it as {HEAD}.weight; else choose another model"
                )
            if any(map(_LANGUAGE_HEAD.search, self.unread)):
                return "This is a language model, not a reward model: train it as one with task=rm, or choose another"
            return "It was saved without its head: save it again with it, or train a reward model with task=rm"
        if all(map(_LANGUAGE_HEAD.search, self.missing)) and not (self.misplaced or self.mismatched or self.torn):
            if self.heads():
                return "This is not a language model but one with another head: choose the model that it was made of"
            return (
                "It was saved without its head: save it again as a causal language model; if its head shares the input "
                "embeddings, set tie_word_embeddings to true in its config.json"
            )
        if self.mismatched or self.misplaced:
            return "Its config.json is that of another model, or the files are: get both from one place"
        return "The files are incomplete: save or download the model again"

    def note(self) -> str:
        """One line about tensors that are not read and change nothing; empty if there are none."""
        return _part("not read", self.unread) and f"{_part('not read', self.unread)}: {self.model} has no such tensor"


def account_for(model: PreTrainedModel, info: Mapping[str, Any], *, new_head: bool = False) -> Account:
    """Compare what transformers has loaded with what it was given.

    Args:
        model: loaded.
        info: of `from_pretrained(output_loading_info=True)`; tied parameters are left out there already.
        new_head: the task replaces the language head, which needs no tensor.
    """
    owned = {_pattern(name.rpartition(".")[0]) for name, _ in model.named_parameters(remove_duplicate=False)}
    expected = {_pattern(name) for name in model.state_dict()}
    unexpected = sorted(info["unexpected_keys"], key=_by_number)
    misplaced = [
        name
        for name in unexpected
        if _pattern(name) in expected or (_pattern(name.rpartition(".")[0]) in owned and not _is_read_bias(model, name))
    ]
    head = model.get_output_embeddings() if new_head else None
    of_new_head = tuple(f"{name}." for name, module in model.named_modules() if head is not None and module is head)
    missing = [name for name in info["missing_keys"] if not name.startswith(of_new_head)]
    mismatched = [
        (name, tuple(files), tuple(own))
        for name, files, own in info["mismatched_keys"]
        if not name.startswith(of_new_head)
    ]
    return Account(
        model=type(model).__name__,
        missing=sorted(missing, key=_by_number),
        misplaced=[name for name in misplaced if not name.startswith(of_new_head)],
        unread=[name for name in unexpected if name not in misplaced and not _is_read_bias(model, name)],
        mismatched=sorted(mismatched, key=lambda entry: _by_number(entry[0])),
        torn=[],
    )


def account_from_headers(
    model_class: type[PreTrainedModel], config: Any, tensors: Mapping[str, TensorFacts], *, new_head: bool = False
) -> Account:
    """Account for the weights from the headers of the files only: transformers maps tensors with shapes and no content.

    Args:
        model_class: what is going to be loaded.
        config: its configuration.
        tensors: what the files declare.
        new_head: as in `account_for`.
    """
    empty = {name: torch.empty(facts.shape, device="meta") for name, facts in tensors.items()}
    loader: Any = model_class  # its annotation knows no second result
    try:
        model, info = loader.from_pretrained(
            None,
            config=config,
            state_dict=empty,
            dtype=torch.float32,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except RuntimeError:  # tensors that the model joins do not fit each other
        torn = torn_groups(tensors) or ["a tensor of a group that the model joins into one"]
        return Account(model_class.__name__, [], [], [], [], torn)
    found = account_for(model, info, new_head=new_head)
    return found if not found.mismatched else found._replace(torn=torn_groups(tensors))


def torn_groups(names: Iterable[str]) -> list[str]:
    """Names that a numbered group lacks, where other groups of the same form have them: one expert of a layer."""
    numbers: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        found = list(_NUMBER.finditer(name))
        if len(found) > 1:
            last = found[-1]
            group = f"{name[: last.start()]}*{name[last.end() :]}"
            numbers[_pattern(name)][group].add(int(last.group()))
    siblings: dict[str, dict[str, set[int]]] = defaultdict(dict)  # gate, up and down of the same experts
    for groups in numbers.values():
        for group, present in groups.items():
            siblings[group.partition("*")[0]][group] = present
    lacking = []
    for groups in (*numbers.values(), *siblings.values()):
        whole = set().union(*groups.values())
        for group, present in groups.items():
            lacking += [group.replace("*", str(number)) for number in whole - present]
    return sorted(set(lacking), key=_by_number)


def _is_read_bias(model: PreTrainedModel, name: str) -> bool:
    """A single score's bias is read: the reward model adds it."""
    head = getattr(model, HEAD, None)
    return name == SCORE_BIAS and isinstance(head, nn.Linear) and head.bias is None and head.out_features == 1


def _pattern(name: str) -> str:
    return _NUMBER.sub("*", name)


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _shape(sizes: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, sizes))})"


def _part(what: str, names: list[str]) -> str:
    """Names of a kind, the first ones in full."""
    if not names:
        return ""
    shown = [name if len(name) <= _NAME_LENGTH else f"{name[:_NAME_LENGTH]}..." for name in names]
    return f"{first_of(shown, _SHOWN)} {'is' if len(names) == 1 else 'are'} {what}"
