"""Scores of responses sampled as in a rollout; one model in memory at a time.

`evaluate` compares a policy with references, its start or another run: win rate and KL. `evaluate_frontier` draws score
against KL for a run's checkpoints, compared with the best of n of its initial model. Every point is made of the same
prompts with the same numbers. The best of n costs no training, so a policy that is below its curve has paid more than
it had to (arXiv 2009.01325, 2204.05862, 2210.10760).
"""

import csv
import io
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from sheeprlhf.agent.batches import choose_packed, longest_row
from sheeprlhf.agent.reward import RewardModel
from sheeprlhf.config.model_lookup import reads_chat, with_own_tokenizer
from sheeprlhf.data.example import Example
from sheeprlhf.data.prepare import own_prompts
from sheeprlhf.data.tokenize import TextExchange, has_same_tokens
from sheeprlhf.engine.checkpoint import saved_steps
from sheeprlhf.engine.rundir import read_run
from sheeprlhf.engine.shard import place
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.reward.score import RawScores, build_reward
from sheeprlhf.rollout.engines import StopStrings
from sheeprlhf.rollout.rollout import (
    check_positions,
    decode_rollout,
    distinct_bigrams,
    kl_bound,
    longest_of,
    response_scores,
    to_rollout,
)
from sheeprlhf.rollout.sampler import Sampled
from sheeprlhf.rollout.sources import episode_metrics
from sheeprlhf.structure.evaluation import NOTHING, REFERENCES, START, FrontierConfig, RewardConfig
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.structure.reward import model_sources, terms_of
from sheeprlhf.structure.run import EvalConfig
from sheeprlhf.task.eval.load import (
    Answers,
    Evaluation,
    answer,
    evaluated_files,
    kl_of_responses,
    logprobs_of,
    longest_with_response,
    model_of_run,
    set_up,
    start_of,
)
from sheeprlhf.task.eval.preference import pairs_of_rows, scores_of_rows
from sheeprlhf.task.eval.result import (
    cell,
    draw_frontier,
    draw_histogram,
    interval_of,
    records_of,
    save_result,
    standard_error,
)
from sheeprlhf.task.models import (
    check_reward_columns,
    load_policy_from_run,
    load_reward_tokenizer,
    load_separate_reward_model,
    prepare_prompts,
)
from sheeprlhf.utils.end_tokens import end_token_ids
from sheeprlhf.utils.errors import DataError
from sheeprlhf.utils.lightning import Fabric

COLUMNS = ("what", "n", "score", "score_low", "score_high", "kl", "kl_error", "rougeL", "response_tokens")


class RewardModelAccuracy(NamedTuple):
    """Accuracy of a reward model on held-out pairs, with its 95 % interval, and the number of pairs."""

    accuracy: float
    interval: list[float]
    pairs: int

    def at_chance(self) -> bool:
        """True if the accuracy is compatible with chance."""
        return self.interval[0] <= 0.5 <= self.interval[1]

    def warning(self) -> str:
        """Warning text for such a reward model."""
        low, high = self.interval
        return (
            f"warning: the reward model is right in {self.accuracy:.1%} of {self.pairs:,} held-out pairs ({low:.1%} to "
            f"{high:.1%}), no better than chance: its scores and win rates mean nothing"
        )


