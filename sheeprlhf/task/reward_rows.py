"""Prompts with the columns that the reward functions of a configuration name."""

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from sheeprlhf.data.prepare import PreparedData, available_columns, prepare_data
from sheeprlhf.engine.checkpoint import Say
from sheeprlhf.reward.score import check_columns, wanted_columns
from sheeprlhf.structure.run import EvalConfig, TrainConfig

REFERENCE = "reference"  # the dataset's own response, as a column


def prepare_prompts(
    cfg: TrainConfig | EvalConfig, tokenizer: PreTrainedTokenizerBase, *, say: Say, progress: bool
) -> PreparedData:
    """The prompts of a run or of an evaluation; before they are prepared, the functions' signatures are checked.

    Raises:
        ConfigError: a reward function cannot be imported or called.
        DataError: as `prepare_data` does.
    """
    assert cfg.data is not None
    kept = wanted_columns(cfg.reward, default=cfg.data.rule_reward)
    return prepare_data(cfg.data, tokenizer, kind="prompts", say=say, progress=progress, kept=kept)


def check_reward_columns(cfg: TrainConfig | EvalConfig, data: PreparedData, answered: Mapping[str, bool]) -> list[str]:
    """The names of the columns that the reward gets: those that the rows of all used splits have.

    Args:
        cfg: has the reward.
        data: of `prepare_prompts`.
        answered: the splits that are used, each with whether all of its rows have a response.

    Raises:
        ConfigError: a function needs a column that a split lacks; names those that it has.
    """
    assert cfg.data is not None
    names: list[str] | None = None
    for split, has_reference in answered.items():
        of_reference = [REFERENCE] if has_reference else []
        there = dict.fromkeys([*available_columns(data.report, split), *of_reference])
        check_columns(cfg.reward, there, default=cfg.data.rule_reward, rows=f"the {split} rows")
        given = dict.fromkeys([*data.splits[split].columns, *of_reference])
        names = [name for name in given if names is None or name in names]
    return names or []
