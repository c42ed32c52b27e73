"""From prompts to a scored rollout: sample responses, score them, and compute what every model predicts for each token.

```
             prompt         response (its end token is one)
tokens       p  p  p        a  b  EOS
head reads         ^        ^  ^           the place before each token: there the policy predicts it and the critic
                                           estimates the remaining reward
logprobs                    0  1  2        of the response's tokens; reference, values, advantages and returns alike
rewards                     .  .  score    the score lands on the last token, an end token or the one it was cut at,
                                           except for what a reward function gives single tokens
```

Every rank samples and reads its share of the rows; afterwards all ranks have the whole rollout. The sampled responses
are a function of the weights, the seed and the rollout's number: they do not depend on ranks, batches or a resume.

Letters: S responses, N tokens of all responses laid end to end.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import chain, pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sheeprlhf.agent.batches import Batches, BatchOptions, MappedRows, Rows
from sheeprlhf.agent.policy import Policy
from sheeprlhf.agent.reward import AdapterValueModel, RewardModel
from sheeprlhf.data.example import Batch, Example
from sheeprlhf.data.tokenize import StepFinder, TextExchange
from sheeprlhf.engine.shard import data_rank, equal_passes, gathered
from sheeprlhf.loss.advantage import by_position
from sheeprlhf.loss.reward import combine_steps
from sheeprlhf.model.folder.architecture import num_positions_of
from sheeprlhf.reward.score import RawScores, RunningMoments, Texts, build_reward
from sheeprlhf.rollout.engines import StopStrings
from sheeprlhf.rollout.sampler import Sampled, engine_of
from sheeprlhf.rollout.sources import Episode, EpisodeSource, ServerSource, episode_metrics, sampled_of
from sheeprlhf.structure.reward import EPISODE_COLUMNS
from sheeprlhf.structure.rollout import OnlineTaskConfig, PPOConfig, ReinforcePPConfig
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.utils.end_tokens import end_token_ids
from sheeprlhf.utils.errors import NonFiniteError, RewardError, RolloutMismatchError, first_of
from sheeprlhf.utils.lightning import Fabric, gather_objects
from sheeprlhf.utils.memory import phase
from sheeprlhf.utils.modes import eval_mode, isolated_rng

SampledT = TypeVar("SampledT")
JUDGE_FAILURES = "objective/judge_failures"  # responses of a rollout that the judge gave no score
_MAX_SHOWN_ROWS = 20
_MAX_IMPORTANCE = 2.0  # of a token that was sampled with older weights
_PROBED_PROMPTS = 8  # whose responses show that servers have the weights


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Prompts, their sampled responses, and numbers of each token. Immutable; the same on all ranks.

    Arrays of tokens have one number for each token of a row's responses, response after response, like the targets of
    a batch of those rows: those of `Example.trained`, which leaves out what an environment wrote. There is no padding.
    """

    rows: tuple[Example, ...]  # a prompt with its sampled responses each
    scores: np.ndarray  # (rows, K) float64, the reward of each response
    finished: np.ndarray  # (rows, K) bool, whether an end token or a stop string ended it; else it was cut
    tokens: dict[str, tuple[np.ndarray, ...]]  # by name, for each row the numbers of its responses' tokens, float32
    texts: Texts = Texts([], [], [], [], {})  # prompts and responses as the reward reads them; empty until it has
    raw: RawScores = RawScores([], {})  # scores before normalisation and penalties, by term
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # for the log

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) tokens that are computed for each."""
        return np.array([row.num_tokens() for row in self.rows])

    @property
    def response_lengths(self) -> list[int]:
        """Trained tokens of every response, end token included, in the order of the token arrays."""
        return [int(mask.sum()) for row in self.rows for mask in row.masks()]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def examples(self, indices: Sequence[int]) -> list[Example]:
        """Return some rows, for a batch."""
        return [self.rows[index] for index in indices]

    def flat(self, name: str) -> Tensor:
        """(N,) the numbers of all responses' tokens, end to end."""
        return torch.from_numpy(np.concatenate(self.tokens[name]))

    def with_tokens(self, **values_N: Tensor) -> "Rollout":
        """Return the rollout with more numbers for each token, given end to end."""
        borders = np.cumsum([num_targets(row) for row in self.rows])[:-1]
        new = {
            name: tuple(np.split(values.detach().float().cpu().numpy(), borders)) for name, values in values_N.items()
        }
        return dataclasses.replace(self, tokens=self.tokens | new)

    def given_rewards(self) -> Tensor | None:
        """(S, T) the parts of the scores that single tokens have, 0 on padding; None if none has one."""
        if "rewards" not in self.tokens:
            return None
        return by_position(self.flat("rewards"), self.response_lengths)[0]

    def encoded_by(self, exchange: TextExchange, texts: Texts, prompts: Sequence[Example] | None = None) -> "Rollout":
        """Return the rollout in the tokens of a reward model; arguments as of `TextExchange`."""
        responses = list(zip(texts.prompts, texts.responses, texts.finished, strict=True))
        return dataclasses.replace(self, rows=exchange(self.rows, responses, prompts), tokens={})

    def with_rows(self, at: Sequence[int], other: "Rollout") -> "Rollout":
        """Return the rollout with the rows of another one at some places; its metrics stay as they are."""
        scores, finished = self.scores.copy(), self.finished.copy()
        scores[at], finished[at] = other.scores, other.finished
        group = self.scores.shape[1]
        return dataclasses.replace(
            self,
            rows=tuple(_replaced(self.rows, other.rows, at)),
            scores=scores,
            finished=finished,
            tokens={name: tuple(_replaced(old, other.tokens[name], at)) for name, old in self.tokens.items()},
            texts=_replaced_texts(self.texts, other.texts, at, group),
            raw=_replaced_scores(self.raw, other.raw, at, group),
        )

    def with_advantages(self, advantages_PG: Tensor) -> "Rollout":
        """Return the rollout with an advantage of each response as "advantages" of all of its tokens."""
        lengths_S = torch.tensor(self.response_lengths)
        return self.with_tokens(advantages=advantages_PG.flatten().repeat_interleave(lengths_S))


