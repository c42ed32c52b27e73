"""A prompt that somebody types has the ids of the prompt that training saw."""

import json

import pyarrow.parquet
import pytest

from sheeprlhf.config.model_lookup import Trained
from sheeprlhf.data.prompt_encoder import FORMS, Asker, Turn, form_of
from sheeprlhf.data.read import Row
from sheeprlhf.data.tokenize import RowTokenizer
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.structure.data import DocstringsConfig, HelpfulHarmlessConfig, LocalDataConfig, SummarizationConfig
from sheeprlhf.structure.model import TinyConfig
from sheeprlhf.utils.errors import DataError
from sheeprlhf.utils.home import embedded_folder
from tests.support.models import EOS, byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def decoded(example) -> str:
    return byte_tokenizer().decode(example.prompt_ids.tolist())


def test_a_signature_becomes_the_prompt_of_its_row():
    tokenizer = load_tokenizer(TinyConfig())
    table = pyarrow.parquet.read_table(embedded_folder("embedded:docstrings") / "test.parquet").slice(0, 200)
    rows = table.select(["prompt", "response"]).to_pylist()
    limits = {"max_length": 10**6, "max_prompt_length": 10**6, "minimum_response_length": 1}
    trained = RowTokenizer(DocstringsConfig(**limits), tokenizer, "sft")(
        [Row(i, "", row) for i, row in enumerate(rows)]
    )
    asker = Asker(FORMS["docstring"], tokenizer)
    for row, expected in zip(rows, trained, strict=True):
        typed = row["prompt"].removesuffix('"""').rstrip()
        for text in (typed, typed.removesuffix(":"), f"{typed}\n", row["prompt"]):
            example = asker.example([Turn("user", text)], row["response"])
            assert example.prompt_ids.tolist() == expected.tokens[: expected.sizes[0]].tolist()
            assert example.responses[0].tolist() == expected.tokens[expected.sizes[0] :].tolist()


@pytest.mark.parametrize(
    ("form", "turns", "expected"),
    [
        ("text", ["Once upon"], "<s>Once upon"),
        ("text", ["ignored", "x", "Once"], "<s>Once"),
        ("tldr", ["A post. "], "<s>A post.\nTL;DR:"),
        ("tldr", ["A post.\nTL;DR:"], "<s>A post.\nTL;DR:"),
        ("dialogue", ["Hi"], "<s>\n\nHuman: Hi\n\nAssistant:"),
        ("dialogue", ["Hi", " Yes. ", "Why?"], "<s>\n\nHuman: Hi\n\nAssistant: Yes.\n\nHuman: Why?\n\nAssistant:"),
        ("template", ["Hi", "Yes.", "Why?"], "[user]Hi[assistant]Yes.</s>[user]Why?[assistant]"),
    ],
)
def test_each_form_writes_what_its_dataset_has(form, turns, expected):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    roles = ("user", "assistant")
    conversation = [Turn(roles[index % 2], text) for index, text in enumerate(turns)]
    example = Asker(FORMS[form], tokenizer).example(conversation)
    assert decoded(example) == expected
    assert example.responses[0][-1] == EOS


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", ["", " \n"])
def test_nothing_is_no_prompt(form, text):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(DataError, match="empty"):
        Asker(FORMS[form], tokenizer).example([Turn("user", text)])


def trained_on(data):
    return Trained("x", "policy", TinyConfig(), data)


def test_the_form_is_that_of_training(tmp_path):
    plain, chatty = byte_tokenizer(), byte_tokenizer()
    chatty.chat_template = TEMPLATE
    for tokenizer in (plain, chatty):
        assert form_of(trained_on(DocstringsConfig()), tokenizer) == "docstring"
        assert form_of(trained_on(SummarizationConfig()), tokenizer) == "tldr"
        assert form_of(trained_on(HelpfulHarmlessConfig()), tokenizer) == "dialogue"
    for data in (None, LocalDataConfig()):
        of = trained_on(data)
        assert (form_of(of, plain), form_of(of, chatty)) == ("text", "template")
    for rows, form in ((0, "text"), (1, "template")):
        (tmp_path / "data_report.json").write_text(
            json.dumps({"splits": {"train": {"read": 1, "kept": 1, "templated_rows": rows}}})
        )
        assert form_of(trained_on(LocalDataConfig())._replace(run_dir=tmp_path), chatty) == form


def test_the_date_of_a_prompt_is_that_of_training():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "({{ strftime_now('%Y-%m-%d') }})" + TEMPLATE
    for given, shown in ((None, "2024-07-26"), ({"strftime_now": "2025-03-01"}, "2025-03-01")):
        row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}
        [trained] = RowTokenizer(LocalDataConfig(template_args=given), tokenizer, "sft")([Row(0, "", row)])
        example = Asker(FORMS["template"], tokenizer, given).example([Turn("user", "Hi")])
        assert decoded(example) == f"({shown})[user]Hi[assistant]"
        assert example.prompt_ids.tolist() == trained.tokens[: trained.sizes[0]].tolist()
