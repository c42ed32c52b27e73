"""What every online task begins with: prompts, models and a reward, and then its loop."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from sheeprlhf.agent.batches import longest_row
from sheeprlhf.agent.reference import reference_of
from sheeprlhf.data.prepare import TokenizedSplit
from sheeprlhf.engine.run import Run
from sheeprlhf.model.load import load_tokenizer
from sheeprlhf.reward.score import state_warnings
from sheeprlhf.rollout.collector import Collector
from sheeprlhf.rollout.text_exchange import TextExchange
from sheeprlhf.structure.rollout import PPOConfig
from sheeprlhf.task.finish import report_data
from sheeprlhf.task.reward_rows import check_reward_columns, prepare_prompts
from sheeprlhf.task.rl_models import Agents, load_agents
from sheeprlhf.task.rollout_validation import HeldOut
from sheeprlhf.task.turns import Loop
from sheeprlhf.utils.errors import DataError
from sheeprlhf.utils.lightning import Fabric


class Parts(NamedTuple):
    """What is loaded before anything is wrapped.

    Attributes:
        tokenizer: of all models.
        rows: whose prompts are answered.
        held_out: those of validation; None if there are none.
        agents: the models.
        columns: names of what the reward is given of each row.
    """

    tokenizer: PreTrainedTokenizerBase
    rows: TokenizedSplit
    held_out: TokenizedSplit | None
    agents: Agents
    columns: list[str]


def load_parts(fabric: Fabric, run: Run) -> Parts:
    """All ranks: prepare and report the data, load the models onto the host.

    Raises:
        SheepError: something cannot be loaded, or rows lack the response that the task or the reward reads; see its
            message.
    """
    cfg = run.cfg
    if cfg.generation.engine != "native":
        run.say(
            f"generation.engine={cfg.generation.engine} draws from torch's generator: a run that is resumed with as "
            "many processes and the same task.token_budget samples the same responses, any other run does not"
        )
    tokenizer = load_tokenizer(cfg.model)
    data = prepare_prompts(cfg, tokenizer, say=run.say, progress=fabric.is_global_zero)
    report_data(fabric, run, data)
    rows, held_out = data.splits["train"], data.splits.get("validation")
    used = {"": rows} if held_out is None else {"": rows, "validation": held_out}
    if isinstance(cfg.task, PPOConfig) and cfg.task.ptx_coeff and rows.unanswered:
        raise DataError(
            f"task.ptx_coeff={cfg.task.ptx_coeff:g} learns from the dataset's own responses, and {rows.unanswered} of "
            f"{len(rows)} training rows have none: give each of them one, or task.ptx_coeff=0"
        )
    columns = check_reward_columns(cfg, data, {name or "train": not split.unanswered for name, split in used.items()})
    for line in state_warnings(cfg.reward, default=cfg.data.rule_reward):
        run.say(line)
    sampled = max(int(split.sizes[:, 0].max()) for split in used.values()) + cfg.generation.max_new_tokens
    agents = load_agents(run, tokenizer, longest=max(longest_row(used), sampled))
    return Parts(tokenizer, rows, held_out, agents, columns)


def exchange_of(run: Run, agents: Agents, tokenizer: PreTrainedTokenizerBase) -> TextExchange | None:
    """What makes texts of the policy's tokens for the reward model; None if both have one tokenizer."""
    reader = agents.reward_tokenizer
    return None if reader is None else TextExchange(tokenizer, reader, run.say)


def begin(
    fabric: Fabric,
    run: Run,
    parts: Parts,
    module: nn.Module,
    optimizer: Optimizer,
    learners: nn.Module | None = None,
    as_shown: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Loop:
    """All ranks: restore what a checkpoint has, and be ready for the first turn. The reference is the policy until now.

    Args:
        fabric: where it runs.
        run: the run.
        parts: of `load_parts`.
        module: the policy, set up.
        optimizer: of all that trains, set up.
        learners: all that trains and is saved; None is the policy alone.
        as_shown: inside, the policy has the weights that are validated.

    Raises:
        SheepError: the reward's functions cannot be had, or the checkpoint does not fit.
    """
    cfg, agents = run.cfg, parts.agents
    learners = module if learners is None else learners
    reward = None if agents.reward is None else agents.reward.to(fabric.device)
    of_policy = (agents.policy, reference_of(agents.policy))
    exchange = exchange_of(run, agents, parts.tokenizer)
    how: dict[str, Any] = {"packed": agents.packed, "columns": parts.columns, "exchange": exchange}
    collect = Collector(fabric, cfg, parts.tokenizer, *of_policy, reward, **how)
    torch.manual_seed(cfg.seed + fabric.global_rank)  # weights began alike on all ranks, dropout does not
    state = run.restore(learners, optimizer)
    collect.restore(state.extra)
    validate = None
    if parts.held_out is not None:
        held_out = HeldOut(fabric, run, collect, module, parts.held_out)

        def validate(step: int) -> dict[str, float]:
            with as_shown():
                return held_out(step)

    return Loop(run, state, parts.rows, collect, validate, learners, optimizer)
