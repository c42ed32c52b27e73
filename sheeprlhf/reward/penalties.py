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


def penalty(cfg: RewardSourceConfig, response: str, *, finished: bool, num_tokens: int) -> float:
    """What one response loses, 0.0 or more.

    Args:
        cfg: has the sizes of the penalties.
        response: its text, without EOS and stop string.
        finished: the model ended it itself, with EOS or a stop string.
        num_tokens: its length, EOS not counted.
    """
    lost = 0.0 if finished else cfg.missing_eos_penalty
    if num_tokens < cfg.min_response_length:
        lost += cfg.short_penalty
    if cfg.repetition_penalty:
        lost += cfg.repetition_penalty * repeated_share(response)
    return lost