def _replaced_texts(old: Texts, new: Texts, at: Sequence[int], group: int) -> Texts:
    """Return texts with those of other rows, each with `group` responses, at some places."""
    lists: dict[str, Any] = {
        name: _replaced(getattr(old, name), getattr(new, name), at, group)
        for name in ("prompts", "responses", "finished", "num_tokens", "completion_ids")
    }
    columns = {name: _replaced(part, new.columns[name], at, group) for name, part in old.columns.items()}
    return Texts(**lists, columns=columns)


def _replaced_scores(old: RawScores, new: RawScores, at: Sequence[int], group: int) -> RawScores:
    """Return raw scores with those of other rows, each with `group` responses, at some places."""
    by_term = {name: _replaced(part, new.by_term[name], at, group) for name, part in old.by_term.items()}
    return RawScores(_replaced(old.total, new.total, at, group), by_term, old.failures)


def _replaced(old: Sequence[Any], new: Sequence[Any], at: Sequence[int], size: int = 1) -> list[Any]:
    """Return a list in which the parts of `size` items at some places are those of another list, in its order."""
    result = list(old)
    for number, place in enumerate(at):
        result[place * size : (place + 1) * size] = new[number * size : (number + 1) * size]
    return result


def num_targets(row: Example) -> int:
    """Return the tokens of a row's responses that count in a loss over tokens."""
    return sum(map(len, row.responses)) if row.trained is None else int(row.trained.sum())


def token_values(rollout: Rollout, part: list[int], names: Sequence[str]) -> dict[str, Tensor]:
    """(N,) numbers of some rows' tokens by name, in the order of the targets of a batch of those rows."""
    return {name: torch.from_numpy(np.concatenate([rollout.tokens[name][i] for i in part])) for name in names}


def sampling_uniforms(seed: int, number: int, shape: tuple[int, int, int]) -> np.ndarray:
    """(prompts, K, tokens) uniform numbers that decide what a rollout samples: a function of seed and number."""
    return np.random.default_rng([seed, number]).random(shape)


def sample_on_all_ranks(
    fabric: Fabric,
    policy: Policy,
    sample: Callable[[list[int], Callable[[int], object]], list[SampledT]],
    num_prompts: int,
    num_responses: int,
    label: str,
) -> list[SampledT]:
    """All ranks: the policy's responses to every prompt; each rank samples its share by `sample(prompts, progress)`."""
    data = data_rank(fabric)
    mine = list(range(data.rank, num_prompts, data.size))
    hidden = None if fabric.is_global_zero else True  # None: shown in a terminal only
    bar = tqdm(total=len(mine) * num_responses, desc=label, leave=False, disable=hidden)
    with gathered(fabric, policy), fabric.autocast(), bar:
        sampled = sample(mine, bar.update)
    found = dict(pair for part in gather_objects(fabric, list(zip(mine, sampled, strict=True))) for pair in part)
    return [found[number] for number in range(num_prompts)]


