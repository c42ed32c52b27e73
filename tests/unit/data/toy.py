"""Tokenizers of a few lines and rows by hand: what the tests of the data are made of. No network."""

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sheeprlhf.data.example import Example
from sheeprlhf.data.prepare import PreparedData, prepare_data
from sheeprlhf.structure.data import DataConfig, LocalDataConfig

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BOS_TEMPLATE = "{{ bos_token }}" + TEMPLATE


def byte_tokenizer(
    *,
    bos: bool = False,
    eos: str | None = "<|im_end|>",
    pad: str | None = "<|pad|>",
    template: str | None = None,
    merges: tuple[str, ...] = (),
) -> PreTrainedTokenizerFast:
    """One token a byte, `merges` joined further (such as "y z"); puts BOS before a text if asked."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*alphabet, *(pair.replace(" ", "") for pair in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(pair.split(" ")) for pair in merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|pad|>"]
    backend.add_special_tokens([AddedToken(text, special=True) for text in specials])
    if bos:
        first = backend.token_to_id("<s>")
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", first)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token=pad, chat_template=template
    )


def piece_tokenizer(prefix: str, *, template: str | None = None) -> PreTrainedTokenizerFast:
    """Pieces in the form of a converted sentencepiece model, with BOS.

    Args:
        prefix: "prepend": a normalizer writes a space before each text between control tokens, as in Llama 2;
            "first": Metaspace writes it at the text's start, as in Mistral; "always": Metaspace writes it, of a
            unigram model, as in T5; "none": nobody does, as in Gemma.
        template: of chats.
    """
    words = ["the cat sat on the mat. the dog ran", "answer: a cat. a dog, an ant", "ask the cat: who is there"]
    letters = sorted({*string.printable, "\u2581", "\u00e9"})
    specials = ["<unk>", "<s>", "</s>"]
    backend = Tokenizer(models.Unigram() if prefix == "always" else models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    options = {"special_tokens": specials, "initial_alphabet": letters, "show_progress": False}
    if prefix == "always":
        trainer = trainers.UnigramTrainer(vocab_size=130, unk_token="<unk>", **options)
    else:
        trainer = trainers.BpeTrainer(vocab_size=180, **options)
    backend.train_from_iterator(words * 20, trainer)
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    if prefix != "always":
        strip = [decoders.Strip(" ", 1, 0)] if prefix != "none" else []
        backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), *strip])
    if prefix == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif prefix != "always":
        backend.pre_tokenizer = None
        steps = [normalizers.Prepend("\u2581")] if prefix == "prepend" else []
        backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    first = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", first)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template
    )


def example(prompt: list[int], *responses: list[int], row_id: int = 0) -> Example:
    """A tokenised row by hand."""
    return Example(row_id, np.array(prompt, np.int32), tuple(np.array(r, np.int32) for r in responses))


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> str:
    """A jsonl file; its path as a string."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def local(folder: Path, rows: list[dict[str, Any]] | None = None, **options: Any) -> LocalDataConfig:
    """The configuration of a local dataset, all rows in "train" unless said otherwise."""
    if rows is not None:
        options["train_file"] = write_jsonl(folder / "rows.jsonl", rows)
    defaults = {
        "validation_split": 0.0,
        "test_split": 0.0,
        "minimum_response_length": 1,
        "cache_dir": str(folder / "cache"),
    }
    return LocalDataConfig(**{**defaults, **options})


def prepare(cfg: DataConfig, tokenizer: Any, kind: str = "sft") -> PreparedData:
    """`prepare_data` in silence."""
    return prepare_data(cfg, tokenizer, kind=kind, say=lambda line: None, progress=False)


def texts(prepared: PreparedData, tokenizer: Any, split: str = "train") -> list[tuple[str, ...]]:
    """Prompt and responses of every row of a split, decoded with their special tokens."""
    if split not in prepared.splits:
        return []
    rows = prepared.splits[split]
    return [
        tuple(tokenizer.decode(ids) for ids in (e.prompt_ids, *e.responses)) for e in rows.examples(range(len(rows)))
    ]
