"""Flags of commands without a configuration: read wherever they stand, and all mistakes told at once."""

import pytest

from sheeprlhf.apps.arguments import Flag, read_flags
from sheeprlhf.utils.errors import ConfigError

FLAGS = (
    Flag("to", "Where to."),
    Flag("top-p", "Share.", default=1.0, kind=float, minimum=0.1, maximum=1),
    Flag("seed", "Seed.", default=42, kind=int, minimum=0),
    Flag("auth", "Ask.", kind=bool),
    Flag("dtype", "Format.", values=("float32", "bfloat16")),
)


def read(*words):
    return read_flags("talk", FLAGS, words)


def test_flags_and_words_in_any_order():
    given = read("run", "--to", "x", "--top-p=0.5", "other", "--auth", "--dtype", "bfloat16")
    assert given.words == ["run", "other"]
    assert given.values == {"to": "x", "top-p": 0.5, "seed": 42, "auth": True, "dtype": "bfloat16"}
    assert type(given.values["seed"]) is int
    assert read("a=b", "--to", "-x").words == ["a=b"]
    assert read("run", "--help") is None and read("-h") is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sed 3", "--seed"),
        ("--top_p 0.5", "--top-p"),
        ("--zzzz", "`talk --help`"),
        ("--seed", "--seed"),
        ("--seed --auth", "--seed"),
        ("--seed 1.5", "--seed 1.5"),
        ("--top-p x", "--top-p x"),
        ("--top-p nan", "--top-p nan"),
        ("--top-p 0.05", "0.1"),
        ("--top-p 2", "1"),
        ("--dtype bf16", "bfloat16"),
        ("--auth=yes", "--auth"),
        ("seed=3", "--seed 3"),
        ("top_p=0.5", "--top-p 0.5"),
    ],
)
def test_a_mistake_is_answered(words, message):
    with pytest.raises(ConfigError) as error:
        read(*words.split())
    assert message in str(error.value)


def test_all_mistakes_at_once():
    with pytest.raises(ConfigError) as error:
        read("--sed", "--top-p", "5", "--seed", "x")
    assert len(error.value.problems) == 3


@pytest.mark.parametrize(
    "words",
    [
        "--hf-token sesame123",
        "--api_key=sesame123",
        "--to hf_sesame1234567890123456789012345678",
        "hf_sesame1234567890123456789012345678",
    ],
)
def test_a_secret_is_refused_and_not_shown(words):
    with pytest.raises(ConfigError) as error:
        read(*words.split())
    assert "HF_TOKEN" in str(error.value)
    assert "hf_sesame" not in str(error.value)