def to_rollout(
    prompts: Sequence[Example], sampled: Sequence[Sampled], trained: Sequence[np.ndarray] | None = None
) -> Rollout:
    """Return sampled responses as a rollout with the sampler's log-probabilities ("sampled") and no score yet.

    `trained` are the masks of the rows' sampled tokens, as `Example.trained`; None: all.
    """
    masks: Sequence[np.ndarray | None] = [None] * len(prompts) if trained is None else trained
    rows = tuple(
        prompt._replace(responses=one.responses, margin=0.0, desirable=True, trained=mask)
        for prompt, one, mask in zip(prompts, sampled, masks, strict=True)
    )
    finished = np.array([one.finished for one in sampled])
    logprobs = tuple(np.concatenate(one.logprobs) for one in sampled)
    return Rollout(rows, np.zeros(finished.shape), finished, {"sampled": logprobs})


def play_on_all_ranks(
    fabric: Fabric,
    policy: Policy,
    sampler: EpisodeSource,
    engine: Callable[..., list[Sampled]],
    prompts: Sequence[Example],
    uniforms_PKN: np.ndarray,
) -> tuple[Rollout, list[Episode]]:
    """All ranks: episodes after every prompt, as a rollout and one by one; `engine` samples a message of each."""

    def play(mine: list[int], progress: Callable[[int], object]) -> list[list[Episode]]:
        return sampler(engine, [prompts[row] for row in mine], uniforms_PKN[mine], progress)

    num_prompts, num_responses = uniforms_PKN.shape[:2]
    played = sample_on_all_ranks(fabric, policy, play, num_prompts, num_responses, "episodes")
    masks = [np.concatenate([episode.trained for episode in of_row]) for of_row in played]
    return to_rollout(prompts, list(map(sampled_of, played)), masks), list(chain.from_iterable(played))


def decode_rollout(
    rollout: Rollout,
    prompts: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    stop: StopStrings,
    episodes: Sequence[Episode] = (),
) -> Texts:
    """Decode the responses, each with its prompt; of episodes, the whole transcripts, and their columns.

    The dataset's own responses are the column "reference" if every one of `prompts` has one and the rows bring no
    column of this name. The other columns are those of the rows, copied for each response. End tokens are neither
    written nor counted. Sampled responses are cut before a stop string, whose tokens count.
    """

    def text(ids: np.ndarray) -> str:
        return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    group, end_ids, whole = rollout.finished.shape[1], end_token_ids(tokenizer), StopStrings((), tokenizer)
    stop = whole if episodes else stop
    responses = [response for row in rollout.rows for response in row.responses]
    columns: dict[str, list[Any]] = {
        name: [copy.deepcopy((prompt.columns or {}).get(name)) for prompt in prompts for _ in range(group)]
        for name in dict.fromkeys(name for prompt in prompts for name in prompt.columns or ())
    }
    if "reference" not in columns and all(prompt.responses for prompt in prompts):
        columns["reference"] = [one for prompt in prompts for one in [whole.text(prompt.responses[0])] * group]
    if episodes:
        values = [one.reward for one in episodes], [one.answer for one in episodes]
        columns |= zip(EPISODE_COLUMNS, values, strict=True)
    return Texts(
        prompts=[one for prompt in prompts for one in [text(prompt.prompt_ids)] * group],
        responses=[stop.text(response) for response in responses],
        finished=rollout.finished.reshape(-1).tolist(),
        num_tokens=[len(response) - int(response[-1] in end_ids) for response in responses],
        columns=columns,
        completion_ids=[response.tolist() for response in responses],
    )


