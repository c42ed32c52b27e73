"""Train the tiny model's byte-level BPE tokenizer and write its configuration.

The folder it writes loads with ``AutoTokenizer.from_pretrained`` and ``AutoConfig.from_pretrained``; weights are made
elsewhere.

Usage: ``python -m tools.build_tokenizer --corpus train.parquet --output DIR``
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig

from sheeprlhf.utils.home import embedded_folder

VOCAB_SIZE = 4096
MAX_LENGTH = 512
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SPECIAL_TOKENS = (PAD, BOS, EOS)
SPLIT = r" {2,}| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|[0-9]|\n+|\s"
"""Runs of spaces whole, words and marks with one leading space, single digits, line breaks."""


def read_texts(corpus: Path) -> Iterator[str]:
    """Yield prompt and response of each corpus row as one text.

    Args:
        corpus: Parquet file with the columns ``prompt`` and ``response``.

    Yields:
        The texts in the file's order.
    """
    for batch in pq.ParquetFile(corpus).iter_batches(batch_size=4096, columns=["prompt", "response"]):
        for row in batch.to_pylist():
            yield row["prompt"] + row["response"]


def train_tokenizer(texts: Iterator[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Train a byte-level BPE tokenizer that encodes any text and decodes it to the same text.

    Args:
        texts: Training texts.
        vocab_size: Tokens in all: three special tokens, 256 bytes and the merges.

    Returns:
        The tokenizer, which prepends ``<|bos|>`` and appends nothing.

    Raises:
        ValueError: If the texts have too few different pairs for `vocab_size` tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        size = tokenizer.get_vocab_size()
        raise ValueError(f"vocab_size={vocab_size}, but the corpus gives {size} tokens; give more text or fewer tokens")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    return tokenizer


def tokenizer_config() -> dict[str, object]:
    """Return the content of ``tokenizer_config.json``.

    Returns:
        What `transformers` needs next to ``tokenizer.json``; no code is ever loaded for it.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_LENGTH,
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def model_config() -> LlamaConfig:
    """Return the tiny model's configuration: about 5.8 million parameters with tied embeddings.

    Returns:
        The configuration; pad, bos and eos are ids 0, 1 and 2.
    """
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def generation_config() -> dict[str, object]:
    """Return the content of ``generation_config.json``.

    Returns:
        The ids of the special tokens.
    """
    return {f"{name}_token_id": position for position, name in enumerate(("pad", "bos", "eos"))}


def write_json(content: dict[str, object], path: Path) -> None:
    """Write one JSON file, indented and in ASCII.

    Args:
        content: What to write.
        path: The file to write.
    """
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train on a corpus and write the folder.

    Args:
        arguments: Command line; that of the process when None.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.build_tokenizer", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--corpus", type=Path, required=True, help="parquet file with the columns prompt and response")
    parser.add_argument("--output", type=Path, default=embedded_folder("tiny"), help="folder to write")
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(read_texts(args.corpus))
    write_json(json.loads(tokenizer.to_str()), args.output / "tokenizer.json")
    write_json(tokenizer_config(), args.output / "tokenizer_config.json")
    model_config().save_pretrained(args.output)
    write_json(generation_config(), args.output / "generation_config.json")


if __name__ == "__main__":
    main()
