"""Datasets: one dataclass each."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Optional

from sheeprlhf.structure.option import Config, option

REASONING_TAGS = ("<think>", "</think>")


class KeptColumns(NamedTuple):
    """Columns of the source files that are stored with the tokens, for reward functions."""

    names: tuple[str, ...] = ()  # columns that a function names
    every: bool = False  # keep all other columns too (`**columns`)


@dataclass(eq=False, repr=False)
class DataConfig(Config):
    """Options of every dataset. `row_format` names the function that turns a raw row into an example."""

    row_format: ClassVar[str] = ""  # "module:function"; a constant, never read from a file
    read_columns: ClassVar[tuple[str, ...]] = ()  # columns that it reads besides data.rows.COLUMNS
    prompt_format: ClassVar[Optional[str]] = None  # the same for tasks that need no response; None: row_format does
    rule_reward: ClassVar[Optional[str]] = None  # the built-in function that scores responses, with reward=auto

    config_name: str = option("???", "Name of this choice.")
    dataset_name: Optional[str] = option("???", "Hub id (owner/name) or local folder in the hub's layout.")
    revision: Optional[str] = option(None, "Commit, tag or branch of the hub dataset.")
    max_length: int = option(512, "Longest prompt plus response.", unit="tokens", minimum=2)
    max_prompt_length: int = option(384, "Longest prompt; the response gets the rest.", unit="tokens", minimum=1)
    on_overflow: str = option(
        "truncate_prompt",
        "An example that is too long: cut the prompt's start and the response's end, drop the example, or stop with an "
        "error.",
        choices=("truncate_prompt", "drop", "error"),
    )
    num_samples: Optional[int] = option(None, "Use only the first rows of each split.", unit="rows", minimum=1)
    validation_split: float = option(0.1, "Share of training rows held out if it has none.", minimum=0.0, maximum=0.9)
    test_split: float = option(0.1, "Share of training rows for tests if it has none.", minimum=0.0, maximum=0.9)
    reward_model_split: float = option(0.0, "Share of training rows for the reward model.", minimum=0.0, maximum=1.0)
    shuffle: bool = option(True, "Train on the rows of each epoch in random order; false keeps that of the files.")
    split_seed: int = option(0, "Seed of the splits; apart from the run's seed, so that seeds share a test set.")
    minimum_response_length: int = option(2, "Shorter responses are dropped.", unit="tokens", minimum=1)
    remove_same_inputs: bool = option(True, "Keep the first of the rows that have the same prompt and response.")
    remove_same_responses: bool = option(True, "Drop pairs whose chosen and rejected responses are equal.")
    train_on: str = option(
        "last",
        "Answers of a conversation that task=sft learns: the last, all, or only those marked with weight 1. None that "
        "is marked with weight 0 counts.",
        choices=("last", "all", "weights"),
    )
    reasoning: str = option(
        "train",
        "Reasoning of answers (reasoning_content, or text between data.reasoning_tags): learn it, mask it (context "
        "that does not count in the loss), or remove it.",
        choices=("train", "mask", "remove"),
    )
    reasoning_tags: list[str] = option(
        factory=lambda: list(REASONING_TAGS),
        help="Begin and end of the reasoning in an answer's text, such as [[THINK],[/THINK]] in quotes.",
    )
    template_args: Any = option(
        None,
        "Variables for the model's chat template, such as {enable_thinking: false}; null takes those of the run "
        "that training starts from, or of the model's training as far as its folder tells.",
    )
    num_proc: int = option(1, "Processes that tokenise.", minimum=1)
    cache_dir: Optional[str] = option(None, "Folder of prepared data; null: $SHEEPRLHF_CACHE, else ~/.cache/sheeprlhf.")


@dataclass(eq=False, repr=False)
class DocstringsConfig(DataConfig):
    """Embedded: Python signatures and their one-line summaries, split by package."""

    row_format: ClassVar[str] = "sheeprlhf.data.formats:docstrings_row"
    rule_reward: ClassVar[Optional[str]] = "imperative"

    config_name: str = "docstrings"
    dataset_name: Optional[str] = "embedded:docstrings"
    num_samples: Optional[int] = option(6_000, "First rows of each split; null: all 20,000.", unit="rows", minimum=1)
    max_length: int = 128
    max_prompt_length: int = 96
    reward_model_split: float = 0.5


@dataclass(eq=False, repr=False)
class SummarizationConfig(DataConfig):
    """Reddit posts and two summaries, one preferred (CarperAI/openai_summarize_comparisons)."""

    row_format: ClassVar[str] = "sheeprlhf.data.formats:summarization_row"

    config_name: str = "summarization"
    dataset_name: Optional[str] = "CarperAI/openai_summarize_comparisons"


@dataclass(eq=False, repr=False)
class HelpfulHarmlessConfig(DataConfig):
    """Dialogues and two answers, one preferred (Dahoas/full-hh-rlhf)."""

    row_format: ClassVar[str] = "sheeprlhf.data.formats:helpful_harmless_row"

    config_name: str = "helpful_harmless"
    dataset_name: Optional[str] = "Dahoas/full-hh-rlhf"


@dataclass(eq=False, repr=False)
class LayoutDataConfig(DataConfig):
    """Parent of the datasets whose columns are found by the layouts that `data.layout` knows."""

    row_format: ClassVar[str] = "sheeprlhf.data.formats:format_row"
    prompt_format: ClassVar[Optional[str]] = "sheeprlhf.data.formats:format_prompt"
    read_columns: ClassVar[tuple[str, ...]] = (
        *("rejected_response", "score_chosen", "score_rejected"),
        *("ranks", "scores"),
    )

    columns: Any = option(
        None,
        "Columns of other names, such as {prompt: question, response: answer}; a list of names is joined by blank "
        "lines. null finds them by the layouts that it knows.",
    )
    step_separator: str = option("\n", "Text between two steps of a response (task=prm); the last step has none.")
    ignore_columns: list[str] = option(
        factory=list,
        help="Columns and keys of messages to leave out that change what a row means: [weight, messages.weight].",
    )
    control_tokens: bool = option(
        False,
        "Encode control tokens in the text of prompts and responses, such as <|im_start|>, as the tokens that they "
        "name: for rows that a chat template wrote. Whoever wrote the rows can then end a turn.",
    )
    streaming: bool = option(False, "Prepare training rows shard by shard (a file or a part) during training.")
    shard_size: Optional[float] = option(
        256.0,
        "With streaming: larger files are split into parts of about this size (jsonl, ndjson, txt and parquet that are "
        "not compressed); null splits none.",
        unit="MiB",
        above=0.0,
    )
    keep_shards: Optional[int] = option(2, "Shards kept, besides the first; null: all.", unit="shards", minimum=2)
    minimum_response_length: int = 1


@dataclass(eq=False, repr=False)
class MixDataConfig(DataConfig):
    """Several datasets together, each with its own layout and its share of the training rows."""

    config_name: str = option("mix", "Name of this choice.")
    dataset_name: Optional[str] = option(None, "Not used: give data.mix.")
    mix: Any = option(
        "???",
        "The datasets, such as [{train_file: a.jsonl, weight: 3}, {dataset_name: owner/name, weight: 1}]: each with "
        "options of data=local, data=hub or another {data: <name>}, and its share of the training rows of an epoch as "
        "weight; without weights every row counts once.",
    )
    minimum_response_length: int = option(1, "Shorter responses are dropped.", unit="tokens", minimum=1)


@dataclass(eq=False, repr=False)
class LocalDataConfig(LayoutDataConfig):
    """Your own files: prompt with response (+ label), a pair, responses or none; or messages."""

    config_name: str = "local"
    dataset_name: Optional[str] = option(None, "Not used: give data.train_file.")
    train_file: Any = option(
        "???",
        "Training rows: a file (.jsonl, .ndjson, .json, .csv, .tsv, .txt or .parquet; all but the last also as .gz, "
        ".bz2 or .zst), a folder, a pattern in quotes, or a list.",
    )
    validation_file: Any = option(None, "Validation rows, likewise; null cuts them from the training rows.")
    test_file: Any = option(None, "Test rows, likewise; null cuts them from the training rows.")


@dataclass(eq=False, repr=False)
class HubDataConfig(LayoutDataConfig):
    """Any dataset of the hub: prompt with response (+ label), a pair, responses or none; messages; or text."""

    config_name: str = "hub"
    dataset_name: Optional[str] = "???"
    subset: Optional[str] = option(None, "Subset (configuration) of the dataset, or a folder in it; null: its default.")
    split: Optional[str] = option(
        None,
        "Split to train on, such as train_sft; null takes train, or the only one. Splits of the same name with "
        "validation or test in place of train are used as such.",
    )
