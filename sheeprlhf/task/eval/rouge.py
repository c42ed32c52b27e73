"""ROUGE: how much wording generated responses share with the references, next to what trivial answers get.

Every row's response is written once, in batches of prompts of similar length that are dealt to all devices; the text
depends neither on the batches nor on the devices. Scores are means over rows of rouge-score's F-measures, times 100,
with 95 % bootstrap intervals.
"""

import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from evaluate import Metric, MetricInfo
from rich.table import Table
from rouge_score.rouge_scorer import RougeScorer
from tqdm import tqdm

from sheeprlhf.config.registry import config_to_dict
from sheeprlhf.data.report import check_prompts
from sheeprlhf.structure.evaluation import RougeConfig
from sheeprlhf.structure.run import EvalConfig
from sheeprlhf.task.eval.load import Evaluation, answer_split
from sheeprlhf.task.eval.result import draw_bars, mean_and_interval, records_of, save_result
from sheeprlhf.utils.end_tokens import end_token_ids
from sheeprlhf.utils.lightning import Fabric

_DEFINED = re.compile(r"^\s*(?:async\s+)?(?:class|def)\s+(\w+)", re.MULTILINE)
_PART = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def evaluate(fabric: Fabric, cfg: EvalConfig) -> Path | None:
    """All ranks: generate, score, print the scores and save them as JSON, with the generations next to it."""
    task = cfg.task
    assert isinstance(task, RougeConfig)
    job = Evaluation(fabric, cfg)
    job.data = replace(job.data, train_on="last")  # a reference is one answer
    data = job.prepare("sft")
    check_prompts(data.report, task.config_name)
    examples, answers = answer_split(job, data, task.num_samples)
    if not fabric.is_global_zero:
        return None
    texts = answers.texts
    prompts, responses, references = texts.prompts, texts.responses, texts.columns["reference"]
    end_ids = end_token_ids(job.tokenizer)
    num_cut = sum(int(example.responses[0][-1] not in end_ids) for example in examples)
    if num_cut:
        job.say(f"{num_cut} references were cut at data.max_length={job.data.max_length}: only what is left counts")
    num_wordless = sum(re.search("[a-z0-9]", text.lower()) is None for text in references)
    if num_wordless:
        job.say(f"{num_wordless} references have no word of a-z and 0-9, and ROUGE sees no others: they score 0")

    systems = {"model": responses, **baseline_responses(prompts, references)}
    numbers, rouge_l = _score(systems, references, use_stemmer=task.use_stemmer, seed=cfg.seed)
    numbers |= {"seed": cfg.seed, "generation": config_to_dict(cfg.generation)}
    rows = records_of(examples, texts, reference=references, rougeL=rouge_l)
    bars = {system: tuple(scores["rougeL"]) for system, scores in numbers["mean_low_high"].items()}
    draw = partial(draw_bars, bars, "ROUGE-L, F-measure x 100, and its 95 % interval")
    return save_result(fabric, cfg, f"rouge-{task.data_split}", numbers, table=_table(numbers), rows=rows, draw=draw)


def _score(
    systems: dict[str, list[str]], references: list[str], *, use_stemmer: bool, seed: int
) -> tuple[dict[str, Any], list[float]]:
    """Numbers of the model and of the baselines, F-measures times 100, and the model's ROUGE-L of every row."""
    metric = Rouge()
    columns: dict[tuple[str, str], np.ndarray] = {}  # (N,) one value a row
    for system, texts in tqdm(systems.items(), desc="scoring", leave=False, disable=None):
        options = {"use_stemmer": use_stemmer, "use_aggregator": False}
        of_rows = metric.compute(predictions=texts, references=references, **options)
        columns |= {(system, kind): 100 * np.array(of_rows[kind]) for kind in ROUGE_TYPES}
    for system in systems:  # the same rows are drawn for both, so that the interval is of the difference itself
        columns[system, "ahead"] = columns["model", "rougeL"] - columns[system, "rougeL"]
    intervals = mean_and_interval(np.stack(list(columns.values()), axis=1), seed=seed).T.tolist()
    result = dict(zip(columns, intervals, strict=True))
    numbers = {
        **{kind: result["model", kind][0] for kind in ROUGE_TYPES},
        "rows": len(references),
        "mean_low_high": {system: {kind: result[system, kind] for kind in ROUGE_TYPES} for system in systems},
        "rougeL_ahead_of": {system: result[system, "ahead"] for system in systems if system != "model"},
        "words": {system: sum(len(text.split()) for text in texts) / len(texts) for system, texts in systems.items()},
        "use_stemmer": use_stemmer,
    }
    return numbers, columns["model", "rougeL"].tolist()


