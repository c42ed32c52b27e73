"""From prompts to a rollout: sample, score, and read what every model says of each token. What all online tasks share.

Every rank samples and reads its share of the rows, and all ranks then know the whole rollout: statistics over it need
no further word between them. What is sampled is a function of the weights, the seed and the rollout's number, so ranks,
batches and a resumed run give the same responses.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sheeprlhf.agent.batches import Batches, Rows
from sheeprlhf.agent.policy import Policy
from sheeprlhf.data.example import Batch, Example
from sheeprlhf.engine.fabric import gather_objects
from sheeprlhf.engine.rng import isolated_rng
from sheeprlhf.engine.shard import gathered
from sheeprlhf.reward.call import Texts
from sheeprlhf.rollout.engines import ENGINES
from sheeprlhf.rollout.rollout import Rollout
from sheeprlhf.rollout.sampler import Sampled
from sheeprlhf.rollout.stop import StopStrings
from sheeprlhf.structure.generation import GenConfig
from sheeprlhf.utils.end_tokens import end_token_ids
from sheeprlhf.utils.errors import NonFiniteError
from sheeprlhf.utils.lightning import Fabric
from sheeprlhf.utils.memory import phase
from sheeprlhf.utils.modes import eval_mode

_SHOWN = 20  # rows in a message
Call = Callable[[Batch], Tensor]  # a batch to a number for each of its targets


def drawn_numbers(seed: int, number: int, shape: tuple[int, int, int]) -> np.ndarray:
    """(prompts, K, tokens) uniform numbers that decide what a rollout samples; the same for equal seed and number."""
    return np.random.default_rng([seed, number]).random(shape)


def sample(
    fabric: Fabric,
    policy: Policy,
    prompts: Sequence[Example],
    uniforms: np.ndarray,
    cfg: GenConfig,
    *,
    end_ids: Sequence[int],
    stop: StopStrings,
    token_budget: int,
    packed: bool,
) -> list[Sampled]:
    """All ranks: responses to every prompt; each rank samples its share.

    Args:
        fabric: where it runs.
        policy: who writes.
        prompts: rows, of which the prompts are read.
        uniforms: (prompts, K, tokens) numbers of `drawn_numbers`.
        cfg: has the temperature and says who samples.
        end_ids: each ends a response.
        stop: ends one too.
        token_budget: most tokens that are held at a time.
        packed: whether the policy's batches are packed.
    """
    mine = list(range(fabric.global_rank, len(prompts), fabric.world_size))
    hidden = None if fabric.is_global_zero else True  # None: shown in a terminal only
    num_responses = len(mine) * uniforms.shape[1]
    with fabric.autocast(), tqdm(total=num_responses, desc="sampling", leave=False, disable=hidden) as bar:
        sampled = ENGINES[cfg.engine](
            policy.causal_lm(),
            [prompts[row].prompt_ids for row in mine],
            uniforms[mine],
            temperature=cfg.temperature,
            end_ids=end_ids,
            token_budget=token_budget,
            stop=stop if stop else None,
            progress=bar.update,
            packed=packed,
            undefined_U=policy.undefined_U,
        )
    found = dict(pair for part in gather_objects(fabric, list(zip(mine, sampled, strict=True))) for pair in part)
    return [found[row] for row in range(len(prompts))]


def as_rollout(prompts: Sequence[Example], sampled: Sequence[Sampled]) -> Rollout:
    """What was sampled after each prompt, with the sampler's log-probabilities ("sampled") and no score yet."""
    rows = tuple(
        prompt._replace(responses=one.responses, margin=0.0, desirable=True)
        for prompt, one in zip(prompts, sampled, strict=True)
    )
    finished = np.array([one.finished for one in sampled])
    logprobs = tuple(np.concatenate(one.logprobs) for one in sampled)
    return Rollout(rows, np.zeros(finished.shape), finished, {"sampled": logprobs})


