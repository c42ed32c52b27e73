"""Small runs for the commands that talk, and models whose next words are known."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import byte_tokenizer, make_model_folder
from tests.support.runs import train, write_pairs, write_rows

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
LORA = ("model.finetune_mode=LORA", "model.lora_cfg.rank=4", "optim.lr=0.05")


def make_runs(folder: Path) -> dict[str, Path]:
    """Two steps each: of all weights ("sft"), of adapters on "sft" ("dpo"), of adapters on "sft" that score ("rm").

    Their model ("model") has a chat template.
    """
    model = make_model_folder(folder / "model", "llama")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    rows, pairs = write_rows(folder / "rows.jsonl", 24), write_pairs(folder / "pairs.jsonl", 24)
    runs = {"model": model}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHEEPRLHF_CACHE", str(folder / "cache"))
        runs["sft"] = train(model, rows, folder / "sft", "dry_run=true")
        start = f"task.sft_experiment_dir={runs['sft']}"
        runs["dpo"] = train(model, pairs, folder / "dpo", "dry_run=true", start, *LORA, task="dpo")
        runs["rm"] = train(model, pairs, folder / "rm", "dry_run=true", start, *LORA, task="rm")
    return runs


def says(patch: pytest.MonkeyPatch, *texts: str) -> list[str]:
    """Make every model write these texts, in turn and then again; returns the prompts as they are asked."""
    tokenizer, prompts = byte_tokenizer(), []
    count = iter(range(1 << 30))

    def stream(model: object, prompt_ids: Any, cfg: Any, *, end_ids: Any, seed: int, **_: Any) -> Iterator[int]:
        prompts.append(tokenizer.decode(prompt_ids.tolist()))
        ids = tokenizer(texts[next(count) % len(texts)], add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        yield from [*ids, end_ids[0]][: cfg.max_new_tokens]

    patch.setattr("sheeprlhf.task.text_generator.stream_ids", stream)
    return prompts


def write_result(run_dir: Path, name: str, **content: Any) -> None:
    """A result of an evaluation, as `eval` leaves it."""
    (run_dir / "eval").mkdir(exist_ok=True)
    (run_dir / "eval" / f"{name}.json").write_text(json.dumps(content))
