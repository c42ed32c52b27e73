"""The gates of the embedded model: what a word is, what is run for a seed, what the figures are, and the card."""

from tools.english import unknown_words, words_of
from tools.measure_tiny import Sampled, Seed, gates

WARM = Sampled(1.0, 0.96, 0.97, 9000, ["sometric", "gle"])
COOL = Sampled(0.7, 0.98, 0.99, 8000, ["gle"])
SEED = Seed(1.4, 30.0, 23.0, 21.7, [WARM, COOL], 0.972, 0.986)


def warmer(known: float) -> Seed:
    return SEED._replace(sampled=[WARM._replace(known=known), COOL])


def test_words_by_hand() -> None:
    english = frozenset({"return", "the", "of", "don't", "size", "frame"})
    found = words_of("Return max_len2 of the x's DataFrame; don't.")
    assert " ".join(found) == "return max len of the x's dataframe don't"
    assert unknown_words("Return the frame's sizze. Don't!", "def f():", english) == ["sizze"]
    assert unknown_words("Return dataframe, data, HTTP of readers.", "def read_HTTPData(DataFrame)", english) == [
        "readers"
    ]


def test_a_gate_is_of_the_mean_over_the_seeds() -> None:
    def passed(*seeds: Seed) -> list[bool]:
        return [gate.passed for gate in gates(list(seeds))]

    assert passed(SEED, SEED) == [True, True, True, True]
    assert passed(SEED, SEED._replace(bits_per_character=1.61)) == [False, True, True, True]  # mean 1.505
    assert passed(SEED, SEED._replace(bits_per_character=1.59)) == [True, True, True, True]
    assert passed(warmer(0.9499)) == [True, False, True, True]
    assert passed(SEED._replace(sampled=[WARM, COOL._replace(known=0.9499)])) == [True, True, False, True]
    assert passed(SEED._replace(rouge_l=21.7)) == [True, True, True, False]  # above, not equal
    assert gates([]) == []
