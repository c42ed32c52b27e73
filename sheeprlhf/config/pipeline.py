"""A pipeline: commands one after the other, as a recipe writes them and as words of the command line change them."""

import dataclasses
import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from sheeprlhf.config.command_words import hydra_value, option_word
from sheeprlhf.config.option_checks import did_you_mean
from sheeprlhf.config.registry import current_word
from sheeprlhf.structure.run import PipelineConfig, TrainConfig
from sheeprlhf.utils.errors import ConfigError

VERBS = ("train", "eval")
_OF_EVAL = ("fabric", "generation")  # of the words for all stages, those of evaluations; their run has the others
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_LINK = re.compile(r"<(\w+)>")
_LINKED_PATH = re.compile(_LINK.pattern + r"((?:/[\w./-]*)?)")  # and what follows in its folder


class Stage(NamedTuple):
    """A stage before its folder is known: `<name>` stands for the folder of an earlier stage."""

    name: str  # of the stage and its folder
    verb: str  # train or eval
    flags: tuple[str, ...]  # of its command
    words: tuple[str, ...]  # option=value, each option once

    def links(self) -> set[str]:
        """The stages that it names."""
        return set(_LINK.findall(" ".join(self.words)))

    def without(self, absent: Collection[str]) -> "Stage":
        """The same without absent stages where several are listed: `experiment_dir=<a>,<b>` becomes `=<a>`."""
        words = []
        for word in self.words:
            key, _, value = word.partition("=")
            listed = value.split(",")
            kept = [one for one in listed if not any(one == f"<{name}>" for name in absent)]
            words.append(f"{key}={','.join(kept)}" if kept and len(listed) > 1 else word)
        return self._replace(words=tuple(words))

    def placed(self, folders: Mapping[str, str]) -> list[str]:
        """Verb, flags and words with the folders of the stages that they name."""

        def folder(match: re.Match[str]) -> str:
            return hydra_value(folders[match[1]] + match[2]) if match[1] in folders else match[0]

        return [self.verb, *self.flags, *(_LINKED_PATH.sub(folder, word) for word in self.words)]

    def text(self) -> str:
        """The command as a recipe writes it."""
        return " ".join([self.verb, *self.flags, *self.words])


def collected(words: list[str]) -> list[str]:
    """The command line as Hydra takes it: what is not an option of the pipeline is collected in `words=[...]`."""
    own = {field.name for field in dataclasses.fields(PipelineConfig)}
    of_stages = [word for word in words if "=" in word and _first(word) not in own | {"", "hydra"}]
    if not of_stages:
        return words
    ours = [word for word in words if word not in of_stages]
    return [*ours, option_word("words", of_stages)]


def _first(word: str) -> str:
    """The first part of the key: `optim` of `optim.lr=1`."""
    return word.partition("=")[0].partition(".")[0].lstrip("+~")


def stages_of(config: PipelineConfig) -> list[Stage]:
    """The recipe's stages with the words of the command line. Raises ConfigError if a stage or a word is wrong."""
    if problems := list(_recipe_problems(config)) or list(_word_problems(config)):
        raise ConfigError(*problems)
    stages = []
    for name, command in config.stages.items():
        verb, *own = _split(command)
        shared = [word for word in config.words if _first(word) not in config.stages]
        shared = [word for word in shared if verb == "train" or _first(word) in _OF_EVAL]
        alone = [word.partition(".")[2] for word in config.words if _first(word) == name]
        given = [f"seed={config.seed}", *(["dry_run=true"] if config.dry_run else [])]
        by_key: dict[str, str] = {}
        for word in [*_split(config.common.get(verb, "")), *own, *given, *shared, *alone]:
            word = current_word(word)
            by_key[word.partition("=")[0]] = word
        flags = tuple(word for word in by_key.values() if word.startswith("-"))
        words = tuple(word for word in by_key.values() if not word.startswith("-"))
        stages.append(Stage(name, verb, flags, words))
    return stages


def _split(text: str) -> list[str]:
    """The words of a command, in quotes where they hold spaces."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} in a recipe cannot be read ({error}): quote it as in a shell") from error


def _recipe_problems(config: PipelineConfig) -> Iterator[str]:
    from sheeprlhf.config.untrusted_config import word_problem  # imports Hydra

    if not config.stages:
        yield "there are no stages: give experiment=<recipe>; `list pipelines` tells which there are"
    taken = {field.name for cls in (TrainConfig, PipelineConfig) for field in dataclasses.fields(cls)}
    for verb in config.common:
        if verb not in VERBS:
            yield f"common.{verb} is not a command: give {' or '.join(VERBS)}"
    before: set[str] = set()
    for name, command in config.stages.items():
        if not _NAME.fullmatch(name) or name in taken:
            yield f"stages.{name} cannot name a stage: give small letters, digits and _, and no option's name"
        verb, *own = _split(command) or [""]
        if verb not in VERBS:
            yield f"stages.{name} begins with {verb!r}: begin with {' or '.join(VERBS)}"
        for word in [*own, *_split(config.common.get(verb, ""))]:
            problem = word_problem(_LINK.sub(r"\1", word))  # Hydra cannot read < and >
            if problem:
                yield f"stages.{name}: {problem}"
        for link in sorted(set(_LINK.findall(command)) - before):
            earlier = f"those before it are {', '.join(before)}" if before else "there is none before it"
            yield f"stages.{name}: <{link}> is not an earlier stage; {earlier}"
        before.add(name)


def _word_problems(config: PipelineConfig) -> Iterator[str]:
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    own = [field.name for field in dataclasses.fields(PipelineConfig)]
    names = f"the stages are {', '.join(config.stages)}"
    for word in config.words:
        first = _first(word)
        if first not in config.stages and first not in known:
            key = word.partition("=")[0]
            did = did_you_mean(first, [*config.stages, *own, *known], names, end=key[len(first) :])
            yield f"there is no stage and no option {key}: {did}"
    for name in config.skip:
        if name not in config.stages:
            yield f"skip={name} is not a stage: {did_you_mean(name, config.stages, names, key='skip=[', end=']')}"