class Judge:
    """Scores responses by `reward=`. Reward models are loaded when they are first needed; ask for `trust` first."""

    def __init__(self, job: Evaluation, longest: int) -> None:
        self._job, self._fabric, self._cfg, self._longest = job, job.fabric, job.cfg, longest
        self._rule = job.data.rule_reward
        self._terms = model_sources(job.cfg.reward, self._rule)
        self._loaded: dict[str, tuple[RewardModel, int]] = {}
        self._own_prompts: dict[str, list[Example]] = {}

    def name(self) -> str:
        """Name of the scores: their only source, or `list`."""
        terms = terms_of(self._cfg.reward, self._rule)
        source = terms[0].source if len(terms) == 1 else self._cfg.reward.config_name
        return source.replace(":", ".")

    def scores(self, answers: Answers) -> np.ndarray:
        """All ranks: (P * K,) float64, scores less the penalties of `reward`. Raises SheepError on failures."""
        of_models = {term: self._scores_of_model(answers, term) for term in self._terms}
        scorer = build_reward(
            self._cfg.reward,
            {term: lambda *_, scores=scores: scores for term, scores in of_models.items()},
            default=self._rule,
            max_tokens=self._cfg.generation.max_new_tokens,
        )
        # Rank zero alone asks the user's functions, which may answer the same question differently.
        asked = scorer.raw(answers.texts) if self._fabric.is_global_zero else RawScores([], {})
        total = self._fabric.broadcast(asked).total
        return np.array(scorer.shape(total, answers.texts), dtype=np.float64)

    def trust(self) -> RewardModelAccuracy | None:
        """All ranks: the reward model's accuracy on the pairs of the split; None without a model, or without pairs."""
        if not self._terms:
            return None
        if len(self._terms) > 1 or reads_chat(self._cfg):
            self._job.say("the accuracy on pairs is measured for one reward model with reward.template=plain only")
            return None
        cfg, task, [term] = self._cfg, self._cfg.task, self._terms
        try:
            split = self._job.split(self._job.prepare("preference", load_reward_tokenizer(cfg, term)))
        except DataError as error:
            self._job.say(f"the reward model's accuracy is unknown, as there are no pairs to ask it about: {error}")
            return None
        model = self._model(term, max(self._longest, longest_row({"": split})))
        how: dict[str, Any] = {"num_rows": task.num_samples, "step_score": self._step_score()}
        scores_S = scores_of_rows(self._fabric, model, task, split, load_reward_tokenizer(cfg, term), **how)
        chosen_P, rejected_P, _ = pairs_of_rows(scores_S, split.sizes[:, 1:], task.num_samples)
        right_P = (chosen_P > rejected_P) + 0.5 * (chosen_P == rejected_P)
        return RewardModelAccuracy(*interval_of(right_P, seed=cfg.seed), len(right_P))

    def _scores_of_model(self, answers: Answers, term: str) -> list[float]:
        rollout, tokenizer, job = answers.rollout, load_reward_tokenizer(self._cfg, term), self._job
        if reads_chat(self._cfg):
            prepare = partial(prepare_prompts, self._cfg, tokenizer, say=job.say, progress=False)
            prompts = own_prompts(job.prepare_scored(answers.tokenizer), prepare)
            exchange = TextExchange(answers.tokenizer, tokenizer, job.say, chat=True, own_prompts=prompts)
            rollout = rollout.encoded_by(exchange, answers.texts)
        elif not has_same_tokens(answers.tokenizer, tokenizer):
            if term not in self._own_prompts:
                self._own_prompts[term] = job.rows_as(tokenizer, rollout.rows)
            exchange = TextExchange(answers.tokenizer, tokenizer, job.say)
            rollout = rollout.encoded_by(exchange, answers.texts, self._own_prompts[term])
        model = self._model(term, max(self._longest, longest_of(rollout)))
        check_positions(model, rollout)
        of = (self._fabric, self._cfg.task, model, rollout, tokenizer)
        return response_scores(*of, step_score=self._step_score()).double().tolist()

    def _step_score(self) -> str:
        return getattr(self._cfg.reward, "step_score", "min")

    def _model(self, term: str, longest: int) -> RewardModel:
        """The reward model of a term; rows that are longer than before decide anew whether its batches are packed."""
        if term not in self._loaded:
            tokenizer = load_reward_tokenizer(self._cfg, term)
            model = load_separate_reward_model(self._cfg, tokenizer, term, longest=longest, say=self._job.say)
            place(self._fabric, model)  # onto the device, in the precision asked for
            self._loaded[term] = model, longest
        model, before = self._loaded[term]
        if longest > before:
            how: dict[str, Any] = {"longest": longest, "batching": self._cfg.task.batching, "say": self._job.say}
            model.packed = model.packed and choose_packed(model, model.classifier(), **how)
            self._loaded[term] = model, longest
        return model


class Written(NamedTuple):
    """Sampled responses, the same on all ranks."""

    own: Answers  # the evaluated policy's answers
    other: Answers | None  # the answers to compare with; None compares with nothing
    kl_N: np.ndarray | None  # (P,) nats of each response; None without a start


