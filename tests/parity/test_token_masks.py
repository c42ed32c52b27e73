"""Masks over the tokens of a conversation and its reasoning, against plain transformers with labels of -100."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from sheeprlhf.agent.policy import load_policy
from sheeprlhf.data.conversation import reasoning_pattern
from sheeprlhf.data.example import Example, collate_packed, collate_padded
from sheeprlhf.data.store import MismatchedSplit, SplitWriter, TokenizedSplit
from sheeprlhf.data.tokenize import encode, token_index
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.structure.data import REASONING_TAGS
from sheeprlhf.structure.model import ModelConfig
from sheeprlhf.task.reference import sum_by_response
from sheeprlhf.task.train.sft import sft_loss
from sheeprlhf.utils.chat_templates import FOLDER, SUFFIX
from sheeprlhf.utils.errors import DataError
from tests.support.models import ModelFolder
from tests.unit.data.toy import TEMPLATE, byte_tokenizer, local, piece_tokenizer, prepare, texts

# Thoughts of every turn stay; "yes" is no text of any message.
CHAT = (
    "{% for m in messages %}[{{ m.role }}] "
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% if m.role == 'assistant' %}</s>{% endif %}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
END = "</s>"
CHANNEL = ("<|channel|>analysis<|message|>", "<|end|>")


def talk(*, tagged: bool = False) -> list[dict[str, Any]]:
    """Six turns; every second answer has thoughts, written into its content if `tagged`; answer 2 has weight 1."""
    messages: list[dict[str, Any]] = []
    for number in range(3):
        answer: dict[str, Any] = {"role": "assistant", "content": f"It is {number * 7}."}
        if number != 1 and tagged:
            answer["content"] = f"<think>\nSeven, {number} t\u00efmes.\n</think>\n\n" + answer["content"]
        elif number != 1:
            answer["reasoning_content"] = f"Seven, {number} t\u00efmes."
        messages += [
            {"role": "user", "content": f"What is 7 * {number}?"},
            answer | ({"weight": 1} if number == 1 else {}),
        ]
    return messages


def tokenizer_in(folder: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return load_tokenizer(ModelConfig(config_name="auto", repo_name=str(folder)))


def labels_by_text(tokenizer: Any, messages: list[dict[str, Any]], learned: list[str]) -> tuple[list[int], list[int]]:
    """Ids of a whole conversation in one piece, and labels: -100 except where one of the texts stands, in order."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    counts, place = np.zeros(len(text), dtype=bool), 0
    for piece in learned:
        place = text.index(piece, place)
        counts[place : place + len(piece)] = True
        place += len(piece)
    labels = [
        token if end > start and counts[start] else -100
        for token, (start, end) in zip(whole["input_ids"], whole["offset_mapping"], strict=True)
    ]
    return whole["input_ids"], labels


ANSWERS = [f"It is {number * 7}.{END}" for number in range(3)]
THOUGHTS = [f"<think>\nSeven, {number} t\u00efmes.\n</think>\n\n" for number in range(3)]
LEARNED = {
    ("all", "train"): [THOUGHTS[0] + ANSWERS[0], ANSWERS[1], THOUGHTS[2] + ANSWERS[2]],
    ("all", "mask"): ANSWERS,
    ("last", "mask"): ANSWERS[2:],
    ("weights", "train"): ANSWERS[1:2],
}