def _table(numbers: dict[str, Any]) -> Table:
    """A row for the model and for each baseline: F-measures and their intervals, and words of a response."""
    table = Table("", *(kind.replace("rouge", "ROUGE-") for kind in ROUGE_TYPES), "words", show_lines=True)
    for system, scores in numbers["mean_low_high"].items():
        cells = [f"{mean:.1f}\n{low:.1f} to {high:.1f}" for mean, low, high in scores.values()]
        table.add_row(system, *cells, f"{numbers['words'][system]:.1f}", style="bold" if system == "model" else "")
    ahead = numbers["rougeL_ahead_of"]
    best = min(ahead, key=lambda system: ahead[system][0])
    mean, low, high = ahead[best]
    table.caption = (
        f"means over {numbers['rows']:,} rows of F-measures x 100, and their 95 % intervals\n"
        f"ROUGE-L ahead of `{best}`: {mean:+.1f} ({low:+.1f} to {high:+.1f})"
    )
    return table


def baseline_responses(prompts: Sequence[str], references: Sequence[str]) -> dict[str, list[str]]:
    """Trivial answers: `lead` (as many words as references have), `copy`, and `names` if prompts define any."""
    num_words = max(1, round(sum(len(text.split()) for text in references) / len(references)))
    answers = {"lead": [" ".join(prompt.split()[:num_words]) for prompt in prompts], "copy": list(prompts)}
    if 2 * sum(_DEFINED.search(prompt) is not None for prompt in prompts) > len(prompts):
        answers["names"] = [" ".join(name_words(prompt)) for prompt in prompts]
    return answers


def name_words(prompt: str) -> list[str]:
    """The words of the names that a text's `class` and `def` lines define, in order: `def to_JSON(x)` -> to JSON."""
    return [word for name in _DEFINED.findall(prompt) for word in split_name(name)]


def split_name(name: str) -> list[str]:
    """The words of an identifier: `_read_HTTPHeader2` -> read HTTP Header 2."""
    return _PART.findall(name)


class Rouge(Metric):
    """F-measures of ROUGE-1, -2, -L and -Lsum (Lin 2004) by rouge-score; a line of a text is a sentence."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:  # the parent makes a cache folder that rows in memory never use
            super().__init__(cache_dir=folder, keep_in_memory=True)

    def _info(self) -> MetricInfo:
        text = datasets.Value("string")
        return MetricInfo(
            description=type(self).__doc__,
            citation="Lin, C.-Y. (2004). ROUGE: A Package for Automatic Evaluation of Summaries.",
            inputs_description="predictions: generated texts. references: one text for each.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(
        self, predictions: list[str], references: list[str], use_stemmer: bool = False, use_aggregator: bool = True
    ) -> dict[str, float] | dict[str, list[float]]:
        scorer = RougeScorer(list(ROUGE_TYPES), use_stemmer=use_stemmer)
        scored = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
        rows = {name: [float(scores[name].fmeasure) for scores in scored] for name in ROUGE_TYPES}
        return {name: float(np.mean(values)) for name, values in rows.items()} if use_aggregator else rows
