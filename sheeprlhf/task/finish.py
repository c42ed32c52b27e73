"""Common parts of training tasks: reports of the data, self-checks, validations, samples, saved rollouts, the end."""

import io
import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sheeprlhf.agent.policy import Policy
from sheeprlhf.config.command_words import changed_words, command, option_word
from sheeprlhf.config.model_lookup import Trained
from sheeprlhf.config.run_lookup import REPORT_FILE, REWARD_MODEL, scores_by_run
from sheeprlhf.data.example import Batch, Example
from sheeprlhf.data.prepare import NOTHING_KEPT, PreparedData, Stream, prepare_training_data
from sheeprlhf.data.prompt_encoder import save_form
from sheeprlhf.data.report import render_report
from sheeprlhf.data.store import TokenizedSplit
from sheeprlhf.engine.checkpoint import TrainState
from sheeprlhf.engine.manifest import write_folder
from sheeprlhf.engine.parts import keeps_parameters, write_model
from sheeprlhf.engine.run import Run
from sheeprlhf.engine.rundir import mark_finished, same_data
from sheeprlhf.engine.shard import assemble, data_rank, equal_passes, gathered, is_sharded
from sheeprlhf.engine.step import LossFn, MicroBatch
from sheeprlhf.rollout.engines import generate_responses
from sheeprlhf.rollout.rollout import Rollout, RolloutCollector, distinct_bigrams
from sheeprlhf.security.json_records import DATA_REPORT, load_json
from sheeprlhf.structure.data import KeptColumns
from sheeprlhf.structure.reward import AutoRewardConfig
from sheeprlhf.structure.rollout import DistillConfig, OnlineTaskConfig, environment_of
from sheeprlhf.structure.run import GenConfig, TrainConfig
from sheeprlhf.structure.task import TrainTaskConfig
from sheeprlhf.task.reference import response_sums
from sheeprlhf.task.scale_plan import step_plan
from sheeprlhf.utils.end_tokens import end_token_ids
from sheeprlhf.utils.errors import ConfigError, DataError, ModelError, Notify, RecordError
from sheeprlhf.utils.lightning import Fabric, gather_objects
from sheeprlhf.utils.memory import size_text
from sheeprlhf.utils.modes import eval_mode, isolated_rng
from sheeprlhf.utils.output import safe_path, write_file

ROLLOUTS = "rollouts"  # folder with one parquet file for each saved rollout, with a row for each response
TERM = "reward/"  # prefix of its columns with the unweighted scores of each term of the reward
_ROWS_PER_GROUP = 256
_HALF_PRECISION_ERROR = 0.1  # nats a token: bf16 rounds logits of 20 to eighths, in another order with a cache
VALIDATION = (1 << 32) - 1  # number of the validation's rollout: it samples with numbers that no training rollout has
_MIN_KL = -1.0  # nats a response, which sampling alone does not reach
_MAX_PERPLEXITY_GROWTH = 1.5  # over the first perplexity of the data's own responses, before a warning


