"""Which chat template a tokenizer uses; expected texts are written by hand after the families' own formats."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sheeprlhf.config.path_checks import template_problem
from sheeprlhf.data.conversation import read_conversation, render_example
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.structure.model import AutoModelConfig
from sheeprlhf.utils.chat_templates import built_in_templates
from sheeprlhf.utils.errors import DataError, ModelError
from tests.support.models import byte_tokenizer, make_model_folder

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it warm?"},
    {"role": "assistant", "content": "It is."},
    {"role": "user", "content": "Why?"},
]
RENDERED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nIs it warm?<|im_end|>\n"
    "<|im_start|>assistant\nIt is.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nIs it warm?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nIt is.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\nIs it warm?<end_of_turn>\n"
    "<start_of_turn>model\nIt is.<end_of_turn>\n"
    "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
    "mistral": "<s>[INST] Be brief.\n\nIs it warm? [/INST] It is.</s>[INST] Why? [/INST]",
    "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>\nIs it warm?<|end|>\n<|assistant|>\nIt is.<|end|>\n"
    "<|user|>\nWhy?<|end|>\n<|assistant|>\n",
    "vicuna": "<s>Be brief.\n\nUSER: Is it warm?\nASSISTANT: It is.</s>USER: Why?\nASSISTANT:",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nIs it warm?</s>\n<|assistant|>\nIt is.</s>\n"
    "<|user|>\nWhy?</s>\n<|assistant|>\n",
}
NAMED = {"tool_use": "T{{ messages[-1]['content'] }}", "rag": "R{{ messages[-1]['content'] }}"}


def rendered(tokenizer: Any) -> str:
    return str(tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model without a chat template, one with several of them and no default, and a file."""
    base = make_model_folder(tmp_path_factory.mktemp("base"))
    named = make_model_folder(tmp_path_factory.mktemp("named"))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = NAMED
    tokenizer.save_pretrained(named)
    file = tmp_path_factory.mktemp("files") / "mine.jinja"
    file.write_text("F{{ messages[-1]['content'] }}")
    return {"base": base, "named": named, "file": file}


def loaded(folder: Path, choice: str | None) -> Any:
    return load_tokenizer(AutoModelConfig(repo_name=str(folder), chat_template=choice))


def test_every_built_in_template_is_that_of_its_family(folders: dict[str, Path]) -> None:
    assert built_in_templates() == sorted(RENDERED)
    for name, expected in RENDERED.items():
        assert rendered(loaded(folders["base"], name)) == expected, name


@pytest.mark.parametrize("name", RENDERED)
def test_a_conversation_begins_with_its_prompt(name: str, folders: dict[str, Path]) -> None:
    """So that the response is what follows the prompt; it ends as the family ends a turn."""
    example = render_example(read_conversation({"messages": TALK[:3]}), loaded(folders["base"], name), None)
    assert example.response is not None
    ends = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|end|>"}
    assert example.response.strip().removesuffix(ends.get(name, "</s>")) == "It is."


def test_names_of_the_model_and_files_are_chosen_and_saved(folders: dict[str, Path], tmp_path: Path) -> None:
    for choice, expected in (("tool_use", "TWhy?"), ("rag", "RWhy?"), (str(folders["file"]), "FWhy?")):
        tokenizer = loaded(folders["named"], choice)
        assert rendered(tokenizer) == expected
        tokenizer.save_pretrained(tmp_path / expected[0])
        assert rendered(AutoTokenizer.from_pretrained(tmp_path / expected[0])) == expected
    assert rendered(loaded(folders["base"], str(folders["file"]))) == "FWhy?"
    assert loaded(folders["named"], None).chat_template == NAMED


def test_an_unknown_name_lists_those_that_there_are(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"model\.chat_template=toll_use.*model\.chat_template=tool_use"):
        loaded(folders["named"], "toll_use")


@pytest.mark.parametrize("model", ["base", "named"])
def test_messages_without_a_default_template_name_the_option(model: str, folders: dict[str, Path]) -> None:
    tokenizer = loaded(folders[model], None)
    with pytest.raises(DataError, match=r"model\.chat_template=<name>") as error:
        render_example(read_conversation({"messages": TALK[:3]}), tokenizer, None)
    assert ("tool_use, rag" in str(error.value)) == (model == "named")


@pytest.mark.parametrize(
    "expression",
    [
        "1 / 0",
        "messages + 1",
        "messages[99]['content']",
        "{}['x'].y",
        "10.0 ** 400",
        "raise_exception('no')",
        "'a'.zz()",
    ],
)
def test_a_template_that_fails_is_an_error_of_ours(expression: str) -> None:
    """ZeroDivisionError, TypeError, UndefinedError, OverflowError: a template is a program."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ " + expression + " }}"
    with pytest.raises(DataError, match="chat template"):
        render_example(read_conversation({"messages": TALK[:3]}), tokenizer, None)


def test_a_chosen_file_is_tried_like_any_other_template(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "endless.jinja"
    file.write_text("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    with pytest.raises(ModelError, match=r"model.chat_template=.*endless.jinja"):
        loaded(folders["base"], str(file))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"model\.chat_template"):
        loaded(folders["base"], str(file))


def test_what_cannot_be_a_template_is_reported_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "mine.jinja").write_text("x")
    assert template_problem("chatml") is None and template_problem("my_own") is None
    assert template_problem(str(tmp_path / "mine.jinja")) is None
    assert "model.chat_template" in str(template_problem(str(tmp_path / "mien.jinja")))
    assert ".jinja" in str(template_problem(str(tmp_path / "a.txt")))
    assert "chatml" in str(template_problem("two words"))