def evaluate(fabric: Fabric, cfg: EvalConfig) -> Path | None:
    """All ranks: sample, score, compare, print the figures and save them as JSON, with each response and its score."""
    task = cfg.task
    assert isinstance(task, RewardConfig)
    job = Evaluation(fabric, cfg)
    data = job.prepare_scored()
    rows = job.rows(data, task.num_samples)
    check_reward_columns(cfg, data, {task.data_split: all(row.responses for row in rows)})
    longest, against = longest_sequence(cfg, evaluated_files(cfg), rows), _opponent(job, rows)
    written = _write(job, rows, longest, against)
    judge = Judge(job, longest)
    trust = judge.trust()
    scores_N = judge.scores(written.own)
    others_N = None if written.other is None else judge.scores(written.other)
    numbers = _figures(cfg, against, written, scores_N, others_N, trust)
    columns: dict[str, Any] = {"score": scores_N.tolist()}
    shown = {"model": scores_N}
    if written.other is not None and others_N is not None:
        shown[Path(against).name] = others_N
        columns |= {"against": written.other.texts.responses, "against_score": others_N.tolist()}
    kept = records_of(rows, written.own.texts, **columns)
    if trust is not None and trust.at_chance():
        job.say(trust.warning())
    draw = partial(draw_histogram, shown, f"score ({judge.name()})")
    table = _table(numbers, judge.name(), trust)
    name = f"reward-{judge.name()}-{task.data_split}"
    return save_result(fabric, cfg, name, numbers, table=table, rows=kept, draw=draw)


def longest_sequence(cfg: EvalConfig, model: ModelConfig, rows: list[Example]) -> int:
    """Tokens of the longest prompt with its reference or with a response."""
    own = max(len(row.prompt_ids) + sum(map(len, row.responses[:1])) for row in rows)
    return max(own, longest_with_response(cfg, model, rows))


def _opponent(job: Evaluation, rows: list[Example]) -> str:
    """Opponent of the win rate: `task.against`, or the initial model or nothing if the rows have no responses."""
    assert isinstance(job.cfg.task, RewardConfig)
    against = job.cfg.task.against
    if against.casefold() in (REFERENCES, START, NOTHING):
        against = against.casefold()
    if against == REFERENCES and not all(row.responses for row in rows):
        against = NOTHING if start_of(job.cfg) is None else START
        job.say(f"rows have no responses to compare with: task.against={against} is used")
    return against


def _write(job: Evaluation, rows: list[Example], longest: int, against: str) -> Written:
    """Compute everything that the judge needs, one model after the other."""
    start = start_of(job.cfg)
    writer = set_up(job, job.load_policy(longest))
    own = answer(job, writer, rows, samples=True)
    logprobs_N = logprobs_of(job, writer, own, "log-probabilities") if start is not None else None
    del writer
    other, kl_N = references_of(rows, job.tokenizer) if against == REFERENCES else None, None
    if start is not None and logprobs_N is not None:
        begun = set_up(job, job.load_start(start, longest))
        kl_N = kl_of_responses(own, logprobs_N, logprobs_of(job, begun, own, "start"))
        if against == START:
            other = answer(job, begun, rows, samples=True)
        del begun
    if against not in (REFERENCES, START, NOTHING):
        other = _of_run(job, against, rows)
    return Written(own, other, kl_N)


def _of_run(job: Evaluation, run_dir: str, rows: list[Example]) -> Answers:
    """Another run's answers to the same rows, with the same numbers; its tokenizer may be another."""
    model = model_of_run(run_dir, "task.against")
    files = with_own_tokenizer(model, Path(run_dir))
    theirs = load_tokenizer(files)
    if theirs.get_vocab() != job.tokenizer.get_vocab():
        rows = job.rows_as(theirs, rows)
    how = job.options(longest_sequence(job.cfg, files, rows))
    loaded = load_policy_from_run(model, Path(run_dir), "final", theirs, **how)
    return answer(job, set_up(job, loaded, theirs), rows, samples=True)


def references_of(rows: list[Example], tokenizer: PreTrainedTokenizerBase) -> Answers:
    """The dataset's own responses, as if somebody had answered so."""
    end_ids = end_token_ids(tokenizer)
    ids = [row.responses[0] for row in rows]
    own = [Sampled((part,), (np.zeros(len(part), np.float32),), (bool(part[-1] in end_ids),)) for part in ids]
    rollout = to_rollout(rows, own)
    return Answers(rollout, decode_rollout(rollout, rows, tokenizer, StopStrings((), tokenizer)), tokenizer)