def predict_targets(
    fabric: Fabric,
    module: nn.Module,
    call: Callable[[Batch], Tensor],
    batches: Batches,
    rows: Rows,
    label: str,
    num_rows: int | None = None,
) -> Tensor:
    """All ranks: return a number for each target of the rows, end to end in their order, float32 on the host.

    Args:
        fabric: where it runs.
        module: the module in `call`; in eval mode meanwhile, without gradient.
        call: a forward pass.
        batches: decides whether each token or each response is a target.
        rows: a rollout, or a split of a dataset.
        label: text of the progress bar.
        num_rows: read the first rows only.
    """
    mine: list[tuple[int, np.ndarray]] = []
    count = min(len(rows), num_rows or len(rows))
    passes = equal_passes(fabric, module, batches.numbered(rows, np.arange(count), label))
    with phase("evaluation"), isolated_rng(), eval_mode(module), torch.no_grad(), fabric.autocast():
        for (part, micro), _ in passes:  # what a rank computes twice has the same numbers
            values_N = call(fabric.to_device(micro.batch)).float().cpu().numpy()
            sizes = [num_targets(row) for row in rows.examples(part)]
            if len(values_N) != sum(sizes):  # one for each response instead of each token
                sizes = [len(row.responses) for row in rows.examples(part)]
            mine += zip(part, np.split(values_N, np.cumsum(sizes)[:-1]), strict=True)
    found: dict[int, np.ndarray] = dict(pair for rank in gather_objects(fabric, mine) for pair in rank)
    return torch.from_numpy(np.concatenate([found[row] for row in range(count)]))


def check_finite(rollout: Rollout, split: str = "training") -> None:
    """Check that the scores and all numbers of tokens are finite; all ranks alike, since all have the whole rollout.

    Raises:
        NonFiniteError: names the kind of number that is not finite in the fewest rows, which is where it began, and
            these rows of the split.
    """
    odd = {
        name: [row.row_id for row, values in zip(rollout.rows, of_rows, strict=True) if not np.isfinite(values).all()]
        for name, of_rows in {"scores": tuple(rollout.scores), **rollout.tokens}.items()
    }
    odd = {name: rows for name, rows in odd.items() if rows}
    if odd:
        name, rows = min(odd.items(), key=lambda kind: len(kind[1]))
        shown = first_of(list(map(str, rows)), _MAX_SHOWN_ROWS)
        raise NonFiniteError(
            f"{name} after {len(rows)} of {len(rollout)} prompts are not finite; the weights were not changed. "
            f"Look at the models and these rows of the {split} split ([{shown}]), or lower optim.lr, or compute in "
            "fabric.precision=32-true"
        )


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Return the metrics of a rollout; KL and entropy are of a response, nats summed over its tokens."""
    num_responses, raw = rollout.finished.size, rollout.raw
    logprobs_N, reference_N = rollout.flat("logprobs").double(), rollout.flat("reference").double()
    by_term = raw.by_term if len(raw.by_term) > 1 else {}
    metrics = {f"objective/scores/{name}": sum(scores) / len(scores) for name, scores in by_term.items()}
    if raw.failures is not None:
        metrics[JUDGE_FAILURES] = float(raw.failures)
    return metrics | {
        "objective/scores": float(rollout.scores.mean()),
        "objective/kl": float((logprobs_N - reference_N).sum() / num_responses),
        "objective/entropy": float(-logprobs_N.sum() / num_responses),
        "rollout/length": len(logprobs_N) / num_responses,
        "rollout/finished": float(rollout.finished.mean()),
    }


def distinct_bigrams(texts: list[str]) -> float:
    """Return the share of different ones among all pairs of neighbouring words; 0.0 if there is none."""
    pairs = [pair for text in texts for words in [text.split()] for pair in pairwise(words)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def kl_bound(n: int) -> float:
    """Nats from the sampler to its best of n at most, log n - (n-1)/n (arXiv 2009.01325; as a bound: 2401.01879)."""
    return math.log(n) - (n - 1) / n


class TermModel(NamedTuple):
    """A reward model, and the encoder of its texts; None if it reads the policy's tokens."""

    model: RewardModel | AdapterValueModel
    exchange: TextExchange | None = None