def as_text(
    rollout: Rollout, prompts: Sequence[Example], tokenizer: PreTrainedTokenizerBase, stop: StopStrings
) -> Texts:
    """The rollout's responses as text, each beside its prompt.

    The dataset's own responses are the column "reference", which is there if every one of `prompts` has one, and if
    the rows bring no column of this name. The other columns are those of the rows, copied for each response.
    End tokens are neither written nor counted. Sampled responses are cut before a stop string, whose tokens count.
    """

    def text(ids: np.ndarray) -> str:
        return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    group, end_ids, whole = rollout.finished.shape[1], end_token_ids(tokenizer), StopStrings((), tokenizer)
    responses = [response for row in rollout.rows for response in row.responses]
    columns: dict[str, list[Any]] = {
        name: [copy.deepcopy((prompt.columns or {}).get(name)) for prompt in prompts for _ in range(group)]
        for name in dict.fromkeys(name for prompt in prompts for name in prompt.columns or ())
    }
    if "reference" not in columns and all(prompt.responses for prompt in prompts):
        columns["reference"] = [one for prompt in prompts for one in [whole.text(prompt.responses[0])] * group]
    return Texts(
        prompts=[one for prompt in prompts for one in [text(prompt.prompt_ids)] * group],
        responses=[stop.text(response) for response in responses],
        finished=rollout.finished.reshape(-1).tolist(),
        num_tokens=[len(response) - int(response[-1] in end_ids) for response in responses],
        columns=columns,
    )


def read_targets(
    fabric: Fabric,
    module: nn.Module,
    call: Call,
    batches: Batches,
    rows: Rows,
    label: str,
    num_rows: int | None = None,
) -> Tensor:
    """All ranks: a number for each target of the rows, end to end in their order.

    Args:
        fabric: where it runs.
        module: what `call` runs; in eval mode meanwhile, without gradient.
        call: a forward pass.
        batches: cuts the rows; says whether each token or each response is a target.
        rows: a rollout, or a split of a dataset.
        label: what the progress bar says.
        num_rows: read the first rows only.

    Returns:
        float32, on the host.
    """
    mine: list[tuple[int, np.ndarray]] = []
    count = min(len(rows), num_rows or len(rows))
    with phase("evaluation"), isolated_rng(), gathered(module), eval_mode(module), torch.no_grad(), fabric.autocast():
        for part, micro in batches.numbered(rows, np.arange(count), label):
            batch = fabric.to_device(micro.batch)
            values_N = call(batch).float().cpu().numpy()
            mine += zip(part, np.split(values_N, _borders(len(values_N), rows.examples(part))), strict=True)
    found: dict[int, np.ndarray] = dict(pair for rank in gather_objects(fabric, mine) for pair in rank)
    return torch.from_numpy(np.concatenate([found[row] for row in range(count)]))


def _borders(num_values: int, rows: list[Example]) -> np.ndarray:
    """Where the values of each row but the first begin: one for each token of its responses, or for each response."""
    sizes = [sum(map(len, row.responses)) for row in rows]
    if num_values != sum(sizes):
        sizes = [len(row.responses) for row in rows]
    return np.cumsum(sizes)[:-1]


def refuse_non_finite(rollout: Rollout, split: str = "training") -> None:
    """All ranks alike, since all have the whole rollout: its scores and all its tokens' numbers have to be finite.

    Raises:
        NonFiniteError: naming the kind of number that is not in the fewest rows, which is where it began, and these
            rows of the split.
    """
    odd = {
        name: [row.row_id for row, found in zip(rollout.rows, of_rows, strict=True) if not np.isfinite(found).all()]
        for name, of_rows in {"scores": tuple(rollout.scores), **rollout.tokens}.items()
    }
    odd = {name: rows for name, rows in odd.items() if rows}
    if odd:
        name, rows = min(odd.items(), key=lambda kind: len(kind[1]))
        shown = rows if len(rows) <= _SHOWN else f"{rows[:_SHOWN]}, and {len(rows) - _SHOWN} more"
        raise NonFiniteError(
            f"{name} after {len(rows)} of {len(rollout)} prompts are not finite; nothing was learnt from this rollout. "
            f"Look at the models and these rows of the {split} split ({shown}), or lower optim.lr, or compute in "
            "fabric.precision=32-true"
        )


def figures_of(rollout: Rollout) -> dict[str, float]:
    """What there is to say of a rollout; KL and entropy are of a response, nats summed over its tokens."""
    num_responses = rollout.finished.size
    logprobs_N, reference_N = rollout.flat("logprobs").double(), rollout.flat("reference").double()
    return {
        "objective/scores": float(rollout.scores.mean()),
        "objective/kl": float((logprobs_N - reference_N).sum() / num_responses),
        "objective/entropy": float(-logprobs_N.sum() / num_responses),
        "rollout/length": len(logprobs_N) / num_responses,
        "rollout/finished": float(rollout.finished.mean()),
    }
