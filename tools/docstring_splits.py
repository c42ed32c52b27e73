"""Deduplicate clean docstring pairs, divide the packages among the splits and draw a balanced snapshot.

Everything here is deterministic: the order of rows and packages is the order of a keyed hash of their text, never the
order of a file system or of a random generator.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sheeprlhf.reward.inflect import style_of
from tools.inflect import has_second_verb, to_imperative

SPLITS = ("train", "validation", "test")
FAMILIES: Mapping[str, str] = {
    "boto3": "botocore",
    "dask": "distributed",
    "httpcore2": "httpx2",
    "keras": "tensorflow-cpu",
    "lightning-utilities": "lightning",
    "multiprocess": "python",
    "pytorch-lightning": "lightning",
    "setuptools": "python",
    "tensorboard": "tensorflow-cpu",
    "torchmetrics": "lightning",
    "typing-extensions": "python",
    "wagtail": "django",
}
"""Packages that share text, by the package that names the family; a family is never divided between two splits."""


@dataclass(frozen=True)
class Pair:
    """One clean pair of a signature and its one-sentence summary, and where it is from.

    Attributes:
        prompt: Source form up to and with the opening quotes of the docstring.
        response: The summary as its author wrote it.
        package: Distribution name, in lower case with hyphens.
        version: Distribution version.
        file: Path of the source file inside the site-packages or library folder.
        qualname: Dotted name inside the file.
        licence: SPDX id.
    """

    prompt: str
    response: str
    package: str
    version: str
    file: str
    qualname: str
    licence: str


def hash_key(seed: int, *parts: str) -> str:
    """Return the sort key that stands in for a random draw.

    Args:
        seed: Any whole number; another one gives another order.
        parts: The texts that identify the thing to order.

    Returns:
        32 hexadecimal digits.
    """
    return hashlib.blake2b("\0".join([str(seed), *parts]).encode(), digest_size=16).hexdigest()


def normalise(text: str) -> str:
    """Return a text in lower case with every run of other characters than letters and digits as one space.

    Args:
        text: A prompt or a summary.

    Returns:
        The form that duplicates are found by.
    """
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def deduplicate(pairs: Iterable[Pair], seed: int) -> list[Pair]:
    """Keep one pair of each summary and one of each prompt, over all packages together.

    "Return the value." and "Returns the value." count as one summary. Of duplicates the third-person one is kept, the
    rarer kind, and otherwise the first in hash order.

    Args:
        pairs: All clean pairs.
        seed: Seed of the hash order.

    Returns:
        The kept pairs in hash order.
    """
    order = sorted(
        pairs,
        key=lambda pair: (
            style_of(pair.response) != "third_person",
            hash_key(seed, pair.prompt, pair.response, pair.package, pair.file, pair.qualname),
        ),
    )
    seen_summaries: set[str] = set()
    seen_prompts: set[str] = set()
    kept = []
    for pair in order:
        summary = normalise(to_imperative(pair.response) or pair.response)
        prompt = normalise(pair.prompt)
        if summary in seen_summaries or prompt in seen_prompts:
            continue
        seen_summaries.add(summary)
        seen_prompts.add(prompt)
        kept.append(pair)
    return sorted(kept, key=lambda pair: hash_key(seed, pair.prompt))


def is_comparable(pair: Pair) -> bool:
    """Say whether a pair can be written in both forms by changing its first word only.

    Args:
        pair: A clean pair.

    Returns:
        True for a function or method whose summary begins with a verb of the list and has no second verb to inflect.
        Classes are left out: their summaries are descriptions, and PEP 257 asks no command of them.
    """
    is_class = "def " not in pair.prompt
    return not is_class and style_of(pair.response) != "other" and not has_second_verb(pair.response)


def assign_packages(
    pairs: Iterable[Pair], seed: int, held_out_rows: int, package_rows: tuple[int, int]
) -> dict[str, str]:
    """Divide the packages among the splits, families together.

    Args:
        pairs: The comparable pairs.
        seed: Seed of the hash order.
        held_out_rows: Balanced rows wanted for the validation and for the test split.
        package_rows: Least balanced rows and most rows in all that a family may have to be held out, so that the large
            packages stay in the training split and no held-out split is one package.

    Returns:
        The split of each package.
    """
    counts: dict[str, dict[str, int]] = defaultdict(lambda: {"imperative": 0, "third_person": 0})
    packages: dict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        family = FAMILIES.get(pair.package, pair.package)
        counts[family][style_of(pair.response)] += 1
        packages[family].add(pair.package)
    least, most = package_rows
    free = [family for family in counts if 2 * min(counts[family].values()) >= least]
    free = [family for family in free if sum(counts[family].values()) <= most]
    free.sort(key=lambda family: hash_key(seed, family))
    splits = dict.fromkeys((name for names in packages.values() for name in names), "train")
    for split in ("test", "validation"):
        held = {"imperative": 0, "third_person": 0}
        while free and 2 * min(held.values()) < held_out_rows:
            family = free.pop(0)
            splits.update(dict.fromkeys(packages[family], split))
            held = {style: held[style] + counts[family][style] for style in held}
    return splits


def balance(pairs: Sequence[Pair], max_rows: int, max_style_rows_per_package: int) -> list[Pair]:
    """Draw as many imperative as third-person pairs.

    Args:
        pairs: Comparable pairs of one split, in the order they are drawn in.
        max_rows: Most rows to draw.
        max_style_rows_per_package: Most rows of one style that one package may give.

    Returns:
        The drawn pairs, in the order given.
    """
    pools: dict[str, list[Pair]] = {"imperative": [], "third_person": []}
    given: dict[tuple[str, str], int] = defaultdict(int)
    for pair in pairs:
        style = style_of(pair.response)
        given[style, pair.package] += 1
        if given[style, pair.package] <= max_style_rows_per_package:
            pools[style].append(pair)
    rows = min(max_rows // 2, *(len(pool) for pool in pools.values()))
    drawn = {pair.prompt for pool in pools.values() for pair in pool[:rows]}
    both = [pair for pool in pools.values() for pair in pool if pair.prompt in drawn]
    return sorted(both, key=_original_order(pairs))


def corpus_rows(
    pairs: Iterable[Pair], bodies: Iterable[tuple[str, str]], seed: int, max_chars: int
) -> list[dict[str, str]]:
    """Return the rows of a corpus split in hash order.

    Args:
        pairs: Deduplicated clean pairs of the split's packages; all of them are kept.
        bodies: Docstring bodies and short functions of the same packages; they fill what the pairs leave.
        seed: Seed of the hash order.
        max_chars: Most characters, prompts and responses together.

    Returns:
        Rows with the keys ``prompt`` and ``response``.
    """
    kept = [(pair.prompt, pair.response) for pair in pairs]
    chars = sum(len(prompt) + len(response) for prompt, response in kept)
    unique = {normalise(response): (prompt, response) for prompt, response in sorted(bodies, reverse=True)}
    for prompt, response in sorted(unique.values(), key=lambda row: hash_key(seed, *row)):
        chars += len(prompt) + len(response)
        if chars > max_chars:
            break
        kept.append((prompt, response))
    order = sorted(kept, key=lambda row: hash_key(seed, *row))
    return [{"prompt": prompt, "response": response} for prompt, response in order]


def _original_order(pairs: Iterable[Pair]) -> Callable[[Pair], int]:
    positions = {pair.prompt: position for position, pair in enumerate(pairs)}
    return lambda pair: positions[pair.prompt]