class Saved(Protocol):
    """Model of a run that can save itself for `from_pretrained`."""

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the model and its tokenizer into an empty folder."""


def prepare_run_data(
    fabric: Fabric, run: Run, tokenizer: PreTrainedTokenizerBase, *, kind: str, kept: KeptColumns = NOTHING_KEPT
) -> tuple[PreparedData, Stream | None]:
    """All ranks: prepare, report and check the data of a run; with `data.streaming` the first shard, and the stream.

    Raises DataError if the data cannot be used.
    """
    shows: dict[str, Any] = {"say": run.say, "progress": fabric.is_global_zero, "leads": fabric.local_rank == 0}
    data, stream = prepare_training_data(run.cfg.data, tokenizer, kind=kind, kept=kept, **shows)
    report_data(fabric, run, data)
    check_validation_rows(run.cfg.task, data.splits.get("validation"))
    return data, stream


def report_data(fabric: Fabric, run: Run, data: PreparedData) -> None:
    """All ranks; rank zero shows, checks and stores the data report, and plans the memory. Raises DataError."""
    run.say(render_report(data.report))
    same = fabric.broadcast(same_data(run.dir, data.fingerprint) if fabric.is_global_zero else None)
    if not same:
        raise DataError(
            f"{run.dir} trained on other data until now: the files of data.*, the columns that the reward names, the "
            "tokenizer, its chat template or the version of this program have changed; put them back, or start another "
            "run without resume"
        )
    if fabric.is_global_zero:
        with isolated_rng(), suppress(ModelError):  # of a model that cannot be run on tensors without content
            run.planned_memory = step_plan(run.cfg, device=fabric.device.type).total()
        if run.planned_memory is not None:
            size = size_text(run.planned_memory)
            run.say(f"memory plan: up to {size} in a step of the longest rows (`doctor` tells more)")
        write_file(run.dir, REPORT_FILE, json.dumps(data.report, indent=1).encode())


def record_validation(
    run: Run, state: TrainState, result: dict[str, float], metric: str = "loss", *, highest: bool = False
) -> None:
    """Log a validation; remember the step if its metric (task.early_stopping_metric, if any) is the best so far."""
    task = run.cfg.task
    run.log({f"val/{name}": value for name, value in result.items()}, state.step)
    run.say(f"step {state.step}  " + "  ".join(f"val/{name} {value:.4f}" for name, value in result.items()))
    if task.early_stopping_metric is not None:
        metric, highest = task.early_stopping_metric, task.stops_at_highest()
        if metric not in result:
            raise ConfigError(f"task.early_stopping_metric={metric} is not measured: give one of {', '.join(result)}")
    if state.step == 0:
        return
    sign = -1.0 if highest else 1.0
    best = math.inf if state.best_metric is None else sign * state.best_metric
    if math.isfinite(result[metric]) and sign * result[metric] < best:
        state.best_metric, state.best_step, state.stale_validations = result[metric], state.step, 0
    else:
        state.stale_validations += 1


def check_validation_rows(task: TrainTaskConfig, rows: TokenizedSplit | None) -> None:
    """Raises DataError if there are no validation rows although an option needs them."""
    name = "early_stopping_metric" if task.early_stopping_metric is not None else "eval_at_start"
    if not rows and getattr(task, name):
        advice = "give for example data.validation_split=0.1, or remove it"
        raise DataError(f"task.{name}={getattr(task, name)} needs validation rows, and this data has none: {advice}")


def finish_run(fabric: Fabric, run: Run, trained: Saved, tokenizer: PreTrainedTokenizerBase, state: TrainState) -> None:
    """All ranks: write `final/` for `from_pretrained`; rank zero marks the run finished and says what measures it."""
    run.finish_saving()
    final = safe_path(run.dir, "final")
    if not fabric.broadcast(final.exists()):  # complete whenever it is there: it is renamed into place
        _write_final(fabric, final, trained, lambda folder: _save(folder, run, trained, tokenizer))
    if fabric.is_global_zero:
        facts = {"best_metric": state.best_metric, "best_step": state.best_step}
        facts["stopped_early"] = run.cfg.task.stops_early(state.stale_validations)
        mark_finished(run.dir, step=state.step, **facts, peak_memory=run.peak_memory())
    fabric.barrier()
    if (peak := run.peak_memory()) is not None:
        place = "on the GPU" if fabric.device.type == "cuda" else "of this process"
        planned = "" if run.planned_memory is None else f" (planned: up to {size_text(run.planned_memory)})"
        run.say(f"peak memory {place}: {size_text(peak)}{planned}")
    if run.cfg.task.stops_early(state.stale_validations):
        run.say(
            f"early stopping after step {state.step}: val/{run.cfg.task.early_stopping_metric} has not improved in "
            f"{state.stale_validations} validations; its best value, {state.best_metric}, is that of step "
            f"{state.best_step}"
        )
    run.say(f"finished: {run.dir}\nnext: {evaluation_of(run.cfg, run.dir)}")


def _write_final(fabric: Fabric, final: Path, trained: Saved, save: Callable[[Path], None]) -> None:
    """All ranks: write the folder; of sharded weights, only adapters and weights that are computed become whole."""
    model = getattr(trained, "model", None)
    if isinstance(trained, nn.Module) and is_sharded(trained):
        if isinstance(model, PreTrainedModel) and keeps_parameters(model):
            write_model(fabric, final, trained, save)
            return
        on_base = isinstance(model, PeftModel) and bool(model.get_base_model().name_or_path)
        assemble(fabric, trained, adapters=on_base)
    if fabric.is_global_zero:
        write_folder(final, save)


def _save(folder: Path, run: Run, trained: Saved, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the model, its tokenizer, and how its prompts are written."""
    trained.save(folder, tokenizer)
    task = run.cfg.task
    save_form(folder, Trained(str(run.dir), task.trains, run.cfg.model, run.cfg.data, run.dir), tokenizer)