@dataclasses.dataclass(eq=False)
class RolloutCollector:
    """Makes rollouts: the policy samples, the reward scores, the reference computes its log-probabilities."""

    fabric: Fabric
    cfg: TrainConfig
    tokenizer: PreTrainedTokenizerBase
    policy: Policy
    reference: nn.Module
    reward_models: Mapping[str, TermModel]  # by their terms of the reward
    columns: Collection[str] = ("reference",)  # of the texts that the reward gets
    servers: ServerSource | None = None  # sample if given
    episodes: EpisodeSource | None = None  # samples in several turns if given

    def __post_init__(self) -> None:
        """Build the reward, and what cuts rollouts into batches: a target at each token, or at each last one."""
        cfg, packed = self.cfg, self.policy.packed
        assert isinstance(cfg.task, OnlineTaskConfig)
        self.task = cfg.task
        self._stop = StopStrings(cfg.generation.stop_strings, self.tokenizer)
        self._model_scores: dict[str, list[float]] = {}
        model_scores = {term: lambda *_, term=term: self._model_scores[term] for term in self.reward_models}
        self._reward = build_reward(
            cfg.reward, model_scores, default=cfg.data.rule_reward, max_tokens=cfg.generation.max_new_tokens
        )
        self.token_batches = Batches(self.fabric, cfg.task, packed=packed, targets="response")
        self.last_token_batches = Batches(self.fabric, cfg.task, packed=packed, targets="last")

    def __call__(
        self, prompts: list[Example], number: int, *, group: int | None = None, validates: bool = False
    ) -> Rollout:
        """All ranks: return the rollout with texts, scores and metrics, and the numbers of each token.

        "sampled" are the sampler's log-probabilities, "logprobs" those at which the ratio of an update is 1,
        "reference" those of the reference, and "rewards", if there are some, what a reward function gives tokens.

        Args:
            prompts: rows whose prompts are answered.
            number: number of the rollout in the run; it decides what is sampled.
            group: responses to each prompt; None takes the task's.
            validates: scores are comparable over the whole run, and do not change its state.

        Raises:
            NonFiniteError: a model's log-probabilities are not finite.
            RewardError: the reward fails; on all ranks.
            RolloutServerError: the servers fail; on all ranks.
        """
        # 1. sample
        rollout, episodes = self._sample(prompts, number, group, keeps=not validates)
        staleness = self.servers.staleness if self.servers is not None else 0
        # 2. log-probabilities of the policy and the reference
        old_N = rollout.flat("sampled")
        # Those of a server, and in half precision the sampler's, differ from those that the update computes.
        if self.servers is not None or self.cfg.fabric.precision != "32-true":
            old_N = self.logprobs(self.policy, rollout, "log-probabilities")
        rollout = rollout.with_tokens(logprobs=old_N, reference=self.logprobs(self.reference, rollout, "reference"))
        check_finite(rollout, "validation" if validates else "training")
        found: dict[str, float] = {} if self.servers is None else dict(self.servers.speeds)
        if staleness:
            weights_N = (old_N - rollout.flat("sampled")).exp().clamp(max=_MAX_IMPORTANCE)
            rollout = rollout.with_tokens(importance=weights_N)
            found |= {"rollout/staleness": float(staleness), "rollout/importance": float(weights_N.mean())}
        elif self.servers is not None:
            try:
                found |= self.servers.check(rollout.tokens)
            except RolloutMismatchError:
                if not self.servers.was_pending:
                    raise
                # It was kept from before a stop, and the weights have become others since the checkpoint.
                return self(prompts, number, group=group, validates=validates)
        # 3. decode and score
        texts = decode_rollout(rollout, prompts, self.tokenizer, self._stop, episodes)
        found |= episode_metrics(episodes)
        columns = {name: values for name, values in texts.columns.items() if name in self.columns}
        rollout = dataclasses.replace(rollout, texts=texts._replace(columns=columns))
        rollout = self._with_scores(rollout, validates)
        return dataclasses.replace(rollout, metrics=rollout_metrics(rollout) | found)

    def _sample(
        self, prompts: list[Example], number: int, group: int | None, *, keeps: bool
    ) -> tuple[Rollout, list[Episode]]:
        """All ranks: sample responses to every prompt; each rank samples its share. Episodes: of an environment."""
        fabric, cfg, task = self.fabric, self.cfg.generation, self.task
        shape = (len(prompts), group or task.num_generations, cfg.max_new_tokens)
        uniforms = sampling_uniforms(self.cfg.seed, number, shape)
        if self.servers is not None:
            ids = [prompt.prompt_ids for prompt in prompts]
            if not keeps or not self.servers.has(ids, uniforms, number, weights_of=number):
                self.servers.write_weights()
            return to_rollout(prompts, self.servers.sample(ids, uniforms, number if keeps else None)), []
        engine = partial(
            engine_of(cfg.engine),
            self.policy.causal_lm(),
            temperature=cfg.temperature,
            end_ids=end_token_ids(self.tokenizer),
            token_budget=task.token_budget,
            stop=self._stop if self._stop else None,
            packed=self.policy.packed,
            undefined_U=self.policy.undefined_U,
        )

        def sample(mine: list[int], progress: Callable[[int], object]) -> list[Sampled]:
            return engine([prompts[row].prompt_ids for row in mine], uniforms[mine], progress=progress)

        if self.episodes is None:
            sampled = sample_on_all_ranks(fabric, self.policy, sample, *shape[:2], "sampling")
            return to_rollout(prompts, sampled), []
        return play_on_all_ranks(fabric, self.policy, self.episodes, engine, prompts, uniforms)

    def sample_ahead(self, later: Sequence[tuple[int, list[Example]]], number: int) -> None:
        """All ranks: let servers sample later rollouts, of these numbers and prompts, while rollout `number` is used.

        Nothing is done while older weights still sample: the first of `later` is pending then. Otherwise the servers
        get the policy's weights, and their log-probabilities of a few responses are checked.

        Raises:
            RolloutServerError: the servers fail, or compute other log-probabilities.
        """
        servers = self.servers
        if not later or servers is None:
            return
        shape, seed = (self.task.num_generations, self.cfg.generation.max_new_tokens), self.cfg.seed
        given = {
            other: ([row.prompt_ids for row in rows], sampling_uniforms(seed, other, (len(rows), *shape)))
            for other, rows in later
        }
        if servers.has(*given[number + 1], number + 1, weights_of=number - 1):
            return
        if not all(servers.has(*given[other], other, weights_of=number) for other in given):
            servers.write_weights()
            rows = later[0][1][:_PROBED_PROMPTS]
            uniforms = sampling_uniforms(seed, number + 1, (len(rows), 1, shape[1]))
            probe = to_rollout(rows, servers.sample([row.prompt_ids for row in rows], uniforms))
            servers.check(probe.with_tokens(logprobs=self.logprobs(self.policy, probe, "check of servers")).tokens)
        servers.sample_ahead(given, number)

    def _with_scores(self, rollout: Rollout, validates: bool) -> Rollout:
        """All ranks: return the rollout with the scores of its texts, and the rewards of tokens if there are some."""
        self._model_scores = {source: self._scores_by(term, rollout) for source, term in self.reward_models.items()}
        # Rank zero alone calls the user's functions, which may answer the same question differently.
        raw: RawScores | RewardError = RawScores([], {})
        if self.fabric.is_global_zero:
            try:
                raw = self._reward.raw(rollout.texts)
            except RewardError as error:
                raw = error
        raw = self.fabric.broadcast(raw)
        if isinstance(raw, RewardError):  # on all ranks: none waits for the others
            raise raw
        if raw.of_tokens is not None and isinstance(self.task, PPOConfig | ReinforcePPConfig):
            if self.cfg.reward.normalize or self.cfg.reward.clip is not None:
                raise RewardError(
                    "the reward has numbers for tokens, and reward.normalize and reward.clip change the score of a "
                    "whole response: remove them"
                )
            trained = np.concatenate([mask for row in rollout.rows for mask in row.masks()])
            rewards_N = torch.tensor(list(chain.from_iterable(raw.of_tokens)))[torch.from_numpy(trained)]
            rollout = rollout.with_tokens(rewards=rewards_N)
        scores = np.array(raw.total if validates else self._reward.shape(raw.total, rollout.texts), dtype=np.float64)
        return dataclasses.replace(rollout, scores=scores.reshape(rollout.finished.shape), raw=raw)

    def _scores_by(self, term: TermModel, rollout: Rollout) -> list[Any]:
        """All ranks: return a reward model's score of each response; with `step_score=each`, one of each token."""
        reward, tokenizer, step_score = term.model, self.tokenizer, getattr(self.cfg.reward, "step_score", "min")
        if isinstance(reward, RewardModel) and term.exchange is not None:
            if reward.step_separator is not None and step_score == "each":
                raise RewardError("reward.step_score=each needs a reward model with the policy's tokens: give min")
            rollout, tokenizer = rollout.encoded_by(term.exchange, rollout.texts), term.exchange.reward
            check_positions(reward, rollout)
        scores_S = response_scores(self.fabric, self.task, reward, rollout, tokenizer, step_score=step_score)
        if len(scores_S) == rollout.scores.size:
            return scores_S.tolist()
        sizes = [len(ids) for ids in rollout.texts.completion_ids]
        return [of_response.tolist() for of_response in scores_S.split(sizes)]

    def logprobs(
        self,
        module: nn.Module,
        rows: Rows,
        label: str,
        *,
        temperature: float | None = None,
        num_rows: int | None = None,
    ) -> Tensor:
        """All ranks: (N,) log-probabilities of the responses' tokens, by default at the sampling temperature."""
        temperature = self.cfg.generation.temperature if temperature is None else temperature

        def call(batch: Batch) -> Tensor:
            return module(batch, temperature=temperature).target_N

        read = module if isinstance(module, Policy) else self.policy
        return predict_targets(self.fabric, read, call, self.token_batches, rows, label, num_rows)

    def values_of(self, critic: RewardModel | AdapterValueModel, rollout: Rollout, *, at_end: bool = False) -> Tensor:
        """All ranks: (N,) the critic's values before each token; at the end: (S,) after the last of each response."""
        batches = self.last_token_batches if at_end else self.token_batches
        with critic.in_use():
            return predict_targets(self.fabric, critic, critic, batches, rollout, "values")

    def perplexity(self, rows: Rows, num_rows: int) -> float:
        """All ranks: return the policy's perplexity on the dataset's own responses in the first rows."""
        logprobs_N = self.logprobs(self.policy, rows, "validating", temperature=1.0, num_rows=num_rows)
        return math.exp(min(-float(logprobs_N.double().mean()), 700.0))

    def state(self) -> dict[str, float]:
        """Return the state for a checkpoint: the running moments of the scores."""
        return {f"reward_{name}": value for name, value in self._reward.moments.to_dict().items()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore the result of `state`, if it is there: a new run has none."""
        moments = {name.removeprefix("reward_"): value for name, value in saved.items() if name.startswith("reward_")}
        if moments:
            self._reward.moments = RunningMoments(**moments)


def check_positions(model: RewardModel, rollout: Rollout) -> None:
    """Raises RewardError if a prompt with its response has more tokens than the reward model has positions."""
    positions = num_positions_of(model.classifier().config)
    longest = longest_of(rollout)
    if positions is not None and longest > positions:
        raise RewardError(
            f"a prompt with its response has {longest} tokens of the reward model, which has {positions} positions: "
            "lower generation.max_new_tokens or data.max_prompt_length"
        )


def response_scores(
    fabric: Fabric,
    options: BatchOptions,
    model: RewardModel | AdapterValueModel,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    step_score: str = "min",
    label: str = "scoring",
    num_rows: int | None = None,
) -> Tensor:
    """All ranks: (S,) the score after the last token of each response, of a process reward model that of its steps.

    With `step_score="each"` (N,) the probability that a step is right at its last token, and 0 at all other tokens.
    """
    targets, separator = "last", model.step_separator
    if separator is not None:
        find = StepFinder(tokenizer, separator)

        def with_steps(row: Example) -> Example:
            """The row whose trained tokens are the last ones of the steps of its responses."""
            masks = [find(row.prompt_ids.tolist(), response.tolist()) for response in row.responses]
            return row._replace(trained=np.concatenate(masks))

        targets, rows = "steps", MappedRows(rows, with_steps)
    batches = Batches(fabric, options, packed=model.packed, targets=targets)
    with model.in_use():
        scores = predict_targets(fabric, model, model, batches, rows, label, num_rows)
    if separator is None:
        return scores
    masks = [mask for row in rows.examples(range(min(len(rows), num_rows or len(rows)))) for mask in row.masks()]
    if step_score == "each":
        ends_N = torch.from_numpy(np.concatenate(masks))
        return torch.zeros(len(ends_N)).masked_scatter(ends_N, scores.sigmoid())
    return combine_steps(scores, torch.tensor([int(mask.sum()) for mask in masks]), step_score)


def longest_of(rollout: Rollout) -> int:
    """Return the tokens of the longest prompt with one of its responses."""
    return max(len(row.prompt_ids) + max(map(len, row.responses)) for row in rollout.rows)
