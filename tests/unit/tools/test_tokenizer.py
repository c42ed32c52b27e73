"""The shipped tokenizer and configuration, and the training function on a small text."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import sheeprlhf.assets

FOLDER = Path(sheeprlhf.assets.__file__).parent / "tiny"
ODD_TEXTS = [
    "",
    " ",
    "a ",
    "  two  spaces  ",
    "tab\tand\r\nline\n\n\n  end\n",
    'class Owner:\n    def name(self, x=12):\n        """',
    "\u00e9\u00df\u4e2d\u6587\U0001f600\u200b\u00a0x",
    "\x00\x01\x7f",
    "1234567890 3.14 0x1F",
    "don't , . ! ?",
    "e\u0301 \ufeff",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


def test_size_and_special_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 4096
    assert sorted(tokenizer.get_vocab().values()) == list(range(4096))
    assert tokenizer.convert_tokens_to_ids(["<|pad|>", "<|bos|>", "<|eos|>"]) == [0, 1, 2]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.model_max_length == 512


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_one_bos_first_and_no_eos(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == 1
    assert ids.count(1) == 1
    assert 2 not in ids
    assert 1 not in tokenizer.encode(text, add_special_tokens=False)


def test_digits_are_single_and_indentation_is_one_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer.encode("12345", add_special_tokens=False)) == 5
    for width in (4, 8, 12):
        assert len(tokenizer.encode(" " * width + "return", add_special_tokens=False)) == 2


def test_prompt_and_response_tokenize_the_same_apart_and_together(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt, response = 'def f(x):\n    """', "Return the value."
    apart = tokenizer.encode(prompt) + tokenizer.encode(response, add_special_tokens=False)
    assert tokenizer.encode(prompt + response) == apart