def _figures(
    cfg: EvalConfig,
    against: str,
    written: Written,
    scores_N: np.ndarray,
    others_N: np.ndarray | None,
    trust: RewardModelAccuracy | None,
) -> dict[str, Any]:
    """The numbers of the result."""
    texts, kl_N = written.own.texts, written.kl_N
    score, score_interval = interval_of(scores_N, seed=cfg.seed)
    win_rate, win_rate_interval = None, None
    if others_N is not None:
        won_N = (scores_N > others_N) + 0.5 * (scores_N == others_N)
        win_rate, win_rate_interval = interval_of(won_N, seed=cfg.seed)
    return {
        "score": score,
        "score_interval": score_interval,
        "win_rate": win_rate,
        "win_rate_interval": win_rate_interval,
        "against": against,
        "against_score": None if others_N is None else float(others_N.mean()),
        "rows": len(scores_N),
        "kl": None if kl_N is None else float(kl_N.mean()),
        "kl_error": None if kl_N is None else standard_error(kl_N),
        "response_tokens": float(np.mean(texts.num_tokens)),
        "distinct_2": distinct_bigrams(texts.responses),
        "rm_accuracy": None if trust is None else trust.accuracy,
        "rm_pairs": None if trust is None else trust.pairs,
        **episode_metrics(written.own.episodes),
    }


def _table(numbers: dict[str, Any], judge: str, trust: RewardModelAccuracy | None) -> Table:
    """Table of the result, one metric per row."""
    table = Table("metric", "value")
    table.add_row(f"score ({judge})", f"{numbers['score']:.4f} ({cell(numbers['score_interval'])})")
    if numbers["against_score"] is not None:
        against, (low, high) = escape(numbers["against"]), numbers["win_rate_interval"]
        table.add_row(f"score of {against}", f"{numbers['against_score']:.4f}")
        rate = f"{numbers['win_rate']:.1%} ({low:.1%} to {high:.1%})"
        table.add_row(f"win rate against {against}", f"{rate} of {numbers['rows']:,}")
    if trust is not None:
        chance = " (not better than chance)" if trust.at_chance() else ""
        right = f"{trust.accuracy:.1%} of {trust.pairs:,} held-out pairs{chance}"
        table.add_row("the reward model is right in", right, style="bold red" if chance else "")
    if numbers["kl"] is not None:
        error = "" if numbers["kl_error"] is None else f" +- {numbers['kl_error']:.3f}"
        table.add_row("KL from the start, nats a response", f"{numbers['kl']:.3f}{error}")
    table.add_row("tokens of a response", f"{numbers['response_tokens']:.1f}")
    table.add_row("distinct pairs of words", f"{numbers['distinct_2']:.1%}")
    for name in (name for name in numbers if name.startswith("env/")):
        table.add_row(name, f"{numbers[name]:.4f}")
    return table


def evaluate_frontier(fabric: Fabric, cfg: EvalConfig) -> Path | None:
    """All ranks: sample from the start and from every checkpoint, score, and save the curve as JSON, CSV and PNG."""
    task = cfg.task
    assert isinstance(task, FrontierConfig)
    job = Evaluation(fabric, cfg)
    data = job.prepare_scored()
    rows = job.rows(data, task.num_samples)
    check_reward_columns(cfg, data, {task.data_split: all(row.responses for row in rows)})
    longest = longest_with_response(cfg, evaluated_files(cfg), rows)
    pool, written = _write_all(job, rows, longest)
    judge = Judge(job, longest)
    trust = judge.trust()
    pool_PK = judge.scores(pool).reshape(len(rows), task.best_of)
    powers = (2**k for k in range(task.best_of.bit_length()) if 2**k <= task.best_of)
    points = [_best_of_point(pool_PK, n, pool, cfg.seed) for n in sorted({task.best_of, *powers})]
    points += [_point(what, own, judge.scores(own), kl_N, cfg.seed) for what, (own, kl_N) in written.items()]
    if trust is not None and trust.at_chance():
        job.say(trust.warning())
    numbers = {
        "points": points,
        "rows": len(rows),
        "rm_accuracy": None if trust is None else trust.accuracy,
        "rm_pairs": None if trust is None else trust.pairs,
    }
    name, table = judge.name(), _frontier_table(points, judge.name())
    return save_result(
        fabric,
        cfg,
        f"frontier-{name}-{task.data_split}",
        numbers,
        table=table,
        weights="all",
        more={"csv": lambda: _csv(points)},
        draw=partial(draw_frontier, points, name),
        always_draw=True,
    )


