"""Mistakes in evaluations that their tests notice."""

from tests.mutants.mutant import Mutant

_ROUGE = "sheeprlhf/task/eval/rouge.py"
_TEXTS = "tests/e2e/test_rouge.py::test_texts_and_scores_are_the_same_for_any_batches"

MUTANTS = [
    Mutant(  # prompt tokens of left-padded rows are taken for the response
        trap="rouge",
        file="sheeprlhf/model/generate.py",
        old="for row in output[:, width:].cpu().numpy()]",
        new="for row in output[:, min(map(len, prompts)) :].cpu().numpy()]",
        tests=_TEXTS,
    ),
    Mutant(  # texts in the order in which they were generated, references in that of the rows
        trap="rouge",
        file=_ROUGE,
        old="responses = [response_of_row[row] for row in range(num_rows)]",
        new="responses = list(response_of_row.values())",
        tests=_TEXTS,
    ),
    Mutant(  # special tokens are part of the text
        trap="rouge",
        file=_ROUGE,
        old="tokenizer.decode(ids.tolist(), skip_special_tokens=True)",
        new="tokenizer.decode(ids.tolist())",
        tests=_TEXTS,
    ),
    Mutant(  # a 90 % interval
        trap="rouge",
        file="sheeprlhf/task/eval/interval.py",
        old="[2.5, 97.5]",
        new="[5.0, 95.0]",
        tests="tests/unit/task/test_rouge_metric.py::test_an_interval_is_that_of_the_mean_and_repeats",
    ),
]
