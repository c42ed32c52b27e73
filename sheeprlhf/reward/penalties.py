"""What is subtracted from a score for the form of a response."""

import re

from sheeprlhf.structure.reward import RewardSourceConfig

RUN_LENGTH = 3  # words of the runs that count as repeated
_WORD = re.compile(r"\w+|[^\w\s]")


def repeated_share(text: str) -> float:
    """The share of runs of three words that stood in the text before, in [0, 1); 0.0 if it has fewer words.

    A word is a run of letters, digits and underscores, in lower case; any other character but white space is one too.
    """
    words = _WORD.findall(text.lower())
    runs = [tuple(words[i : i + RUN_LENGTH]) for i in range(len(words) - RUN_LENGTH + 1)]
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def overlong_penalty(num_tokens: int, max_tokens: int, cache: int) -> float:
    """What a long response loses (DAPO, arXiv 2503.14476, eq. 13), in [0, 1].

    Nothing up to max_tokens - cache tokens, from there linearly up to 1 at max_tokens.

    Args:
        num_tokens: of the response.
        max_tokens: the most that a response may have.
        cache: the last tokens before it, in which the penalty grows; at least 1.
    """
    return min(1.0, max(0.0, (num_tokens - (max_tokens - cache)) / cache))


def penalty(cfg: RewardSourceConfig, response: str, *, finished: bool, num_tokens: int, max_tokens: int) -> float:
    """What one response loses, 0.0 or more.

    Args:
        cfg: has the sizes of the penalties.
        response: its text, without end token and stop string.
        finished: the model ended it itself, with an end token or a stop string.
        num_tokens: its length, the end token not counted.
        max_tokens: the most that a response may have.
    """
    lost = 0.0 if finished else cfg.missing_eos_penalty
    if num_tokens < cfg.min_response_length:
        lost += cfg.short_penalty
    if cfg.overlong_cache:
        lost += overlong_penalty(num_tokens, max_tokens, cfg.overlong_cache)
    if cfg.repetition_penalty:
        lost += cfg.repetition_penalty * repeated_share(response)
    return lost