def evaluation_of(cfg: TrainConfig, run_dir: Path) -> str:
    """The command that measures what a run has learned: texts, pairs, or what its reward says of its samples."""
    task, words = cfg.task, ["task=perplexity"]
    if task.trains == "reward model":
        words = ["task=steps" if task.data_kind == "stepwise" else "task=preference"]
    elif task.data_kind == "preference":
        words = ["task=preference"]
    words.append(option_word("experiment_dir", str(run_dir)))
    split = _evaluated_split(run_dir)
    if split is not None:
        words.append(f"task.data_split={split}")
    if isinstance(task, OnlineTaskConfig):
        words[0] = "task=reward"
        if cfg.reward.config_name != AutoRewardConfig.config_name:
            words.append(f"reward={cfg.reward.config_name}")
        words += changed_words("reward", cfg.reward, ("normalize",))
        if scores_by_run(cfg):
            words.append(option_word(REWARD_MODEL, task.rm_experiment_dir))
        words += changed_words("rollout", cfg.rollout) if environment_of(cfg) is not None else []
        words += changed_words("generation", cfg.generation, ("do_sample", "engine"))
    return command(["eval", *words])


def _evaluated_split(run_dir: Path) -> str | None:
    """The split to evaluate on where a run's data has no test rows; None where it has some, or is not known."""
    splits: dict[str, Any] = {}
    with suppress(RecordError):
        splits = load_json(run_dir / REPORT_FILE, DATA_REPORT).get("splits", {})
    kept = [name for name, part in splits.items() if part["kept"]]
    return next((name for name in ("validation", "train") if name in kept), None) if "test" not in kept else None


def log_samples(
    fabric: Fabric,
    run: Run,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    cfg: GenConfig,
    step: int,
) -> None:
    """All ranks; rank zero generates for the examples' prompts and logs them; training's generators are kept."""
    if not examples:
        return
    with gathered(fabric, policy), isolated_rng():
        if data_rank(fabric).rank:
            return
        prompts = [example.prompt_ids for example in examples]
        responses = generate_responses(policy.causal_lm(), tokenizer, prompts, cfg, with_end_token=True)
    blocks = []
    for example, response in zip(examples, responses, strict=True):
        answer = example.responses[0]
        ends = np.flatnonzero(np.isin(answer, end_token_ids(tokenizer)))  # further turns may follow the first
        answer = answer[: ends[0] + 1] if len(ends) else answer
        prompt, reference = (tokenizer.decode(ids.tolist()) for ids in (example.prompt_ids, answer))
        blocks.append(f"[prompt]\n{prompt}\n[model]\n{response}\n[reference]\n{reference}\n")
    run.log_text("samples", "\n".join(blocks), step)


def sample_table(rollout: Rollout, num_rows: int) -> str:
    """Format prompt, response, score and KL of the first rows, and the dataset's own responses if there are any."""
    texts = rollout.texts
    references = texts.columns.get("reference")
    blocks = []
    for row in range(min(num_rows, len(rollout))):
        kl = float((rollout.tokens["logprobs"][row] - rollout.tokens["reference"][row]).sum())
        cut = "" if texts.finished[row] else ", cut"
        blocks.append(
            f"[prompt]\n{texts.prompts[row]}\n[model] score {rollout.scores[row, 0]:.3f}, KL {kl:.2f}{cut}\n"
            f"{texts.responses[row]}\n" + ("" if references is None else f"[reference]\n{references[row]}\n")
        )
    return "\n".join(blocks)


