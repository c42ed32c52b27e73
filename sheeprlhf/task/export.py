"""From a trained model to a folder that plain transformers loads, with proof that it computes the same."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sheeprlhf.agent.policy import Policy
from sheeprlhf.agent.reward import RewardModel
from sheeprlhf.config.model_lookup import POLICY, Trained
from sheeprlhf.config.path_checks import data_is_here
from sheeprlhf.data.layout import RowLayout
from sheeprlhf.data.prompt_encoder import save_form
from sheeprlhf.data.read import read_batches
from sheeprlhf.data.source import locate
from sheeprlhf.data.tokenize import RowTokenizer
from sheeprlhf.engine.manifest import write_folder
from sheeprlhf.model.adapter import check_difference, compute_outputs, max_difference, max_output, merge_lora
from sheeprlhf.model.folder.architecture import num_positions_of
from sheeprlhf.task.models import load_trained
from sheeprlhf.utils.end_tokens import add_end_ids, padding_token
from sheeprlhf.utils.errors import ConfigError, DataError, ModelError, Notify
from sheeprlhf.utils.output import write_file

LOADED = 1e-5  # of 1 + the largest logit, all in float32
_TEXTS = (  # where the run's own rows are not on this machine
    "The quick brown fox jumps over the lazy dog, and then it rests.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Question: why is the sky blue?\nAnswer:",
)
_ROWS = 4


class Checks(NamedTuple):
    """Largest differences of logits on real rows."""

    rows: int  # how many
    largest: float  # the largest logit
    merged: float | None  # with adapters next to the weights and in them; None without adapters
    rounded: float  # in float32 and in the number format of the folder
    loaded: float  # in memory and loaded from the folder; its weights, computed in float32
    head_bias: float = 0.0  # of a reward model made elsewhere, in its `reward_offset`; the folder's weights lack it


Card = Callable[[Checks, PreTrainedModel, PreTrainedTokenizerBase], str]


def export_model(trained: Trained, target: Path, dtype: str, card: Card, say: Notify) -> Checks:
    """Write the folder, absent or empty, whole and checked or not at all. Raises ModelError if outputs differ."""
    model, tokenizer = _load(trained, say)
    causal = trained.trains == POLICY
    rows = list(_rows(trained, tokenizer, model))
    plain, apart = _inner(model), None
    if isinstance(model.model, PeftModel):
        plain, outputs, apart = merge_lora(model.model, rows)
    else:
        outputs = compute_outputs(plain, rows)
    for weight in plain.parameters():  # buffers, such as rotary frequencies, stay as they are
        weight.data = weight.data.to(getattr(torch, dtype))
    plain.config.use_cache = True
    checks: list[Checks] = []

    def fill(folder: Path) -> None:
        _save(plain, tokenizer, folder, causal=causal)
        save_form(folder, trained, tokenizer)
        for weight in plain.parameters():
            weight.data = weight.data.float()
        rounded = compute_outputs(plain, rows)
        auto: Any = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
        options = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
        read = compute_outputs(auto.from_pretrained(folder, dtype=torch.float32, **options), rows)
        loaded = max_difference(rounded, read)
        check_difference(loaded, rounded, LOADED, f"{target}: what was written computes something else; it was removed")
        if AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab() != tokenizer.get_vocab():
            raise ModelError(f"{target}: the written tokenizer is another one; it was removed")
        bias = 0.0 if isinstance(model, Policy) else model.head_bias
        checks.append(Checks(len(rows), max_output(outputs), apart, max_difference(outputs, rounded), loaded, bias))
        write_file(folder, "README.md", card(checks[0], plain, tokenizer).encode())
        check_target(target)

    size = sum(weight.numel() * weight.element_size() for weight in plain.parameters())
    write_folder(target, fill, num_bytes=size, advice="Free space, or give another --to <folder>")
    return checks[0]


def check_target(target: Path) -> None:
    """Raises ConfigError if something of the user's would be overwritten."""
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise ConfigError(f"--to {target} is there already and is not an empty folder: give a new one")


def _load(trained: Trained, say: Notify) -> tuple[Policy | RewardModel, PreTrainedTokenizerBase]:
    """In the run's own number format first, as it was trained, and then exactly in float32."""
    model, tokenizer = load_trained(trained, say)
    return model.eval().float(), tokenizer


def _inner(model: Policy | RewardModel) -> PreTrainedModel:
    return model.causal_lm() if isinstance(model, Policy) else model.classifier()


def _rows(trained: Trained, tokenizer: PreTrainedTokenizerBase, model: Policy | RewardModel) -> Iterator[list[int]]:
    """Token ids of a few rows of the run's own data, prompt and response; of our own texts if it is not here."""
    most = num_positions_of(_inner(model).config)
    found: list[list[int]] = []
    if trained.data is not None and data_is_here(trained.data):
        try:
            files = locate(trained.data)
            batches = read_batches(files.get("test", files["train"]), _ROWS, layout=RowLayout(trained.data, "sft"))
            rows = next(batches, [])
            made = RowTokenizer(trained.data, tokenizer, "sft")(rows)
            found = [row.tokens.tolist() for row in made if row.dropped is None]
        except DataError:  # moved or changed since; the check does not depend on it
            found = []
    for ids in found or [tokenizer(text)["input_ids"] for text in _TEXTS]:
        yield ids[:most]


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, causal: bool) -> None:
    if causal:  # what a base model samples with by default was made for the base model
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "pad_token_id")}
        listed = model.generation_config.eos_token_id
        model.generation_config = GenerationConfig(**ids, eos_token_id=listed)
        add_end_ids(model.generation_config, tokenizer)
    else:
        add_end_ids(model.config, tokenizer)
        tokenizer.pad_token = padding_token(tokenizer)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "backend"):  # how this process found it
        config.pop(key, None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # its name in every version
    write_file(folder, path.name, json.dumps(config, indent=2, ensure_ascii=False).encode())
