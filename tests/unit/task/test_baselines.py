"""The trivial answers, by hand."""

import pytest

from sheeprlhf.task.eval.rouge import baseline_responses, name_words

METHOD = 'class HTTPServer(Base):\n    async def get_maxSize2(self, file_name=1) -> int:\n        """'


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ('def read_file(path):\n    """', "read file"),
        (METHOD, "HTTP Server get max Size 2"),
        ('class _JSONEncoderV2:\n    """', "JSON Encoder V 2"),
        ('def __init__(self):\n    """', "init"),
        ("define(x); the class of def", ""),
        ("", ""),
    ],
)
def test_the_names_of_a_signature_as_words(prompt: str, expected: str) -> None:
    assert " ".join(name_words(prompt)) == expected


def test_every_baseline_answers_every_prompt() -> None:
    prompts = [METHOD, 'def  run_all():\n    """']
    assert baseline_responses(prompts, ["One two three.", "Four five"]) == {  # 2.5 words on average: 2
        "lead": ["class HTTPServer(Base):", "def run_all():"],
        "copy": prompts,
        "names": ["HTTP Server get max Size 2", "run all"],
    }