def saved_rollouts(num_rollouts: int, count: int) -> set[int]:
    """Numbers of the `count` rollouts to save: the first, the last and others evenly between; at most all."""
    count = min(count, num_rollouts)
    return {index * (num_rollouts - 1) // max(count - 1, 1) for index in range(count)}


def write_rollout(run_dir: Path, rollout: Rollout, number: int, step: int) -> Path:
    """Rank zero only: write a rollout (number from 0, steps before it), over one that a killed process wrote."""
    sink = io.BytesIO()
    pq.write_table(rollout_table(rollout, number, step), sink, row_group_size=_ROWS_PER_GROUP)
    return write_file(run_dir, f"{ROLLOUTS}/rollout-{number:06d}.parquet", sink.getvalue())


def rollout_table(rollout: Rollout, number: int, step: int) -> pa.Table:
    """Return a table with a row for each response; arguments as of `write_rollout`."""
    group, responses = rollout.finished.shape[1], [ids for row in rollout.rows for ids in row.responses]
    columns: dict[str, Any] = {
        "rollout": pa.array([number] * len(responses), pa.int64()),
        "step": pa.array([step] * len(responses), pa.int64()),
        "row_id": pa.array([row.row_id for row in rollout.rows for _ in range(group)], pa.int64()),
        "prompt": rollout.texts.prompts,
        "response": rollout.texts.responses,
        "prompt_ids": pa.array([row.prompt_ids for row in rollout.rows for _ in range(group)], pa.list_(pa.int32())),
        "response_ids": pa.array(responses, pa.list_(pa.int32())),
        "finished": rollout.finished.reshape(-1),
        "score": rollout.scores.reshape(-1),
    }
    if any(row.trained is not None for row in rollout.rows):
        columns["trained"] = pa.array([mask for row in rollout.rows for mask in row.masks()], pa.list_(pa.bool_()))
    columns |= {f"{TERM}{name}": pa.array(scores, pa.float64()) for name, scores in rollout.raw.by_term.items()}
    borders = np.cumsum(rollout.response_lengths)[:-1]
    for name in rollout.tokens:
        values = np.split(rollout.flat(name).numpy(), borders)
        columns[name] = pa.array(values, pa.list_(pa.float32()))
    return pa.table(columns)


def check_sampler(run: Run, collect: RolloutCollector, rollout: Rollout) -> None:
    """All ranks, before the first step: check that sampler, training forward and reference agree on each token.

    The ratio of new to old probability is 1 then, and the KL to the reference 0, unless that is a teacher.

    Raises:
        ModelError: they differ by more than rounding, and `task.self_check` is "error".
    """
    task, precision = run.cfg.task, run.cfg.fabric.precision
    assert isinstance(task, OnlineTaskConfig)
    tolerance = 1e-5 if precision == "32-true" else 2e-2
    sampler_tolerance = 1e-5 if precision == "32-true" else _HALF_PRECISION_ERROR
    if collect.servers is not None:  # every rollout is compared with rollout.tolerance
        sampler_tolerance = math.inf
    sampled_N = rollout.flat("sampled")
    trained_N = collect.logprobs(collect.policy, rollout, "self-check")
    others = (rollout.flat(name) for name in ("sampled", "logprobs", "reference"))
    sampler, ratio, kl = (float((trained_N - other_N).abs().mean()) for other_N in others)
    problem = ""
    if not sampler <= sampler_tolerance or not ratio <= tolerance:
        limit = sampler_tolerance if sampler > sampler_tolerance else tolerance
        problem = (
            f"what was sampled has log-probabilities {max(sampler, ratio):.2g} nats a token from those that training "
            f"computes, more than {limit:g}: something besides weights and tokens changes them (random numbers in the "
            "model's code, positions, a cache), and a ratio of new to old probability means nothing"
        )
    elif not kl <= tolerance and not isinstance(task, DistillConfig):
        problem = (
            f"before the first step the policy's log-probabilities are {kl:.2g} nats a token from the reference's, "
            f"more than {tolerance:g}: the reference is not what training starts from"
        )
    elif not float(-sampled_N.mean()) > 0:
        problem = "the policy has no entropy: every token is certain, so nothing else is ever tried"
    if problem and task.self_check == "error":
        raise ModelError(f"{problem}; or give task.self_check=warn")
    if problem:
        run.say(f"warning: {problem}")


class RolloutValidator:
    """Answers the same held-out prompts with the same random numbers at every validation."""

    def __init__(self, run: Run, collect: RolloutCollector, rows: TokenizedSplit) -> None:
        task = run.cfg.task
        assert isinstance(task, OnlineTaskConfig)
        self._run, self._collect, self._rows, self._task = run, collect, rows, task
        self._count = min(len(rows), (task.max_eval_batches or len(rows)) * task.mini_batch_size)
        self._first: dict[str, float] = {}

    def __call__(self, step: int) -> dict[str, float]:
        """All ranks: return the metrics, and log a table of samples.

        "objective" is what training maximises, score - price * KL; "perplexity" is that of the dataset's own
        responses, if every row has one; "distinct_2" is the share of different word pairs among all that were written.
        """
        rollout = self._collect(self._rows.examples(range(self._count)), VALIDATION, group=1, validates=True)
        result = {name.partition("/")[2]: value for name, value in rollout.metrics.items()}
        result["objective"] = result["scores"] - self._task.kl_price() * result["kl"]
        result["distinct_2"] = distinct_bigrams(rollout.texts.responses)
        if not self._rows.unanswered:
            result["perplexity"] = self._collect.perplexity(self._rows, self._count)
        if self._task.num_sample_prompts:
            self._run.log_text("samples", sample_table(rollout, self._task.num_sample_prompts), step)
        self._warn(result)
        return result

    def _warn(self, result: dict[str, float]) -> None:
        """Warn of implausible metrics, with their usual cause."""
        self._first = self._first or result
        if result["kl"] < _MIN_KL:
            self._run.say(
                f"warning: the KL divergence is estimated as {result['kl']:.1f} nats a response, and it is never "
                "negative: responses were not sampled from the policy alone (generation.*, a bug in the model's cache)"
            )
        first, perplexity = (metrics.get("perplexity", 0.0) for metrics in (self._first, result))
        if result["scores"] > self._first["scores"] and perplexity > _MAX_PERPLEXITY_GROWTH * first:
            self._run.say(
                f"warning: scores rise and the data's own responses become unlikely (perplexity {first:.1f} -> "
                f"{perplexity:.1f}): the policy may be finding what the reward overlooks; look at samples/, raise "
                "task.init_kl_coeff (task.beta) or lower the learning rate"
            )


def check_reference(
    fabric: Fabric,
    module: nn.Module,
    micro_batches: list[MicroBatch],
    loss_fn: LossFn,
    initial_loss: Callable[[Batch], float],
    mode: str,
    precision: str,
    say: Notify,
    tail_weight: float = 1.0,
) -> None:
    """All ranks, before the first step: check that the policy is its own reference, dropout off.

    Log-probabilities may differ by 1e-5 nats a token in float32, else by 2e-2; the loss by ten times that from
    `initial_loss`, the total loss of a batch if policy and reference are equal.
    Raises ModelError if they differ by more, and `mode` is "error" instead of "warn".
    """
    tolerance = 1e-5 if precision == "32-true" else 2e-2
    apart, tokens, loss, expected = 0.0, 1, 0.0, 0.0
    with isolated_rng(), eval_mode(module), torch.no_grad():
        for micro, _ in equal_passes(fabric, module, micro_batches[:1]):
            batch, reference_S, *_ = content = fabric.to_device(micro.batch)
            sums_S = response_sums(module(batch).target_N, batch, tail_weight)
            apart, tokens = float((sums_S - reference_S).abs().sum()), sum(batch.response_lengths)
            loss = float(loss_fn(module, content).total) / micro.num_items
            expected = initial_loss(batch) / micro.num_items
    found = gather_objects(fabric, (apart / tokens, abs(loss - expected), expected))
    logprobs_apart, loss_apart, expected = (max(part) for part in zip(*found, strict=True))
    problem = ""
    if not logprobs_apart <= tolerance:
        problem = (
            f"before the first step the policy's log-probabilities are {logprobs_apart:.2g} nats a token from its "
            f"reference's, more than {tolerance:g}: something besides training changes them (random numbers in the "
            "model's code, weights that were changed on disk); delete the reference-*.safetensors files next to the "
            "prepared data, or give task.self_check=warn"
        )
    elif not loss_apart <= 10 * tolerance * max(1.0, expected):
        problem = (
            f"before the first step the loss is {loss_apart:.2g} from {expected:.4f}, its value for a policy that is "
            "its own reference, although their log-probabilities agree: this is a mistake in the loss; please report "
            "it, or give task.self_check=warn"
        )
    if problem and mode == "error":
        raise ModelError(problem)
    if problem:
        say(f"warning: {problem}")
