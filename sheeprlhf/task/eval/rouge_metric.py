"""ROUGE as an `evaluate.Metric` that needs no network."""

import tempfile

import datasets
import evaluate
import numpy as np
from rouge_score.rouge_scorer import RougeScorer

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Rouge(evaluate.Metric):
    """F-measures of ROUGE-1, -2, -L and -Lsum (Lin 2004) by rouge-score, what papers report; nothing is downloaded.

    Words are runs of a-z and 0-9 in lower case; ROUGE-Lsum takes the lines of a text as its sentences.

    `compute(predictions=..., references=..., use_stemmer=False, use_aggregator=True)` returns the mean of each
    measure in [0, 1]; without the aggregator, its list of one value a row.
    """

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:  # the parent makes a cache folder that rows in memory never use
            super().__init__(cache_dir=folder, keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
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