def _write_all(
    job: Evaluation, rows: list[Example], longest: int
) -> tuple[Answers, dict[str, tuple[Answers, np.ndarray]]]:
    """The start's pool of answers, and each checkpoint's answers with the KL of each; one model after the other."""
    cfg, task, start = job.cfg, job.cfg.task, start_of(job.cfg)
    assert isinstance(task, FrontierConfig) and cfg.experiment_dir is not None and start is not None
    job.say(f"start: {start.name}")
    written: dict[str, tuple[Answers, Any]] = {}
    for weights in checkpoints_of(Path(cfg.experiment_dir)):
        writer = set_up(job, job.load_policy(longest, weights))
        own = answer(job, writer, rows, samples=True)
        written[weights] = own, logprobs_of(job, writer, own, weights)
        del writer
    begun = set_up(job, job.load_start(start, longest))
    pool = answer(job, begun, rows, group=task.best_of, samples=True)
    return pool, {
        weights: (own, kl_of_responses(own, logprobs_N, logprobs_of(job, begun, own, f"start of {weights}")))
        for weights, (own, logprobs_N) in written.items()
    }


def checkpoints_of(run_dir: Path) -> list[str]:
    """The names of a run's weights, oldest first; the last step of a finished run is called `final`."""
    steps, finished = sorted(saved_steps(run_dir / "checkpoints")), (run_dir / "final").is_dir()
    last = read_run(run_dir).get("step") if finished else None
    return [f"step-{step}" for step in steps if step != last] + ["final"] * finished


def expected_best(scores_PK: np.ndarray, n: int) -> np.ndarray:
    """(P,) the expected best score of n of a prompt's K, over all ways to choose n of them: unbiased for K >= n.

    The i-th smallest of K scores is the best of C(i-1, n-1) of the C(K, n) choices (arXiv 2112.09332).

    Args:
        scores_PK: (P, K) scores of independent samples.
        n: from 1 to K.
    """
    num = scores_PK.shape[1]
    weights_K = np.array([math.comb(i, n - 1) / math.comb(num, n) for i in range(num)])
    return np.sort(scores_PK, axis=1) @ weights_K


def _best_of_point(scores_PK: np.ndarray, n: int, pool: Answers, seed: int) -> dict[str, Any]:
    """The best of n responses of the start; its KL is at most `kl_bound(n)`."""
    score, (low, high) = interval_of(expected_best(scores_PK, n), seed=seed)
    point = dict.fromkeys(COLUMNS) | {"what": f"best of {n}", "n": n, "kl": kl_bound(n), "kl_error": 0.0}
    if n == 1:
        point |= {"response_tokens": float(np.mean(pool.texts.num_tokens)), "rougeL": _rouge_l(pool)}
    return point | {"score": score, "score_low": low, "score_high": high}


def _point(what: str, answers: Answers, scores_N: np.ndarray, kl_N: np.ndarray, seed: int) -> dict[str, Any]:
    """One checkpoint."""
    score, (low, high) = interval_of(scores_N, seed=seed)
    return {
        **dict.fromkeys(COLUMNS),
        **{"what": what, "score": score, "score_low": low, "score_high": high},
        **{"kl": float(kl_N.mean()), "kl_error": standard_error(kl_N), "rougeL": _rouge_l(answers)},
        "response_tokens": float(np.mean(answers.texts.num_tokens)),
    }


def _rouge_l(answers: Answers) -> float | None:
    """The mean F-measure of ROUGE-L against the references, times 100; None without them."""
    if "reference" not in answers.texts.columns:
        return None
    from rouge_score.rouge_scorer import RougeScorer

    scorer, texts = RougeScorer(["rougeL"]), answers.texts
    rows = zip(texts.columns["reference"], texts.responses, strict=True)
    return 100 * float(np.mean([scorer.score(reference, text)["rougeL"].fmeasure for reference, text in rows]))


def _csv(points: list[dict[str, Any]]) -> bytes:
    """A row a point."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(points)
    return text.getvalue().encode()


def _frontier_table(points: list[dict[str, Any]], judge: str) -> Table:
    """A row a point, for people to read."""
    table = Table("", f"score ({judge})", "KL, nats a response", "ROUGE-L", "tokens")
    for point in points:
        kl = f"{point['kl']:.3f}" + (f" +- {point['kl_error']:.3f}" if point["kl_error"] else "")
        rouge = "" if point["rougeL"] is None else f"{point['rougeL']:.1f}"
        tokens = "" if point["response_tokens"] is None else f"{point['response_tokens']:.1f}"
        score = f"{point['score']:.4f} ({point['score_low']:.4f} to {point['score_high']:.4f})"
        table.add_row(point["what"], score, f"at most {kl}" if point["n"] else kl, rouge, tokens)
    return table