@pytest.mark.parametrize("tagged", [False, True])
@pytest.mark.parametrize("options", LEARNED)
def test_loss_and_gradient_are_those_of_plain_transformers(
    options: tuple[str, str], tagged: bool, model_folder: ModelFolder, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    tokenizer, messages = tokenizer_in(folder), talk(tagged=tagged)
    train_on, reasoning = options
    cfg = local(tmp_path, [{"messages": messages}], train_on=train_on, reasoning=reasoning, max_prompt_length=500)
    prepared = prepare(cfg, tokenizer)
    [example] = prepared.splits["train"].examples(range(len(prepared.splits["train"])))
    ids, labels = labels_by_text(tokenizer, messages, LEARNED[options])
    last = max(place for place, label in enumerate(labels) if label >= 0) + 1
    assert [*example.prompt_ids.tolist(), *example.responses[0].tolist()] == ids[:last]
    assert prepared.report["splits"]["train"]["trained_tokens"] == sum(label >= 0 for label in labels)

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = plain(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss * sum(x >= 0 for x in labels)
    expected.backward()
    model_cfg = ModelConfig(config_name="auto", repo_name=str(folder))
    policy = load_policy(model_cfg, tokenizer, longest=100, batching="packed")
    for batch in (collate_packed([example]), collate_padded([example], pad_id=0)):
        policy.zero_grad()
        loss = sft_loss(policy, batch).total
        loss.backward()
        assert batch.response_lengths == (sum(label >= 0 for label in labels),)
        assert_close(loss, expected, rtol=1e-6, atol=1e-5)
        pairs = zip(policy.causal_lm().parameters(), plain.parameters(), strict=True)
        for own, other in pairs:
            assert_close(own.grad, other.grad, rtol=1e-5, atol=1e-5)


JOINED = {"chatml": 1, "mistral": 1, "vicuna": 1, "zephyr": 1, "gemma": 3, "llama3": 3, "phi3": 3}


@pytest.mark.parametrize("name", JOINED)
def test_the_builtin_templates(name: str, tmp_path: Path) -> None:
    """One example if the tokenizer has the token that ends an answer; the text is that of the whole conversation."""
    tokenizer = byte_tokenizer(template=(FOLDER / (name + SUFFIX)).read_text())
    messages = [{key: one[key] for key in ("role", "content")} for one in talk()]
    cfg = local(tmp_path, [{"messages": messages}], train_on="all", max_prompt_length=500, max_length=1000)
    rows = prepare(cfg, tokenizer).splits["train"]
    examples = rows.examples(range(len(rows)))
    assert len(examples) == JOINED[name]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    learned = [tokenizer.decode(one.responses[0][one.masks()[0]]) for one in examples]
    answers = [one["content"] for one in messages[1::2]]
    assert re.sub(r"<[^>]*>|\s", "", "".join(learned)) == re.sub(r"\s", "", "".join(answers))
    for one in examples:
        text = tokenizer.decode([*one.prompt_ids, *one.responses[0]])
        assert whole.startswith(text.removesuffix("<|im_end|>"))


def test_masked_pairs_are_scored_without_their_reasoning(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    tokenizer = tokenizer_in(folder)
    context = talk()[:5]
    answers = [{"role": "assistant", "content": text, "reasoning_content": f"As {text}"} for text in ("Yes.", "Nope!")]
    rows = [{"prompt": context, "chosen": [answers[0]], "rejected": [answers[1]]}]
    cfg = local(tmp_path, rows, reasoning="mask", max_prompt_length=500)
    split = prepare(cfg, tokenizer, "preference").splits["train"]
    model_cfg = ModelConfig(config_name="auto", repo_name=str(folder))
    policy = load_policy(model_cfg, tokenizer, longest=100, batching="packed")
    plain, expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
    for answer in answers:
        ids, labels = labels_by_text(tokenizer, [*context, answer], [answer["content"] + END])
        loss = plain(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        expected.append(-loss * sum(label >= 0 for label in labels))
    for batch in (collate_packed(split.examples([0])), collate_padded(split.examples([0]), pad_id=0)):
        sums_S = sum_by_response(policy(batch).target_N, batch.response_index_N, 2)
        assert_close(sums_S, torch.stack(expected), rtol=1e-6, atol=1e-5)
        assert batch.response_lengths == (len("Yes.") + 1, len("Nope!") + 1)
    scores = collate_packed(split.examples([0]), targets="scores")  # of a reward model
    assert scores.response_lengths == tuple(map(len, split.example(0).responses))


def test_masks_follow_the_responses_of_unpaired_data(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(template=TEMPLATE)
    pairs = [("h" * number, f"q{number}") for number in range(1, 4)]
    rows = [{"prompt": prompt, "chosen": f"<think>{text}</think>yes", "rejected": "no"} for text, prompt in pairs]
    split = prepare(local(tmp_path, rows, reasoning="mask"), tokenizer, "unpaired").splits["train"]
    found = [tokenizer.decode(one.responses[0][one.masks()[0]]) for one in split.examples(range(6))]
    assert found == ["yes<|im_end|>", "no<|im_end|>"] * 3
    writer = SplitWriter(tmp_path / "copy.arrow")  # as a mixture copies rows
    writer.write([split.token_row(row) for row in range(6)])
    writer.close()
    copied = TokenizedSplit(tmp_path / "copy.arrow")
    assert [one.masks()[0].tolist() for one in copied.examples(range(6))] == [
        one.masks()[0].tolist() for one in split.examples(range(6))
    ]
    assert copied.num_untrained() == split.num_untrained() == sum(len("<think></think>") + n for n in range(1, 4))
    mismatched = MismatchedSplit(split.file, 100)
    lent = [tokenizer.decode(one.responses[0][one.masks()[0]]) for one in mismatched.examples(range(6))]
    assert lent == [found[partner] for partner in mismatched.partners]


@pytest.mark.parametrize("key", ["content", "reasoning_content"])
@pytest.mark.parametrize("kind", ["sft", "preference", "prompts"])
def test_removed_reasoning_is_in_no_text(kind: str, key: str, tmp_path: Path) -> None:
    """Also of earlier answers, as if the file had none; the user's own tags stay."""
    tokenizer = byte_tokenizer(template=CHAT.replace(END, "<|im_end|>"))

    def answer(text: str) -> dict[str, Any]:
        if key == "content":
            return {"role": "assistant", "content": f"<think>hm</think>\n\n{text}"}
        return {"role": "assistant", "content": text, key: "hm"}

    context = [{"role": "user", "content": "<think>x</think>q"}, answer("a"), {"role": "user", "content": "more"}]
    rows = [{"prompt": context, "chosen": [answer("yes")], "rejected": [answer("no")]}]
    plain = [
        {**one, "content": one["content"].replace("<think>hm</think>\n\n", "")} if one["role"] == "assistant" else one
        for one in context
    ]
    for one in plain:
        one.pop("reasoning_content", None)
    for reasoning in ("remove", "train"):
        prepared = prepare(local(tmp_path, rows, reasoning=reasoning), tokenizer, kind)
        [found] = texts(prepared, tokenizer)
        messages = plain if reasoning == "remove" else context
        assert found[0] == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert all(("hm" in text) == (reasoning == "train") for text in found)


def test_responses_of_plain_text() -> None:
    tokenizer = byte_tokenizer()
    ids = encode(tokenizer, ["<think>\u00e9\u4f60</think>\n\u4f60\u00e9"])[0]
    [block] = reasoning_pattern(REASONING_TAGS).finditer("<think>\u00e9\u4f60</think>\n\u4f60\u00e9")
    first, last = block.span()
    assert tokenizer.decode(ids[token_index(tokenizer, [], ids, last) :]) == "\u4f60\u00e9"
    assert token_index(tokenizer, [], ids, first) == 0


@pytest.mark.parametrize("prefix", ["prepend", "first", "always", "none"])
def test_places_in_the_tokens_of_sentencepiece(prefix: str) -> None:
    tokenizer = piece_tokenizer(prefix)
    prompt, answer = "ask the cat:", "<think>the dog ran</think> the cat sat"
    before = encode(tokenizer, [prompt])[0]
    ids = encode(tokenizer, [prompt + answer])[0][len(before) :]
    place = token_index(tokenizer, before, ids, answer.index(" the cat sat"))
    read = tokenizer.decode([*before, *ids[:place]])
    assert read.replace(" ", "") == (prompt + answer[: answer.index(" the cat sat")]).replace(" ", "")


@pytest.mark.parametrize(
    ("tags", "text", "spans"),
    [
        (REASONING_TAGS, "<think>a</think> b", [(0, 17)]),
        (REASONING_TAGS, "a</think>\n\nb", [(0, 11)]),  # the template wrote <think>
        (REASONING_TAGS, "b <think>a", [(2, 10)]),  # cut
        (REASONING_TAGS, "a <think>b</think>c<think>d</think>", [(2, 18), (19, 35)]),
        (REASONING_TAGS, "no thoughts", []),
        (("[THINK]", "[/THINK]"), "[THINK]a[/THINK]b", [(0, 16)]),
        (("[THINK]", "[/THINK]"), "<think>a</think>b", []),
        (CHANNEL, "<|channel|>analysis<|message|>a<|end|><|start|>b<|end|>", [(0, 38)]),
        (CHANNEL, "<|channel|>final<|message|>b<|end|>", []),  # the end of the message
    ],
)
def test_blocks_of_reasoning(tags: tuple[str, str], text: str, spans: list[tuple[int, int]]) -> None:
    assert [block.span() for block in reasoning_pattern(tags).finditer(text)] == spans


def test_reasoning_between_the_tags_of_the_template(tmp_path: Path) -> None:
    """Masked and removed as in a row whose template writes the usual tags."""
    rows = [{"messages": talk()[:2]}]
    found = {}
    for tags in (REASONING_TAGS, CHANNEL):
        chat = CHAT.replace(END, "<|im_end|>").replace("<think>", tags[0]).replace("</think>", tags[1])
        for reasoning in ("mask", "remove"):
            options = {"reasoning": reasoning, "reasoning_tags": list(tags)}
            tokenizer = byte_tokenizer(template=chat)
            [one] = prepare(local(tmp_path, rows, **options), tokenizer).splits["train"].examples([0])
            learned = tokenizer.decode(one.responses[0][one.masks()[0]])
            assert (tags[0] in tokenizer.decode(one.responses[0])) == (reasoning == "mask")
            found[tags, reasoning] = learned
    assert set(found.values()) == {"It is 0.<|im_end|>"}


def test_reasoning_that_cannot_be_found_or_leaves_nothing(tmp_path: Path) -> None:
    template = CHAT.replace(END, "<|im_end|>").replace("<think>", "(").replace("</think>", ")")
    rows = [{"messages": talk()[:2]}]
    with pytest.raises(DataError, match=r"data\.reasoning=train or remove"):
        prepare(local(tmp_path, rows, reasoning="mask"), byte_tokenizer(template=template))
    rows = [{"prompt": "q", "response": "<think>" + "h" * 600}, {"prompt": "q", "response": "yes"}]
    part = prepare(local(tmp_path, rows, reasoning="mask", max_length=64, max_prompt_length=32), byte_tokenizer())
    assert part.report["splits"]["train"]["dropped"] == {"reasoning_alone": 1}


def test_parts_of_a_long_text_have_their_parts_of_the_mask(tmp_path: Path) -> None:
    """A part that is reasoning alone is left out and counted."""
    text = "abcdefghij<think>klmnopqrstuvwxyz</think>ABCDEFGHIJ"
    tokenizer = byte_tokenizer()
    cfg = local(tmp_path, [{"text": text}], reasoning="mask", max_length=10, max_prompt_length=5)
    prepared = prepare(cfg, tokenizer)
    rows = prepared.splits["train"].examples(range(len(prepared.splits["train"])))
    texts = [tokenizer.decode(row.responses[0]) for row in rows]
    assert texts == ["abcdefghi", "j<think>k", "hink>ABCD", "EFGHIJ<|im_end|>"]
    learned = [tokenizer.decode(row.responses[0][row.masks()[0]]) for row in rows]
    assert learned == ["abcdefghi", "j", "ABCD", "EFGHIJ<|im_end|>"]
    assert collate_packed(rows).response_lengths == (9, 1, 4, 7)
    part = prepared.report["splits"]["train"]
    assert (part["read"], part["kept"], part["dropped"]) == (1, 4, {"reasoning_alone": 2})
    assert part["trained_tokens"] == 21


def test_a_mask_of_all_tokens_learns_the_text_between_the_answers() -> None:
    ids = np.arange(3, 9, dtype=np.int32)
    example = Example(0, ids[:2], (ids[2:],), trained=np.array([True, False, False, True]))
    assert collate_packed([example]).target_ids_N.tolist() == [5, 8]
    assert collate_packed([example], targets="all").target_ids_N.tolist() == ids[1:].tolist()
