"""The built-in reward functions: `fn(prompts, responses, <columns>) -> scores`, one score a response.

Responses come without the end token.
"""

import re
from functools import cache
from itertools import pairwise
from typing import Any

from sheeprlhf.reward.inflect import style_of

FEWEST_WORDS = 3  # of a summary: a verb and what it is done to
MOST_REPEATED = 0.25  # of a summary's runs of three words: "a list of names into a list of ids" repeats one
RUN_LENGTH = 3  # words of the runs that count as repeated
_WORD = re.compile(r"\w+|[^\w\s]")


def imperative(prompts: list[str], responses: list[str]) -> list[float]:
    """1.0 for a one-line summary as PEP 257 asks for it ("Return the value."), else 0.0; nothing in between.

    A summary is one line of at least three words whose first is an imperative verb; it ends in one full stop, has no
    other sentence and no word twice in a row, and at most a quarter of its runs of three words repeat. So neither a
    verb alone, nor words again and again, nor a good sentence with more text behind it scores. Whether the summary is
    true is not looked at: the penalty on the divergence from the reference has to keep that.
    """
    return [float(_is_imperative_summary(response)) for response in responses]


def _is_imperative_summary(text: str) -> bool:
    words = text.lower().split()
    return (
        text == text.strip()
        and len(text.splitlines()) == 1
        and len(words) >= FEWEST_WORDS
        and all(first != second.rstrip(".") for first, second in pairwise(words))
        and text.endswith(".")
        and not text.endswith("..")
        and re.search(r"[.!?]\s", text) is None
        and repeated_share(text) <= MOST_REPEATED
        and style_of(text) == "imperative"
    )


def repeated_share(text: str) -> float:
    """Return the share of runs of three words that occurred in the text before, in [0, 1); 0.0 if it has fewer words.

    A word is a run of letters, digits and underscores, in lower case; any other character but white space is one too.
    """
    words = _WORD.findall(text.lower())
    runs = [tuple(words[i : i + RUN_LENGTH]) for i in range(len(words) - RUN_LENGTH + 1)]
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def length(prompts: list[str], responses: list[str], *, target_length: int, length_unit: str = "words") -> list[float]:
    """The smaller of a response's length and the target divided by the larger: 1.0 at the target, 0.0 for no text."""
    lengths = [len(text.split()) if length_unit == "words" else len(text) for text in responses]
    return [min(found, target_length) / max(found, target_length) for found in lengths]


def environment(prompts: list[str], responses: list[str], *, episode_reward: list[float]) -> list[float]:
    """The sum of the rewards that `rollout.environment` gave in each episode; 0.0 for one that failed."""
    return list(episode_reward)


def regex(prompts: list[str], responses: list[str], *, pattern: str) -> list[float]:
    """1.0 where the pattern is found in a response, as `re.search` does it, else 0.0."""
    compiled = re.compile(pattern)
    return [float(compiled.search(response) is not None) for response in responses]


def rouge(prompts: list[str], responses: list[str], *, reference: list[str]) -> list[float]:
    """F-measure of ROUGE-L (Lin 2004) against the reference, in [0, 1], by rouge-score without a stemmer."""
    scorer = _rouge_scorer()
    pairs = zip(reference, responses, strict=True)
    return [float(scorer.score(wanted, response)["rougeL"].fmeasure) for wanted, response in pairs]


def sentiment(prompts: list[str], responses: list[str]) -> list[float]:
    """The compound score of VADER (Hutto and Gilbert 2014), from -1.0 (negative) to 1.0 (positive); English only."""
    analyzer = _sentiment_analyzer()
    return [float(analyzer.polarity_scores(response)["compound"]) for response in responses]


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])


@cache
def _sentiment_analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
