"""Make the embedded model of a finished pretraining run: its weights in float16, and a card with the run's figures.

Usage: ``python -m sheeprlhf.assets.build_tiny --run RUN --summaries JSON --output DIR``

RUN is a run of ``experiment=pretrain_tiny``; JSON is what ``eval task=perplexity data=docstrings`` made of it.
"""

import argparse
import csv
import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

CURVE_POINTS = 12

CARD = """# tiny: the embedded model of SheepRLHF

A llama-shaped causal language model of {parameters:,} parameters (width 256, 6 layers, 4 heads, 512 positions, tied
embeddings) with a byte-level BPE tokenizer of 4,096 tokens, stored in float16. It is there so that every command of
SheepRLHF runs offline on a CPU; it is not good at anything else.

## How it was made
By this framework, from random weights: `python sheeprlhf.py train experiment=pretrain_tiny data.train_file=<corpus>`,
all tokens trained on, rows packed. `python -m sheeprlhf.assets.build_docstrings --corpus <folder>` makes the corpus:
signatures with their docstrings, and short functions, of permissively licensed Python packages and the standard
library; none of the packages of the validation and test splits of `data=docstrings` is in it. Its sources are those
named in `../docstrings/NOTICE`.

| | |
| --- | --- |
| rows, tokens an epoch | {rows:,} rows, {epoch_tokens:,} response tokens |
| optimizer steps, rows a step | {steps:,}, {rows_per_step} |
| tokens trained on | {tokens:,} |
| learning rate | {lr}, cosine, {warmup} steps of warm-up |
| precision, device | {precision}, {accelerator} |

## Figures
| | |
| --- | --- |
| held-out perplexity of a token, all tokens, packages never trained on | {perplexity:.2f} |
| perplexity of a summary's token given its signature, test split of `data=docstrings` | {summary_perplexity:.2f} |

Training loss (nats a token):

| step | loss |
| --- | --- |
{curve}

What it wrote for three held-out prompts at the last step:

```
{samples}
```

## What it cannot do
It has seen nothing but Python docstrings and short functions. It knows no facts, writes no correct code, and repeats
itself. Text in other languages or domains is gibberish to it. Do not use it for anything but trying out SheepRLHF.
"""


def read_curve(metrics: Path, tag: str) -> list[tuple[int, float]]:
    """The (step, value) pairs of one tag of a run's metrics.csv."""
    with metrics.open(newline="") as file:
        return [(int(row["step"]), float(row["value"])) for row in csv.DictReader(file) if row["tag"] == tag]


def write_card(run: Path, summaries: dict[str, float], parameters: int) -> str:
    """The model card of a finished run, from its own records."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    report = json.loads((run / "data_report.json").read_text())["splits"]["train"]
    losses = read_curve(run / "metrics.csv", "train/loss")
    shown = losses[:: max(1, len(losses) // CURVE_POINTS)]
    state = json.loads((run / "checkpoints" / f"step-{losses[-1][0]}" / "state.json").read_text())
    samples = (run / "samples" / f"step-{losses[-1][0]}.txt").read_text().split("\n", 1)[1]
    return CARD.format(
        parameters=parameters,
        rows=report["kept"],
        epoch_tokens=report["trained_tokens"],
        steps=losses[-1][0],
        rows_per_step=config["task"]["mini_batch_size"],
        tokens=state["items_seen"],
        lr=config["optim"]["lr"],
        warmup=config["task"]["lr_warmup_steps"],
        precision=config["fabric"]["precision"],
        accelerator=config["fabric"]["accelerator"],
        perplexity=read_curve(run / "metrics.csv", "val/perplexity")[-1][1],
        summary_perplexity=summaries["perplexity"],
        curve="\n".join(f"| {step} | {loss:.3f} |" for step, loss in shown),
        samples=samples.strip(),
    )


def main() -> None:
    """Write model.safetensors, config.json and README.md of the embedded model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="directory of the finished run")
    parser.add_argument("--summaries", type=Path, required=True, help="JSON of eval task=perplexity on data=docstrings")
    parser.add_argument("--output", type=Path, required=True, help="folder of the embedded model")
    args = parser.parse_args()
    weights = load_file(args.run / "final" / "model.safetensors")
    half = {name: tensor.to(torch.float16).contiguous() for name, tensor in weights.items()}
    save_file(half, args.output / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((args.output / "config.json").read_text()) | {"dtype": "float16"}
    (args.output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    card = write_card(args.run, json.loads(args.summaries.read_text()), sum(t.numel() for t in half.values()))
    (args.output / "README.md").write_text(card)


if __name__ == "__main__":
    main()
