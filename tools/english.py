"""Classify the words of a generated docstring: from an English list, from its signature, or jargon of many packages."""

import lzma
import re
from collections import Counter
from functools import cache
from pathlib import Path

from pyarrow import parquet

from sheeprlhf.task.eval.rouge import split_name
from sheeprlhf.utils.home import embedded_folder

WORD_LIST = Path(__file__).parent / "words" / "american-english.txt.xz"
SUMMARIES = embedded_folder("docstrings") / "train.parquet"
_RUN = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*")


@cache
def english_words() -> frozenset[str]:
    """The list of `words/NOTICE`, in lower case."""
    with lzma.open(WORD_LIST, "rt", encoding="ascii") as file:
        return frozenset(file.read().split())


@cache
def jargon() -> frozenset[str]:
    """Words in the summaries of at least two packages of the training split, such as `tuple`; English ones too."""
    rows = parquet.read_table(SUMMARIES, columns=["response", "package"]).to_pylist()
    pairs = {(word.removesuffix("'s"), row["package"]) for row in rows for word in words_of(row["response"])}
    packages = Counter(word for word, _ in pairs)
    return frozenset(word for word, number in packages.items() if number >= 2)


def words_of(text: str) -> list[str]:
    """Runs of two or more letters, in lower case; an apostrophe may stand inside: `Don't split max_len` has four."""
    return [word.lower() for word in _RUN.findall(text) if len(word) > 1]


def unknown_words(text: str, signature: str, known: frozenset[str]) -> list[str]:
    """The words of a text that are neither known nor in the signature.

    A possessive counts as its noun. A signature's words are its runs of letters, whole and cut at camel case:
    `class DataFrame` has class, dataframe, data and frame.
    """
    of_signature = {word.lower() for run in _RUN.findall(signature) for word in (run, *split_name(run))}
    nouns = ((word, word.removesuffix("'s")) for word in words_of(text))
    return [word for word, noun in nouns if noun not in known and noun not in of_signature]
