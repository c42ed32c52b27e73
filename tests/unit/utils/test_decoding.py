"""The text of a response is the text that was encoded, its first space included."""

from typing import Any

import numpy as np
import pytest

from sheeprlhf.data.tokenize import PairEncoder
from sheeprlhf.rollout.engines import StopStrings
from sheeprlhf.utils.vocabulary import ResponseDecoder
from tests.unit.data.toy import byte_tokenizer, piece_tokenizer

FAMILIES = {
    **{prefix: lambda prefix=prefix: piece_tokenizer(prefix) for prefix in ("prepend", "first", "always", "none")},
    "bytes": lambda: byte_tokenizer(bos=True),
}
TEXTS = (" the cat", "the cat", "\nthe cat", "a", " a. the dog", "at", ": 7")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_response_decodes_to_the_text_that_was_encoded(family: str) -> None:
    tokenizer: Any = FAMILIES[family]()
    [pair] = PairEncoder(tokenizer)(["ask: the cat"], [TEXTS], control_tokens=False)
    decode, stop = ResponseDecoder(tokenizer), StopStrings([" dog"], tokenizer)
    for text, ids in zip(TEXTS, pair.responses, strict=True):
        assert decode(ids) == text
        assert stop.text(np.array([*ids, tokenizer.eos_token_id])) == text.partition(" dog")[0]
    assert decode([]) == ""


def test_a_message_has_no_space_that_the_template_writes() -> None:
    tokenizer = piece_tokenizer("prepend")
    [pair] = PairEncoder(tokenizer)(["ask"], [[" the cat"]], control_tokens=False)
    assert StopStrings([], tokenizer, as_message=True).text(np.array(pair.responses[0])) == "the cat"
