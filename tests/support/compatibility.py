"""The table of docs/models.md: how a tiny model of each architecture is batched, and which tasks it passes.

`python -m tests.support.compatibility` computes the table and writes it.
"""

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sheeprlhf.agent.policy import load_policy
from sheeprlhf.data.example import collate_packed, collate_padded
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.structure.model import ModelConfig
from tests.support.batches import random_examples
from tests.support.models import make_model_folder
from tests.support.plain import response_logprobs
from tests.support.runs import exit_code, train_words, write_pairs, write_rows

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = "| architecture | batches | " + " | ".join(["log-probabilities", "SFT", "RM", "DPO", "GRPO", "export"]) + " |"
NAMES = (
    *("llama", "mistral", "mistral (window)", "qwen2", "qwen3", "qwen3_5_text", "gemma2", "gemma3_text", "phi3"),
    *("phi3 (longrope)", "olmo2", "granite", "gpt_oss", "mixtral", "qwen3_moe", "falcon", "opt", "gpt2", "gpt_neox"),
    *("phi", "deepseek_v3"),
)
TOLERANCE = 1e-5
IDS = torch.arange(5, 40)[None]


def row_of(name: str, folder: Path) -> str:
    """The line of an architecture.

    Args:
        name: of `NAMES`.
        folder: empty, for a model and runs.
    """
    model = make_model_folder(folder / "model", name)
    packed, difference = _compare(model)
    cells = ["packed" if packed else "padded", "equal" if difference <= TOLERANCE else f"differ by {difference:.1g}"]
    rows, pairs = write_rows(folder / "rows.jsonl", 12), write_pairs(folder / "pairs.jsonl", 12)
    for task in ("sft", "rm", "dpo", "grpo"):
        data, final = rows if task in ("sft", "grpo") else pairs, folder / task / "final"
        words = ["task.max_num_steps=2", "task.max_eval_batches=1", "root_dir=" + str(folder)]
        done = exit_code(" ".join(train_words(model, data, folder / task, *words, task=task))) == 0
        auto = AutoModelForSequenceClassification if task == "rm" else AutoModelForCausalLM
        cells.append("yes" if done and _outputs(auto, final).isfinite().all() else "no")
    target = folder / "exported"
    if exit_code(f"export {folder / 'sft'} --to {target}") == 0:
        assert_close(
            _outputs(AutoModelForCausalLM, target),
            _outputs(AutoModelForCausalLM, folder / "sft" / "final"),
            rtol=0,
            atol=TOLERANCE,
        )
        cells.append("yes")
    else:
        cells.append("no")
    return f"| {name} | {' | '.join(cells)} |"


def _outputs(auto: Any, folder: Path) -> torch.Tensor:
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


def _compare(folder: Path) -> tuple[bool, float]:
    """Whether batches are packed, and the largest difference from rows alone in plain transformers, eager attention."""
    cfg = ModelConfig(config_name="auto", repo_name=str(folder))
    policy = load_policy(cfg, load_tokenizer(cfg), longest=64, batching="auto")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    rows = random_examples(4, 2, seed=1, longest=30)
    batch = collate_packed(rows) if policy.packed else collate_padded(rows, pad_id=0)
    with torch.no_grad():
        found = policy.eval()(batch).target_N
        expected = torch.cat([response_logprobs(plain, row.prompt_ids, one) for row in rows for one in row.responses])
    return policy.packed, float((found - expected).abs().max())


def published_rows() -> list[str]:
    """The lines of the table in docs/models.md."""
    table = re.search(re.escape(HEAD) + r"\n\|[-| ]+\n((?:\|.*\n)+)", PAGE.read_text(encoding="utf-8"))
    return table.group(1).splitlines() if table else []


def main() -> None:
    """Write the table, in the place of the one that is there."""
    lines = []
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(row_of(name, Path(folder)))
        print(lines[-1], file=sys.stderr, flush=True)
    table = "\n".join([HEAD, "| --- " * HEAD.count(" |") + "|", *lines]) + "\n"
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(re.escape(HEAD) + r"\n(?:\|.*\n)*", text)
    assert found is not None
    PAGE.write_text(text[: found.start()] + table + text[found.end() :], encoding="utf-8")


if __name__ == "__main__":
    main()
